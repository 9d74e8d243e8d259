"""`mmsdk bench entropy`: how many bits a token takes when a generator predicts it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mmsdk.bench.runner import BenchResult
from mmsdk.data.emoji import SPLITS, EmojiDataset
from mmsdk.entropy import EntropyModel, cross_entropy
from mmsdk.loading import resolve
from mmsdk.tokens import ImageTokens
from tokenizers_img.base import ImageTokenizer

# Generator -> the tokenizer whose tokens it knows.
GENERATORS = {"emoji-64-1d": "one_d_piece", "emoji-64": "vq"}


def entropy(
    splits: Sequence[str] = SPLITS[::-1],
    num_images: int = 500,
    temperature: float = 1.6,
    output_dir: Path | None = None,
) -> BenchResult:
    """Code the tokens of images with the embedded generators, read them back, and count the bits.

    Args:
        splits: whose images; the generators and tokenizers have seen `train` alone.
        num_images: the first so many of each split; by default all of `test` and `pair`.
        temperature: of the generators, which knew no caption.
        output_dir: unused; this benchmark draws nothing.

    Raises:
        RuntimeError: a stream came back as other tokens.
    """
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"splits are among {list(SPLITS)}, received {split!r}.")
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, received {num_images}.")
    images = {split: torch.from_numpy(EmojiDataset(split).images[:num_images]).permute(0, 3, 1, 2) for split in splits}
    rows: list[list[Any]] = []
    for name, component in GENERATORS.items():
        tokenizer = resolve(component).from_pretrained("emoji-64").eval()
        model = resolve("llamagen_entropy")(resolve("llamagen").from_pretrained(name), temperature)
        rows += [[split, name, *_coded(tokenizer, model, images[split])] for split in splits]
    return BenchResult(
        name="entropy",
        columns=[
            "split",
            "generator",
            "tokens",
            "images",
            "bits",
            "ideal",
            "coded bits",
            "saved %",
            "bytes",
            "coded bytes",
            "alone",
            "images/s",
        ],
        rows=rows,
        notes=[
            "bits: per token, tightly packed; ideal: cross entropy of the generator; coded bits: all that coding adds",
            "to one stream of all images included. bytes: per image of that stream, header included; alone: mean of",
            "streams of one image each (the first 64), which are packed tightly where that is smaller.",
            f"{sum(row[3] for row in rows)} images in all; every stream was read back and gave the same tokens.",
        ],
    )


def _coded(tokenizer: ImageTokenizer, model: EntropyModel, images: Tensor) -> list[Any]:
    """Return the cells of one row, from `tokens` on."""
    count = model.max_tokens if tokenizer.ordered else None
    tokens = ImageTokens.cat([tokenizer.encode(part, count) for part in images.split(64)])
    ids = cast(Tensor, tokens.token_ids).numpy()
    ideal = cross_entropy(ids, tokens.lengths.numpy(), model)
    tight = tokens.to_bytes()
    started = time.perf_counter()
    coded = tokens.to_bytes(model)
    seconds = time.perf_counter() - started
    if not ImageTokens.from_bytes(coded, entropy_model=model).equal(tokens):
        raise RuntimeError(f"The coded tokens of {len(images)} images came back as others.")
    total = int(tokens.lengths.sum())
    packed = int(tokens.num_bits.sum()) / total
    spent = packed - 8 * (len(tight) - len(coded)) / total
    singles = [len(image.to_bytes(model)) for image in tokens[:64]]
    return [
        total // len(images),
        len(images),
        packed,
        ideal,
        spent,
        100 * (1 - spent / packed),
        len(tight) / len(images),
        len(coded) / len(images),
        sum(singles) / len(singles),
        len(images) / seconds,
    ]
