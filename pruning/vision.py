"""What a pruning method may ask about the vision tower: where each token comes from, and what attended to it."""

from __future__ import annotations

import copy
import inspect
import math
from collections import UserDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.image_processing_utils import select_best_resolution

# Rows of an attention map computed at once when all of it is needed.
_QUERY_BLOCK = 512
_RECORDER = "visual_token_pruning_recorder"


@dataclass(frozen=True)
class CropLayout:
    """Where the tokens of one image come from, in the order in which the language model sees them.

    Attributes:
        crop: `(num_tokens,)` int64, the crop (AnyRes), tile or frame of each token, -1 for a newline token. In
            AnyRes, crop 0 is the whole image, the others follow row by row.
        index: `(num_tokens,)` int64, row-major place of each token within its crop, in `[0, height * width)`; for a
            newline token, the row of the high-resolution grid (without padding) that it ends, -1 where there is no such
            grid. Where the model shrinks the high-resolution grid, the nearest token before shrinking.
        num_crops: crops of the image, including those of which no token is left after unpadding.
        crop_size: tokens per crop, `(height, width)`.
        grid: high-resolution crops of an AnyRes image, `(rows, columns)`; None for other images.
    """

    crop: Tensor
    index: Tensor
    num_crops: int
    crop_size: tuple[int, int]
    grid: tuple[int, int] | None = None

    def __getitem__(self, tokens: Tensor) -> CropLayout:
        """Return the layout of some tokens, given their indices `(num_kept,)`."""
        return CropLayout(self.crop[tokens], self.index[tokens], self.num_crops, self.crop_size, self.grid)


@dataclass(frozen=True)
class VisionAttention:
    """Attention of one vision layer over the crops of one image; maps are computed when asked for, in float32.

    Attributes:
        query: `(num_crops, num_heads, num_patches, head_dim)`, after any rotary embedding; a class token comes first.
        key: as `query`.
        scaling: factor of the products of queries and keys.
        has_cls: whether the first of the patches is a class token.
        num_tokens: tokens per crop after the projector, at most one per patch.
        order: `(num_crops * num_tokens,)`, where the tower put each token while it computed attention; None: in place.
        consecutive: whether patches merged into one token are neighbours in the sequence, and not a square in space.
    """

    query: Tensor
    key: Tensor
    scaling: float
    has_cls: bool
    num_tokens: int
    order: Tensor | None = None
    consecutive: bool = False

    def cls_logits(self) -> Tensor:
        """Return the scaled products `(num_crops, num_heads, num_patches)` of the class token's query with all keys.

        Raises:
            ValueError: the tower has no class token.
        """
        if not self.has_cls:
            raise ValueError(
                "This vision tower has no class token, so there is no class attention. Use `received()`, the mean "
                "attention that each token receives, or a method that needs no attention, such as DivPrune."
            )
        return (self.query[:, :, :1].float() * self.scaling @ self.key.float().transpose(-1, -2)).squeeze(2)

    def cls_row(self) -> Tensor:
        """Return the attention `(num_crops, num_heads, num_patches)` that the class token pays; rows sum to 1."""
        return self.cls_logits().softmax(-1)

    def received(self) -> Tensor:
        """Return the attention `(num_crops, num_heads, num_patches)` that each patch receives, mean over the queries.

        Not published for any of these methods: it stands in for class attention where a tower has no class token.
        """
        key = self.key.float().transpose(-1, -2)
        total = sum(
            (block.float() * self.scaling @ key).softmax(-1).sum(-2) for block in self.query.split(_QUERY_BLOCK, -2)
        )
        return total / self.query.shape[-2]

    def per_token(self, values: Tensor) -> Tensor:
        """Average values per patch `(num_crops, ..., num_patches)` to `(num_crops, ..., num_tokens)` as patches merge.

        The value of a class token is left out.
        """
        values = values[..., 1:] if self.has_cls else values
        factor = values.shape[-1] // self.num_tokens
        if self.consecutive:
            values = values.unflatten(-1, (self.num_tokens, factor)).mean(-1)
        elif factor > 1:
            side, step = math.isqrt(values.shape[-1]), math.isqrt(factor)
            maps = values.reshape(-1, 1, side, side)
            values = F.avg_pool2d(maps, step).flatten(1).view(*values.shape[:-1], self.num_tokens)
        if self.order is None:
            return values
        # Tokens of all crops (frames) are ordered together.
        together = values.movedim(0, -2).flatten(-2)[..., self.order]
        return together.unflatten(-1, (len(values), self.num_tokens)).movedim(-2, 0)


