"""What drafters share: checks of what they are given, and one that keeps the rows of a batch apart."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Generator, Tensor

from mmsdk.decoding.base import Drafter, Prefill, Verified
from mmsdk.decoding.tree import DraftTree


def check_at_least(name: str, value: int, minimum: int) -> None:
    """Raise `ValueError` unless `value` is an integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}.")


def check_prompts(prompts: Sequence[Tensor], vocab_size: int | None = None) -> None:
    """Raise `ValueError` unless these are 1-D int64 tensors of at least one id each, below a known `vocab_size`."""
    if not len(prompts):
        raise ValueError("Expected the prompt of at least one row, got none.")
    for i, prompt in enumerate(prompts):
        if prompt.ndim != 1 or not len(prompt) or prompt.dtype != torch.int64:
            raise ValueError(
                f"Prompt {i} must be a 1-D int64 tensor of at least one id, got {tuple(prompt.shape)} {prompt.dtype}."
            )
        low, high = (int(value) for value in prompt.aminmax())
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            limit = "at least 0" if vocab_size is None else f"0 to {vocab_size - 1}, the drafter's vocabulary"
            raise ValueError(f"Prompt {i} has ids from {low} to {high}; accepted are {limit}.")


def check_verified(verified: Verified, num_rows: int, vocab_size: int | None = None) -> None:
    """Raise where a verification is of another number of rows, or of another vocabulary, than the drafter's.

    Raises:
        RuntimeError: `reset` was not called before.
        ValueError: the numbers differ.
    """
    if not num_rows:
        raise RuntimeError("The drafter has no sequences: call `reset(prompts)` first.")
    batch, _, target_size = verified.logits.shape
    if batch != num_rows:
        raise ValueError(f"The drafter has {num_rows} rows, but {batch} were verified.")
    probs = verified.tree.probs
    for size in (vocab_size, None if probs is None else probs.shape[-1]):
        if size is not None and size != target_size:
            raise ValueError(
                f"The drafter's vocabulary has {size} ids, the target's {target_size}: drafter and target must have "
                "the same tokenizer and the same number of logits."
            )


def new_tokens(verified: Verified) -> list[list[int]]:
    """Return, for each row, the tokens of the accepted path and the bonus token."""
    decision = verified.decision
    path = verified.tree.tokens.gather(1, decision.path.clamp_min(0))
    table = torch.cat([path, decision.bonus[:, None], decision.lengths[:, None]], 1).tolist()
    return [[*row[: row[-1]], row[-2]] for row in table]


@dataclass(eq=False)
class Row:
    """One sequence; drafters add what else they remember of it.

    Attributes:
        ids: the prompt and all that was accepted since.
    """

    ids: list[int]


RowT = TypeVar("RowT", bound=Row)


class RowDrafter(Drafter, Generic[RowT]):
    """Drafts for each row on its own, so that a row's trees do not depend on the rest of the batch.

    Attributes:
        vocab_size: size of the vocabulary that the drafter knows; None where it takes any ids.
        device: where the prompts were, and where trees are made.
    """

    vocab_size: int | None = None
    device: torch.device = torch.device("cpu")
    _rows: Sequence[RowT] = ()

    @abstractmethod
    def start_row(self, ids: list[int]) -> RowT:
        """Return what is remembered of a new sequence."""

    @abstractmethod
    def propose_row(self, row: RowT, budget: int, generators: Sequence[Generator] | None) -> DraftTree:
        """Return the tree of one row, on `device`; `generators` holds that row's, if any were given."""

    def extend_row(self, row: RowT, ids: list[int]) -> None:
        """Note that the sequence goes on with `ids`."""
        row.ids += ids

    def reset(self, prompts: Sequence[Tensor], prefill: Prefill | None = None) -> None:
        """Begin new sequences: one 1-D int64 tensor for each row, without padding, the last token included.

        Raises:
            ValueError: a prompt is empty, of another shape or dtype, or has ids outside the vocabulary.
        """
        check_prompts(prompts, self.vocab_size)
        self.device = prompts[0].device
        self._rows = [self.start_row(prompt.tolist()) for prompt in prompts]

    def propose(self, budget: int, generators: Sequence[Generator] | None = None) -> DraftTree:
        """Return a tree for each row, with the row's last token as its root and at most `budget` candidates.

        Raises:
            RuntimeError: `reset` was not called before.
            ValueError: the budget is negative, or there is not one generator for each row.
        """
        check_at_least("budget", budget, 0)
        if not self._rows:
            raise RuntimeError("The drafter has no sequences: call `reset(prompts)` first.")
        if generators is not None and len(generators) != len(self._rows):
            raise ValueError(f"Expected one generator for each of {len(self._rows)} rows, got {len(generators)}.")
        return DraftTree.stack(
            [
                self.propose_row(row, budget, None if generators is None else [generators[i]])
                for i, row in enumerate(self._rows)
            ]
        )

    def observe(self, verified: Verified) -> None:
        """Note the accepted path and the bonus token of each row, which now end the sequences.

        Raises:
            RuntimeError: `reset` was not called before.
            ValueError: the number of rows or the vocabulary differs.
        """
        check_verified(verified, len(self._rows), self.vocab_size)
        for row, ids in zip(self._rows, new_tokens(verified), strict=True):
            self.extend_row(row, ids)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in that order; the others are finished."""
        self._rows = [self._rows[row] for row in rows]
