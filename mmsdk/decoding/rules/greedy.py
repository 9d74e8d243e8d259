"""Greedy acceptance: what the target would have chosen."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mmsdk.decoding.base import AcceptanceRule, Decision
from mmsdk.decoding.rules.walk import follow
from mmsdk.decoding.tree import DraftTree


class Greedy(AcceptanceRule):
    """Accepts a candidate if it is the target's most probable token, of equal ones the lowest id.

    The tokens are those of greedy decoding.
    """

    lossless: ClassVar[bool] = True

    def verify(self, tree: DraftTree, logits: Tensor, uniforms: Tensor) -> Decision:
        """Walk down each tree; `uniforms` are ignored."""
        return follow(tree, logits, lambda scores, _: scores.argmax(-1))
