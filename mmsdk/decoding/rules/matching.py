"""Matching: the target draws as it would without drafts, and a draft that says the same saves a forward."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mmsdk.decoding.base import AcceptanceRule, Decision
from mmsdk.decoding.rules.walk import follow
from mmsdk.decoding.sampling import sample_inverse_cdf
from mmsdk.decoding.tree import DraftTree


class Matching(AcceptanceRule):
    """Draws a token after each accepted node, with the number of its place, and accepts the child that says it.

    Whatever the drafts are, the tokens are the very ones that sampling without them draws from the same numbers. Of
    drafts that are chosen, not drawn, it accepts as many as any lossless rule can: each with its probability.
    """

    lossless: ClassVar[bool] = True
    by_position: ClassVar[bool] = True

    def verify(self, tree: DraftTree, logits: Tensor, uniforms: Tensor) -> Decision:
        """Walk down each tree.

        Args:
            tree: the drafts.
            logits: `(batch, n, vocab)`, what the target says after each node, processed.
            uniforms: `(batch, n)` in [0, 1): the i-th draws the i-th token after the root.
        """
        uniforms = uniforms.to(logits.device)
        return follow(
            tree, logits, lambda scores, depth: sample_inverse_cdf(torch.softmax(scores, -1), uniforms[:, depth])
        )
