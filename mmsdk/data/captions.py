"""The caption tokenizer: lower-case words, spelled out where they are unknown; in transformers' format."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

MAX_PROMPT_TOKENS = 16


def train_caption_tokenizer(
    captions: Iterable[str], vocab_size: int = 4096, max_length: int = MAX_PROMPT_TOKENS
) -> PreTrainedTokenizerFast:
    """Collect a WordPiece vocabulary from `captions`; the tokenizer pads on the left, as LlamaGen needs it.

    The vocabulary holds all letters and digits, then the most frequent words (ties in alphabetical order). It depends
    on the captions alone, which a trained vocabulary does not: a training that resumes must find the same ids.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    pad, unknown = "<pad>", "<unk>"
    normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[^a-z0-9#]+"), " "),
        ]
    )
    counts = Counter(word for caption in captions for word in normalizer.normalize_str(caption).split())
    characters = string.ascii_lowercase + string.digits + "#"
    pieces = [pad, unknown, *characters, *(f"##{c}" for c in characters)]
    words = sorted((w for w in counts if len(w) > 1), key=lambda word: (-counts[word], word))
    vocabulary = {piece: i for i, piece in enumerate((pieces + words)[:vocab_size])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=40))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unknown,
        padding_side="left",
        truncation_side="right",
        model_max_length=max_length,
    )
