"""DiSA: fewer and fewer steps of the token head as the generation goes on, since less and less is left open.

Zhao et al., 2025, "DiSA: Diffusion Step Annealing in Autoregressive Image Generation" (arXiv 2505.20297).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from generators.heads.diffusion import NUM_TIMESTEPS, SPACINGS, respaced_timesteps
from mmsdk.errors import unknown_name

STRATEGIES = ("linear", "cosine", "two-stage", "constant")


@dataclass(frozen=True)
class StepAnnealing:
    """How many steps the head makes at each step of the generation; for diffusion and flow heads. Lossy.

    With s = 0, 1, ..., u for the step of the generation, u the last one:

    - `linear`: `lower + floor((upper - lower) (u - s) / u)`;
    - `cosine`: `lower + floor((upper - lower) (cos(pi s / u) + 1) / 2)`;
    - `two-stage`: `upper` where `s < u / 2`, else `lower`;
    - `constant`: `lower`.

    The published diffusion schedules end at timestep 950 where they would go on to 999: later timesteps become 950, and
    duplicates are dropped, so that 50 steps are 48. `last_timestep=None` gives clean schedules without this. The
    timesteps of training are not touched, and flow heads have none.

    Args:
        upper: steps at the beginning.
        lower: steps at the end, 1 to `upper`.
        strategy: one of the above.
        last_timestep: diffusion timesteps above it become it; None leaves them.
        spacing: diffusion timesteps from 0 to 999, `"linspace"`, or at an integer stride from 0, `"leading"`.

    Raises:
        ValueError: a number is out of its range.
        UnknownNameError: there is no such strategy or spacing.
    """

    setting: ClassVar[str] = "annealing"  # the argument of generators that takes it

    upper: int = 50
    lower: int = 5
    strategy: str = "linear"
    last_timestep: int | None = 950
    spacing: str = "linspace"

    def __post_init__(self) -> None:
        for name in ("upper", "lower"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        if self.lower > self.upper:
            raise ValueError(f"lower must be at most upper, got {self.lower} and {self.upper}.")
        if self.strategy not in STRATEGIES:
            raise unknown_name("annealing strategy", self.strategy, list(STRATEGIES))
        if self.spacing not in SPACINGS:
            raise unknown_name("timestep spacing", self.spacing, list(SPACINGS))
        last = self.last_timestep
        if last is not None and (isinstance(last, bool) or not isinstance(last, int) or not 0 < last < NUM_TIMESTEPS):
            raise ValueError(f"last_timestep must be 1 to {NUM_TIMESTEPS - 1}, or None, got {last!r}.")

    def steps(self, step: int, num_steps: int) -> int:
        """Return the steps of the head at step `step` of `num_steps` of the generation.

        A generation of a single step is the beginning, except where the strategy says otherwise.

        Raises:
            ValueError: there is no such step.
        """
        if not 0 <= step < num_steps:
            raise ValueError(f"step must be 0 to num_steps - 1, got {step} of {num_steps} steps.")
        last, span = num_steps - 1, self.upper - self.lower
        if self.strategy == "constant":
            return self.lower
        if self.strategy == "two-stage":
            return self.upper if step < last / 2 else self.lower
        if last == 0:
            return self.upper
        if self.strategy == "cosine":
            return self.lower + int((math.cos(math.pi * step / last) + 1) / 2 * span)
        return self.lower + int((last - step) / last * span)

    def timesteps(self, step: int, num_steps: int) -> tuple[int, ...]:
        """Return the diffusion timesteps of step `step` of `num_steps`, ascending; they are run from the last down.

        Raises:
            ValueError: there is no such step, or no such schedule of diffusion timesteps.
        """
        return respaced_timesteps(self.steps(step, num_steps), self.spacing, self.last_timestep)
