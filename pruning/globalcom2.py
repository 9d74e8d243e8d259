"""GlobalCom2: let the whole image say how much of each high-resolution crop to keep."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pruning.base import Pruner, PruningContext
from pruning.vision import CropLayout, VisionAttention

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class GlobalCom2(Pruner):
    """Keep more of the crops, and of the places in them, to which the class token of the whole image attends.

    Paper: Liu et al., "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
    Vision-Language Models", https://arxiv.org/abs/2501.05179. Deterministic; ties go to the lowest index. Scores are
    the class token's scaled products with the keys of the last vision layer, before softmax, mean over heads, in
    float32; ratios are in float64.

    Of the whole image, `int(T keep_ratio)` of T tokens remain, at least one. A crop's ratio is
    `min(1, keep_ratio (1 + s - mean s))`, s being the softmax over crops of the scores that the whole image has in the
    region of each, summed, over `temperature`. Its tokens are ranked by the sum of their own scores and those of the
    whole image, enlarged, at their place, each normalised to length 1 over the crop without its padding. All newline
    tokens remain, so somewhat more is kept than `keep_ratio` says. If nothing is to be dropped, nothing is.

    Only AnyRes images are pruned: those that consist of one crop stay whole, as published, and so do images of models
    without AnyRes. Tokens keep their order; the published code leaves those of the whole image in the order of their
    scores, keeps newlines for rows of padding too, and moves tokens of padded crops to other rows. Where a tower has no
    class token, the logarithm of the mean attention that a token receives, merged as the model merges patches, takes
    the place of the scores: this is ours.

    Attributes:
        keep_ratio: fraction of each image's tokens to keep, in (0, 1]. Counts (`num_tokens`) are not supported.
        temperature: of the softmax over crops, above 0; lower values favour the best crop.
    """

    keep_ratio: float = 0.25
    temperature: float = 10.0

    needs_layout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_tokens is not None:
            raise ValueError(
                "GlobalCom2 gives every crop a ratio of its own, which adds up to no exact count: pass keep_ratio "
                f"instead of num_tokens={self.num_tokens!r}."
            )
        super().__post_init__()
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is a finite number above 0, received {self.temperature!r}.")

    def attention_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        """Return the last layer."""
        return (num_layers - 1,)

    def select(self, features: Tensor, context: PruningContext) -> Tensor:
        """Return the indices `(num_kept,)`, ascending, of the kept among `features` `(num_tokens, dim)`.

        Raises:
            ValueError: where tokens come from is not known.
        """
        total = len(features)
        if self.budget(total) == total:
            return torch.arange(total, device=features.device)
        layout = context.known_layout()
        if layout.grid is None:
            logger.info("GlobalCom2 keeps an image of %d tokens whole: it is not divided into crops.", total)
            return torch.arange(total, device=features.device)
        scores = token_logits(context.attention[max(context.attention)])
        crop = layout.crop.to(scores.device)
        ratios = self.ratios(scores[0], layout.crop_size, layout.grid)
        combined = self.combined_scores(scores, layout)
        keep = crop < 0
        for number in range(layout.num_crops):
            tokens = (crop == number).nonzero()[:, 0]
            if number == 0:
                count = max(1, int(len(tokens) * self.keep_ratio))
            else:
                count = int(len(tokens) * float(ratios[number - 1]))
            keep[tokens[combined[tokens].argsort(descending=True, stable=True)[:count]]] = True
        return keep.nonzero()[:, 0].to(features.device)

    def ratios(self, scores: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Return the fraction of each crop to keep, `(num_crops,)` float64 in [0, 1].

        Args:
            scores: `(num_tokens,)`, scores of the whole image.
            size: tokens of a crop, `(height, width)`.
            grid: crops besides the whole image, `(rows, columns)`.
        """
        rows, columns = (
            (torch.arange(tokens, device=scores.device) // max(1, tokens // crops)).clamp(max=crops - 1)
            for tokens, crops in zip(size, grid, strict=True)
        )
        owner = (rows[:, None] * grid[1] + columns).flatten()
        total = torch.zeros(grid[0] * grid[1], dtype=torch.float64, device=scores.device)
        total = total.index_add(0, owner, scores.double())
        excess = ((total - total.max()) / self.temperature).exp()
        share = excess / (excess.sum() + 1e-8)
        return (self.keep_ratio * (1 + share - share.mean())).clamp(max=1)

    def combined_scores(self, scores: Tensor, layout: CropLayout) -> Tensor:
        """Return by what the tokens of an image are ranked within their crop, `(num_tokens,)`; newlines have 0.

        Args:
            scores: `(1 + num_crops, tokens_per_crop)`, scores of the whole image and of the crops.
            layout: where each token comes from, in an AnyRes image.
        """
        crop, index = layout.crop.to(scores.device), layout.index.to(scores.device)
        guide = self.guide_scores(scores[0], layout)
        combined = torch.zeros(len(crop), device=scores.device)
        combined[crop == 0] = scores[0, index[crop == 0]]
        for number in range(1, layout.num_crops):
            own = crop == number
            local = scores[number, index[own]]
            combined[own] = F.normalize(local, dim=0) + F.normalize(guide[own], dim=0)
        return combined

    def guide_scores(self, scores: Tensor, layout: CropLayout) -> Tensor:
        """Return the scores of the whole image at the places of an image's tokens, `(num_tokens,)`.

        The whole image shows what remains of the high-resolution grid without padding, and is enlarged to that. Tokens
        of the whole image and newline tokens have 0.

        Args:
            scores: `(tokens_per_crop,)`, scores of the whole image.
            layout: where each token comes from, in an AnyRes image.
        """
        crop, index = layout.crop.to(scores.device), layout.index.to(scores.device)
        high = crop > 0
        guide = torch.zeros(len(crop), device=scores.device)
        if layout.grid is None or not bool(high.any()):
            return guide
        height, width = layout.crop_size
        row = (crop[high] - 1) // layout.grid[1] * height + index[high] // width
        column = (crop[high] - 1) % layout.grid[1] * width + index[high] % width
        row, column = row - row.min(), column - column.min()
        extent = (int(row.max()) + 1, int(column.max()) + 1)
        enlarged = F.interpolate(scores.view(1, 1, height, width), extent, mode="bilinear", align_corners=False)
        guide[high] = enlarged[0, 0, row, column]
        return guide


def token_logits(attention: VisionAttention) -> Tensor:
    """Return the score `(num_crops, num_tokens)` of each token before softmax, mean over heads.

    Without a class token, the logarithm of the attention received has the scale of logits, for which the temperature
    is meant.
    """
    if attention.has_cls:
        return attention.per_token(attention.cls_logits()).mean(1)
    received = attention.per_token(attention.received()).mean(1)
    return received.clamp_min(torch.finfo(received.dtype).tiny).log()
