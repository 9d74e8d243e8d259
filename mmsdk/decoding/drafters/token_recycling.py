"""Token Recycling: the candidates that the target considered after a token are proposed when the token comes again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from mmsdk.decoding.base import Drafter, Prefill, Verified
from mmsdk.decoding.drafters.rows import check_at_least, check_prompts, check_verified
from mmsdk.decoding.tree import DraftTree

# The published tree. Each node is named by the ranks on its path: "010" is the best successor of the second best
# successor of the best successor of the root.
STATIC_TREE: tuple[tuple[int, ...], ...] = tuple(
    tuple(int(rank) for rank in path)
    for path in (
        "0 1 2 3 4 5 6 7 "
        "00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70 "
        "000 001 002 003 004 005 006 007 010 011 012 020 021 030 040 050 060 070 100 101 110 200 300 400 500 "
        "0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 3000 "
        "00000 00001 00002 00010 00020 00100 01000 10000 "
        "000000 000001 000100"
    ).split()
)


@dataclass(eq=False)
class TokenRecycling(Drafter):
    """Reads a static tree of candidates out of a table of each token's most probable successors.

    Paper: "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling" (Luo et
    al. 2024, arXiv 2408.08696). Row `t` of the table holds the `top_k` ids that the target found most probable when it
    last saw token `t`, as an accepted or a refused node; 0 until then. A node's token is the table's entry at its
    parent's token and its own rank. Deterministic: of equal logits the lowest id comes first, and of several nodes of
    the same token the last one is remembered.

    A smaller budget takes the nodes with the most descendants in the tree: those are its best ones by its own measure,
    and a node never comes without its parent.

    Stores `vocab_size * top_k` int32 for each row (1.5 MB at 49,152 ids), and nothing of the sequence but its last
    token. Cost: one pass over the verified logits, and a look-up for each level of the tree; no forward.

    Attributes:
        vocab_size: size of the target's vocabulary.
        top_k: successors remembered for each token.
        tree: paths of ranks, without the root; nodes of a tree stand in order of depth, then in this order.
        initial_adjacency: the table `(vocab_size, top_k)` that every row begins with, such as `adjacency[0]` of an
            earlier sequence, which is the paper's hot start; None: zeros.
        adjacency: the table of each row, `(batch, vocab_size, top_k)` int32.

    Raises:
        ValueError: the tree has a rank of `top_k` or above, a path twice, or one without its parent; or a size is
            wrong.
    """

    vocab_size: int
    top_k: int = 8
    tree: Sequence[Sequence[int]] = field(default=STATIC_TREE, repr=False)
    initial_adjacency: Tensor | None = field(default=None, repr=False)
    adjacency: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_at_least("top_k", self.top_k, 1)
        check_at_least("vocab_size", self.vocab_size, self.top_k)
        self._paths = sorted((tuple(path) for path in self.tree), key=len)
        known = {()} | set(self._paths)
        if len(known) != len(self._paths) + 1:
            raise ValueError("tree must name each node once, and not the root (the empty path).")
        for path in self._paths:
            if path[:-1] not in known:
                raise ValueError(f"tree has the node {path} without its parent {path[:-1]}.")
            if not 0 <= path[-1] < self.top_k:
                raise ValueError(f"tree has the node {path}, but ranks must be 0 to {self.top_k - 1} (top_k - 1).")
        initial = self.initial_adjacency
        if initial is not None:
            if initial.shape != (self.vocab_size, self.top_k):
                raise ValueError(
                    f"initial_adjacency must be {(self.vocab_size, self.top_k)}, got {tuple(initial.shape)}."
                )
            if bool((initial < 0).any()) or bool((initial >= self.vocab_size).any()):
                raise ValueError(f"initial_adjacency must hold ids from 0 to {self.vocab_size - 1}.")
        self._subtrees: dict[int, _Subtree] = {}

    def reset(self, prompts: Sequence[Tensor], prefill: Prefill | None = None) -> None:
        """Begin new sequences, each with a table of its own.

        Raises:
            ValueError: a prompt is empty, of another shape or dtype, or has ids outside the vocabulary.
        """
        check_prompts(prompts, self.vocab_size)
        device = prompts[0].device
        self._last = torch.stack([prompt[-1] for prompt in prompts])
        self._subtrees = {}
        shape = (len(prompts), self.vocab_size, self.top_k)
        self.adjacency = torch.zeros(shape, dtype=torch.int32, device=device)
        if self.initial_adjacency is not None:
            self.adjacency += self.initial_adjacency.to(self.adjacency)

    def propose(self, budget: int, generators: Sequence[Generator] | None = None) -> DraftTree:
        """Return a tree for each row, with the row's last token as its root and at most `budget` candidates.

        Raises:
            RuntimeError: `reset` was not called before.
            ValueError: the budget is negative.
        """
        check_at_least("budget", budget, 0)
        if self.adjacency is None:
            raise RuntimeError("The drafter has no sequences: call `reset(prompts)` first.")
        subtree = self._subtree(budget)
        rows = torch.arange(len(self._last), device=self._last.device)[:, None]
        tokens = self._last[:, None].repeat(1, len(subtree.parents))
        for begin, end in subtree.levels:
            parents = tokens[:, subtree.parents[begin:end]]
            tokens[:, begin:end] = self.adjacency[rows, parents, subtree.ranks[begin:end]].long()
        return DraftTree(tokens, subtree.parents.expand_as(tokens))

    def observe(self, verified: Verified) -> None:
        """Remember the successors of every node, accepted or not.

        Raises:
            RuntimeError: `reset` was not called before.
            ValueError: the number of rows or the vocabulary differs.
        """
        check_verified(verified, 0 if self.adjacency is None else len(self.adjacency), self.vocab_size)
        seen = verified.tree.is_candidate.clone()
        seen[:, 0] = True
        self.learn(verified.tree.tokens, verified.logits, seen)
        self._last = verified.decision.bonus.clone()

    def learn(self, tokens: Tensor, logits: Tensor, mask: Tensor | None = None) -> None:
        """Remember the successors of tokens, such as those of the prompts.

        Args:
            tokens: `(batch, n)` int64.
            logits: `(batch, n, vocab_size)`, what the target says after each of them.
            mask: `(batch, n)` bool, which of them are no padding; None: all.

        Raises:
            RuntimeError: `reset` was not called before.
            ValueError: the shapes do not fit the tables.
        """
        if self.adjacency is None:
            raise RuntimeError("The drafter has no sequences: call `reset(prompts)` first.")
        if len(tokens) != len(self.adjacency) or logits.shape != (*tokens.shape, self.vocab_size):
            raise ValueError(
                f"Expected tokens ({len(self.adjacency)}, n) and logits ({len(self.adjacency)}, n, {self.vocab_size}), "
                f"got {tuple(tokens.shape)} and {tuple(logits.shape)}."
            )
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        # Writing to an index twice has no defined order: only the last node of each token is written.
        again = (tokens[:, :, None] == tokens[:, None, :]) & mask[:, None, :]
        row, node = (mask & ~again.triu(1).any(-1)).nonzero(as_tuple=True)
        self.adjacency[row, tokens[row, node]] = top_ids(logits, self.top_k)[row, node].int()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in that order; the others are finished."""
        if self.adjacency is not None:
            index = torch.tensor(rows, dtype=torch.int64, device=self._last.device)
            self._last, self.adjacency = self._last[index], self.adjacency[index]

    def _subtree(self, budget: int) -> _Subtree:
        if budget not in self._subtrees:
            best = sorted(
                range(len(self._paths)),
                key=lambda i: -sum(path[: len(self._paths[i])] == self._paths[i] for path in self._paths),
            )
            nodes = [(), *(self._paths[i] for i in sorted(best[:budget]))]
            where = {path: i for i, path in enumerate(nodes)}
            depths = [len(path) for path in nodes]
            starts = [depths.index(depth) for depth in range(depths[-1] + 1)]
            device = self._last.device
            self._subtrees[budget] = _Subtree(
                parents=torch.tensor([where[path[:-1]] if path else -1 for path in nodes], device=device),
                ranks=torch.tensor([path[-1] if path else 0 for path in nodes], device=device),
                levels=list(zip(starts[1:], [*starts[2:], len(nodes)], strict=True)) if len(nodes) > 1 else [],
            )
        return self._subtrees[budget]


