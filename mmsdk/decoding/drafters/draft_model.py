"""A small language model drafts for a large one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from mmsdk.decoding.base import CHAIN, CHOSEN, WITH_REPLACEMENT
from mmsdk.decoding.drafters.cached_model import CachedModel, check_model
from mmsdk.decoding.drafters.rows import Row, RowDrafter, check_at_least
from mmsdk.decoding.sampling import check_sampling, draw_uniforms, process_logits, sample_inverse_cdf
from mmsdk.decoding.tree import DraftTree


@dataclass(eq=False)
class _ModelRow(Row):
    model: CachedModel


@dataclass(eq=False)
class DraftModel(RowDrafter[_ModelRow]):
    """Lets a causal language model of the same vocabulary say the next tokens, one by one, once or several times.

    Papers: "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al. 2022, arXiv 2211.17192);
    "Accelerating Large Language Model Decoding with Speculative Sampling" (Chen et al. 2023, arXiv 2302.01318); several
    independent sequences: "SpecTr: Fast Speculative Decoding via Optimal Transport" (Sun et al. 2023, arXiv
    2310.15141). Sampled tokens come with their distributions (`DraftTree.probs`), so that rejection, or `KSeq` for
    several sequences, keeps the target's; a row's draws depend on nothing but its generator. Greedy drafts are
    deterministic and come without.

    Stores the ids and a key-value cache of the draft model for each row; after a rejection the cache is cut back to
    what was accepted. Cost: at most `num_tokens * num_sequences` forwards of the draft model for each row, row by row;
    sequences that begin alike share those of their beginning.

    Attributes:
        model: the draft model; it is used as it is, so it should be in evaluation mode.
        num_tokens: tokens of a sequence, at most.
        do_sample: draw the tokens instead of taking the most probable ones (of equal ones the lowest id).
        num_sequences: sequences of a proposal, drawn independently; a budget below `num_tokens * num_sequences` makes
            them shorter, and fewer where it is below `num_sequences`.
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
    num_sequences: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        self.vocab_size = check_model(self.model)
        check_at_least("num_tokens", self.num_tokens, 1)
        check_at_least("num_sequences", self.num_sequences, 1)
        if self.num_sequences > 1 and not self.do_sample:
            raise ValueError(f"Without do_sample, all of num_sequences={self.num_sequences} sequences would be equal.")
        check_sampling(self.temperature, self.top_k, self.top_p)
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError("temperature, top_k and top_p change nothing without do_sample=True.")

    @property
    def drawing(self) -> str:
        """How candidates are found."""
        if not self.do_sample:
            return CHOSEN
        return CHAIN if self.num_sequences == 1 else WITH_REPLACEMENT

    def start_row(self, ids: list[int]) -> _ModelRow:
        """Return a new sequence, with an empty cache."""
        return _ModelRow(ids, CachedModel(self.model))

    def propose_row(self, row: _ModelRow, budget: int, generators: Sequence[Generator] | None) -> DraftTree:
        """Return the sequences of one row: siblings may be equal, and what follows equal ones follows the first."""
        count = min(self.num_sequences, budget)
        length = min(self.num_tokens, budget // count) if count else 0
        uniforms = draw_uniforms(generators, 1, count * length)[0] if self.do_sample else None
        tokens, parents = row.ids[-1:], [-1]
        nodes: dict[tuple[int, ...], int] = {(): 0}
        probs: dict[int, Tensor] = {}
        for sequence in range(count):
            path: tuple[int, ...] = ()
            for step in range(length):
                parent = nodes[path]
                if uniforms is None:
                    token = int(row.model([*row.ids, *path]).argmax())
                else:
                    if parent not in probs:
                        logits = row.model([*row.ids, *path])
                        processed = process_logits(logits, self.temperature, self.top_k, self.top_p)
                        probs[parent] = torch.softmax(processed, -1)
                    number = uniforms[sequence * length + step]
                    token = int(sample_inverse_cdf(probs[parent], number.to(probs[parent].device)))
                path = (*path, token)
                nodes.setdefault(path, len(tokens))
                tokens.append(token)
                parents.append(parent)
        table = None
        if probs:
            table = torch.zeros(1, len(tokens), len(probs[0]), device=self.device)
            for node, row_probs in probs.items():
                table[0, node] = row_probs
        return DraftTree(
            torch.tensor([tokens], device=self.device),
            torch.tensor([parents], device=self.device),
            table,
            with_replacement=self.num_sequences > 1,
        )
