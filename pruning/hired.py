"""HiRED: spend a budget of tokens where the vision tower's class token looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmsdk.errors import unknown_name
from pruning.base import Pruner, PruningContext
from pruning.vision import VisionAttention

PARTITIONS = ("bands", "quadrants")


@dataclass(kw_only=True)
class HiRED(Pruner):
    """Keep the tokens with the highest class attention, crops sharing a budget by what an early layer attends to.

    Paper: Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
    Vision-Language Models", AAAI 2025, https://arxiv.org/abs/2408.10945; published with `keep_ratio=0.2`.
    Deterministic; ties go to the lowest index. Scores are sums over heads, in float32, without the class token's own.

    An AnyRes image of n crops, the whole image among them, with T tokens each has a budget of `int(n T keep_ratio)`
    tokens (`num_tokens`, if that is given), padding included. `alpha` of it goes to the whole image. The other crops
    share the rest by how many of the `int(T (1 - alpha))` highest scores of the whole image at the first layer lie in
    their part of it. Within each crop, the scores of the layer that gives the features decide. As published, fractions
    of tokens, what exceeds a crop, tokens in the padding of an image and newline tokens are lost: fewer tokens than the
    budget may remain. If nothing is to be dropped, nothing is.

    Of an image with one crop, and of each tile or frame of models without AnyRes, the best `int(T keep_ratio)` remain;
    in any case one token per image. Where a tower has no class token, the mean attention that a token receives, merged
    as the model merges patches, takes the place of class attention: this is ours.

    The published code packs crops of images that are not square with height and width of the grid swapped, and uses the
    first image's choice for all of a batch; here, each image has its own choice in its own place.

    Attributes:
        alpha: share of the budget for the whole image, in [0, 1].
        partition: how crops divide the whole image: `"bands"`, runs of equally many tokens row by row, as published, or
            `"quadrants"`, the regions that the crops really show.
    """

    alpha: float = 0.5
    partition: str = "bands"

    needs_layout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is the whole image's share of the budget, in [0, 1], received {self.alpha!r}.")
        if self.partition not in PARTITIONS:
            raise unknown_name("partition", self.partition, list(PARTITIONS))

    def attention_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        """Return the first layer and that whose output becomes the features."""
        return (0, feature_layer)

    def select(self, features: Tensor, context: PruningContext) -> Tensor:
        """Return the indices `(num_kept,)`, ascending, of the kept among `features` `(num_tokens, dim)`.

        Raises:
            ValueError: `alpha` leaves no token of the whole image to share the budget of the crops by; or where tokens
                come from, or what attends to them, is not known.
        """
        if self.budget(len(features)) == len(features):
            return torch.arange(len(features), device=features.device)
        layout = context.known_layout()
        scores = token_scores(context.attention[max(context.attention)])
        num_crops, size = scores.shape
        total = self.num_tokens or int(num_crops * size * float(self.keep_ratio or 0))
        if layout.grid is None:
            budgets = [total // num_crops] * num_crops
        else:
            budgets = self.budgets(total, token_scores(context.attention[0])[0], layout.crop_size, layout.grid)
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for row, ranking, budget in zip(
            mask, scores.argsort(dim=1, descending=True, stable=True), budgets, strict=True
        ):
            row[ranking[:budget]] = True
        crop, index = layout.crop.to(scores.device), layout.index.to(scores.device)
        kept = ((crop >= 0) & mask[crop, index]).nonzero()[:, 0]
        if len(kept) == 0:
            kept = scores[crop, index].masked_fill(crop != 0, -torch.inf).argmax(0, keepdim=True)
        return kept.to(features.device)

    def budgets(self, total: int, guide: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> list[int]:
        """Return how many tokens of each crop to keep, the whole image first.

        Args:
            total: tokens to keep.
            guide: `(num_tokens,)`, scores of the whole image at the first layer.
            size: tokens of a crop, `(height, width)`.
            grid: crops besides the whole image, `(rows, columns)`.

        Raises:
            ValueError: `alpha` leaves no token of the whole image to share the budget by.
        """
        tokens, crops = len(guide), grid[0] * grid[1]
        whole = min(int(total * self.alpha), tokens)
        shared = min(total - whole, crops * tokens)
        if shared == 0:
            return [whole] + [0] * crops
        guides = guide.argsort(descending=True, stable=True)[: int(tokens * (1 - self.alpha))]
        if len(guides) == 0:
            raise ValueError(
                f"alpha={self.alpha} leaves {shared} tokens to {crops} crops, but none of the whole image's {tokens} "
                "to divide them by. Lower alpha or keep_ratio."
            )
        if self.partition == "bands":
            owner = guides * crops // tokens
        else:
            owner = guides // size[1] * grid[0] // size[0] * grid[1] + guides % size[1] * grid[1] // size[1]
        counts = owner.bincount(minlength=crops).float()
        shares = (counts / counts.sum() * shared).int().clamp(max=tokens)
        return [whole, *shares.tolist()]


def token_scores(attention: VisionAttention) -> Tensor:
    """Return the class attention `(num_crops, num_tokens)` of each token, or what it receives, summed over heads."""
    values = attention.cls_row() if attention.has_cls else attention.received()
    return attention.per_token(values).sum(1)
