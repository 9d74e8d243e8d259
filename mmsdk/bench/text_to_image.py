"""Whether pictures show what their prompts ask for, beside what the evaluator makes of real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmsdk.bench.figures import captioned_sheet
from mmsdk.bench.prompts import STYLES, PromptSet, load_pipeline
from mmsdk.bench.runner import BenchResult
from mmsdk.tokens import write_atomically

_SPLIT_NAMES = {"train": "seen", "pair": "unseen pairs", "test": "unseen emoji"}
_FIRST_SHEET = 48


def text_to_image(
    model: str | Sequence[str] = "emoji-64",
    num_prompts: int = 200,
    styles: Sequence[str] = STYLES,
    splits: Sequence[str] = ("train", "pair"),
    evaluator: str = "emoji-64",
    candidates: int = 100,
    reference_images: int = 1000,
    batch_size: int = 16,
    seed: int = 0,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    num_tokens: int | None = None,
    cache_dir: str | None = None,
    output_dir: Path | None = None,
) -> BenchResult:
    """Draw one picture for each of many prompts and let the evaluator retrieve the prompt from the picture.

    Args:
        model: embedded name or folder of a pipeline, or several; all get the same prompts and seeds.
        num_prompts: prompts for each split.
        styles: image sets to ask for: those that the generators were trained on.
        splits: `train` (emoji seen in this style), `pair` (seen in other styles only), `test` (unseen emoji).
        evaluator: embedded name or folder.
        candidates: prompts to retrieve from, at most as many as there are different ones.
        reference_images: other training images of these styles, which Frechet distances are measured to.
        batch_size: pictures drawn at once.
        seed: of the choice of prompts and candidates; picture i is drawn with `seed + i`.
        guidance_scale: default: the pipeline's own, as for the other sampling settings.
        temperature: see there.
        top_k: see there.
        top_p: see there.
        num_tokens: tokens of each picture; default: all.
        cache_dir: where the data set lies.
        output_dir: receives a sheet of samples and the list of prompts for each model and split.

    Raises:
        DataError: the data set has too few prompts.
    """
    names = [model] if isinstance(model, str) else list(model)
    pipelines = {name: load_pipeline(name) for name in names}
    settings = {
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_tokens": num_tokens,
    }
    table: list[list[Any]] = []
    figures: list[Path] = []
    skipped = 0
    used: list[int] = []
    for split in splits:
        prompts = PromptSet(
            split, list(pipelines.values()), num_prompts, styles, evaluator, candidates, reference_images, seed,
            cache_dir, used,
        )  # fmt: skip
        skipped += prompts.too_long
        if split == "train":
            used += prompts.rows

        def row(label: str, images: Tensor, split: str = split, prompts: PromptSet = prompts) -> list[Any]:
            top1, top5, distance = prompts.judge(images)
            return [_SPLIT_NAMES[split], label, top1, top5, None, distance, None]

        table.append(row("real images", prompts.images))
        for name, pipeline in pipelines.items():
            ceiling = row(f"{name}: reconstructions", prompts.reconstruct(pipeline, batch_size, num_tokens))
            images, seconds = prompts.draw(pipeline, batch_size, **settings)
            drawn = row(f"{name}: drawn", images)
            drawn[4] = drawn[2] / ceiling[2] if ceiling[2] else None
            drawn[6] = seconds / len(images)
            table += [ceiling, drawn]
            if output_dir is not None:
                stem = f"t2i-{Path(name).name}-{split}"
                count = min(_FIRST_SHEET, len(images))
                figures.append(captioned_sheet(images[:count], prompts.prompts[:count], output_dir / f"{stem}.png"))
                listing = "".join(f"{seed + i}\t{prompt}\n" for i, prompt in enumerate(prompts.prompts))
                write_atomically(output_dir / f"{stem}-prompts.txt", listing.encode())
                figures.append(output_dir / f"{stem}-prompts.txt")
    notes = [
        prompts.note.replace(repr(split), " and ".join(map(repr, splits))),
        "of recon.: top-1 as a share of what the tokenizer's reconstructions of the real images reach, the most that a "
        "generator over its tokens can hope for.",
        f"s/image: drawing in batches of {batch_size}, decoding included.",
    ]
    if skipped:
        notes.append(f"{skipped} prompts were passed over because they are longer than a model reads.")
    columns = ["prompts", "images", "top-1", "top-5", "of recon.", "FD", "s/image"]
    return BenchResult("t2i", columns, table, notes, figures)
