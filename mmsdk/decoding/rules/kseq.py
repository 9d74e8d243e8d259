"""SpecTr's k-SEQ: several independent drafts of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmsdk.decoding.base import CHAIN, WITH_REPLACEMENT
from mmsdk.decoding.rules.walk import SiblingRule
from mmsdk.decoding.tree import DraftTree

_BISECTIONS = 60


@dataclass
class _Node:
    target: Tensor
    draft: Tensor
    rho: Tensor
    overlap: Tensor
    num_children: Tensor


class KSeq(SiblingRule[_Node]):
    """Accepts the first of k independent drafts with min(1, q / (rho p)) of draft p and target q, at the best rho.

    Paper: "SpecTr: Fast Speculative Decoding via Optimal Transport" (Sun et al. 2023, arXiv 2310.15141). With
    beta(rho) = sum min(p, q / rho), rho is the number in 1 to k at which 1 - (1 - beta)^k = rho beta; where all are
    refused, the token is drawn in proportion to q - min(p, q / rho) (1 - (1 - beta)^k) / beta. The tokens follow the
    target's distribution. With one draft it is rejection sampling.
    """

    lossless: ClassVar[bool] = True
    drawings: ClassVar[tuple[str, ...]] = (CHAIN, WITH_REPLACEMENT)

    def check(self, tree: DraftTree) -> None:
        """Raise `ValueError` unless siblings were drawn independently, from a distribution that is known."""
        if tree.probs is None or (not tree.with_replacement and _has_siblings(tree)):
            raise ValueError(
                "KSeq needs siblings that were drawn with replacement, and their distribution (probs); for drafts "
                "without, or drawn without replacement, use Rejection."
            )

    def enter(self, target: Tensor, draft: Tensor | None, num_children: Tensor) -> _Node:
        """Find rho for the number of children of each row."""
        assert draft is not None  # noqa: S101 - `check` has seen it
        count = num_children.clamp_min(1).double()
        low, high = torch.ones_like(count), count.clone()
        for _ in range(_BISECTIONS):
            rho = (low + high) / 2
            overlap = _overlap(target, draft, rho)
            # Falls from 0 or more at 1 to 0 or less at k.
            is_above = 1 - (1 - overlap) ** count > rho * overlap
            low, high = torch.where(is_above, rho, low), torch.where(is_above, high, rho)
        # The upper end: acceptances that are a rounding error too rare leave a residual of at least 0.
        return _Node(target, draft, high, _overlap(target, draft, high), num_children)

    def acceptance(self, node: _Node, tokens: Tensor) -> Tensor:
        """Return min(1, q / (rho p))."""
        target, draft = (x.gather(1, tokens[:, None])[:, 0] for x in (node.target, node.draft))
        return target / (node.rho * draft).clamp_min(torch.finfo(draft.dtype).tiny)

    def refuse(self, node: _Node, tokens: Tensor, refused: Tensor) -> None:
        """Change nothing: the drafts are independent."""

    def rest(self, node: _Node) -> Tensor:
        """Return what the accepted drafts leave of the target."""
        accepted = 1 - (1 - node.overlap) ** node.num_children
        share = accepted / node.overlap.clamp_min(torch.finfo(accepted.dtype).tiny)
        taken = torch.minimum(node.draft, node.target / node.rho[:, None]) * share[:, None]
        left = (node.target - taken).clamp_min(0)
        # Where drafts are always accepted nothing is left, and nothing is drawn but what rounding asks for.
        return torch.where(left.sum(1, keepdim=True) > 0, left, node.target)


def _overlap(target: Tensor, draft: Tensor, rho: Tensor) -> Tensor:
    return torch.minimum(draft, target / rho[:, None]).sum(1)


def _has_siblings(tree: DraftTree) -> bool:
    counts = torch.zeros_like(tree.parents).scatter_add_(1, tree.parents.clamp_min(0), tree.is_candidate.long())
    return bool((counts > 1).any())
