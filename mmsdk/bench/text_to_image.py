"""Whether pictures show what their prompts ask for, beside what the evaluator makes of real ones."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generators.pipelines import ARImagePipeline
from mmsdk.bench.evaluator import Evaluator, evaluation_prompt, frechet_distance
from mmsdk.bench.figures import captioned_sheet
from mmsdk.bench.runner import BenchResult
from mmsdk.data.emoji import EmojiDataset
from mmsdk.errors import DataError
from mmsdk.loading import resolve
from mmsdk.tokens import write_atomically

STYLES = ("noto", "twemoji", "fluent flat")
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
    pipelines = {name: ARImagePipeline.from_pretrained(name) for name in names}
    judge: Evaluator = resolve("evaluator").from_pretrained(evaluator).eval()
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
    used: set[int] = set()
    for split in splits:
        data = EmojiDataset(split, list(styles), cache_dir)
        rows, too_long = _choose(data, num_prompts, seed, list(pipelines.values()))
        skipped += too_long
        if split == "train":
            used |= set(rows)
        prompts = [evaluation_prompt(data.records[i]) for i in rows]
        real = torch.from_numpy(data.images[rows]).permute(0, 3, 1, 2).float() / 255
        reference = _reference(styles, used, reference_images, seed, cache_dir, judge)
        most = min(candidates, len(prompts))

        def row(
            label: str, images: Tensor, split: str = split, prompts: list[str] = prompts, most: int = most,
            reference: Tensor = reference,
        ) -> list[Any]:  # fmt: skip
            features = judge.features(images)
            found = judge.retrieval_of_features(features, prompts, most, seed)
            distance = frechet_distance(reference, features)
            return [_SPLIT_NAMES[split], label, found.top1, found.top5, None, distance, None]

        table.append(row("real images", real))
        for name, pipeline in pipelines.items():
            pipeline.set_progress_bar_config(disable=True)
            ceiling = row(f"{name}: reconstructions", _reconstructions(pipeline, real, batch_size, num_tokens))
            images, seconds = _draw(pipeline, prompts, batch_size, seed, settings)
            drawn = row(f"{name}: drawn", images)
            drawn[4] = drawn[2] / ceiling[2] if ceiling[2] else None
            drawn[6] = seconds / len(images)
            table += [ceiling, drawn]
            if output_dir is not None:
                stem = f"t2i-{Path(name).name}-{split}"
                count = min(_FIRST_SHEET, len(images))
                figures.append(captioned_sheet(images[:count], prompts[:count], output_dir / f"{stem}.png"))
                listing = "".join(f"{seed + i}\t{prompt}\n" for i, prompt in enumerate(prompts))
                write_atomically(output_dir / f"{stem}-prompts.txt", listing.encode())
                figures.append(output_dir / f"{stem}-prompts.txt")
    notes = [
        f"{num_prompts} prompts `label, style` for each split; styles: {', '.join(styles)}. Retrieval among "
        f"{min(candidates, num_prompts)} of these prompts, the same for every row (chance "
        f"{1 / min(candidates, num_prompts):.3f}).",
        "of recon.: top-1 as a share of what the tokenizer's reconstructions of the real images reach, the most that a "
        "generator over its tokens can hope for.",
        f"FD: Frechet distance over EfficientNet-Lite0 features to {len(reference)} other training images of these "
        "styles. It depends on the number of images: compare within a split only. Neither is a CLIP score or an FID.",
        f"s/image: drawing in batches of {batch_size}, decoding included.",
    ]
    if skipped:
        notes.append(f"{skipped} prompts were passed over because they are longer than a model reads.")
    columns = ["prompts", "images", "top-1", "top-5", "of recon.", "FD", "s/image"]
    return BenchResult("t2i", columns, table, notes, figures)


def _choose(data: EmojiDataset, count: int, seed: int, pipelines: list[ARImagePipeline]) -> tuple[list[int], int]:
    """Return random rows with different prompts that every pipeline can read, and how many were too long."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: dict[str, int] = {}
    too_long = 0
    for i in order:
        if len(rows) == count:
            break
        prompt = evaluation_prompt(data.records[i])
        if all(prompt_fits(pipeline, prompt) for pipeline in pipelines):
            rows.setdefault(prompt, i)
        else:
            too_long += 1
    if len(rows) < count or count < 2:
        raise DataError(f"num_prompts must be 2 to {len(rows)}, what this split has in these styles, got {count}.")
    return list(rows.values()), too_long


def prompt_fits(pipeline: ARImagePipeline, prompt: str) -> bool:
    """Return whether `pipeline` reads the whole of `prompt`."""
    # Not verbose: the tokenizer would warn of the very prompts that are left out here.
    count = len(pipeline.tokenizer(prompt, verbose=False)["input_ids"])
    return count <= pipeline.transformer.prompt_length


def _reference(
    styles: Sequence[str], used: set[int], count: int, seed: int, cache_dir: str | None, judge: Evaluator
) -> Tensor:
    """Return the features of random training images that are not `used`."""
    data = EmojiDataset("train", list(styles), cache_dir)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed + 1)).tolist()
    rows = [i for i in order if i not in used][:count]
    if len(rows) < 2:
        raise DataError("No training images are left to measure Frechet distances to; use fewer prompts.")
    return judge.features(torch.from_numpy(data.images[rows]).permute(0, 3, 1, 2))


def _reconstructions(pipeline: ARImagePipeline, images: Tensor, batch_size: int, num_tokens: int | None) -> Tensor:
    """Return what is left of `images` after as many tokens as the pipeline would write."""
    tokenizer = pipeline.image_tokenizer
    count = (num_tokens or pipeline.transformer.config.max_tokens) if tokenizer.ordered else None
    return torch.cat([tokenizer.reconstruct(batch, count).images.cpu() for batch in images.split(batch_size)])


def _draw(
    pipeline: Any, prompts: list[str], batch_size: int, seed: int, settings: dict[str, Any]
) -> tuple[Tensor, float]:
    """Return a picture `(num_prompts, 3, H, W)` for each prompt, and the seconds that drawing took."""
    parts = []
    started = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(batch))]
        parts.append(pipeline(batch, **settings, generator=generators, output_type="pt").images.cpu())
    return torch.cat(parts), time.perf_counter() - started
