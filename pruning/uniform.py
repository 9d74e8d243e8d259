"""Keep every so-manieth token: the baseline that needs no features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.base import Pruner, PruningContext


@dataclass(kw_only=True)
class UniformPruner(Pruner):
    """Keep the middle token of each of `num_kept` equal stretches of the sequence. Deterministic."""

    def select(self, features: Tensor, context: PruningContext) -> Tensor:
        """Return the indices `(num_kept,)`, ascending, of the kept among `features` `(num_tokens, dim)`."""
        total, count = len(features), self.budget(len(features))
        return (2 * torch.arange(count, device=features.device) + 1) * total // (2 * count)
