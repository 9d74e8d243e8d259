"""Every embedded generator on the same prompts and seeds: what a picture costs, and what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmsdk.bench.figures import labelled_rows
from mmsdk.bench.prompts import STYLES, PromptSet, load_pipeline
from mmsdk.bench.runner import BenchResult

EMBEDDED = (
    "emoji-64",
    "emoji-64-1d",
    "emoji-64-mar",
    "emoji-64-tokenbridge-ar",
    "emoji-64-flextok-ar",
    "emoji-64-token-shuffle",
)


def generators(
    models: Sequence[str] = EMBEDDED,
    num_prompts: int = 200,
    split: str = "train",
    styles: Sequence[str] = STYLES,
    preset: str = "default",
    evaluator: str = "emoji-64",
    batch_size: int = 16,
    sheet_images: int = 12,
    seed: int = 0,
    cache_dir: str | None = None,
    output_dir: Path | None = None,
) -> BenchResult:
    """Draw the same prompts with every generator; count what a picture takes and measure what it shows.

    Args:
        models: embedded names or folders of text-conditional pipelines.
        num_prompts: prompts.
        split: `train` (emoji seen in this style), `pair` (seen in other styles only), `test` (unseen emoji).
        styles: image sets to ask for.
        preset: saved settings of each pipeline.
        evaluator: embedded name or folder.
        batch_size: pictures drawn at once.
        sheet_images: columns of the sample sheet.
        seed: of all draws.
        cache_dir: where the data set lies.
        output_dir: receives the sample sheet.

    Raises:
        DataError: the data set has too few prompts.
    """
    pipelines = {name: load_pipeline(name) for name in models}
    prompts = PromptSet(split, list(pipelines.values()), num_prompts, styles, evaluator, seed=seed, cache_dir=cache_dir)
    real = prompts.judge(prompts.images)
    table: list[list[Any]] = [["real images", *[None] * 5, real.top1, real.top5, None, real.distance]]
    sheet = {"real": prompts.images[:sheet_images]}
    for name, pipeline in pipelines.items():
        with FlopCounterMode(display=False) as counter:
            single: Any = pipeline(prompts.prompts[0], preset=preset, generator=torch.Generator().manual_seed(seed))
        images, seconds = prompts.draw(pipeline, batch_size, preset=preset)
        drawn = prompts.judge(images)
        ceiling = prompts.judge(prompts.reconstruct(pipeline, batch_size)).top1
        sheet[Path(name).name] = images[:sheet_images]
        parameters = sum(p.numel() for p in pipeline.transformer.parameters()) / 1e6
        row = [name, parameters, _tokens(pipeline), single.trace.forwards, counter.get_total_flops() / 1e9]
        row += [seconds / len(images), drawn.top1, drawn.top5, drawn.top1 / ceiling if ceiling else None]
        table.append([*row, drawn.distance])
    figures = [labelled_rows(sheet, output_dir / "generators.png")] if output_dir is not None else []
    return BenchResult(
        "generators",
        ["model", "M params", "tokens", "forwards", "GFLOP", "s/image", "top-1", "top-5", "of recon.", "FD"],
        table,
        [
            prompts.note + f" Preset {preset!r}.",
            "Forwards of the transformer and GFLOP (multiplications and additions, decoding included) of one picture.",
            f"s/image: drawing in batches of {batch_size}, decoding included.",
            "of recon.: top-1 as a share of what the tokenizer's reconstructions of the real images reach.",
        ],
        figures,
    )


def _tokens(pipeline: Any) -> int:
    """Return how many tokens the transformer writes for an image."""
    transformer = pipeline.transformer
    return getattr(transformer, "num_tokens", None) or transformer.config.max_tokens
