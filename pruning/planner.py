"""How many visual tokens a latency or a number of operations allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from pruning.base import Pruner, prefill_flops
from pruning.random import RandomPruner


@dataclass(frozen=True)
class PrefillCost:
    """Seconds that a language model takes to read a prompt of n tokens: `fixed + linear * n + quadratic * n^2`.

    Attributes:
        fixed: seconds.
        linear: seconds per token.
        quadratic: seconds per squared token.
    """

    fixed: float
    linear: float
    quadratic: float

    def __call__(self, num_tokens: int) -> float:
        """Return the seconds for a prompt of `num_tokens`."""
        return self.fixed + self.linear * num_tokens + self.quadratic * num_tokens**2

    @classmethod
    def fit(cls, num_tokens: Sequence[int], seconds: Sequence[float]) -> PrefillCost:
        """Fit to measurements by least squares; no term is negative, so that more tokens never cost less.

        Raises:
            ValueError: fewer than two different numbers of tokens, or as many seconds as tokens are not given.
        """
        if len(num_tokens) != len(seconds) or len(set(num_tokens)) < 2:
            raise ValueError(
                f"A fit needs seconds for two or more numbers of tokens, got {list(num_tokens)} and {list(seconds)}."
            )
        n = torch.tensor(num_tokens, dtype=torch.float64)
        columns = torch.stack([torch.ones_like(n), n, n**2], 1)
        target = torch.tensor(seconds, dtype=torch.float64)
        best: tuple[float, list[float]] = (math.inf, [0.0, 0.0, 0.0])
        # Three terms: each set of those that are not zero is tried.
        for used in ([0, 1, 2], [0, 1], [0, 2], [1, 2], [0], [1], [2]):
            found = torch.linalg.lstsq(columns[:, used], target[:, None], driver="gelsd").solution[:, 0]
            if bool((found >= 0).all()):
                error = float((columns[:, used] @ found - target).square().sum())
                if error < best[0] - 1e-18:
                    terms = [0.0, 0.0, 0.0]
                    for place, value in zip(used, found.tolist(), strict=True):
                        terms[place] = value
                    best = (error, terms)
        return cls(*best[1])


@dataclass(frozen=True)
class Plan:
    """What one method may keep.

    Attributes:
        method: as the caller named it.
        num_tokens: most visual tokens that meet the target; None where not even one does.
        keep_ratio: the same as a share of the image's tokens.
        seconds: predicted for vision tower, selection and prefill; None for a target in operations.
        flops: operations of the language model's prefill.
    """

    method: str
    num_tokens: int | None
    keep_ratio: float | None
    seconds: float | None
    flops: float | None


def plan(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    methods: Mapping[str, Callable[..., Pruner]],
    target_seconds: float | None = None,
    target_flops: float | None = None,
    repeats: int = 3,
) -> list[Plan]:
    """Propose for each method how many visual tokens to keep, so that a prefill meets a target.

    For a target in seconds, the prefill is measured once at a few numbers of tokens and each method's preparation
    (vision tower and selection) once; a method that selects slowly may keep fewer. A target in operations counts the
    language model's prefill alone and measures nothing.

    Li et al., "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters", ICLR 2025,
    https://arxiv.org/abs/2411.03312: at a fixed cost, a larger language model with very few visual tokens often beats a
    smaller one with all of them. So plan for each of the models at hand, not for the smallest alone.

    Args:
        model: a vision-language model.
        inputs: of its processor, for one prompt with one image, the kind that is to become fast.
        methods: name -> class of a pruner (or what makes one, given `num_tokens` or `keep_ratio`).
        target_seconds: time until the prefill is done.
        target_flops: operations of the language model's prefill, as `PruningReport.flops_after` counts them.
        repeats: runs of each measurement; the fastest counts.

    Raises:
        ValueError: not exactly one target, a target that is not positive, more than one prompt or image, or a target
            that no method reaches with a single visual token; the message names the least that is possible.
    """
    targets = [target for target in (target_seconds, target_flops) if target is not None]
    if len(targets) != 1 or not (math.isfinite(targets[0]) and targets[0] > 0):
        raise ValueError(
            f"Give one positive target: target_seconds or target_flops; received {target_seconds} and {target_flops}."
        )
    everything = RandomPruner(keep_ratio=1.0)
    everything.prepare(model, inputs)
    report = everything.report
    if report is None or len(report.tokens_before) != 1 or len(report.prompt_before) != 1:
        raise ValueError("A plan is for one prompt with one image; pass the inputs of one.")
    total, text = report.tokens_before[0], report.prompt_before[0] - report.tokens_before[0]

    def flops(count: int) -> float:
        return prefill_flops(model, (text + count,))

    if target_flops is not None:
        count = _most(total, lambda k: flops(k) <= target_flops)
        if count is None:
            raise ValueError(
                f"No method reaches {target_flops:.3g} operations: with a single visual token it takes {flops(1):.3g}."
            )
        return [Plan(method, count, count / total, None, flops(count)) for method in methods]

    assert target_seconds is not None  # noqa: S101 - one of the two is given
    cost = measure_prefill(model, inputs, repeats=repeats)
    plans, least = [], math.inf
    for method, make in methods.items():
        # A selection's cost hardly depends on how much is kept; half is in the middle.
        pruner = make(keep_ratio=0.5)
        seconds = _fastest(partial(pruner.prepare, model, inputs), repeats)
        least = min(least, seconds + cost(text + 1))
        left = target_seconds - seconds
        count = _most(total, partial(_within, cost, text, left))
        if count is None:
            plans.append(Plan(method, None, None, None, None))
        else:
            plans.append(Plan(method, count, count / total, seconds + cost(text + count), flops(count)))
    if all(p.num_tokens is None for p in plans):
        raise ValueError(
            f"No method reaches {1e3 * target_seconds:.3g} ms: with a single visual token the fastest takes "
            f"{1e3 * least:.3g} ms, vision tower included."
        )
    return plans


def measure_prefill(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    keep_ratios: Sequence[float] = (0.02, 0.1, 0.4, 1.0),
    repeats: int = 3,
) -> PrefillCost:
    """Measure how long the language model takes to read the prompt with different shares of its visual tokens.

    Args:
        model: a vision-language model.
        inputs: of its processor.
        keep_ratios: shares of the visual tokens.
        repeats: runs of each; the fastest counts.
    """
    counts, seconds = [], []
    for ratio in keep_ratios:
        pruner = RandomPruner(keep_ratio=ratio)
        prepared = [pruner.prepare(model, inputs) for _ in range(repeats + 1)]

        def run(prepared: list[Any] = prepared) -> None:
            with torch.inference_mode():
                model(**prepared.pop(), logits_to_keep=1)

        run()  # the first one also warms caches up
        seconds.append(_fastest(run, repeats))
        counts.append(max(pruner.report.prompt_after if pruner.report else (0,)))
    return PrefillCost.fit(counts, seconds)


def _within(cost: PrefillCost, text: int, seconds: float, count: int) -> bool:
    return cost(text + count) <= seconds


def _fastest(function: Callable[[], Any], repeats: int) -> float:
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return best


def _most(total: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest of 1 to `total` that fits, given that everything below one that fits does; None: none."""
    low, high = 0, total
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low or None
