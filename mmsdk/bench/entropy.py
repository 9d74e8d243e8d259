"""`mmsdk bench entropy`: how many bits a token takes when a generator predicts it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmsdk.bench.runner import BenchResult
from mmsdk.data.emoji import SPLITS, EmojiDataset
from mmsdk.loading import resolve
from mmsdk.tokens import ImageTokens

# Generator -> the tokenizer whose tokens it knows.
GENERATORS = {"emoji-64-1d": "one_d_piece", "emoji-64": "vq"}


def entropy(
    splits: Sequence[str] = ("test", "pair"),
    num_images: int | None = None,
    temperature: float = 1.6,
    output_dir: Path | None = None,
) -> BenchResult:
    """Code the tokens of unseen images with the embedded generators, read them back, and count the bits.

    Args:
        splits: whose images; the generators and tokenizers have seen `train` alone.
        num_images: of each split; all by default.
        temperature: of the generators, which knew no caption.
        output_dir: unused; this benchmark draws nothing.

    Raises:
        RuntimeError: a stream came back as other tokens.
    """
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"splits are among {list(SPLITS)}, received {split!r}.")
    images = np.concatenate([EmojiDataset(split).images[:num_images] for split in splits])
    rows: list[list[Any]] = []
    for name, component in GENERATORS.items():
        tokenizer = resolve(component).from_pretrained("emoji-64").eval()
        model = resolve("llamagen_entropy")(resolve("llamagen").from_pretrained(name), temperature)
        parts = [
            tokenizer.encode(
                torch.from_numpy(images[i : i + 64]).permute(0, 3, 1, 2),
                model.max_tokens if tokenizer.ordered else None,
            )
            for i in range(0, len(images), 64)
        ]
        tokens = ImageTokens.cat(parts)
        tight = tokens.to_bytes()
        started = time.perf_counter()
        coded = tokens.to_bytes(model)
        seconds = time.perf_counter() - started
        if not ImageTokens.from_bytes(coded, entropy_model=model).equal(tokens):
            raise RuntimeError(f"{name}: the coded tokens of {len(images)} images came back as others.")
        count = int(tokens.lengths.sum())
        packed = int(tokens.num_bits.sum()) / count
        spent = packed - 8 * (len(tight) - len(coded)) / count
        singles = [image.to_bytes(model) for image in tokens[:64]]
        rows.append(
            [
                f"{component}, {count // len(images)} tokens",
                name,
                len(images),
                packed,
                spent,
                100 * (1 - spent / packed),
                len(tight) / len(images),
                len(coded) / len(images),
                sum(map(len, singles)) / len(singles),
                len(images) / seconds,
            ]
        )
    return BenchResult(
        name="entropy",
        columns=[
            "tokens",
            "generator",
            "images",
            "bits",
            "coded bits",
            "saved %",
            "bytes",
            "coded bytes",
            "alone",
            "images/s",
        ],
        rows=rows,
        notes=[
            "bits: per token, tightly packed, and coded with everything that coding adds to a stream.",
            "bytes: per image of one stream of all, header included; alone: mean of streams of one image each (the",
            "first 64), which fall back to tight packing where that is smaller.",
            f"Every stream was read back and gave the same tokens. Images: {' and '.join(splits)} splits.",
        ],
    )
