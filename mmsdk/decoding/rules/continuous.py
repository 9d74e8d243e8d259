"""Speculation of continuous tokens: whether a draft from one normal distribution passes for one from another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmsdk.errors import unknown_name

MODES = ("paper", "official")

Draw = Callable[[], tuple[Tensor, Tensor]]
"""Gives normal numbers `(n, dim)` and numbers in [0, 1) `(n,)` for one more proposal of each token."""


class Normals(NamedTuple):
    """Normal distributions of tokens, with independent numbers.

    Attributes:
        mean: `(n, dim)`.
        std: `(n, dim)`, above 0.
    """

    mean: Tensor
    std: Tensor

    def log_density(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """Return `(n,)`, without the constant; `temperature` widens the exponent, but not the factor before it."""
        scaled = (tokens - self.mean) / (self.std * temperature)
        return -0.5 * scaled.square().sum(-1) - self.std.log().sum(-1)


@dataclass(frozen=True)
class Continuous:
    """Accepts continuous tokens of a draft, and draws others in place of those that are refused.

    Paper: "Continuous Speculative Decoding for Autoregressive Image Generation" (Wang et al. 2024, arXiv 2411.11925).

    - `paper`: rejection sampling. A token `x` of a draft with density q stays with probability `min(1, p(x) / q(x))`;
      else proposals are drawn from p until one stays with probability `max(0, p - q) / p`. Tokens then follow p
      exactly. The paper multiplies p by the ratio of the densities of both trajectories. Where both share their noise,
      that noise is given and p and q are all that is drawn; with the factor, tokens would not follow p, so that it is
      left out.
    - `official`: what the published code does. The trajectories' factor `F` is the inverse of the paper's, and a
      temperature flattens the densities of the test: most drafts stay, whatever p says. Of up to `max_proposals`
      proposals the last that stays is taken, and zeros where none does. Not lossless.

    Attributes:
        mode: one of the above.
        temperature: of the official test.
        max_proposals: proposals at most; exhausted in `paper` mode they are an error, not another result.

    Raises:
        UnknownNameError: there is no such mode.
        ValueError: a number is out of its range.
    """

    mode: str = "paper"
    temperature: float = 42.0
    max_proposals: int = 100

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_name("mode", self.mode, list(MODES))
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature!r}.")
        if isinstance(self.max_proposals, bool) or not isinstance(self.max_proposals, int) or self.max_proposals < 1:
            raise ValueError(f"max_proposals must be an integer of at least 1, got {self.max_proposals!r}.")

    @property
    def lossless(self) -> bool:
        """Whether tokens follow the target's distribution."""
        return self.mode == "paper"

    def log_ratio(self, tokens: Tensor, target: Normals, draft: Normals, trajectory: Tensor) -> Tensor:
        """Return the logarithm `(n,)` of what a uniform number is compared with.

        Args:
            tokens: `(n, dim)`, drawn from the draft.
            target: what the target would draw from.
            draft: what the draft drew from.
            trajectory: `(n,)`, the sum of the logarithms of the standard deviations of all steps before, the draft's
                subtracted from the target's; of no use in `paper` mode.
        """
        if self.mode == "paper":
            return target.log_density(tokens) - draft.log_density(tokens)
        test = target.log_density(tokens, self.temperature) - draft.log_density(tokens, self.temperature)
        return test + trajectory

    def residual_probability(self, tokens: Tensor, target: Normals, draft: Normals, trajectory: Tensor) -> Tensor:
        """Return the probability `(n,)` with which a proposal of the target stays."""
        ratio = draft.log_density(tokens) - target.log_density(tokens)
        if self.mode == "official":
            ratio = ratio - trajectory
        return (1 - ratio.exp()).clamp_min(0)

    def resample(self, refused: Tensor, target: Normals, draft: Normals, trajectory: Tensor, draw: Draw) -> Tensor:
        """Return tokens `(n, dim)` in place of those that were refused, zero elsewhere.

        Args:
            refused: bool `(n,)`.
            target: see `log_ratio`.
            draft: see `log_ratio`.
            trajectory: see `log_ratio`.
            draw: numbers for one more proposal of each token.

        Raises:
            RuntimeError: in `paper` mode, no proposal stayed.
        """
        result = torch.zeros_like(target.mean)
        left = refused.clone()
        for _ in range(self.max_proposals):
            if not bool(left.any()):
                break
            normals, uniforms = draw()
            proposal = target.mean + target.std * normals
            stays = refused & (uniforms < self.residual_probability(proposal, target, draft, trajectory))
            if self.mode == "paper":
                stays = stays & left
            result = torch.where(stays[:, None], proposal, result)
            left = left & ~stays
        if self.mode == "paper" and bool(left.any()):
            raise RuntimeError(
                f"{int(left.sum())} tokens had no proposal accepted in max_proposals={self.max_proposals}: draft and "
                "target nearly agree there; pass a larger max_proposals."
            )
        return result
