"""What the generators share: the state of a backbone, and the trace of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


class BackboneState(Protocol):
    """What a backbone remembers of its sequences; it belongs to one generation and is changed in place.

    Attributes:
        length: number of positions that are held, the same for every row.
    """

    length: int

    def commit(self, path: Sequence[int] | Tensor) -> None:
        """Keep only the positions `path` `(k,)` of the last block, in that order; offsets count from its start."""

    def rollback(self, length: int) -> None:
        """Forget everything from position `length` on."""

    def select_rows(self, rows: slice | Sequence[int] | Tensor) -> None:
        """Keep only these rows, in that order."""


@dataclass
class Trace:
    """What a generation executed, so that a saving can be counted and not only timed.

    Attributes:
        keep_logits: also keep the logits of every step; costs `num_steps * batch * codebook_size` floats.
        rows: rows of each forward, conditional and unconditional.
        positions: positions per row of each forward.
        guidance: guidance scale of each step.
        logits: per step `(batch, codebook_size)`: after guidance, before temperature, top-k and top-p.
    """

    keep_logits: bool = False
    rows: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    guidance: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list, repr=False)

    def record_forward(self, rows: int, positions: int) -> None:
        """Count one forward of `rows` sequences with `positions` new positions each."""
        self.rows.append(rows)
        self.positions.append(positions)

    def record_step(self, guidance: float, logits: Tensor) -> None:
        """Note the guidance of one step, and its `logits` `(batch, codebook_size)` where they are kept."""
        self.guidance.append(guidance)
        if self.keep_logits:
            self.logits.append(logits)

    @property
    def forwards(self) -> int:
        """Number of forwards."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Positions processed: the sum over forwards of rows times positions."""
        return sum(rows * positions for rows, positions in zip(self.rows, self.positions, strict=True))
