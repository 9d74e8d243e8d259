"""Drafts of what a model may say next: trees of token ids, one for each sequence of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class DraftTree:
    """Candidates for the next tokens of each sequence of a batch.

    Node 0 is the root: the last token of the sequence, which is no candidate. Every other node continues its parent, so
    that a chain is a tree in which each node has one child. Siblings are examined in the order of their nodes.

    Attributes:
        tokens: `(batch, n)` int64.
        parents: `(batch, n)` int64, index of the parent, smaller than that of the node; -1 at the root, and at nodes
            that only fill up the trees of a batch to the same size.
        probs: `(batch, n, vocab)`, the distribution that the children of each node were drawn from; None where they
            were not drawn but chosen.
        with_replacement: whether siblings were drawn independently of each other, and may be equal; else each one from
            what was left of the distribution.

    Raises:
        ValueError: a shape is wrong, or a parent does not come before its child.
    """

    tokens: Tensor
    parents: Tensor
    probs: Tensor | None = None
    with_replacement: bool = False

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or not self.tokens.numel() or self.tokens.shape != self.parents.shape:
            raise ValueError(
                f"tokens and parents must be (batch, nodes), got {tuple(self.tokens.shape)} and "
                f"{tuple(self.parents.shape)}."
            )
        index = torch.arange(self.num_nodes, device=self.parents.device)
        if bool((self.parents[:, 0] != -1).any()) or bool((self.parents[:, 1:] >= index[1:]).any()):
            raise ValueError("Node 0 must be the root, with parent -1, and every parent must come before its children.")
        if self.probs is not None and self.probs.shape[:2] != self.tokens.shape:
            raise ValueError(
                f"probs must be {tuple(self.tokens.shape)} and a vocabulary, got {tuple(self.probs.shape)}."
            )

    @classmethod
    def chain(cls, root: Tensor, candidates: Tensor, probs: Tensor | None = None) -> DraftTree:
        """Make trees of one path each.

        Args:
            root: `(batch,)`, last token of each sequence.
            candidates: `(batch, k)`, the tokens that follow it.
            probs: `(batch, k, vocab)`, the distribution that each of them was drawn from.
        """
        tokens = torch.cat([root[:, None], candidates], 1)
        parents = torch.arange(-1, tokens.shape[1] - 1, device=tokens.device).expand_as(tokens)
        return cls(tokens, parents, None if probs is None else F.pad(probs, (0, 0, 0, 1)))

    @classmethod
    def stack(cls, trees: Sequence[DraftTree]) -> DraftTree:
        """Join trees to a batch; smaller ones are filled up with nodes that are no candidates.

        Raises:
            ValueError: some have `probs` and some have not, or siblings were drawn differently.
        """
        if len({(tree.probs is None, tree.with_replacement) for tree in trees}) != 1:
            raise ValueError("Trees of a batch must be drawn in the same way; got some with and some without `probs`.")
        most = max(tree.num_nodes for tree in trees)
        room = [most - tree.num_nodes for tree in trees]
        tokens = torch.cat([F.pad(tree.tokens, (0, pad)) for tree, pad in zip(trees, room, strict=True)])
        parents = torch.cat([F.pad(tree.parents, (0, pad), value=-1) for tree, pad in zip(trees, room, strict=True)])
        probs = [F.pad(t.probs, (0, 0, 0, pad)) for t, pad in zip(trees, room, strict=True) if t.probs is not None]
        return cls(tokens, parents, torch.cat(probs) if probs else None, trees[0].with_replacement)

    @property
    def num_nodes(self) -> int:
        """Nodes of each tree, the root included."""
        return self.tokens.shape[1]

    @cached_property
    def is_candidate(self) -> Tensor:
        """Which nodes are candidates, bool `(batch, n)`."""
        return self.parents >= 0

    @cached_property
    def mask(self) -> Tensor:
        """Which nodes are a node itself or its ancestors, bool `(batch, n, n)`: what the node may attend to."""
        batch, nodes = self.tokens.shape
        eye = torch.eye(nodes, dtype=torch.bool, device=self.tokens.device)
        mask = eye.expand(batch, nodes, nodes).clone()
        rows = torch.arange(batch, device=self.tokens.device)
        for node in range(1, nodes):
            parent = self.parents[:, node]
            mask[:, node] |= mask[rows, parent.clamp_min(0)] & (parent >= 0)[:, None]
        return mask

    @cached_property
    def depths(self) -> Tensor:
        """Steps from the root to each node, `(batch, n)` int64."""
        return self.mask.sum(-1) - 1

    def children(self, nodes: Tensor) -> Tensor:
        """Return which nodes are children of `nodes` `(batch,)`, bool `(batch, n)`; of node -1: none."""
        return self.is_candidate & (self.parents == nodes[:, None])
