"""`mmsdk bench perturbation`: how a tokenizer's decoder takes wrong codes, as generators sample them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmsdk.bench.evaluator import frechet_distance
from mmsdk.bench.figures import labelled_rows
from mmsdk.bench.runner import BenchResult
from mmsdk.data.emoji import EmojiDataset
from mmsdk.loading import resolve
from mmsdk.training.tokenizer_recipes import psnr, to_float
from tokenizers_img.perturbation import LatentPerturbation


def perturbation(
    vq: str = "emoji-64",
    evaluator: str = "emoji-64",
    alphas: Sequence[float] = (0.1, 0.3, 0.5),
    deltas: Sequence[int] = (10, 100),
    split: str = "test",
    num_images: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    cache_dir: str | None = None,
    output_dir: Path | None = None,
) -> BenchResult:
    """Decode held-out images from perturbed codes, and measure how far they are from the originals.

    The mean of the perturbed Frechet distances is what the RobustTok paper calls pFID, on this package's own features.

    Args:
        vq: embedded name or folder of a VQ tokenizer.
        evaluator: embedded name or folder.
        alphas: shares of the codes that are replaced.
        deltas: how many of the nearest codes they are replaced by.
        split: whose images.
        num_images: the first so many; None for all.
        batch_size: images encoded at once.
        seed: of the perturbation.
        cache_dir: where the data set lies.
        output_dir: receives a sample sheet.
    """
    images = to_float(torch.from_numpy(EmojiDataset(split, cache_dir=cache_dir).images[:num_images]))
    tokenizer = resolve("vq").from_pretrained(vq).eval()
    judge = resolve("evaluator").from_pretrained(evaluator).eval()
    real = judge.features(images)
    settings: list[tuple[float, int]] = [(0.0, 1), *((alpha, delta) for delta in deltas for alpha in alphas)]
    rows: list[list[Any]] = []
    sheet = {"original": images[:12]}
    for alpha, delta in settings:
        chosen = LatentPerturbation(alpha, 1.0, delta)
        generator = torch.Generator().manual_seed(seed)
        parts = []
        with torch.no_grad():
            for batch in images.split(batch_size):
                latents = tokenizer.encode_latents(batch)
                token_ids = tokenizer.quantize.quantize(latents)
                draws = chosen.draw(token_ids.shape, generator)
                replaced = chosen.perturb(tokenizer.quantize, latents, token_ids, *draws)
                parts.append(tokenizer.decode_latents(tokenizer.quantize.dequantize(replaced)).clamp(0, 1))
        decoded = torch.cat(parts)
        sheet[f"{alpha:g} of {delta}"] = decoded[:12]
        distance = frechet_distance(real, judge.features(decoded))
        rows.append([alpha, delta, float(psnr(decoded, images).mean()), distance])
    mean = [sum(row[i] for row in rows[1:]) / (len(rows) - 1) for i in (2, 3)]
    rows.append(["mean", None, *mean])
    figures = [] if output_dir is None else [labelled_rows(sheet, output_dir / "perturbation.png")]
    return BenchResult(
        name="perturbation",
        columns=["alpha", "delta", "PSNR", "FD"],
        rows=rows,
        notes=[
            f"{len(images)} images of the split {split!r}; alpha: share of codes replaced by one of the delta nearest.",
            "FD: Frechet distance to the originals over EfficientNet-Lite0 features; mean: over the perturbed rows.",
        ],
        figures=figures,
    )
