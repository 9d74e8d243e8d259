"""`mmsdk bench prune-select`: what selecting tokens costs, beside the published algorithm and one matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsdk.bench.measure import PeakMemory
from mmsdk.bench.runner import BenchResult
from mmsdk.errors import MMSDKError, unknown_name
from mmsdk.loading import resolve

FEATURES = ("independent", "clusters")
# What rounding alone can add to a float32 cosine distance: picks that differ by less are both right.
_TOLERANCE = 2e-6


def published_selection(features: Tensor, count: int) -> Tensor:
    """Return the indices `(count,)`, first pick first, by the published O(count^2 N) algorithm.

    Args:
        features: `(num_tokens, dim)`.
        count: tokens to select.
    """
    directions = features / features.norm(dim=1, keepdim=True)
    distances = 1 - directions @ directions.T
    picks = torch.empty(count, dtype=torch.long)
    # The nearest of all is the token itself.
    picks[0] = distances.topk(2, dim=0, largest=False).values[1].argmax()
    for step in range(1, count):
        picks[step] = distances.index_select(0, picks[:step]).amin(0).argmax()
    return picks


def prune_select(
    token_counts: Sequence[int] = (576, 1024, 2880, 8192),
    features: Sequence[str] = FEATURES,
    dim: int = 4096,
    keep_ratio: float = 0.098,
    seconds: float = 20.0,
    seed: int = 0,
    output_dir: Path | None = None,
) -> BenchResult:
    """Time DivPrune, the published algorithm and one product of all pairs, in turn, and check that the picks agree.

    Args:
        token_counts: numbers of visual tokens.
        features: `independent` tokens are as hard as can be, all being nearly equally far; `clusters` of tokens around
            some centres are nearer to what images give.
        dim: numbers per token.
        keep_ratio: share of the tokens to select; the default is the published one.
        seconds: how long to repeat each line of the table, after a first round that is not timed.
        seed: of the features.
        output_dir: not used.

    Raises:
        MMSDKError: the selections differ by more than rounding explains.
        UnknownNameError: there are no such features.
    """
    pruner = resolve("divprune")(keep_ratio=keep_ratio)
    table: list[list[Any]] = []
    for kind in features:
        for total in token_counts:
            tokens = make_features(kind, total, dim, seed)
            directions = torch.nn.functional.normalize(tokens, dim=-1)
            count = pruner.budget(total)

            def published(tokens: Tensor = tokens, count: int = count) -> Tensor:
                return published_selection(tokens, count)

            def ours(tokens: Tensor = tokens) -> Tensor:
                return pruner.select_in_order(tokens)

            def product(directions: Tensor = directions) -> Tensor:
                return directions @ directions.T

            same = equal_picks(tokens, ours(), published())
            wall, processor = best_times((published, ours, product), seconds)
            peaks = []
            for run in (published, ours):
                with PeakMemory([tokens]) as memory:
                    run()
                peaks.append(memory.peak / 2**20)
            table.append(
                [
                    kind,
                    total,
                    count,
                    *(1e3 * x for x in wall),
                    wall[0] / wall[1],
                    processor[0] / processor[1],
                    wall[1] / wall[2],
                    *peaks,
                    same,
                ]
            )
    notes = [
        f"published, ours, product: milliseconds, the fastest of the repeats within {seconds:g} s each, in turn; the "
        "product is one of all pairs of directions, the floor of what the published algorithm does.",
        "ratio: published / ours by the clock; CPU ratio: by processor time, which other work on the machine disturbs "
        "less; of product: ours / product by the clock.",
        "MiB: the most that tensors took at once beyond the features themselves.",
        "same picks: leading picks that are the same, of those kept; where they part, both are equally far in float64 "
        f"up to {_TOLERANCE:g}, the rounding of float32, which is checked.",
    ]
    columns = [
        "features", "tokens", "kept", "published ms", "ours ms", "product ms", "ratio", "CPU ratio", "of product",
        "published MiB", "ours MiB", "same picks",
    ]  # fmt: skip
    return BenchResult("prune-select", columns, table, notes)


def make_features(kind: str, total: int, dim: int, seed: int) -> Tensor:
    """Return random visual tokens `(total, dim)` in float32.

    Args:
        kind: one of `FEATURES`.
        total: number of tokens.
        dim: numbers per token.
        seed: of the draws.

    Raises:
        UnknownNameError: no such kind.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(total, dim, generator=generator)
    if kind == "independent":
        return noise
    if kind != "clusters":
        raise unknown_name("kind of features", kind, list(FEATURES))
    centres = torch.randn(40, dim, generator=generator)
    return centres[torch.randint(len(centres), (total,), generator=generator)] + 0.3 * noise


def equal_picks(features: Tensor, ours: Tensor, published: Tensor) -> int:
    """Return how many leading picks are the same.

    Args:
        features: `(num_tokens, dim)`.
        ours: `(count,)`, first pick first.
        published: likewise.

    Raises:
        MMSDKError: they differ in number, or where they part, one is farther than the other from the picks before.
    """
    if len(ours) != len(published):
        raise MMSDKError(f"Both sides must select the same number, but got {len(ours)} and {len(published)}.")
    parted = (ours != published).nonzero()
    if not len(parted):
        return len(ours)
    step = int(parted[0])
    directions = torch.nn.functional.normalize(features.double(), dim=-1)
    choices = torch.stack([ours[step], published[step]])
    between = 1 - directions[choices] @ directions.T
    if step:
        farness = between[:, ours[:step]].amin(1)
    else:
        farness = between.scatter(1, choices[:, None], torch.inf).amin(1)
    gap = float((farness[0] - farness[1]).abs())
    if gap > _TOLERANCE:
        raise MMSDKError(
            f"Both sides must select the same tokens, but pick {step} of {len(features)} is {int(choices[0])} here and "
            f"{int(choices[1])} as published, whose distances differ by {gap:.3g}: their times cannot be compared."
        )
    return step


def best_times(runs: Sequence[Callable[[], Any]], seconds: float) -> tuple[list[float], list[float]]:
    """Time functions in turn, at least once each; return the least seconds of each by the clock, and of processors.

    Args:
        runs: they are called again and again, each first in turn, so that what else the machine does hits all alike.
        seconds: when to stop.
    """
    wall, processor = [float("inf")] * len(runs), [float("inf")] * len(runs)
    begun, shift = time.perf_counter(), 0
    while shift == 0 or time.perf_counter() - begun < seconds:
        for i in range(len(runs)):
            place = (i + shift) % len(runs)
            started, used = time.perf_counter(), time.process_time()
            runs[place]()
            processor[place] = min(processor[place], time.process_time() - used)
            wall[place] = min(wall[place], time.perf_counter() - started)
        shift += 1
    return wall, processor