@dataclass
class VisionRecord:
    """What the vision side of a model did in one call of `get_image_features` or `get_video_features`."""

    queries: dict[int, list[Tensor]] = field(default_factory=dict)
    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    scaling: dict[int, float] = field(default_factory=dict)
    packing: dict[str, Any] | None = None


def attention_modules(tower: nn.Module) -> list[Any]:
    """Return the self-attention modules of a vision tower whose attention can be recorded, first layer first."""
    return [m for m in tower.modules() if hasattr(m, "config") and (hasattr(m, "q_proj") or hasattr(m, "qkv"))]


@contextmanager
def recording(model: Any, tower: nn.Module, layers: Sequence[int]) -> Iterator[VisionRecord]:
    """Record queries and keys of `layers` of the tower, and how the model packs crops, while features are computed.

    The attention implementation in use (sdpa, eager, flash) computes what it would compute anyway: queries and keys are
    taken where they are handed to it, after rotary embeddings and norms.
    """
    record = VisionRecord()
    modules = attention_modules(tower)
    originals = {layer: modules[layer].config for layer in layers}
    pack: Any = getattr(model, "pack_image_features", None)

    def packer(*args: Any, **kwargs: Any) -> Any:
        record.packing = inspect.signature(pack).bind(*args, **kwargs).arguments
        return pack(*args, **kwargs)

    try:
        AttentionInterface.register(_RECORDER, _record_and_attend)
        for layer, config in originals.items():
            # A module looks up its implementation in its config, and the tower's masks come from the tower's own.
            modules[layer].config = copy.copy(config)
            modules[layer].config._attn_implementation = _RECORDER
            modules[layer].config.recorder = (config._attn_implementation, record, layer)
        if pack is not None:
            model.pack_image_features = packer
        yield record
    finally:
        for layer, config in originals.items():
            modules[layer].config = config
        if pack is not None:
            del model.pack_image_features


