"""Classifier-free guidance (Ho and Salimans, 2022) whose scale depends on the progress of the generation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real

from torch import Tensor


def combine(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Return `uncond + (cond - uncond) * scale`, in the shape of its inputs."""
    return uncond + (cond - uncond) * scale


@dataclass(frozen=True)
class Guidance(ABC):
    """How strongly each step is guided; scale 1 is no guidance and needs no unconditional rows.

    Args:
        target: the scale of full guidance, finite and at least 0.
    """

    target: float

    def __post_init__(self) -> None:
        if isinstance(self.target, bool) or not isinstance(self.target, Real):
            raise TypeError(f"The guidance scale must be a number, got {self.target!r}.")
        if not math.isfinite(self.target) or self.target < 0:
            raise ValueError(f"The guidance scale must be finite and at least 0, got {self.target!r}.")

    @abstractmethod
    def scale(self, step: int, num_steps: int, progress: float | None = None) -> float:
        """Return the scale of step `step` of `num_steps`.

        Args:
            step: index of the step, from 0.
            num_steps: number of steps.
            progress: part of the generation that is done, 0 to 1. By default `step / (num_steps - 1)`, which is 1 for a
                single step; schedules that fix several tokens at once pass the part of the tokens.
        """

    def scales(self, num_steps: int) -> list[float]:
        """Return the scale of every step."""
        return [self.scale(step, num_steps) for step in range(num_steps)]


def _progress(step: int, num_steps: int, progress: float | None) -> float:
    if progress is not None:
        return progress
    return step / (num_steps - 1) if num_steps > 1 else 1.0


@dataclass(frozen=True)
class ConstantGuidance(Guidance):
    """The same scale at every step."""

    def scale(self, step: int, num_steps: int, progress: float | None = None) -> float:
        """Return `target`."""
        return self.target


@dataclass(frozen=True)
class LinearGuidance(Guidance):
    """From 1 to `target` over the generation."""

    def scale(self, step: int, num_steps: int, progress: float | None = None) -> float:
        """Return `1 + (target - 1) * progress`."""
        return 1.0 + (self.target - 1.0) * _progress(step, num_steps, progress)


@dataclass(frozen=True)
class HalfLinearGuidance(Guidance):
    """From 1 to `target` over the first half of the generation, then constant (Token-Shuffle: Ma et al., 2025)."""

    def scale(self, step: int, num_steps: int, progress: float | None = None) -> float:
        """Return `1 + (target - 1) * min(1, 2 * progress)`."""
        return 1.0 + (self.target - 1.0) * min(1.0, 2.0 * _progress(step, num_steps, progress))


@dataclass(frozen=True)
class IntervalGuidance(Guidance):
    """Guided up to a step, unguided after it (LlamaGen's `cfg_interval`).

    Args:
        target: the scale of the guided steps.
        last: as published, counted from the second token: step 0 is guided, and step k is where `k - 1 <= last`.
    """

    last: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.last, bool) or not isinstance(self.last, int) or self.last < 0:
            raise ValueError(
                f"last must be an integer of at least 0, got {self.last!r}; for all steps: ConstantGuidance."
            )

    def scale(self, step: int, num_steps: int, progress: float | None = None) -> float:
        """Return `target` up to step `last + 1`, then 1."""
        return self.target if step - 1 <= self.last else 1.0


def make_guidance(guidance: float | Guidance) -> Guidance:
    """Return `guidance` as an object: a number is a constant scale."""
    return guidance if isinstance(guidance, Guidance) else ConstantGuidance(guidance)
