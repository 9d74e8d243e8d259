"""Speculative decoding of a real language model: stories, code and rewriting, against greedy decoding in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmsdk.bench.runner import BenchResult
from mmsdk.bench.text_prompts import PROMPTS
from mmsdk.data.smollm import load_smollm2
from mmsdk.decoding.decoder import SpeculativeDecoder
from mmsdk.decoding.drafters.aded import ADED
from mmsdk.decoding.drafters.early_exit import EarlyExit
from mmsdk.decoding.drafters.prompt_lookup import PromptLookup
from mmsdk.decoding.drafters.token_recycling import TokenRecycling


def speculative_text(
    drafters: Sequence[str] = ("prompt lookup", "Token Recycling", "ADED"),
    kinds: Sequence[str] = ("story", "code", "rewrite"),
    num_prompts: int = 3,
    max_new_tokens: int = 96,
    lookups: Sequence[int] = (3, 10),
    repeats: int = 2,
    cache_dir: str | None = None,
    output_dir: Path | None = None,
) -> BenchResult:
    """Let SmolLM2-135M answer prompts greedily: alone, with prompt lookup of transformers, and with drafters.

    Args:
        drafters: of `prompt lookup`, `Token Recycling`, `ADED`, `early exit`; sizes of trees are those that the cost
            model chooses.
        kinds: of `story`, `code`, `rewrite`.
        num_prompts: prompts of each kind.
        max_new_tokens: length of an answer.
        lookups: `prompt_lookup_num_tokens` of transformers to compare with.
        repeats: times that each answer is written; the fastest counts.
        cache_dir: where the model lies.
        output_dir: not used; there is nothing to draw.
    """
    model, tokenizer = load_smollm2(cache_dir)
    make: dict[str, Callable[[], Any]] = {
        "prompt lookup": PromptLookup,
        "Token Recycling": lambda: TokenRecycling(model.config.vocab_size),
        "ADED": ADED,
        "early exit": lambda: EarlyExit(model),
    }
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.eos_token_id}
    table: list[list[Any]] = []
    costs: dict[int, float] = {}
    for kind in kinds:
        prompts = [_tokenize(tokenizer, text) for text in PROMPTS[kind][:num_prompts]]
        sides: dict[str, dict[str, Any]] = {"greedy": {}}
        sides |= {f"transformers' prompt lookup, {n}": {"prompt_lookup_num_tokens": n} for n in lookups}
        decoders = {name: SpeculativeDecoder(make[name]()) for name in drafters}
        sides |= {name: {"custom_generate": decoder} for name, decoder in decoders.items()}
        for decoder in decoders.values():  # costs are measured once, and learning begins here
            model.generate(prompts[0], **settings | {"max_new_tokens": 8}, custom_generate=decoder)
            costs = decoder.stats.costs or costs
        tokens, forwards, same = ({name: 0 for name in sides} for _ in range(3))
        seconds = dict.fromkeys(sides, 0.0)
        spent = dict.fromkeys(decoders, 0.0)
        for i, prompt in enumerate(prompts):
            order = list(sides)
            reference: Tensor | None = None
            fastest = dict.fromkeys(sides, float("inf"))
            for turn in range(i, i + repeats):
                # Each goes first in turn, but greedy decoding tells what is right.
                for name in ["greedy", *order[1 + turn % len(order) :], *order[1 : 1 + turn % len(order)]]:
                    with _CountedForwards(model) as counted:
                        started = time.perf_counter()
                        text = model.generate(prompt, **settings, **sides[name])
                        fastest[name] = min(fastest[name], time.perf_counter() - started)
                    reference = text if reference is None else reference
                    same[name] += int(torch.equal(text, reference))
                    tokens[name] += text.shape[1] - prompt.shape[1]
                    forwards[name] += len(counted.lengths)
                    if name in decoders:
                        model_costs = decoders[name].cost_model
                        spent[name] += sum(model_costs.cost(k) for k in counted.lengths[1:])
            for name in sides:
                seconds[name] += fastest[name]
        for name in sides:
            ratio = seconds["greedy"] / seconds[name] * tokens[name] / tokens["greedy"]
            limit = (tokens[name] - len(prompts) * repeats) / spent[name] if spent.get(name) else None
            equal = f"{same[name] // repeats} of {len(prompts)}"
            table.append([kind, name, tokens[name] / forwards[name], ratio, limit, equal])
    measured = ", ".join(f"{k}: {cost:.2f}" for k, cost in costs.items())
    return BenchResult(
        "speculative-text",
        ["prompts", "decoding", "tokens / forward", "ratio", "limit", "same text"],
        table,
        [
            f"SmolLM2-135M-Instruct in float32, {num_prompts} prompts of each kind, {max_new_tokens} new tokens; "
            f"each answer is written {repeats} times, and the fastest counts.",
            f"C(k), the cost of a forward over k tokens relative to one, as last measured: {measured}.",
            "Ratio: tokens per second against greedy decoding. Limit: accepted tokens over C(k), what the ratio would "
            "be if drafting took no time. Same text: prompts whose answer is greedy decoding's.",
        ],
    )


def _tokenize(tokenizer: Any, text: str) -> Tensor:
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]


class _CountedForwards:
    """Note how many tokens each forward of a model reads within a block.

    Attributes:
        lengths: tokens of each forward.
    """

    def __init__(self, model: Any) -> None:
        self.lengths: list[int] = []
        self._model = model

    def __enter__(self) -> _CountedForwards:
        self._handle = self._model.model.embed_tokens.register_forward_hook(
            lambda module, inputs, output: self.lengths.append(output.shape[1])
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()
