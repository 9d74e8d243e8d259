"""What verifying several tokens at once costs, and how many candidates pay for it."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

NODES = (1, 2, 4, 8, 16, 32, 64)
_DECAY = 0.95  # what a round counts for after one more
_CREDIT = 4.0  # forwards that may be lost to first tries


@dataclass
class _Size:
    """What trees of one number of candidates have brought, and cost in forwards over one token."""

    tokens: float = 0.0
    cost: float = 0.0
    rounds: float = 0.0
    last_used: int = -1


@dataclass
class _Context:
    """Costs, and what was seen under them: forwards over one token, relative to `unit` seconds."""

    costs: dict[int, float]
    unit: float | None = None
    sizes: dict[int, _Size] = field(init=False)
    spent: float = 0.0
    lost: float = 0.0
    rounds: int = 0

    def __post_init__(self) -> None:
        self.sizes = {nodes - 1: _Size() for nodes in self.costs}

    def gain(self, size: int) -> float:
        """See `CostModel.gain`."""
        seen = self.sizes[size]
        if seen.rounds:
            return seen.tokens / seen.cost
        return 0.0 if size else 1.0


class CostModel:
    """Chooses how many candidates to verify: as many as give the most tokens for the time.

    The cost C(k) of verifying k tokens, relative to one, is measured once for each context (`calibrate`), or given. A
    size of n candidates brings E[accepted tokens + 1] tokens for C(n + 1), and for the time that drafting takes; both
    are averages over its last rounds, recent ones counting more. The size with the best ratio is used. Without
    candidates, which is plain decoding, a round brings one token for one forward, so that speculation that does not pay
    ends.

    Other sizes are tried again from time to time, the one that was not used for the longest first, since drafters
    learn and texts change: whenever what the tries have lost against the best size, and the most that another one can
    lose, stay within `probe_share` of all time spent, plus four forwards at the beginning. Nothing is drawn: the same
    figures give the same choices.

    Args:
        costs: C(k) for some k, 1 among them, in any unit; what lies between is interpolated. None: to be measured.
        probe_share: share of the time that tries may cost, 0 to below 1.

    Raises:
        ValueError: the costs are not positive, or that of one token is missing; or a setting is out of its range.
    """

    def __init__(self, costs: Mapping[int, float] | None = None, probe_share: float = 0.025) -> None:
        if not 0 <= probe_share < 1:
            raise ValueError(f"probe_share must be at least 0 and below 1, got {probe_share!r}.")
        self.probe_share = probe_share
        self._contexts: dict[Hashable, _Context] = {}
        self._context: _Context | None = None
        self.is_given = costs is not None
        if costs is not None:
            self._context = _Context(_relative(costs))

    @property
    def costs(self) -> dict[int, float]:
        """C(k) of the present context, by k; empty before it is measured."""
        return {} if self._context is None else dict(self._context.costs)

    def calibrate(
        self,
        forward: Callable[[int], Tensor],
        ks: Sequence[int] = NODES,
        context: Hashable = None,
        repeats: int = 2,
    ) -> dict[int, float]:
        """Measure C(k), once for each context, and go on with its statistics.

        Args:
            forward: verifies as many tokens as it is told; one value of what it returns is read, which waits for it.
            ks: numbers of tokens, 1 among them.
            context: what the costs belong to, such as a model and a number of rows.
            repeats: times that each is measured; the fastest counts.

        Returns:
            C(k) by k.

        Raises:
            ValueError: 1 is missing, or `repeats` is below 1.
            RuntimeError: the costs were given, not to be measured.
        """
        if self.is_given:
            raise RuntimeError("The costs were given: there is nothing to measure.")
        if 1 not in ks or repeats < 1:
            raise ValueError(f"ks must hold 1 and repeats be at least 1, got {list(ks)} and {repeats!r}.")
        if context not in self._contexts:
            seconds = dict.fromkeys(sorted(set(ks)), float("inf"))
            forward(1).flatten()[0].item()  # what the first call sets up does not count
            for _ in range(repeats):
                for k in seconds:
                    started = time.perf_counter()
                    forward(k).flatten()[0].item()
                    seconds[k] = min(seconds[k], time.perf_counter() - started)
            # Fewer tokens cost no more: what says otherwise was disturbed.
            seconds = {k: min(seconds[more] for more in seconds if more >= k) for k in seconds}
            self._contexts[context] = _Context(_relative(seconds), unit=seconds[1])
        self._context = self._contexts[context]
        return self.costs

    def cost(self, k: int) -> float:
        """Return C(k): interpolated, and beyond the last known one in proportion to it.

        Raises:
            RuntimeError: the costs are not known yet.
            ValueError: `k` is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k!r}.")
        costs = self._known().costs
        ks = sorted(costs)
        i = bisect_left(ks, k)
        if i == len(ks):
            return costs[ks[-1]] * k / ks[-1]
        if ks[i] == k:
            return costs[k]
        low, high = ks[i - 1], ks[i]
        return costs[low] + (costs[high] - costs[low]) * (k - low) / (high - low)

    def gain(self, size: int) -> float:
        """Return how many tokens trees of so many candidates bring for the price of a forward over one token.

        Not known before the first try, and then 0; without candidates 1.

        Args:
            size: one of those that are chosen: one less than each k whose cost is known.

        Raises:
            RuntimeError: the costs are not known yet.
        """
        return self._known().gain(size)

    def choose(self, limit: int | None = None) -> int:
        """Return how many candidates to verify next; 0 is plain decoding.

        Args:
            limit: at most so many; None: any number.

        Raises:
            RuntimeError: the costs are not known yet.
        """
        context = self._known()
        sizes = [size for size in context.sizes if limit is None or size <= limit]
        best = max(sizes, key=context.gain)  # of equal ones the smallest
        # Plain decoding needs no tries: what it brings is known.
        others = [size for size in sizes if size not in (0, best)]
        if not others:
            return best
        trial = min(others, key=lambda size: context.sizes[size].last_used)
        seen = context.sizes[trial]
        price = max(self.cost(trial + 1), seen.cost / seen.rounds if seen.rounds else 0.0)
        # In the worst case it brings one token, for which the best size needs so much.
        loss = price - 1 / context.gain(best)
        may_lose = _CREDIT + self.probe_share * context.spent
        return trial if context.lost + loss <= may_lose else best

    def record(self, size: int, num_nodes: int, accepted: float, seconds: float = 0.0) -> None:
        """Note a round.

        Args:
            size: candidates that were chosen.
            num_nodes: nodes of the trees that were verified, the root included; drafters may propose less.
            accepted: accepted tokens, the mean of the rows.
            seconds: what drafting took; counts where the costs were measured.

        Raises:
            RuntimeError: the costs are not known yet.
            ValueError: the size is none of those that are chosen.
        """
        context = self._known()
        if size not in context.sizes:
            raise ValueError(f"size must be one of {list(context.sizes)}, got {size!r}.")
        best = max(context.sizes, key=context.gain)
        cost = self.cost(num_nodes) + (seconds / context.unit if context.unit else 0.0)
        if size != best:
            context.lost += max(0.0, cost - (accepted + 1) / context.gain(best))
        context.spent += cost
        context.rounds += 1
        seen = context.sizes[size]
        # What is long ago hardly counts, so that one try shows what a drafter has learned meanwhile.
        kept = _DECAY ** (context.rounds - seen.last_used)
        seen.tokens = kept * seen.tokens + accepted + 1
        seen.cost = kept * seen.cost + cost
        seen.rounds = kept * seen.rounds + 1
        seen.last_used = context.rounds

    def _known(self) -> _Context:
        if self._context is None:
            raise RuntimeError("The costs are not known yet: call `calibrate` first, or give them.")
        return self._context


def _relative(costs: Mapping[int, float]) -> dict[int, float]:
    """Return costs in order, divided by that of one token."""
    if 1 not in costs or any(k < 1 or not 0 < cost < float("inf") for k, cost in costs.items()):
        raise ValueError(f"costs must be positive for numbers of tokens from 1 on, 1 among them, got {dict(costs)}.")
    return {k: costs[k] / costs[1] for k in sorted(costs)}