@dataclass(frozen=True)
class _Subtree:
    """Parents and ranks of the nodes `(n,)`, the root's included, and where each level below it begins and ends."""

    parents: Tensor
    ranks: Tensor
    levels: list[tuple[int, int]]


def top_ids(logits: Tensor, k: int) -> Tensor:
    """Return ids `(..., k)` of the largest of `logits` `(..., vocab)` in descending order, of equal ones the lowest.

    The largest `k` lie in the `k` blocks with the largest maxima, which are found in the same way: one pass over the
    logits and searches among few values, several times as fast as `torch.topk` (which leaves the order of equal values
    open).
    """
    size = logits.shape[-1]
    if size <= 16 * k:
        return _largest(logits, k)
    block = 1 << (math.isqrt(size // k).bit_length() - 1)
    end = size - size % block
    maxima = logits[..., :end].unflatten(-1, (-1, block)).amax(-1)
    first = top_ids(maxima, k).sort(-1).values * block
    candidates = (first[..., None] + torch.arange(block, device=logits.device)).flatten(-2)
    if end < size:
        rest = torch.arange(end, size, device=logits.device)
        candidates = torch.cat([candidates, rest.expand(*logits.shape[:-1], -1)], -1)
    return candidates.gather(-1, top_ids(logits.gather(-1, candidates), k))


def _largest(values: Tensor, k: int) -> Tensor:
    """Return the indices `(..., k)` of the largest values in descending order; of equal values, the lowest."""
    top = values.topk(min(k + 1, values.shape[-1]))
    indices = top.indices[..., :k]
    tied = (top.values[..., 1:] == top.values[..., :-1]).any(-1)
    if bool(tied.any()):
        indices[tied] = values[tied].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return indices
