"""Recipes of the embedded text-to-image generators."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from generators.llamagen import LlamaGen
from mmsdk.data.captions import MAX_PROMPT_TOKENS, train_caption_tokenizer
from mmsdk.data.emoji import STYLES, EmojiDataset, EmojiRecord, caption_of
from mmsdk.images import image_grid, tensor_to_pil
from mmsdk.training.loop import Recipe, TrainingConfig
from tokenizers_img.base import ImageTokenizer
from tokenizers_img.one_d_piece import OneDPiece
from tokenizers_img.vq import VQ

# Drawn often enough to be learned well, with a share of everything else: prompts that people type.
SAMPLE_PROMPTS = (
    "red heart", "pizza", "cat face", "green apple", "dog face", "sun", "rainbow", "star", "rocket", "fire",
    "smiling face with sunglasses", "crying face", "strawberry", "soccer ball", "house", "red car", "tree", "fish",
    "blue heart", "hamburger", "pizza, twemoji", "cat face, noto", "red heart, fluent flat", "penguin",
)  # fmt: skip
_GROUP_WEIGHTS = {"flags": 0.25, "symbols": 0.7}


def sampling_weights(records: list[EmojiRecord]) -> np.ndarray:
    """Return how often each image is drawn: flags less, and the many variants of one person share their weight."""
    variants = Counter((r.base, r.style) for r in records)
    weights = np.array([_GROUP_WEIGHTS.get(r.group, 1.0) * variants[r.base, r.style] ** -0.7 for r in records])
    return np.cumsum(weights / weights.sum())


class TextToImageModule(nn.Module):
    """A text encoder and the transformer that it conditions, trained together."""

    def __init__(self, transformer: LlamaGen, text_encoder: T5EncoderModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode prompts `(batch, length)` to features `(batch, length, dim)`."""
        return self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def tiny_text_encoder(vocab_size: int, dim: int = 192, num_layers: int = 2) -> T5EncoderModel:
    """Build the embedded text encoder: T5's architecture at a tiny size, without dropout."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=dim,
        d_kv=dim // 4,
        num_heads=4,
        d_ff=2 * dim,
        num_layers=num_layers,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
    )
    return T5EncoderModel(config)


class TextToImageRecipe(Recipe):
    """Text-conditional LlamaGen over the tokens of an embedded tokenizer, with its text encoder.

    Args:
        config: shared hyper-parameters.
        tokenizer_source: folder or embedded name of the image tokenizer.
        caption_tokenizer: folder of a saved caption tokenizer, to go on from a run that had another vocabulary; by
            default the vocabulary of the captions.

    Attributes:
        default_steps: steps of the embedded model.
        tokenizer_class: class of the image tokenizer.
        num_tokens: tokens to learn (a prefix, for ordered tokenizers); None for all.
        styles: image sets to learn; fewer are learned better in the same time.
        condition_dropout: share of captions that are dropped, for guidance.
        plain_captions: share of captions that are just "label, style", what people type most.
    """

    default_steps: int
    tokenizer_class: type[ImageTokenizer]
    num_tokens: int | None = None
    styles: tuple[str, ...] = ("noto", "twemoji", "fluent flat")
    condition_dropout = 0.1
    plain_captions = 0.5
    shape = {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "multiple_of": 64}

    def __init__(
        self,
        config: TrainingConfig | None = None,
        tokenizer_source: str | Path = "emoji-64",
        caption_tokenizer: str | Path | None = None,
    ) -> None:
        self.tokenizer_source = tokenizer_source
        self.caption_tokenizer_source = caption_tokenizer
        self.config = config or TrainingConfig(
            steps=self.default_steps,
            batch_size=32,
            learning_rate=1.5e-3,
            muon_learning_rate=2e-3,
            weight_decay=0.02,
            warmup_steps=100,
            decay_fraction=0.35,
            ema_decay=0.998,
            mixed_precision="bf16",
            checkpoint_every=400,
            evaluate_every=800,
        )

    def setup(self) -> nn.Module:
        """Tokenize the images, learn the caption vocabulary, build the models."""
        self.image_tokenizer = self.tokenizer_class.from_pretrained(self.tokenizer_source).eval()
        train, pair = EmojiDataset("train", self.styles), EmojiDataset("pair", self.styles)
        self.records, self.pair_records = train.records, pair.records
        self.token_ids = self._tokenize(train.images)
        self.pair_token_ids = self._tokenize(pair.images)
        self.cumulative = sampling_weights(self.records)
        texts = [" ".join((r.label, *r.tags)) for r in self.records] + list(STYLES) * 200
        self.caption_tokenizer: PreTrainedTokenizerFast = (
            train_caption_tokenizer(texts)
            if self.caption_tokenizer_source is None
            else PreTrainedTokenizerFast.from_pretrained(self.caption_tokenizer_source)
        )
        text_encoder = tiny_text_encoder(len(self.caption_tokenizer))
        transformer = LlamaGen(
            **self.shape,
            codebook_size=self.image_tokenizer.codebook_sizes[0],
            max_tokens=self.token_ids.shape[1],
            condition="text",
            num_classes=None,
            caption_dim=text_encoder.config.d_model,
            num_condition_tokens=MAX_PROMPT_TOKENS,
            positions="learned",
            token_dropout=0.0,
            residual_dropout=0.0,
            feed_forward_dropout=0.0,
        )
        return TextToImageModule(transformer, text_encoder)

    def _tokenize(self, images: np.ndarray) -> Tensor:
        parts = [
            self.image_tokenizer.encode(torch.from_numpy(images[i : i + 64]).permute(0, 3, 1, 2)).token_ids
            for i in range(0, len(images), 64)
        ]
        return torch.cat(parts)[:, : self.num_tokens]

    def muon_parameters(self, module: Any) -> list[nn.Parameter]:
        """Return the hidden matrices of the transformer and of the text encoder, which learns much faster so."""
        hidden = (module.transformer.layers, module.transformer.cls_embedding, module.text_encoder.encoder.block)
        return [
            p
            for part in hidden
            for name, p in part.named_parameters()
            if p.ndim == 2 and "relative_attention_bias" not in name
        ]

    def _captions(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(
            self.caption_tokenizer(
                texts,
                padding="max_length",
                truncation=True,
                max_length=MAX_PROMPT_TOKENS,
                return_tensors="pt",
                return_token_type_ids=False,
            )
        )

    def batch(self, step: int, rng: random.Random) -> dict[str, Tensor]:
        """Return tokens, a caption of each image, which captions to drop, and the input tokens.

        A small model soon recognises an image by its first tokens and recites the rest without reading the caption.
        Up to 80% of the input tokens of four images in five therefore come from another image of the batch, so that
        only the caption tells what comes next. It also prepares for the errors of sampling.
        """
        draws = [rng.random() for _ in range(self.config.batch_size)]
        rows = np.searchsorted(self.cumulative, draws).clip(max=len(self.records) - 1)
        captions = self._captions(
            [caption_of(self.records[i], None if rng.random() < self.plain_captions else rng) for i in rows]
        )
        drop = torch.tensor([rng.random() < self.condition_dropout for _ in rows])
        token_ids = self.token_ids[torch.from_numpy(rows)]
        rates = [rng.uniform(0.0, 0.8) if rng.random() < 0.8 else 0.0 for _ in rows]
        wrong = torch.tensor([[rng.random() < rate for _ in range(token_ids.shape[1])] for rate in rates])
        inputs = torch.where(wrong, token_ids.roll(1, 0), token_ids)
        return {"token_ids": token_ids, "inputs": inputs, "drop_condition": drop, **captions}

    def loss(self, module: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross entropy of the tokens."""
        features = module.features(batch["input_ids"], batch["attention_mask"])
        output = module.transformer(
            batch["inputs"],
            caption_features=features,
            caption_mask=batch["attention_mask"],
            drop_condition=batch["drop_condition"],
            labels=batch["token_ids"],
        )
        return output.loss, {}

    def evaluate(self, module: Any, folder: Path) -> dict[str, float]:
        """Cross entropy on unseen emoji x style pairs, and a sheet of samples."""
        losses = []
        for i in range(0, min(256, len(self.pair_records)), 64):
            captions = self._captions([caption_of(r) for r in self.pair_records[i : i + 64]])
            ids = self.pair_token_ids[i : i + 64]
            features = module.features(captions["input_ids"], captions["attention_mask"])
            output = module.transformer(
                ids, caption_features=features, caption_mask=captions["attention_mask"], labels=ids
            )
            losses.append(output.loss)
        prompts = [p for p in SAMPLE_PROMPTS for _ in range(2)]
        captions = self._captions(prompts)
        ids = module.transformer.generate(
            caption_features=module.features(captions["input_ids"], captions["attention_mask"]),
            caption_mask=captions["attention_mask"],
            guidance_scale=3.0,
            top_k=100,
            generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        ).token_ids
        images = self.decode(ids)
        sheet = image_grid(tensor_to_pil(F.interpolate(images, scale_factor=2)), columns=12)
        sheet.save(folder / "samples.png")
        return {"pair_loss": float(torch.stack(losses).mean())}

    def decode(self, token_ids: Tensor) -> Tensor:
        """Decode generated tokens to images."""
        from mmsdk.tokens import ImageTokens

        return self.image_tokenizer.decode(
            ImageTokens(token_ids=token_ids, spec=self.image_tokenizer.token_spec())
        ).images

    def save(self, module: Any, folder: Path) -> None:
        """Write a pipeline folder."""
        from generators.pipelines import ARImagePipeline

        ARImagePipeline(
            transformer=module.transformer,
            image_tokenizer=self.image_tokenizer,
            text_encoder=module.text_encoder,
            tokenizer=self.caption_tokenizer,
        ).save_pretrained(folder)


class LlamaGenRecipe(TextToImageRecipe):
    """LlamaGen over the 8 x 8 grid tokens."""

    name = "llamagen"
    default_steps = 5600
    tokenizer_class = VQ


class LlamaGen1DRecipe(TextToImageRecipe):
    """LlamaGen over the first half of the One-D-Piece tokens: it can stop after any number of them."""

    name = "llamagen_1d"
    default_steps = 8500
    tokenizer_class = OneDPiece
    num_tokens = 32
