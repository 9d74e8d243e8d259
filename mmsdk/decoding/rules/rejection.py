"""Rejection sampling of one or several drafts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmsdk.decoding.base import CHAIN, CHOSEN, WITHOUT_REPLACEMENT
from mmsdk.decoding.rules.walk import SiblingRule, normalise
from mmsdk.decoding.tree import DraftTree


@dataclass
class _Node:
    target: Tensor
    draft: Tensor | None


class Rejection(SiblingRule[_Node]):
    """Accepts a token of draft probability q and target probability p with min(1, p / q), else goes on with (p - q)+.

    Papers: "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al. 2022, arXiv 2211.17192);
    siblings drawn without replacement are tried one after the other, each against what the refusals before left of both
    distributions ("DySpec", Xiong et al. 2024, arXiv 2410.11744). The tokens follow the target's distribution. Drafts
    without `probs` were chosen, not drawn: q is 1 for each of them.
    """

    lossless: ClassVar[bool] = True
    drawings: ClassVar[tuple[str, ...]] = (CHOSEN, CHAIN, WITHOUT_REPLACEMENT)

    def check(self, tree: DraftTree) -> None:
        """Raise `ValueError` for siblings that were drawn with replacement."""
        if tree.with_replacement:
            raise ValueError("Rejection needs siblings drawn without replacement; for independent ones use KSeq.")

    def enter(self, target: Tensor, draft: Tensor | None, num_children: Tensor) -> _Node:
        """Return both distributions."""
        return _Node(target, draft)

    def acceptance(self, node: _Node, tokens: Tensor) -> Tensor:
        """Return min(1, p / q)."""
        target = node.target.gather(1, tokens[:, None])[:, 0]
        if node.draft is None:
            return target
        draft = node.draft.gather(1, tokens[:, None])[:, 0]
        return target / draft.clamp_min(torch.finfo(draft.dtype).tiny)

    def refuse(self, node: _Node, tokens: Tensor, refused: Tensor) -> None:
        """Take the draft's share out of the target, and the token out of the draft."""
        if node.draft is None:
            left = node.target.scatter(1, tokens[:, None], 0.0)
        else:
            left = (node.target - node.draft).clamp_min(0)
            without = normalise(node.draft.scatter(1, tokens[:, None], 0.0))
            node.draft = torch.where(refused[:, None], without, node.draft)
        node.target = torch.where(refused[:, None], normalise(left), node.target)

    def rest(self, node: _Node) -> Tensor:
        """Return what is left of the target."""
        return node.target
