"""What drafters cost beside the target: microseconds for each proposal, with all that they note of the last one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmsdk.bench.runner import BenchResult
from mmsdk.decoding.base import Drafter, Verified
from mmsdk.decoding.drafters.aded import ADED
from mmsdk.decoding.drafters.draft_model import DraftModel
from mmsdk.decoding.drafters.dyspec import DySpec
from mmsdk.decoding.drafters.early_exit import EarlyExit
from mmsdk.decoding.drafters.prompt_lookup import PromptLookup
from mmsdk.decoding.drafters.token_recycling import TokenRecycling
from mmsdk.decoding.rules import Greedy


def drafters(
    vocab_size: int = 49152,
    prompt_tokens: int = 256,
    rounds: int = 60,
    num_words: int = 400,
    noise: float = 0.3,
    seed: int = 0,
    output_dir: Path | None = None,
) -> BenchResult:
    """Let every drafter follow a text in which words have a favourite successor, and time what it does.

    Args:
        vocab_size: of the target.
        prompt_tokens: length of the text before.
        rounds: proposals; the median counts.
        num_words: different words of the text, which recur.
        noise: share of places where another word follows than usual.
        seed: of the text and all draws.
        output_dir: not used; there is nothing to draw.
    """
    text = _Text(vocab_size, num_words, noise, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, num_hidden_layers=2, **shape)).eval()
    sides: dict[str, tuple[Callable[[], Drafter], int]] = {
        "prompt lookup": (PromptLookup, 10),
        "Token Recycling, 16": (lambda: TokenRecycling(vocab_size), 16),
        "Token Recycling, 32": (lambda: TokenRecycling(vocab_size), 32),
        "Token Recycling, all 80": (lambda: TokenRecycling(vocab_size), 80),
        "ADED": (ADED, 64),
        "draft model, 4": (lambda: DraftModel(model, num_tokens=4), 4),
        "early exit, 4": (lambda: EarlyExit(model, num_layers=1, num_tokens=4), 4),
        "DySpec, 8": (lambda: DySpec(model), 8),
    }
    table: list[list[Any]] = []
    for name, (build, budget) in sides.items():
        with _forward_time(model) as spent:
            nodes, propose, observe = text.follow(build(), budget, prompt_tokens, rounds)
        forward = spent[0] / rounds
        total = statistics.median(a + b for a, b in zip(propose, observe, strict=True))
        parts = [statistics.median(propose), statistics.median(observe), total]
        table.append([name, nodes / rounds, *(1e6 * part for part in parts), 1e6 * forward if forward else None])
    return BenchResult(
        "drafters",
        ["drafter", "candidates", "propose us", "observe us", "together us", "of it forwards us"],
        table,
        [
            f"Vocabulary {vocab_size}, one row, median of {rounds} proposals after {prompt_tokens} tokens of a "
            f"synthetic text of {num_words} words, in which {noise:.0%} of the words do not follow as usual.",
            "Forwards: of the draft model, a Llama of width 64 with two layers (one for early exit), mean; with a real "
            "one they are what a proposal costs.",
        ],
    )


class _Text:
    """Words with a favourite successor each, and a target that knows them."""

    def __init__(self, vocab_size: int, num_words: int, noise: float, seed: int) -> None:
        self._generator = Generator().manual_seed(seed)
        self._words = torch.randperm(vocab_size, generator=self._generator)[:num_words]
        self._successors = torch.randint(vocab_size, (vocab_size,), generator=self._generator)
        self._successors[self._words] = self._words[torch.randperm(num_words, generator=self._generator)]
        self._noise = noise
        self._logits = torch.randn(128, vocab_size, generator=self._generator)

    def _next(self, tokens: Tensor) -> Tensor:
        random = self._words[torch.randint(len(self._words), tokens.shape, generator=self._generator)]
        unusual = torch.rand(tokens.shape, generator=self._generator) < self._noise
        return torch.where(unusual, random, self._successors[tokens])

    def follow(
        self, drafter: Drafter, budget: int, prompt_tokens: int, rounds: int
    ) -> tuple[int, list[float], list[float]]:
        """Return how many candidates a drafter proposed, and the seconds of each proposal and of each observation."""
        prompt = [self._words[0]]
        for _ in range(prompt_tokens - 1):
            prompt.append(self._next(prompt[-1]))
        drafter.reset([torch.stack(prompt)])
        rule, generators = Greedy(), [Generator().manual_seed(0)]
        proposed, propose, observe = 0, [], []
        for _ in range(rounds):
            started = time.perf_counter()
            tree = drafter.propose(budget, generators)
            propose.append(time.perf_counter() - started)
            proposed += int(tree.is_candidate.sum())
            logits = self._logits[torch.arange(tree.num_nodes) % len(self._logits)][None].clone()
            logits.scatter_(-1, self._next(tree.tokens)[..., None], 20.0)
            decision = rule.verify(tree, logits, torch.zeros(tree.tokens.shape))
            verified = Verified(tree, logits, decision)
            started = time.perf_counter()
            drafter.observe(verified)
            observe.append(time.perf_counter() - started)
        return proposed, propose, observe


@contextmanager
def _forward_time(model: Any) -> Iterator[list[float]]:
    """Add up the seconds of a model's forwards within a block, those of its own layers on their own included."""
    spent, started = [0.0], [0.0]

    def begin(*_: Any) -> None:
        started[0] = time.perf_counter()

    def end(*_: Any) -> None:
        spent[0] += time.perf_counter() - started[0]

    first, last = model.model.embed_tokens, model.lm_head
    handles = [first.register_forward_pre_hook(begin), last.register_forward_hook(end)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()
