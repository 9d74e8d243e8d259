"""A small language model drafts for a large one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from mmsdk.decoding.drafters.cached_model import CachedModel, check_model
from mmsdk.decoding.drafters.rows import Row, RowDrafter, check_at_least
from mmsdk.decoding.sampling import check_sampling, draw_uniforms, process_logits, sample_inverse_cdf
from mmsdk.decoding.tree import DraftTree


@dataclass(eq=False)
class _ModelRow(Row):
    model: CachedModel


@dataclass(eq=False)
class DraftModel(RowDrafter[_ModelRow]):
    """Lets a causal language model of the same vocabulary say the next tokens, one by one.

    Papers: "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al. 2022, arXiv 2211.17192);
    "Accelerating Large Language Model Decoding with Speculative Sampling" (Chen et al. 2023, arXiv 2302.01318).
    Sampled tokens come with their distributions (`DraftTree.probs`), so that rejection keeps the target's; a row's
    draws depend on nothing but its generator. Greedy drafts are deterministic and come without.

    Stores the ids and a key-value cache of the draft model for each row; after a rejection the cache is cut back to
    what was accepted. Cost: `num_tokens` forwards of the draft model for each row, row by row.

    Attributes:
        model: the draft model; it is used as it is, so it should be in evaluation mode.
        num_tokens: candidates of a proposal, at most.
        do_sample: draw the tokens instead of taking the most probable ones (of equal ones the lowest id).
        temperature: divides the logits.
        top_k: keeps this many ids; 0 keeps all.
        top_p: keeps the most probable ids up to this sum.

    Raises:
        TypeError: the model is no causal language model of transformers.
        ValueError: its state cannot be rolled back, or a setting is out of its range.
    """

    model: PreTrainedModel = field(repr=False)
    num_tokens: int = 4
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        self.vocab_size = check_model(self.model)
        check_at_least("num_tokens", self.num_tokens, 1)
        check_sampling(self.temperature, self.top_k, self.top_p)
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError("temperature, top_k and top_p change nothing without do_sample=True.")

    def start_row(self, ids: list[int]) -> _ModelRow:
        """Return a new sequence, with an empty cache."""
        return _ModelRow(ids, CachedModel(self.model))

    def propose_row(self, row: _ModelRow, budget: int, generators: Sequence[Generator] | None) -> DraftTree:
        """Return the chain of one row."""
        length = min(self.num_tokens, budget)
        uniforms = draw_uniforms(generators, 1, length)[0] if self.do_sample else None
        tokens: list[int] = []
        probs: list[Tensor] = []
        for i in range(length):
            logits = row.model(row.ids + tokens)
            if uniforms is None:
                tokens.append(int(logits.argmax()))
            else:
                probs.append(torch.softmax(process_logits(logits, self.temperature, self.top_k, self.top_p), -1))
                tokens.append(int(sample_inverse_cdf(probs[-1], uniforms[i].to(logits.device))))
        return DraftTree.chain(
            torch.tensor(row.ids[-1:], device=self.device),
            torch.tensor([tokens], dtype=torch.int64, device=self.device),
            torch.stack(probs)[None].to(self.device) if probs else None,
        )
