"""DiSA on the embedded MAR: fewer diffusion steps as the generation goes on, and what that does to the pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from generators.annealing import StepAnnealing
from generators.base import Trace
from mmsdk.bench.figures import labelled_rows
from mmsdk.bench.prompts import STYLES, PromptSet, load_pipeline
from mmsdk.bench.runner import BenchResult

# What is compared, the first with all others.
SCHEDULES = {
    "constant 100": StepAnnealing(100, 100, "constant"),
    "constant 50": StepAnnealing(50, 50, "constant"),
    "DiSA linear 50 to 5": StepAnnealing(50, 5, "linear"),
    "DiSA cosine 50 to 5": StepAnnealing(50, 5, "cosine"),
    "DiSA two-stage 50 to 5": StepAnnealing(50, 5, "two-stage"),
    "constant 25": StepAnnealing(25, 25, "constant"),
}


def disa(
    model: str = "emoji-64-mar",
    num_iter: int | None = None,
    num_prompts: int = 200,
    split: str = "train",
    styles: Sequence[str] = STYLES,
    evaluator: str = "emoji-64",
    batch_size: int = 16,
    sheet_images: int = 12,
    seed: int = 0,
    cache_dir: str | None = None,
    output_dir: Path | None = None,
) -> BenchResult:
    """Draw the same prompts with different schedules of diffusion steps: time, in the head and in all, and quality.

    Args:
        model: embedded name or folder of a pipeline with a MAR.
        num_iter: steps of the generation; by default the pipeline's own.
        num_prompts: prompts.
        split: `train` (emoji seen in this style), `pair` (seen in other styles only), `test` (unseen emoji).
        styles: image sets to ask for.
        evaluator: embedded name or folder.
        batch_size: pictures drawn at once.
        sheet_images: columns of the sample sheet.
        seed: of all draws.
        cache_dir: where the data set lies.
        output_dir: receives the sample sheet.

    Raises:
        DataError: the data set has too few prompts.
    """
    pipeline = load_pipeline(model)
    prompts = PromptSet(split, [pipeline], num_prompts, styles, evaluator, seed=seed, cache_dir=cache_dir)
    settings: dict[str, Any] = {} if num_iter is None else {"num_iter": num_iter}
    table: list[list[Any]] = []
    sheet = {"real": prompts.images[:sheet_images]}
    pipeline(prompts.prompts[0], **settings)  # the first call is slower than others
    for name, annealing in SCHEDULES.items():
        with _head_time(pipeline.transformer.diffloss) as spent:
            images, seconds = prompts.draw(pipeline, batch_size, accelerator=annealing, **settings)
        single: Any = pipeline(prompts.prompts[0], accelerator=annealing, **settings)
        trace: Trace = single.trace
        quality = prompts.judge(images)
        ratios = [1.0, 1.0] if not table else [table[0][2] / spent[0], table[0][4] / seconds]
        table.append([name, sum(trace.head_steps), spent[0], ratios[0], seconds, ratios[1], *quality])
        sheet[name] = images[:sheet_images]
    figures = [labelled_rows(sheet, output_dir / "disa.png")] if output_dir is not None else []
    return BenchResult(
        "disa",
        ["schedule", "head steps", "head s", "head ratio", "s", "ratio", "top-1", "top-5", "FD"],
        table,
        [
            prompts.note,
            f"{len(trace.head_steps)} steps of the generation, in batches of {batch_size}, decoding included.",
            "Head steps: executed for one picture. Timesteps above 950 become 950 and are run once, as published.",
        ],
        figures,
    )


@contextmanager
def _head_time(head: Any) -> Iterator[list[float]]:
    """Add up the seconds that a head samples within a block."""
    spent, sample = [0.0], head.sample

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = sample(*args, **kwargs)
        spent[0] += time.perf_counter() - started
        return result

    head.sample = timed
    try:
        yield spent
    finally:
        del head.sample
