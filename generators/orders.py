"""The order in which masked generators predict positions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class OrderStep(NamedTuple):
    """One step of a generation.

    Attributes:
        step: index of the step.
        known: `(batch, k)`, positions that are known before it, ascending.
        positions: `(batch, n)`, positions that it predicts, ascending.
        progress: part of all positions that is done after it, as guidance counts it.
    """

    step: int
    known: Tensor
    positions: Tensor
    progress: float


@dataclass(frozen=True)
class RandomCosineMask:
    """Random positions, few at first and then more and more (MaskGIT: Chang et al., 2022; as MAR does it).

    After step s of N, `floor(n cos(pi (s + 1) / 2N))` of n positions are left, at least 1 less than before it, and at
    least 1 until the last step takes all. Steps that would predict nothing, of more steps than positions, are left out.

    Args:
        num_iter: number of steps, at least 1.

    Raises:
        ValueError: `num_iter` is out of its range.
    """

    num_iter: int

    def __post_init__(self) -> None:
        if isinstance(self.num_iter, bool) or not isinstance(self.num_iter, int) or self.num_iter < 1:
            raise ValueError(f"num_iter must be an integer of at least 1, got {self.num_iter!r}.")

    def lengths(self, num_positions: int) -> list[int]:
        """Return how many positions the schedule leaves after each step; 1 after the last, as published."""
        lengths, left = [], num_positions
        for step in range(self.num_iter):
            wanted = math.floor(num_positions * math.cos(math.pi / 2 * (step + 1) / self.num_iter))
            left = max(1, min(left - 1, wanted))
            lengths.append(left)
        return lengths

    def steps(self, orders: Tensor, num_tokens: int) -> Iterator[OrderStep]:
        """Go through the steps that predict something.

        Args:
            orders: `(batch, n)` int64: for each image its positions to predict; those that stand first come last.
            num_tokens: positions of an image. Those that are not in `orders` are known from the beginning.
        """
        batch, left = orders.shape
        masked = torch.zeros(batch, num_tokens, dtype=torch.bool, device=orders.device).scatter_(1, orders, True)
        for step, length in enumerate(self.lengths(left)):
            kept = 0 if step == self.num_iter - 1 else length
            if kept == left:
                continue
            positions = orders[:, kept:left].sort(-1).values
            known = (~masked).nonzero()[:, 1].view(batch, -1)
            yield OrderStep(step, known, positions, (num_tokens - length) / num_tokens)
            masked = masked.scatter(1, positions, False)
            left = kept
