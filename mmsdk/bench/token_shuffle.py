"""Token-Shuffle at several window sizes, over the same transformer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from generators.token_shuffle import TokenShuffle
from mmsdk.bench.measure import interleaved
from mmsdk.bench.prompts import STYLES, PromptSet, load_pipeline
from mmsdk.bench.runner import BenchResult

SHORT_SIZE: dict[str, Any] = {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "multiple_of": 64}


def token_shuffle(
    preset: str | None = None,
    grid: int = 16,
    shuffle_sizes: Sequence[int] = (1, 2, 4),
    batch_size: int = 1,
    guidance_scale: float = 2.0,
    repeats: int = 3,
    models: Sequence[str] = (),
    num_prompts: int = 200,
    styles: Sequence[str] = STYLES,
    evaluator: str = "emoji-64",
    seed: int = 0,
    cache_dir: str | None = None,
    output_dir: Path | None = None,
) -> BenchResult:
    """Time the generation of a grid of tokens with windows of several sizes, and judge trained pipelines beside it.

    Args:
        preset: a published size of LlamaGen for the transformer; by default a small one.
        grid: tokens along each side.
        shuffle_sizes: tokens along each side of a window, the first compared with the others; 1 is LlamaGen.
        batch_size: images at once.
        guidance_scale: of the timed generations.
        repeats: runs of each side, in turn; the median counts.
        models: embedded names or folders of text-conditional pipelines to judge.
        num_prompts: prompts for these, of the training split.
        styles: image sets to ask for.
        evaluator: embedded name or folder.
        seed: of weights and draws.
        cache_dir: where the data set lies.
        output_dir: not used; there is nothing to draw.
    """
    sizes = SHORT_SIZE if preset is None else TokenShuffle.preset_config(preset)
    transformers = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for size in shuffle_sizes:
            model = TokenShuffle(**sizes | {"max_tokens": grid**2}, shuffle_size=size).eval()
            torch.nn.init.normal_(model.output.weight, std=0.05)  # zeros would make all tokens equally probable
            transformers.append(model)
    generator = torch.Generator().manual_seed(seed)
    labels = list(range(batch_size))
    sides = [partial(m.generate, labels, guidance_scale=guidance_scale, generator=generator) for m in transformers]
    traces = [side().trace for side in sides]
    seconds = [statistics.median(times) for times in interleaved(sides, repeats)]
    table: list[list[Any]] = []
    for size, model, trace, taken in zip(shuffle_sizes, transformers, traces, seconds, strict=True):
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        table.append([f"s = {size}", parameters, trace.forwards, taken, seconds[0] / taken, None, None])
    notes = [
        f"{'Preset ' + preset if preset else 'Small size'}, random weights, {grid} x {grid} tokens, batch "
        f"{batch_size}, guidance {guidance_scale:g}, float32, median of {repeats}."
    ]
    pipelines = {name: load_pipeline(name) for name in models}
    if pipelines:
        prompts = PromptSet(
            "train", [*pipelines.values()], num_prompts, styles, evaluator, seed=seed, cache_dir=cache_dir
        )
        for name, pipeline in pipelines.items():
            images, taken = prompts.draw(pipeline)
            quality = prompts.judge(images)
            single: Any = pipeline(prompts.prompts[0])
            parameters = sum(p.numel() for p in pipeline.transformer.parameters()) / 1e6
            table.append(
                [name, parameters, single.trace.forwards, taken / num_prompts, None, quality.top1, quality.distance]
            )
        notes.append(prompts.note + " Seconds of trained models: per image, in batches of 16, decoding included.")
    return BenchResult("token-shuffle", ["windows", "M params", "forwards", "s", "ratio", "top-1", "FD"], table, notes)
