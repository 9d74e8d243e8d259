"""Show which parts of a picture a pruner kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedModel

from pruning.base import Pruner, PruningContext
from pruning.vision import CropLayout

_GAP = 8
_VIEW = 512


@dataclass(kw_only=True)
class _LayoutRecorder(Pruner):
    """Keeps everything and notes where the tokens of each image come from."""

    needs_layout: ClassVar[bool] = True
    layouts: list[CropLayout] = field(default_factory=list)

    def select(self, features: Tensor, context: PruningContext) -> Tensor:
        self.layouts.append(context.known_layout())
        return torch.arange(len(features))


def draw_kept(
    model: PreTrainedModel, inputs: Mapping[str, Any], image: Image.Image, kept: Tensor, index: int = 0
) -> Image.Image:
    """Return `image` with the patches dimmed whose tokens were dropped; AnyRes images as base view and crops.

    Args:
        model: the model that the pruner worked on.
        inputs: of its processor, with `image` as image number `index`.
        image: the picture that went into the processor.
        kept: indices of the kept tokens, an entry of `PruningReport.kept`.
        index: number of the image among those of `inputs`.

    Raises:
        ValueError: it is not known where the model's tokens come from, or they come from crops in no known arrangement.
    """
    recorder = _LayoutRecorder(keep_ratio=1.0)
    recorder.prepare(model, inputs)
    layout = recorder.layouts[index]
    if layout.num_crops > 1 and layout.grid is None:
        raise ValueError(
            f"The image is seen as {layout.num_crops} crops (or frames) whose arrangement this model does not tell, so "
            "they cannot be drawn over it."
        )
    height, width = layout.crop_size
    chosen = layout[kept.cpu()]
    base = torch.zeros(height * width, dtype=torch.bool)
    base[chosen.index[chosen.crop == 0]] = True
    square = image.convert("RGB").resize((_VIEW * width // max(height, width), _VIEW * height // max(height, width)))
    views = [_dimmed(square, base.view(height, width))]
    if layout.grid is not None:
        rows, columns = layout.grid
        mask = torch.zeros(rows, height, columns, width, dtype=torch.bool)
        crops = chosen.crop > 0
        place, index_in_crop = chosen.crop[crops] - 1, chosen.index[crops]
        mask[place // columns, index_in_crop // width, place % columns, index_in_crop % width] = True
        side = _VIEW // max(rows, columns)
        # The crops show the whole picture, with margins where its shape is another than theirs.
        padded = ImageOps.pad(image.convert("RGB"), (columns * side, rows * side), color=(127, 127, 127))
        views.append(_dimmed(padded, mask.view(rows * height, columns * width)))
    sheet = Image.new(
        "RGB", (sum(v.width for v in views) + _GAP * (len(views) - 1), max(v.height for v in views)), "white"
    )
    left = 0
    for view in views:
        sheet.paste(view, (left, 0))
        left += view.width + _GAP
    return sheet


def _dimmed(picture: Image.Image, mask: Tensor) -> Image.Image:
    """Return `picture` pale and grey where `mask` `(rows, columns)` is False."""
    sharp = Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
    pale = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, (150, 150, 150)), 0.75)
    return Image.composite(picture, pale, sharp)
