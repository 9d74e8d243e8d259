"""What each further token of a generator over ordered tokens is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmsdk.bench.figures import labelled_rows, line_plot
from mmsdk.bench.prompts import STYLES, PromptSet, load_pipeline
from mmsdk.bench.runner import BenchResult


def prefix(
    models: Sequence[str] = ("emoji-64-flextok-ar", "emoji-64-1d"),
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32),
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
    """Stop generators after some of their tokens and measure the pictures.

    Args:
        models: embedded names or folders of text-conditional pipelines over ordered tokens.
        counts: numbers of tokens; those above a model's own are left out.
        num_prompts: prompts.
        split: `train` (emoji seen in this style), `pair` (seen in other styles only), `test` (unseen emoji).
        styles: image sets to ask for.
        evaluator: embedded name or folder.
        batch_size: pictures drawn at once.
        sheet_images: columns of the sample sheets.
        seed: of all draws.
        cache_dir: where the data set lies.
        output_dir: receives the plots and a sheet for each model.

    Raises:
        DataError: the data set has too few prompts.
        ValueError: the tokens of a model are not ordered.
    """
    pipelines = {name: load_pipeline(name) for name in models}
    for name, pipeline in pipelines.items():
        if not pipeline.image_tokenizer.ordered:
            raise ValueError(
                f"{name!r} writes tokens of {type(pipeline.image_tokenizer).__name__}, which are not ordered; pass "
                "pipelines over One-D-Piece or FlexTok tokens."
            )
    prompts = PromptSet(split, list(pipelines.values()), num_prompts, styles, evaluator, seed=seed, cache_dir=cache_dir)
    real = prompts.judge(prompts.images)
    table: list[list[Any]] = [["real images", None, None, *real]]
    plots: dict[str, dict[str, tuple[list[float], list[float]]]] = {"top-5": {}, "FD": {}}
    figures: list[Path] = []
    for name, pipeline in pipelines.items():
        sheet = {"real": prompts.images[:sheet_images]}
        wanted = [count for count in counts if count <= pipeline.transformer.config.max_tokens]
        measured = []
        for count in wanted:
            images, seconds = prompts.draw(pipeline, batch_size, num_tokens=count)
            measured.append(prompts.judge(images))
            table.append([name, count, seconds / len(images), *measured[-1]])
            sheet[str(count)] = images[:sheet_images]
        plots["top-5"][name] = (list(wanted), [quality.top5 for quality in measured])
        plots["FD"][name] = (list(wanted), [quality.distance for quality in measured])
        if output_dir is not None:
            figures.append(labelled_rows(sheet, output_dir / f"prefix-{Path(name).name}.png"))
    if output_dir is not None:
        for label, series in plots.items():
            title = f"{num_prompts} prompts of the split {split!r}"
            path = output_dir / f"prefix-{label.lower()}.png"
            figures.append(line_plot(series, path, "tokens generated", label, title, log2_x=True))
    return BenchResult(
        "prefix",
        ["model", "tokens", "s/image", "top-1", "top-5", "FD"],
        table,
        [prompts.note],
        figures,
    )
