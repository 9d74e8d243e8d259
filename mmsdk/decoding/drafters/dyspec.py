"""DySpec: a tree that grows where the draft distribution promises the most."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from mmsdk.decoding.base import WITHOUT_REPLACEMENT
from mmsdk.decoding.drafters.cached_model import CachedModel, check_model
from mmsdk.decoding.drafters.rows import Row, RowDrafter
from mmsdk.decoding.sampling import check_sampling, draw_uniforms, process_logits, sample_inverse_cdf
from mmsdk.decoding.tree import DraftTree

Distribution = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class _DraftRow(Row):
    logits: Callable[[list[int]], Tensor]


@dataclass(eq=False)
class DySpec(RowDrafter[_DraftRow]):
    """Draws a tree of candidates from a draft distribution, always where a candidate is most probably accepted.

    Paper: "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure" (Xiong et al. 2024, arXiv
    2410.11744). A heap holds the places where a node may be added, each with its value, the estimated probability that
    verification gets there. The best one, of value `v`, draws a token `y` from `R`, what is left of its parent's
    distribution. That makes a place below it of value `v R[y]` and one beside it of value `v (1 - R[y])`, where `y` is
    taken out of `R`. Siblings are therefore drawn without replacement, and the tree tells the distribution of each
    parent (`DraftTree.probs`), so that rejection keeps the target's. A row's draws depend on nothing but its generator.

    Stores the ids of each row and, for a model, a key-value cache, which is cut back where branches part and after
    rejections. Cost: one forward for each node that gets children, at most `budget`, and a float64 copy of each of
    their distributions.

    Attributes:
        draft: a causal language model of transformers of the same vocabulary; or what gives, for prefixes of ids
            `(batch, length)`, the probabilities `(batch, vocab)` of the token that follows.
        temperature: divides the logarithms of the draft's probabilities.
        top_k: keeps this many ids; 0 keeps all.
        top_p: keeps the most probable ids up to this sum.

    Raises:
        TypeError: the draft is neither a causal language model nor callable.
        ValueError: the state of the model cannot be rolled back, or a setting is out of its range.
    """

    draft: PreTrainedModel | Distribution = field(repr=False)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)
        if isinstance(self.draft, PreTrainedModel):
            self.vocab_size = check_model(self.draft)
        elif not callable(self.draft):
            raise TypeError(
                "draft must be a causal language model of transformers or a function of prefixes, got "
                f"{type(self.draft).__name__}."
            )

    @property
    def drawing(self) -> str:
        """How candidates are found."""
        return WITHOUT_REPLACEMENT

    def start_row(self, ids: list[int]) -> _DraftRow:
        """Return a new sequence, with an empty cache."""
        return _DraftRow(ids, CachedModel(self.draft) if isinstance(self.draft, PreTrainedModel) else self._log_probs)

    def propose_row(self, row: _DraftRow, budget: int, generators: Sequence[Generator] | None) -> DraftTree:
        """Return the tree of one row."""
        uniforms = draw_uniforms(generators, 1, budget)[0]
        tokens, parents, paths = row.ids[-1:], [-1], [row.ids]
        probs: dict[int, Tensor] = {}
        # (-value, a number that orders equal values by age, parent, what is left of its distribution: None for all)
        places: list[tuple[float, int, int, Tensor | None]] = [(-1.0, 0, 0, None)]
        while places and len(tokens) <= budget:
            value, _, parent, residual = heapq.heappop(places)
            if residual is None:
                logits = process_logits(row.logits(paths[parent]), self.temperature, self.top_k, self.top_p)
                probs[parent] = torch.softmax(logits, -1)
                residual = probs[parent].double()
            node, total = len(tokens), float(residual.sum())
            token = int(sample_inverse_cdf(residual, uniforms[node - 1].to(residual.device)))
            tokens.append(token)
            parents.append(parent)
            paths.append([*paths[parent], token])
            heapq.heappush(places, (value * float(residual[token]) / total, 2 * node, node, None))
            residual[token] = 0.0
            if bool(residual.any()):
                heapq.heappush(places, (value * float(residual.sum()) / total, 2 * node + 1, parent, residual))
        table = None
        if probs:
            table = torch.zeros(1, len(tokens), len(probs[0]), device=self.device)
            for node, row_probs in probs.items():
                table[0, node] = row_probs
        return DraftTree(torch.tensor([tokens], device=self.device), torch.tensor([parents], device=self.device), table)

    def _log_probs(self, ids: list[int]) -> Tensor:
        probs = self.draft(torch.tensor([ids], device=self.device))
        if not isinstance(probs, Tensor) or probs.ndim != 2 or len(probs) != 1:
            shape = tuple(probs.shape) if isinstance(probs, Tensor) else type(probs).__name__
            raise ValueError(f"draft must return probabilities (1, vocab) for a prefix (1, length), got {shape}.")
        return probs[0].float().log()
