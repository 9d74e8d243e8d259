"""How much of held-out images survives k tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsdk.bench.evaluator import evaluation_prompt, frechet_distance
from mmsdk.bench.figures import labelled_rows, line_plot
from mmsdk.bench.runner import BenchResult
from mmsdk.data.emoji import EmojiDataset
from mmsdk.loading import resolve
from mmsdk.training.tokenizer_recipes import psnr
from tokenizers_img.base import ImageTokenizer

COUNTS = (1, 2, 4, 8, 16, 32, 64)


def reconstruction(
    one_d_piece: str | None = "emoji-64",
    flextok: str | None = "emoji-64",
    vq: str | None = "emoji-64",
    evaluator: str | None = "emoji-64",
    counts: Sequence[int] = COUNTS,
    num_images: int | None = None,
    split: str = "test",
    candidates: int = 100,
    batch_size: int = 64,
    seed: int = 0,
    sheet_images: int = 12,
    cache_dir: str | None = None,
    output_dir: Path | None = None,
) -> BenchResult:
    """Measure PSNR, retrieval and Frechet distance of reconstructions of emoji that no training saw.

    Args:
        one_d_piece: embedded name or folder of an ordered tokenizer; None leaves it out.
        flextok: the same of one whose decoder draws what the tokens leave open.
        vq: embedded name or folder of a grid tokenizer; None leaves it out.
        evaluator: embedded name or folder; None measures PSNR only.
        counts: numbers of tokens; those above the tokenizer's own are left out.
        num_images: measure so many of the split, drawn with `seed`; None for all.
        split: `test` (unseen emoji), `pair` or `train`.
        candidates: prompts to retrieve from, at most as many as there are different ones.
        batch_size: images encoded at once.
        seed: of all draws.
        sheet_images: columns of the sample sheet.
        cache_dir: where the data set lies.
        output_dir: receives the plot and the sheet.
    """
    data = EmojiDataset(split, cache_dir=cache_dir)
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:num_images].sort().values
    images = torch.from_numpy(data.images)[rows].permute(0, 3, 1, 2).float() / 255
    prompts = [evaluation_prompt(data.records[i]) for i in rows.tolist()]
    judge = resolve("evaluator").from_pretrained(evaluator).eval() if evaluator is not None else None
    most = min(candidates, len(set(prompts)))
    real_features = judge.features(images) if judge is not None else None

    def judged(decoded: Tensor | None) -> list[Any]:
        if judge is None or real_features is None:
            return [None, None, None]
        features = real_features if decoded is None else judge.features(decoded)
        found = judge.retrieval_of_features(features, prompts, most, seed)
        return [found.top1, found.top5, frechet_distance(real_features, features)]

    table: list[list[Any]] = [["real images", None, None, None, *judged(None)]]
    shown = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + 1))[:sheet_images]
    sheet = {"original": images[shown]}
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    distances: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
    notes = [
        f"{len(images)} images of the split {split!r}; PSNR is the mean over images, of 8-bit pixels.",
        f"Retrieval of `label, style` among {most} prompts (chance {1 / most:.3f}); FD: Frechet distance to the real "
        "images over EfficientNet-Lite0 features. Both compare within this table only.",
    ]
    for name, source in (("one_d_piece", one_d_piece), ("flextok", flextok), ("vq", vq)):
        if source is None:
            continue
        tokenizer: ImageTokenizer = resolve(name).from_pretrained(source).eval()
        wanted = [k for k in counts if k <= tokenizer.max_tokens] if tokenizer.ordered else [tokenizer.max_tokens]
        scores, measured = {}, {}
        for count, (decoded, quality, size) in _reconstruct(tokenizer, images, wanted, batch_size, seed).items():
            table.append([name, count, size, quality, *judged(decoded)])
            scores[count], measured[count] = quality, table[-1][-1]
            sheet[f"{name} {count}"] = decoded[shown]
        label = f"{name}, any prefix" if tokenizer.ordered else f"{name}, grid of {tokenizer.max_tokens}"
        series[label] = (list(scores), list(scores.values()))
        distances[label] = (list(measured), list(measured.values()))
    figures = []
    if output_dir is not None:
        figures = [
            line_plot(
                series,
                output_dir / "reconstruction.png",
                "tokens",
                "PSNR in dB",
                f"Reconstruction of {len(images)} images of the split {split!r}",
                log2_x=True,
            ),
            labelled_rows(sheet, output_dir / "reconstruction-samples.png"),
        ]
        if judge is not None:
            figures.append(
                line_plot(
                    distances,
                    output_dir / "reconstruction-fd.png",
                    "tokens",
                    "Frechet distance to the real images",
                    f"Reconstruction of {len(images)} images of the split {split!r}",
                    log2_x=True,
                )
            )
    columns = ["images", "tokens", "bits", "PSNR", "top-1", "top-5", "FD"]
    return BenchResult("reconstruction", columns, table, notes, figures)


def _reconstruct(
    tokenizer: ImageTokenizer, images: Tensor, counts: Sequence[int], batch_size: int, seed: int
) -> dict[int, tuple[Tensor, float, int]]:
    """Return images, mean PSNR and bits of the tokens of an image for each count; every image is encoded once."""
    decoded: dict[int, list[Tensor]] = {count: [] for count in counts}
    quality: dict[int, list[Tensor]] = {count: [] for count in counts}
    bits = {}
    for first in range(0, len(images), batch_size):
        batch = images[first : first + batch_size]
        reference = tokenizer.preprocess(batch)
        tokens = tokenizer.encode(reference)
        for count in counts:
            kept = tokens.truncate(count) if tokenizer.ordered else tokens
            bits[count] = int(kept.num_bits[0])
            # Generative decoders draw what the tokens leave open, for each image anew.
            generator = torch.Generator().manual_seed(seed + first)
            decoded[count].append(tokenizer.decode(kept, generator).images.cpu())
            quality[count].append(psnr(decoded[count][-1], reference.cpu()))
    return {k: (torch.cat(decoded[k]), float(torch.cat(quality[k]).mean()), bits[k]) for k in counts}
