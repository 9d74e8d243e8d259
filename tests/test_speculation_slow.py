"""Exactness of speculation on trained models: hundreds of pictures, and long texts of a real language model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from generators.feature_head import FeatureDrafter, FeatureHead
from generators.generator_drafter import GeneratorDrafter
from generators.llamagen import LlamaGen
from generators.pipelines import ARImagePipeline
from mmsdk.bench.text_prompts import PROMPTS
from mmsdk.data.smollm import load_smollm2
from mmsdk.decoding.base import Drafter
from mmsdk.decoding.decoder import SpeculativeDecoder
from mmsdk.decoding.drafters.aded import ADED
from mmsdk.decoding.drafters.draft_model import DraftModel
from mmsdk.decoding.drafters.dyspec import DySpec
from mmsdk.decoding.drafters.early_exit import EarlyExit
from mmsdk.decoding.drafters.prompt_lookup import PromptLookup
from mmsdk.decoding.drafters.token_recycling import TokenRecycling
from mmsdk.decoding.rules import Lantern

pytestmark = pytest.mark.slow

# What trees and single tokens compute differs by rounding; a choice may differ where two tokens are as close as this.
TIE = 1e-3
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey")
THINGS = (
    "heart", "apple", "car", "flower", "book", "circle", "square", "cat", "dog", "fish",
    "bird", "house", "star", "hat", "ball", "boat", "leaf", "face", "cup", "bus",
)  # fmt: skip


def assert_same_but_for_ties(got: Tensor, expected: Tensor, logits_after: Callable[[Tensor], Tensor]) -> int:
    """Check that two sequences are equal up to a tie, and return whether there was one."""
    differing = (got != expected).nonzero().flatten()
    if not len(differing):
        return 0
    first = int(differing[0])
    logits = logits_after(expected[:first])
    gap = float((logits[expected[first]] - logits[got[first]]).abs())
    assert gap < TIE, f"token {first} is {int(got[first])}, not {int(expected[first])}; logits differ by {gap}"
    return 1


# ---------------------------------------------------------------- pictures


@cache
def pipeline() -> ARImagePipeline:
    pipe = ARImagePipeline.from_pretrained("emoji-64")
    pipe.set_progress_bar_config(disable=True)
    return pipe


IMAGE_DRAFTERS: dict[str, Callable[[LlamaGen], Drafter]] = {
    "head": lambda model: FeatureDrafter(FeatureHead.from_pretrained("emoji-64-head").eval(), model, 13, depth=3),
    "generator": lambda model: GeneratorDrafter(LlamaGen.from_pretrained("emoji-64-draft").eval()),
    "recycling": lambda model: TokenRecycling(model.config.codebook_size),
    "prompt_lookup": lambda model: PromptLookup(),
}


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", IMAGE_DRAFTERS)
def test_200_pictures_are_those_without(name: str, do_sample: bool) -> None:
    pipe, prompts = pipeline(), [f"{colour} {thing}" for colour, thing in product(COLOURS, THINGS)]
    assert len(prompts) == 200
    decoder = SpeculativeDecoder(IMAGE_DRAFTERS[name](pipe.transformer), num_candidates=12)
    settings: dict[str, Any] = {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 0, "do_sample": do_sample}
    same = drafted = accepted = 0
    for first in range(0, 200, 25):
        chosen = prompts[first : first + 25]
        plain, fast = (
            pipe(chosen, generator=[Generator().manual_seed(first + i) for i in range(25)], output_type="tokens",
                 accelerator=accelerator, **settings).images.token_ids
            for accelerator in (None, decoder)
        )  # fmt: skip
        same += int((plain == fast).all(1).sum())
        drafted, accepted = drafted + decoder.stats.drafted, accepted + decoder.stats.accepted
    assert 0 < accepted < drafted
    # At most one picture in two hundred meets a tie within 64 choices.
    assert same >= 199


def test_200_pictures_of_a_relaxed_rule_are_others() -> None:
    pipe = pipeline()
    neighbours = pipe.image_tokenizer.quantize.nearest_codes(1000)
    decoder = SpeculativeDecoder(IMAGE_DRAFTERS["head"](pipe.transformer), Lantern(neighbours, 0.9), num_candidates=12)
    prompts = [f"red {thing}" for thing in THINGS]
    plain, relaxed = (
        pipe(prompts, generator=[Generator().manual_seed(i) for i in range(20)], output_type="tokens", temperature=1.0,
             accelerator=accelerator).images.token_ids
        for accelerator in (None, decoder)
    )  # fmt: skip
    assert int((plain == relaxed).all(1).sum()) < 5


# ---------------------------------------------------------------- texts


@cache
def language_model() -> tuple[Any, Any]:
    pytest.importorskip("gguf", reason="extra `text` is not installed")
    return load_smollm2()


TEXT_DRAFTERS: dict[str, Callable[[Any], Drafter]] = {
    "prompt_lookup": lambda model: PromptLookup(),
    "token_recycling": lambda model: TokenRecycling(model.config.vocab_size),
    "aded": lambda model: ADED(),
    "early_exit": lambda model: EarlyExit(model, num_layers=10),
    "draft_model": lambda model: DraftModel(model, num_tokens=3),
    "dyspec": lambda model: DySpec(model),
}


@cache
def texts() -> list[tuple[Tensor, Tensor]]:
    """Return twenty long prompts, `(1, n)` ids each, and what greedy decoding makes of them."""
    model, tokenizer = language_model()
    pairs = list(product(PROMPTS["rewrite"], (*PROMPTS["story"], *PROMPTS["code"])))[:20]
    made = []
    for given, asked in pairs:
        message = [{"role": "user", "content": f"{given}\n\n{asked}"}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        made.append((ids, model.generate(ids, do_sample=False, max_new_tokens=48)))
    return made


@pytest.mark.parametrize("name", TEXT_DRAFTERS)
@torch.no_grad()
def test_twenty_long_texts_are_those_of_greedy_decoding(name: str) -> None:
    model, _ = language_model()
    decoder = SpeculativeDecoder(TEXT_DRAFTERS[name](model), num_candidates=6)
    ties = accepted = 0
    for prompt, expected in texts():
        got = model.generate(prompt, do_sample=False, max_new_tokens=48, custom_generate=decoder)
        length = min(got.shape[1], expected.shape[1])
        ties += assert_same_but_for_ties(
            got[0, :length], expected[0, :length], lambda ids: model(ids[None]).logits[0, -1]
        )
        accepted += decoder.stats.accepted
    assert len(texts()) == 20
    assert accepted > 0
    assert ties <= 1
