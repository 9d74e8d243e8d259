"""Keep a random choice of tokens: the baseline that every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.base import Pruner, PruningContext


@dataclass(kw_only=True)
class RandomPruner(Pruner):
    """Keep tokens drawn uniformly without replacement.

    Attributes:
        seed: of the draw. Every image starts from it, so that its choice depends neither on its neighbours in the batch
            nor on earlier calls; images with equally many tokens keep the same places.
        generator: CPU generator to draw from instead of one seeded with `seed`; every image then gets a new draw.
    """

    seed: int = 0
    generator: torch.Generator | None = None

    def select(self, features: Tensor, context: PruningContext) -> Tensor:
        """Return the indices `(num_kept,)`, ascending, of the kept among `features` `(num_tokens, dim)`."""
        generator = self.generator or torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(len(features), generator=generator)[: self.budget(len(features))]
        return drawn.sort().values.to(features.device)
