"""What the benchmarks measure with: times of several sides in turn, and the memory of tensors."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def interleaved(sides: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Return the seconds of each run of each side, in turn, so that what else the machine does hits all alike."""
    times: list[list[float]] = [[] for _ in sides]
    for repeat in range(repeats):
        # Each goes first in turn.
        for turn in range(len(sides)):
            side = (repeat + turn) % len(sides)
            started = time.perf_counter()
            sides[side]()
            times[side].append(time.perf_counter() - started)
    return times


class PeakMemory(TorchDispatchMode):
    """Count the bytes of the tensors that live at once, without those that were there before.

    Args:
        known: tensors that were there before.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(tensor, Tensor) or (storage := tensor.untyped_storage()) in self._known:
                continue
            self._known.add(storage)
            self._change(storage.nbytes())
            weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
