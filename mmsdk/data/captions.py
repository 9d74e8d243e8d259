"""The caption tokenizer: lower-case words, split into pieces where they are rare; in transformers' format."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

MAX_PROMPT_TOKENS = 16


def train_caption_tokenizer(
    captions: Iterable[str], vocab_size: int = 4096, max_length: int = MAX_PROMPT_TOKENS
) -> PreTrainedTokenizerFast:
    """Learn a WordPiece vocabulary from `captions`; the tokenizer pads on the left, as LlamaGen needs it."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    pad, unknown = "<pad>", "<unk>"
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown, max_input_chars_per_word=40))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[^a-z0-9#]+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[pad, unknown],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789"),
    )
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unknown,
        padding_side="left",
        truncation_side="right",
        model_max_length=max_length,
    )
