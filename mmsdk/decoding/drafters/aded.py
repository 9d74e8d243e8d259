"""ADED: a search through the tri-grams of the text so far."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator

from mmsdk.decoding.drafters.rows import Row, RowDrafter, check_at_least
from mmsdk.decoding.tree import DraftTree

_Successors = dict[int, float]


@dataclass(eq=False)
class _TrigramRow(Row):
    successors: dict[tuple[int, int], _Successors] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Node:
    """A node of the search: what it is, and how often and with which values the search came through it."""

    key: tuple[int, int]
    depth: int
    prior: float
    probability: float
    parent: _Node | None
    visits: int = 0
    total: float = 0.0
    children: list[_Node] | None = None


@dataclass(eq=False)
class ADED(RowDrafter[_TrigramRow]):
    """Grows a tree of candidates by a Monte Carlo tree search over weights of tri-grams that follow the text.

    Paper: "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (Liu et al. 2024, arXiv
    2407.12021). Every pair of tokens has up to `num_successors` weighted successors. Each verified step adds
    `increment`, up to `max_weight`, to every tri-gram among the last `window` tokens; a new successor takes the place
    of the lightest one. A visit of the search follows the child with the largest
    `mean + (c1 + ln((N + c2 + 1) / c2)) P sqrt(N) / (1 + n)`, of prior `P` (its share of its siblings' weight) and
    visits `N` of the parent and `n` of the child, to the first unvisited node. It backs up that node's probability, the
    product of the priors on its path. The tree holds the most visited nodes of the `num_paths` most visited leaves.

    The published code begins with tri-grams of a corpus; this begins with those of the prompt, weighted in the same
    way, with their relative frequency after the pair. Deterministic: what is equal comes in the order in which the text
    brought it.

    Stores the ids and the weights of the tri-grams of each row. Cost: `iterations` descents of at most `max_depth`
    steps in Python, one to two milliseconds for each row; no forward.

    Attributes:
        increment: added to a tri-gram's weight.
        max_weight: largest weight.
        window: last tokens whose tri-grams gain weight at a step.
        num_successors: successors remembered for each pair of tokens.
        iterations: visits of the search.
        max_depth: tokens of the longest path.
        num_paths: leaves whose paths make the tree.
        max_nodes: candidates of a proposal, at most.
        c1: constant part of the weight of exploration.
        c2: visits after which its logarithmic part grows.

    Raises:
        ValueError: a setting is out of its range.
    """

    increment: float = 0.04
    max_weight: float = 3.0
    window: int = 16
    num_successors: int = 12
    iterations: int = 150
    max_depth: int = 4
    num_paths: int = 24
    max_nodes: int = 64
    c1: float = 32.0
    c2: float = 8.0

    def __post_init__(self) -> None:
        check_at_least("window", self.window, 3)
        for name in ("num_successors", "iterations", "max_depth", "num_paths", "max_nodes"):
            check_at_least(name, getattr(self, name), 1)
        if not 0 < self.increment <= self.max_weight:
            raise ValueError(
                f"increment must be above 0 and at most max_weight, got {self.increment!r} and {self.max_weight!r}."
            )
        if self.c1 < 0 or self.c2 <= 0:
            raise ValueError(f"c1 must be at least 0 and c2 positive, got {self.c1!r} and {self.c2!r}.")

    def start_row(self, ids: list[int]) -> _TrigramRow:
        """Return the tri-grams of a new sequence, weighted by how often each follows its pair."""
        row = _TrigramRow(ids)
        counts: dict[tuple[int, int], Counter[int]] = {}
        for first, second, third in zip(ids, ids[1:], ids[2:], strict=False):
            counts.setdefault((first, second), Counter())[third] += 1
        for pair, thirds in counts.items():
            row.successors[pair] = {
                third: count / thirds.total() for third, count in thirds.most_common(self.num_successors)
            }
        return row

    def extend_row(self, row: _TrigramRow, ids: list[int]) -> None:
        """Add weight to the tri-grams among the last tokens."""
        row.ids += ids
        last = row.ids[-self.window :]
        for first, second, third in zip(last, last[1:], last[2:], strict=False):
            weights = row.successors.setdefault((first, second), {})
            if third not in weights and len(weights) == self.num_successors:
                del weights[min(weights, key=weights.__getitem__)]
            weights[third] = min(weights.get(third, 0.0) + self.increment, self.max_weight)

    def propose_row(self, row: _TrigramRow, budget: int, generators: Sequence[Generator] | None) -> DraftTree:
        """Return the tree of one row; nothing is drawn."""
        visited = self._search(row)
        inner = {id(node.parent) for node in visited}
        leaves = sorted((node for node in visited if id(node) not in inner), key=lambda node: -node.visits)
        kept: set[int] = set()
        for leaf in leaves[: self.num_paths]:
            node: _Node | None = leaf
            while node is not None:
                kept.add(id(node))
                node = node.parent
        # No node is visited more often, or for the first time earlier, than its parent: parents come first.
        nodes = sorted((node for node in visited if id(node) in kept), key=lambda node: -node.visits)
        nodes = nodes[: min(budget, self.max_nodes)]
        where = {id(node): i for i, node in enumerate(nodes, start=1)}
        tokens = [row.ids[-1], *(node.key[1] for node in nodes)]
        parents = [-1, *(where.get(id(node.parent), 0) for node in nodes)]
        return DraftTree(torch.tensor([tokens], device=self.device), torch.tensor([parents], device=self.device))

    def _search(self, row: _TrigramRow) -> list[_Node]:
        """Return the visited nodes, without the root, in the order of their first visits."""
        if len(row.ids) < 2:
            return []
        root = _Node((row.ids[-2], row.ids[-1]), depth=0, prior=1.0, probability=1.0, parent=None)
        visited: list[_Node] = []
        for _ in range(self.iterations):
            node = root
            while node.depth < self.max_depth:
                if node.children is None:
                    node.children = self._expand(row, node)
                if not node.children:
                    break
                explore = self.c1 + math.log((node.visits + self.c2 + 1) / self.c2)
                explore *= math.sqrt(node.visits)
                node = max(
                    node.children,
                    key=lambda child: child.total / max(child.visits, 1) + explore * child.prior / (1 + child.visits),
                )
                if not node.visits:
                    visited.append(node)
                    break
            if node is root:
                break
            value = node.probability
            above: _Node | None = node
            while above is not None:
                above.visits += 1
                above.total += value
                above = above.parent
        return visited

    def _expand(self, row: _TrigramRow, node: _Node) -> list[_Node]:
        weights = row.successors.get(node.key, {})
        total = sum(weights.values())
        ranked = sorted(weights.items(), key=lambda item: -item[1])
        return [
            _Node(
                key=(node.key[1], token),
                depth=node.depth + 1,
                prior=weight / total,
                probability=node.probability * weight / total,
                parent=node,
            )
            for token, weight in ranked
        ]
