"""VisionZip: keep the tokens that the class token attends to, and merge the others into a few."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pruning.base import Pruner, PruningContext


@dataclass(kw_only=True)
class VisionZip(Pruner):
    """Keep dominant tokens, of highest class attention, and contextual ones, means of groups of the rest.

    Paper: Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025,
    https://arxiv.org/abs/2412.04467; published with 64, 128 or 192 of 576 tokens. Deterministic; ties go to the lowest
    index. Attention, summed over heads, and keys, mean over heads, are those of the layer that gives the features.

    Every `n // c`-th of the n tokens that are not dominant becomes the target of one of c groups; each of the others
    joins the target with the most similar key (cosine). A group leaves one token, the mean of its features, in the
    place of its target. Crops, tiles and frames are treated one by one and share the tokens to keep by their size
    without padding. Newline tokens remain only if nothing is dropped.

    Ours: features are merged after the model's projector, not before it, and the class token itself, which models of
    transformers do not pass on, is not among the dominant ones. Where a tower has no class token, the mean attention
    that a token receives, merged as the model merges patches, takes the place of class attention.

    Attributes:
        contextual_ratio: fraction of the kept tokens of a crop that are contextual, in [0, 1); rounded down to a count.
            Where that is 0, only dominant tokens remain.
    """

    contextual_ratio: float = 10 / 64

    needs_layout: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual_ratio < 1:
            raise ValueError(
                "contextual_ratio is the fraction of the kept tokens that others are merged into, in [0, 1), received "
                f"{self.contextual_ratio!r}."
            )

    def attention_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        """Return the layer whose output becomes the features."""
        return (feature_layer,)

    def select(self, features: Tensor, context: PruningContext) -> Tensor:
        """Return the indices `(num_kept,)`, ascending: of dominant tokens, and of targets for the others.

        Raises:
            ValueError: where tokens come from, or what attends to them, is not known.
        """
        groups = self.groups(len(features), context)
        return groups[groups >= 0].unique().to(features.device)

    def gather(self, features: Tensor, indices: Tensor, context: PruningContext) -> Tensor:
        """Return the features `(num_kept, dim)`: dominant tokens as they are, and the mean of each group."""
        groups = self.groups(len(features), context).to(features.device)
        members = groups >= 0
        sizes = groups[members].bincount(minlength=len(features))[indices, None]
        total = torch.zeros_like(features, dtype=torch.float32)
        total = total.index_add(0, groups[members], features[members].float())
        return torch.where(sizes == 1, features[indices], (total[indices] / sizes).to(features.dtype))

    def groups(self, total: int, context: PruningContext) -> Tensor:
        """Return the index of the token that each token of an image goes into, `(num_tokens,)` int64.

        A dominant token or target goes into itself; -1 for a token that is dropped.

        Args:
            total: tokens of the image.
            context: layout and attention of the image.
        """
        budget = self.budget(total)
        if budget == total:
            return torch.arange(total)
        layout = context.known_layout()
        attention = context.attention[max(context.attention)]
        values = attention.cls_row() if attention.has_cls else attention.received()
        scores = attention.per_token(values).sum(1)
        keys = attention.per_token(attention.key.float().mean(1).transpose(-1, -2)).transpose(-1, -2)
        crops, index = layout.crop.to(scores.device), layout.index.to(scores.device)
        groups = torch.full((total,), -1, device=scores.device)
        sizes = crops[crops >= 0].bincount(minlength=layout.num_crops).cumsum(0)
        ends = [min(budget, int(sizes[-1])) * size // int(sizes[-1]) for size in sizes.tolist()]
        for crop, (start, end) in enumerate(pairwise([0, *ends])):
            tokens = (crops == crop).nonzero()[:, 0]
            contextual = int((end - start) * self.contextual_ratio)
            ranking = tokens[scores[crop, index[tokens]].argsort(descending=True, stable=True)]
            dominant, rest = ranking.tensor_split([end - start - contextual])
            groups[dominant] = dominant
            if contextual:
                rest = rest.sort().values
                targets = rest[:: len(rest) // contextual][:contextual]
                own, goal = (F.normalize(keys[crop, index[places]], dim=-1) for places in (rest, targets))
                groups[rest] = targets[(own @ goal.T).argmax(1)]
                groups[targets] = targets
        return groups
