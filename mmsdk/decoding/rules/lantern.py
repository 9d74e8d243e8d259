"""LANTERN: a draft counts for the image tokens that look like it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mmsdk.decoding.base import CHAIN, CHOSEN, WITHOUT_REPLACEMENT, Decision
from mmsdk.decoding.rules.walk import SiblingRule, normalise, to_decision
from mmsdk.decoding.tree import DraftTree
from mmsdk.errors import unknown_name

MODES = ("paper", "official")
_CHUNK = 1024


def nearest_codes(codebook: Tensor, k: int) -> Tensor:
    """Return the `k` codes that are nearest to each code by Euclidean distance, nearest first, without itself.

    Args:
        codebook: `(codebook_size, dim)`.
        k: 1 to `codebook_size - 1`.

    Returns:
        `(codebook_size, k)` int64.

    Raises:
        ValueError: `k` is out of its range.
    """
    size = len(codebook)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < size:
        raise ValueError(f"k must be 1 to {size - 1}, one less than there are codes, got {k!r}.")
    parts = []
    for first in range(0, size, _CHUNK):
        # Directly, not through products, whose rounding would change the order of near codes.
        distances = torch.cdist(
            codebook[first : first + _CHUNK].double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        rows = torch.arange(len(distances), device=codebook.device)
        distances[rows, first + rows] = -1.0
        parts.append(torch.topk(distances, k + 1, largest=False).indices[:, 1:])
    return torch.cat(parts)


@dataclass
class _Node:
    target: Tensor
    draft: Tensor | None


@dataclass(eq=False)
class Lantern(SiblingRule[_Node]):
    """Accepts an image token with the probability of its neighbours in the codebook added to its own.

    Papers: "LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding" (Jang et al. 2024,
    arXiv 2410.03355); "LANTERN++" (Park et al. 2025, arXiv 2502.06352). Of the `k` nearest codes, as many are added,
    nearest first, as their sum stays within the bound. Not lossless: pictures differ from those of the target, the more
    the larger `delta` is.

    What a refused token takes with it depends on the mode. `"paper"`: the neighbours that were added to it. A chosen
    candidate then changes the distribution by what they sum up to, `delta` at most. `"official"`, as in the published
    code: where any were added, its `k + 1` nearest ones. Then codes that nobody offered are lost; with a `k` near the
    size of the codebook, almost all are.

    Drafts that were drawn without replacement are weighed with their distribution (the published static tree); chosen
    ones are accepted with the sum itself (the dynamic tree).

    Attributes:
        neighbours: `(codebook_size, at least k)` int64, codes nearest first, without itself: of `nearest_codes`.
        delta: up to 1, the largest sum that neighbours add (a bound on the total variation distance: LANTERN); above 1,
            they add up to `delta - 1` times the token's own probability (LANTERN++).
        k: neighbours that are considered.
        do_sample: False accepts the tokens that their sum makes the most probable; nothing is taken out.
        mode: one of the above.

    Raises:
        UnknownNameError: there is no such mode.
        ValueError: a value is out of its range.
    """

    neighbours: Tensor = field(repr=False)
    delta: float = 0.1
    k: int = 1000
    do_sample: bool = True
    mode: str = "paper"

    lossless: ClassVar[bool] = False
    drawings: ClassVar[tuple[str, ...]] = (CHOSEN, CHAIN, WITHOUT_REPLACEMENT)

    def __post_init__(self) -> None:
        if self.neighbours.ndim != 2 or self.neighbours.dtype != torch.int64:
            raise ValueError(
                "neighbours must be (codebook_size, k) int64, nearest codes first, as nearest_codes(codebook, k) "
                f"returns them; got {tuple(self.neighbours.shape)} {self.neighbours.dtype}."
            )
        size, known = self.neighbours.shape
        if isinstance(self.k, bool) or not isinstance(self.k, int) or not 1 <= self.k <= known:
            raise ValueError(f"k must be 1 to {known}, the neighbours that are known, got {self.k!r}.")
        if bool((self.neighbours < 0).any()) or bool((self.neighbours >= size).any()):
            raise ValueError(f"neighbours must be ids from 0 to {size - 1}.")
        if not 0 <= self.delta < float("inf"):
            raise ValueError(f"delta must be finite and at least 0, got {self.delta!r}.")
        if self.mode not in MODES:
            raise unknown_name("mode", self.mode, list(MODES))

    def check(self, tree: DraftTree) -> None:
        """Raise `ValueError` for siblings that were drawn with replacement."""
        if tree.with_replacement:
            raise ValueError("Lantern needs siblings that were chosen, or drawn without replacement.")

    def enter(self, target: Tensor, draft: Tensor | None, num_children: Tensor) -> _Node:
        """Return both distributions."""
        if target.shape[-1] != len(self.neighbours):
            raise ValueError(
                f"The neighbours are those of {len(self.neighbours)} codes, but the target chooses among "
                f"{target.shape[-1]}: they do not belong together."
            )
        return _Node(target, draft)

    def acceptance(self, node: _Node, tokens: Tensor) -> Tensor:
        """Return the sum of the token's and its neighbours' probabilities over the draft's."""
        relaxed = self.relaxed(node.target, tokens)[0]
        if node.draft is None:
            return relaxed
        draft = node.draft.gather(1, tokens[:, None])[:, 0]
        return relaxed / draft.clamp_min(torch.finfo(draft.dtype).tiny)

    def relaxed(self, probs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return what tokens and their neighbours have of the probabilities.

        Args:
            probs: `(batch, vocab)`.
            tokens: `(batch,)`.

        Returns:
            The sums `(batch,)`, and which of the `k` neighbours they hold, bool `(batch, k)`.
        """
        own = probs.gather(1, tokens[:, None])
        near = self._near(tokens)
        if not self.delta:
            return own[:, 0], torch.zeros_like(near, dtype=torch.bool)
        sums = probs.gather(1, near).cumsum(1)
        # Sums do not fall, so that those within the bound come first.
        is_within = sums <= (self.delta if self.delta <= 1 else (self.delta - 1) * own)
        return own[:, 0] + torch.where(is_within, sums, 0.0).amax(1), is_within

    def refuse(self, node: _Node, tokens: Tensor, refused: Tensor) -> None:
        """Take out the token and the neighbours of the mode, and the draft's share of all others."""
        taken = tokens[:, None]
        relaxed, is_within = self.relaxed(node.target, tokens)
        if self.mode == "paper":
            near = torch.where(is_within, self._near(tokens), taken)
            # What the token was weighed as: the neighbours' share is its own.
            target = node.target.scatter(1, near, 0.0).scatter(1, taken, relaxed[:, None])
        else:
            near = torch.where(is_within[:, :1], self.neighbours.to(tokens.device)[tokens, : self.k + 1], taken)
            target = node.target
        if node.draft is None:
            left = node.target.scatter(1, taken, 0.0).scatter(1, near, 0.0)
        else:
            share = node.draft
            if self.mode == "official":
                share = torch.where(is_within[:, :1], share.scatter(1, near, 0.0), share)
            left = (target - share).clamp_min(0)
            node.draft = torch.where(refused[:, None], normalise(node.draft.scatter(1, taken, 0.0)), node.draft)
        left = torch.where(left.sum(1, keepdim=True) > 0, normalise(left), 1 / left.shape[1])
        node.target = torch.where(refused[:, None], left, node.target)

    def _near(self, tokens: Tensor) -> Tensor:
        """Return the neighbours `(batch, k)` that are considered."""
        return self.neighbours.to(tokens.device)[tokens, : self.k]

    def rest(self, node: _Node) -> Tensor:
        """Return what is left of the target."""
        return node.target

    def verify(self, tree: DraftTree, logits: Tensor, uniforms: Tensor) -> Decision:
        """Walk down each tree; see `SiblingRule`. Without sampling, take the longest path of most probable tokens."""
        if self.do_sample:
            return super().verify(tree, logits, uniforms)
        self.check(tree)
        rows = torch.arange(len(logits), device=logits.device)
        is_accepted = torch.zeros_like(tree.tokens, dtype=torch.bool)
        is_accepted[:, 0] = True
        for node in range(1, tree.num_nodes):
            parent = tree.parents[:, node].clamp_min(0)
            known = self.enter(torch.softmax(logits[rows, parent].double(), -1), None, rows)
            token = tree.tokens[:, node]
            with_neighbours = known.target.scatter(1, token[:, None], self.relaxed(known.target, token)[0][:, None])
            wins = with_neighbours.argmax(1) == token
            is_accepted[:, node] = wins & tree.is_candidate[:, node] & is_accepted[rows, parent]
        last = torch.where(is_accepted, tree.depths, -1).argmax(1)
        depth = tree.depths[rows, last]
        path = torch.full((len(rows), int(depth.max())), -1, device=logits.device)
        bonus, node_ = logits[rows, last].argmax(-1), last
        for level in range(path.shape[1], 0, -1):
            is_here = depth >= level
            path[:, level - 1] = torch.where(is_here, node_, -1)
            node_ = torch.where(is_here, tree.parents[rows, node_], node_)
        return to_decision(list(path.unbind(1)), bonus)
