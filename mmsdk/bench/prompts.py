"""The prompts that generators draw in benchmarks, and what their pictures are worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from generators.pipelines import ARImagePipeline
from mmsdk.bench.evaluator import Evaluator, evaluation_prompt, frechet_distance
from mmsdk.data.emoji import EmojiDataset
from mmsdk.errors import DataError
from mmsdk.loading import resolve

STYLES = ("noto", "twemoji", "fluent flat")


class Quality(NamedTuple):
    """What the evaluator says of pictures.

    Attributes:
        top1: how often it retrieves the prompt from the picture.
        top5: how often among its five best.
        distance: Frechet distance to real images.
    """

    top1: float
    top5: float
    distance: float


class PromptSet:
    """Prompts `label, style` of a split, their real images, and an evaluator of pictures drawn from them.

    Args:
        split: `train` (emoji seen in this style), `pair` (seen in other styles only), `test` (unseen emoji).
        pipelines: all of them read the prompts.
        num_prompts: how many.
        styles: image sets to ask for.
        evaluator: embedded name or folder.
        candidates: prompts to retrieve from, at most as many as there are different ones.
        reference_images: other training images of these styles, which Frechet distances are measured to.
        seed: of the choice of prompts and candidates.
        cache_dir: where the data set lies.
        exclude: rows of the training split that are no reference either.

    Attributes:
        prompts: the prompts.
        rows: their rows in the split.
        images: the real images, `(num_prompts, 3, H, W)`.
        split: see above.
        too_long: prompts that were passed over, since a pipeline cannot read them.
        candidates: prompts to retrieve from.

    Raises:
        DataError: the data set has too few prompts.
    """

    def __init__(
        self,
        split: str,
        pipelines: Sequence[ARImagePipeline],
        num_prompts: int = 200,
        styles: Sequence[str] = STYLES,
        evaluator: str = "emoji-64",
        candidates: int = 100,
        reference_images: int = 1000,
        seed: int = 0,
        cache_dir: str | None = None,
        exclude: Sequence[int] = (),
    ) -> None:
        data = EmojiDataset(split, list(styles), cache_dir)
        self.rows, self.too_long = _choose(data, num_prompts, seed, pipelines)
        self.prompts = [evaluation_prompt(data.records[i]) for i in self.rows]
        self.images = torch.from_numpy(data.images[self.rows]).permute(0, 3, 1, 2).float() / 255
        self.split, self.candidates, self.seed = split, min(candidates, num_prompts), seed
        self._judge: Evaluator = resolve("evaluator").from_pretrained(evaluator).eval()
        used = set(exclude) | (set(self.rows) if split == "train" else set())
        train = EmojiDataset("train", list(styles), cache_dir)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed + 1)).tolist()
        others = [i for i in order if i not in used][:reference_images]
        if len(others) < 2:
            raise DataError("No training images are left to measure Frechet distances to; use fewer prompts.")
        self._reference = self._judge.features(torch.from_numpy(train.images[others]).permute(0, 3, 1, 2))

    @property
    def note(self) -> str:
        """What must be known to read the measurements."""
        return (
            f"{len(self.prompts)} prompts `label, style` of the split {self.split!r}; retrieval among "
            f"{self.candidates} of them (chance {1 / self.candidates:.3f}). FD: Frechet distance over "
            f"EfficientNet-Lite0 features to {len(self._reference)} other training images of these styles. Compare "
            "within a split and a table only; neither is a CLIP score or an FID."
        )

    def judge(self, images: Tensor) -> Quality:
        """Measure one picture `(num_prompts, 3, H, W)` for each prompt."""
        features = self._judge.features(images)
        found = self._judge.retrieval_of_features(features, self.prompts, self.candidates, self.seed)
        return Quality(found.top1, found.top5, frechet_distance(self._reference, features))

    def reconstruct(self, pipeline: ARImagePipeline, batch_size: int = 16, num_tokens: int | None = None) -> Tensor:
        """Return what is left of the real images after as many tokens as the pipeline would write."""
        tokenizer = pipeline.image_tokenizer
        count = (num_tokens or pipeline.transformer.config.max_tokens) if tokenizer.ordered else None
        return torch.cat([tokenizer.reconstruct(batch, count).images.cpu() for batch in self.images.split(batch_size)])

    def draw(self, pipeline: Any, batch_size: int = 16, **settings: Any) -> tuple[Tensor, float]:
        """Return a picture for each prompt, `(num_prompts, 3, H, W)`, and the seconds that drawing took.

        Args:
            pipeline: draws picture i with a generator of the seed plus i.
            batch_size: pictures at once.
            **settings: of the pipeline's call.
        """
        parts = []
        started = time.perf_counter()
        for first in range(0, len(self.prompts), batch_size):
            batch = self.prompts[first : first + batch_size]
            generators = [torch.Generator().manual_seed(self.seed + first + i) for i in range(len(batch))]
            parts.append(pipeline(batch, **settings, generator=generators, output_type="pt").images.cpu())
        return torch.cat(parts), time.perf_counter() - started


def load_pipeline(name: str) -> ARImagePipeline:
    """Load an embedded pipeline or a folder, without progress bars."""
    pipeline = ARImagePipeline.from_pretrained(name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt_fits(pipeline: ARImagePipeline, prompt: str) -> bool:
    """Return whether `pipeline` reads the whole of `prompt`."""
    # Not verbose: the tokenizer would warn of the very prompts that are left out here.
    return len(pipeline.tokenizer(prompt, verbose=False)["input_ids"]) <= pipeline.transformer.prompt_length


def _choose(data: EmojiDataset, count: int, seed: int, pipelines: Sequence[ARImagePipeline]) -> tuple[list[int], int]:
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
