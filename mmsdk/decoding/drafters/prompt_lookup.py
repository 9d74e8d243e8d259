"""Prompt lookup: what followed the last few tokens when they came before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator

from mmsdk.decoding.drafters.rows import Row, RowDrafter, check_at_least
from mmsdk.decoding.tree import DraftTree


@dataclass(eq=False)
class _LookupRow(Row):
    follows: dict[tuple[int, ...], int] = field(default_factory=dict)


@dataclass(eq=False)
class PromptLookup(RowDrafter[_LookupRow]):
    """Copies what followed the most recent earlier occurrence of the longest n-gram that ends the sequence.

    Papers: "Inference with Reference" (Yang et al. 2023, arXiv 2304.04487); prompt lookup decoding (Saxena 2023).
    A copy that reaches the end of the sequence goes on with what it has copied itself, so that repetitions are
    continued; without an earlier occurrence the tree is the root alone. Deterministic.

    Stores, for each n-gram of a sequence, where it was last followed by a token. Cost: one look-up for each length of
    n-gram, whatever the length of the sequence; no forward.

    Attributes:
        max_ngram: tokens of the longest n-gram that is looked for.
        min_ngram: tokens of the shortest one.
        num_tokens: candidates of a proposal, at most.

    Raises:
        ValueError: a setting is below 1, or `min_ngram` is above `max_ngram`.
    """

    max_ngram: int = 3
    min_ngram: int = 1
    num_tokens: int = 10

    def __post_init__(self) -> None:
        check_at_least("min_ngram", self.min_ngram, 1)
        check_at_least("max_ngram", self.max_ngram, self.min_ngram)
        check_at_least("num_tokens", self.num_tokens, 1)

    def start_row(self, ids: list[int]) -> _LookupRow:
        """Return the index of a new sequence."""
        row = _LookupRow([])
        self.extend_row(row, ids)
        return row

    def extend_row(self, row: _LookupRow, ids: list[int]) -> None:
        """Index what the new tokens follow."""
        first = len(row.ids)
        row.ids += ids
        for i in range(first, len(row.ids)):
            for n in range(self.min_ngram, min(self.max_ngram, i) + 1):
                row.follows[tuple(row.ids[i - n : i])] = i

    def propose_row(self, row: _LookupRow, budget: int, generators: Sequence[Generator] | None) -> DraftTree:
        """Return the chain of one row; nothing is drawn."""
        candidates: list[int] = []
        for n in range(min(self.max_ngram, len(row.ids)), self.min_ngram - 1, -1):
            start = row.follows.get(tuple(row.ids[-n:]))
            if start is not None:
                period = len(row.ids) - start
                candidates = [row.ids[start + i % period] for i in range(min(self.num_tokens, budget))]
                break
        root = torch.tensor(row.ids[-1:], device=self.device)
        return DraftTree.chain(root, torch.tensor([candidates], dtype=torch.int64, device=self.device))