def _record_and_attend(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Keep queries and keys, then attend as the module would have without this."""
    name, record, layer = module.config.recorder
    record.queries.setdefault(layer, []).append(query.detach())
    record.keys.setdefault(layer, []).append(key.detach())
    record.scaling[layer] = kwargs.get("scaling") or query.shape[-1] ** -0.5
    eager: Any = getattr(inspect.getmodule(type(module)), "eager_attention_forward", None)
    return AttentionInterface().get_interface(name, eager)(module, query, key, *args, **kwargs)


def layouts_of(
    model: Any, record: VisionRecord, lengths: Sequence[int], crop_tokens: int | None, grids: Tensor | None
) -> list[CropLayout | None]:
    """Return the layout of each image, None where it is not known.

    Args:
        model: the base model.
        record: what it did while it computed the features.
        lengths: tokens of each image.
        crop_tokens: tokens of each crop or tile; None where all tokens of an image form one crop.
        grids: `(num_images, 3)`, patches of each image in time, height and width, for models that are told.
    """
    if record.packing is not None:
        return _packed_layouts(model, record.packing)
    layouts: list[CropLayout | None] = []
    for image, length in enumerate(lengths):
        if grids is not None:
            merge = model.config.vision_config.spatial_merge_size
            _, height, width = (grids[image] // torch.tensor([1, merge, merge], device=grids.device)).tolist()
        else:
            height = width = math.isqrt(crop_tokens or length)
        if height * width == 0 or length % (height * width):
            layouts.append(None)
            continue
        place = torch.arange(length)
        size = height * width
        layouts.append(CropLayout(place // size, place % size, length // size, (height, width)))
    return layouts


def _packed_layouts(model: Any, packing: dict[str, Any]) -> list[CropLayout | None]:
    """Return the layouts of AnyRes images, by letting the model pack coordinates instead of features.

    Unpadding, newlines and shrinking are thereby the model's own: where it interpolates features, it interpolates
    coordinates, which yields the place of the interpolated token.
    """
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    place = torch.arange(side * side)
    grids: list[tuple[int, int] | None] = []
    coordinates = []
    for crops, image_size in zip(packing["image_features"], packing["image_sizes"], strict=True):
        if crops.shape[1] != side * side:
            return [None] * len(packing["image_features"])
        grid = _crop_grid(image_size, model.config.image_grid_pinpoints, vision.image_size)
        crop = torch.arange(len(crops))[:, None]
        # Places in the high-resolution grid; the whole image is crop 0 and has a grid of its own.
        high = (crop > 0).long()
        row = place // side + high * ((crop - 1) // grid[1] * side)
        column = place % side + high * ((crop - 1) % grid[1] * side)
        coordinates.append(torch.stack([high.expand_as(row), row, column], -1).double())
        grids.append(grid if len(crops) > 1 else None)
    newline = None if packing.get("image_newline") is None else torch.full((3,), -1.0, dtype=torch.float64)
    packed, _ = model.pack_image_features(**{**packing, "image_features": coordinates, "image_newline": newline})
    layouts: list[CropLayout | None] = []
    for places, crops, shape in zip(packed, coordinates, grids, strict=True):
        high, row, column = places.round().long().unbind(-1)
        columns = shape[1] if shape is not None else 1
        crop = torch.where(high > 0, 1 + row // side * columns + column // side, high)
        ended = (high < 0).cumsum(0) - 1 if shape is not None else high
        index = torch.where(high < 0, ended, row % side * side + column % side)
        layouts.append(CropLayout(crop, index, len(crops), (side, side), shape))
    return layouts


def _crop_grid(image_size: Any, pinpoints: list[list[int]], crop: int) -> tuple[int, int]:
    """Return the rows and columns of crops into which an AnyRes image is cut."""
    height, width = select_best_resolution(tuple(int(x) for x in image_size), pinpoints)
    return height // crop, width // crop


class LayerAttention(UserDict[int, VisionAttention | None]):
    """Attention of one image by layer; taking that of a layer whose maps are not those of whole crops is refused."""

    def __getitem__(self, layer: int) -> VisionAttention:
        """Return the attention of a layer.

        Raises:
            ValueError: the layer's maps do not correspond to the images' crops, as where it attends within windows.
        """
        attention = super().__getitem__(layer)
        if attention is None:
            raise ValueError(
                f"The attention of layer {layer} of this vision tower cannot be assigned to images: it has no map of "
                "each crop, as in layers that attend within windows. Use a layer whose tokens attend to all of their "
                "crop, or a method that needs no attention, such as DivPrune."
            )
        return attention


def attention_of(
    tower: Any, record: VisionRecord, layouts: Sequence[CropLayout | None], grids: Tensor | None
) -> list[LayerAttention]:
    """Return the recorded attention of each image, by layer."""
    attention = [LayerAttention(dict.fromkeys(record.queries)) for _ in layouts]
    known = [layout for layout in layouts if layout is not None]
    counts = [layout.num_crops for layout in known]
    for layer in record.queries:
        queries, keys = ([crop for call in calls[layer] for crop in call] for calls in (record.queries, record.keys))
        if len(known) < len(layouts) or sum(counts) != len(queries):
            continue
        start = 0
        for image, (layout, count) in enumerate(zip(known, counts, strict=True)):
            query, key = (torch.stack(x[start : start + count]) for x in (queries, keys))
            start += count
            tokens = layout.crop_size[0] * layout.crop_size[1]
            attention[image][layer] = VisionAttention(
                query,
                key,
                record.scaling[layer],
                has_cls=query.shape[2] % tokens == 1,
                num_tokens=tokens,
                order=None if grids is None else _order_in_tower(tower, grids[image : image + 1]),
                consecutive=grids is not None,
            )
    return attention


def _order_in_tower(tower: Any, grid: Tensor) -> Tensor | None:
    """Return where a tower that attends within windows puts the tokens of an image; None where they stay in place."""
    config = tower.config
    if not hasattr(config, "window_size"):
        return None
    from transformers.vision_utils import get_vision_window_index

    window, _ = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
    return window.argsort()
