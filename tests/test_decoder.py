"""The engine of speculative decoding on tiny language models: what it writes is what the model writes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Generator, Tensor
from transformers import (
    Cache,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from mmsdk.caching import CACHE, cache_of
from mmsdk.decoding.base import AcceptanceRule, Decision, Drafter, Prefill, Verified
from mmsdk.decoding.cost import CostModel
from mmsdk.decoding.decoder import SpeculativeDecoder
from mmsdk.decoding.drafters.aded import ADED
from mmsdk.decoding.drafters.draft_model import DraftModel
from mmsdk.decoding.drafters.dyspec import DySpec
from mmsdk.decoding.drafters.early_exit import EarlyExit
from mmsdk.decoding.drafters.prompt_lookup import PromptLookup
from mmsdk.decoding.drafters.token_recycling import TokenRecycling
from mmsdk.decoding.rules import Greedy, KSeq, Lantern, Matching, Rejection
from mmsdk.decoding.rules.lantern import nearest_codes
from mmsdk.decoding.sampling import sample_inverse_cdf
from mmsdk.decoding.target import HFTarget, TargetModel
from mmsdk.decoding.tree import DraftTree
from tests.tiny_vlms import FAMILIES, VOCABULARY, tiny_inputs, tiny_vlm

VOCAB = 24
PAD, EOS = 0, 23
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def spread(model: PreTrainedModel, seed: int = 0, scale: float = 0.3) -> PreTrainedModel:
    """Give a model weights large enough that its choices depend on all of its input."""
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def llama(num_layers: int = 2) -> PreTrainedModel:
    return spread(LlamaForCausalLM(LlamaConfig(**SIZES | {"num_hidden_layers": num_layers})))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return llama()


def similar(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model that often says what `model` says."""
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=Generator().manual_seed(1)) * 0.02)
    return other


DRAFTERS: dict[str, Callable[[PreTrainedModel], Drafter]] = {
    "prompt_lookup": lambda model: PromptLookup(),
    "token_recycling": lambda model: TokenRecycling(VOCAB),
    "aded": lambda model: ADED(),
    "draft_model": lambda model: DraftModel(similar(model), num_tokens=4),
    "sampled_draft": lambda model: DraftModel(similar(model), num_tokens=3, do_sample=True),
    "dyspec": lambda model: DySpec(similar(model)),
    "early_exit": lambda model: EarlyExit(model, num_layers=1),
}


def prompts(batch: int, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Return prompts with a repetition in them, padded on the left."""
    generator = Generator().manual_seed(seed)
    ids = torch.randint(2, EOS, (batch, length), generator=generator)
    ids[:, length // 2 : length // 2 + 3] = ids[:, -3:].clone()
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : row % (length - 4)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def both(model: PreTrainedModel, decoder: SpeculativeDecoder, inputs: dict[str, Any], **settings: Any) -> None:
    """Check that a decoder writes what the model writes."""
    settings = {"do_sample": False, "max_new_tokens": 16} | settings
    expected = model.generate(**inputs, **settings)
    got = model.generate(**inputs, **settings, custom_generate=decoder)
    assert torch.equal(got, expected)


# ---------------------------------------------------------------- nothing relaxed: what the model writes alone


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_identity(model: PreTrainedModel, name: str) -> None:
    decoder = SpeculativeDecoder(DRAFTERS[name](model), num_candidates=6)
    accepted = 0
    for seed in range(5):
        both(model, decoder, prompts(5, seed=seed), max_new_tokens=12)
        assert decoder.stats.tokens == 5 * 12
        accepted += decoder.stats.accepted
    for seed in range(4):
        both(model, decoder, prompts(1, seed=seed), max_new_tokens=12)
    assert accepted > 0
    assert decoder.lossless


@pytest.mark.parametrize("name", ["token_recycling", "dyspec"])
def test_the_cost_model_changes_nothing_but_the_speed(model: PreTrainedModel, name: str) -> None:
    decoder = SpeculativeDecoder(DRAFTERS[name](model))
    both(model, decoder, prompts(2))
    both(model, decoder, prompts(1), cache_implementation="static", max_new_tokens=12)
    assert max(decoder.stats.costs) == 8  # more did not fit into the rest of the cache
    both(windowed(), decoder, prompts(1))
    assert decoder.stats.costs[1] == 1


@pytest.mark.parametrize("name", ["token_recycling", "draft_model"])
def test_sampling_with_matching_gives_the_same_text_whatever_is_drafted(model: PreTrainedModel, name: str) -> None:
    texts = []
    for drafter, size in ((PromptLookup(), 0), (DRAFTERS[name](model), 5)):
        decoder = SpeculativeDecoder(drafter, num_candidates=size, generator=Generator().manual_seed(3))
        texts.append(
            model.generate(
                **prompts(3), do_sample=True, temperature=0.8, top_k=9, max_new_tokens=20, custom_generate=decoder
            )
        )
    assert decoder.stats.accepted > 0
    assert torch.equal(*texts)


@pytest.mark.parametrize("rule", [None, Rejection()])
def test_sampled_pairs_follow_the_model(model: PreTrainedModel, rule: AcceptanceRule | None) -> None:
    assert sampled_pairs(model, rule, DraftModel(similar(model), num_tokens=2, do_sample=True)) > 1e-3


class AcceptsAll(KSeq):
    def acceptance(self, node: Any, tokens: Tensor) -> Tensor:
        return torch.ones(len(tokens), dtype=torch.float64)


@pytest.mark.parametrize(("rule", "is_exact"), [(KSeq(), True), (Matching(), True), (AcceptsAll(), False)])
def test_sampled_pairs_of_independent_sequences(model: PreTrainedModel, rule: AcceptanceRule, is_exact: bool) -> None:
    drafter = DraftModel(similar(model), num_tokens=2, do_sample=True, num_sequences=3)
    p_value = sampled_pairs(model, rule, drafter, num_candidates=6, count=400)
    assert p_value > 1e-3 if is_exact else p_value < 1e-6


def test_sampled_pairs_of_a_wrong_rule_do_not(model: PreTrainedModel) -> None:
    wrong = Lantern(nearest_codes(torch.eye(VOCAB), 8), delta=0.5, k=8)
    assert sampled_pairs(model, wrong, DraftModel(similar(model), num_tokens=2)) < 1e-3


def sampled_pairs(
    model: PreTrainedModel, rule: AcceptanceRule | None, drafter: Drafter, num_candidates: int = 2, count: int = 200
) -> float:
    """Return the p-value of the first two tokens of many continuations of one prompt."""
    prompt = prompts(1)["input_ids"]
    generator = Generator().manual_seed(0)
    decoder = SpeculativeDecoder(drafter, rule, num_candidates=num_candidates, generator=generator)
    settings = {"do_sample": True, "top_k": 4, "max_new_tokens": 3}
    texts = model.generate(prompt.expand(count, -1), **settings, custom_generate=decoder)
    first = _probs(model, prompt)[0]
    joint = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for token in first.nonzero().flatten():
        joint[token] = first[token] * _probs(model, torch.cat([prompt, token.view(1, 1)], 1))[0]
    new = texts[:, prompt.shape[1] :]
    counts = torch.bincount(new[:, 0] * VOCAB + new[:, 1], minlength=VOCAB**2).double()
    expected = joint.flatten() * count
    if bool(counts[expected == 0].any()):
        return 0.0
    possible = expected > 0
    statistic = ((counts - expected)[possible].square() / expected[possible]).sum()
    return float(torch.special.gammaincc((possible.sum().double() - 1) / 2, statistic / 2))


@torch.no_grad()
def _probs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, -1].double()
    return torch.softmax(logits.masked_fill(logits < logits.topk(4).values[:, -1:], -float("inf")), -1)


def test_a_batch_equals_its_rows(model: PreTrainedModel) -> None:
    inputs = prompts(4)
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 5}):
        generators = [Generator().manual_seed(i) for i in range(4)]
        decoder = SpeculativeDecoder(TokenRecycling(VOCAB), num_candidates=8, generator=generators)
        together = model.generate(**inputs, **settings, max_new_tokens=15, custom_generate=decoder)
        for row in range(4):
            real = inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]
            alone = SpeculativeDecoder(
                TokenRecycling(VOCAB), num_candidates=8, generator=[Generator().manual_seed(row)]
            )
            text = model.generate(real, **settings, max_new_tokens=15, custom_generate=alone)
            assert text[0, -15:].tolist() == together[row, -15:].tolist()


# ---------------------------------------------------------------- every kind of model and cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_attention_and_windows(family: str, attention: str) -> None:
    sizes = SIZES | {"attn_implementation": attention}
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**sizes, sliding_window=6)),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(**sizes, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
        ),
    }
    model = spread(made[family](), scale=0.2)
    decoder = SpeculativeDecoder(TokenRecycling(VOCAB), num_candidates=9)
    for batch in (1, 3):
        both(model, decoder, prompts(batch), max_new_tokens=25)


def test_a_static_cache(model: PreTrainedModel) -> None:
    decoder = SpeculativeDecoder(TokenRecycling(VOCAB), num_candidates=9)
    both(model, decoder, prompts(1), cache_implementation="static", max_new_tokens=25)
    assert decoder.stats.accepted > 0


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_vision_language_models(family: str) -> None:
    vlm = tiny_vlm(family)
    decoder = SpeculativeDecoder(TokenRecycling(VOCABULARY), num_candidates=6)
    for images in ((1,), (1, 2)):
        both(vlm, decoder, tiny_inputs(vlm, images), max_new_tokens=12)


def windowed() -> PreTrainedModel:
    config = Gemma3TextConfig(**SIZES, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
    return spread(Gemma3ForCausalLM(config), scale=0.2)


MADE: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[PreTrainedModel], Cache]]] = {
    "dynamic": (llama, lambda model: DynamicCache(config=model.config)),
    "windows": (windowed, lambda model: DynamicCache(config=model.config)),
    "windows, all kept": (windowed, lambda model: DynamicCache()),
    "static": (llama, lambda model: StaticCache(config=model.config, max_cache_len=64)),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_cache_that_is_passed_holds_what_plain_decoding_leaves(kind: str) -> None:
    make_model, make_cache = MADE[kind]
    model = make_model()
    decoder = SpeculativeDecoder(TokenRecycling(VOCAB), num_candidates=9)
    caches, texts = [make_cache(model), make_cache(model)], [prompts(1)["input_ids"]] * 2
    for count in (12, 9):
        for i, extra in enumerate(({}, {"custom_generate": decoder})):
            texts[i] = model.generate(texts[i], max_new_tokens=count, do_sample=False, **{CACHE: caches[i]}, **extra)
        assert torch.equal(*texts)
        length = texts[0].shape[1] - 1
        assert int(caches[0].get_seq_length()) == int(caches[1].get_seq_length()) == length
        for plain, ours in zip(caches[0].layers, caches[1].layers, strict=True):
            for expected, got in ((plain.keys, ours.keys), (plain.values, ours.values)):
                torch.testing.assert_close(got[:, :, :length], expected[:, :, :length], atol=1e-4, rtol=1e-4)
    # Plain decoding goes on in a cache of ours.
    more = [model.generate(texts[0], max_new_tokens=9, do_sample=False, **{CACHE: cache}) for cache in caches]
    assert torch.equal(*more)


def test_cached_logits_after_refusals_equal_uncached_ones(model: PreTrainedModel) -> None:
    target = HFTarget(model)
    prompt = prompts(2)
    target.prefill(**prompt)
    target.forward_tree(DraftTree(prompt["input_ids"][:, -1:], torch.full((2, 1), -1)))
    nothing = Decision(torch.full((2, 0), -1), torch.zeros(2, dtype=torch.int64), torch.tensor([3, 4]))
    target.commit(nothing)
    texts = [prompt["input_ids"][row][prompt["attention_mask"][row].bool()].tolist() for row in range(2)]
    roots = torch.tensor([3, 4])
    for paths in ([[1, 3], [-1, -1]], [[2, -1], [1, 3]], [[-1, -1], [1, -1]]):
        tree = DraftTree(
            torch.cat([roots[:, None], torch.tensor([[5, 6, 7], [8, 9, 10]])], 1), torch.tensor([[-1, 0, 0, 1]] * 2)
        )
        logits, _ = target.forward_tree(tree)
        path = torch.tensor(paths)
        for row in range(2):
            for node, ids in ((0, []), (1, [1]), (2, [2]), (3, [1, 3])):
                text = texts[row] + [int(tree.tokens[row, i]) for i in [0, *ids]]
                with torch.no_grad():
                    expected = model(torch.tensor([text])).logits[0, -1]
                torch.testing.assert_close(logits[row, node], expected, atol=1e-4, rtol=1e-4)
        target.discard()  # measured and forgotten, as the decoder does
        target.forward_tree(tree)
        roots = torch.tensor([11, 12])
        target.commit(Decision(path, (path >= 0).sum(1), roots))
        for row in range(2):
            texts[row] += [int(tree.tokens[row, node]) for node in [0, *[n for n in paths[row] if n >= 0]]]


# ---------------------------------------------------------------- where texts end, and how they are steered


def test_ends_within_an_accepted_path(model: PreTrainedModel) -> None:
    decoder = SpeculativeDecoder(DraftModel(model, num_tokens=7), num_candidates=7)
    lengths = set()
    for seed in range(8):
        inputs = prompts(4, seed=seed)
        text = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        ends = sorted({int(token) for token in text[:, -10]})
        both(model, decoder, inputs, eos_token_id=ends, max_new_tokens=16)
        lengths.add(decoder.stats.tokens)
    assert len(lengths) > 4


def test_stopping_criteria_see_every_token(model: PreTrainedModel) -> None:
    class After(StoppingCriteria):
        """Ends a text with the second even token after its prompt."""

        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return (input_ids[:, 9:] % 2 == 0).sum(1) >= 2

    decoder = SpeculativeDecoder(DraftModel(model, num_tokens=7), num_candidates=7)
    for seed in range(4):
        # Plain decoding lets rows go on after a criterion, unless there is an end token.
        both(model, decoder, prompts(3, seed=seed), stopping_criteria=StoppingCriteriaList([After()]), eos_token_id=EOS)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.2, "bad_words_ids": [[3, 4], [5]], "min_new_tokens": 6, "eos_token_id": EOS},
        {"suppress_tokens": [3, 5, 7], "encoder_repetition_penalty": 1.4},
        {"prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * 5 + row + i) % VOCAB for i in range(4)]},
    ],
)
def test_logits_processors_see_the_text_of_every_node(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    for drafter in (TokenRecycling(VOCAB), DraftModel(model, num_tokens=5)):
        decoder = SpeculativeDecoder(drafter, num_candidates=7)
        for seed in range(2):
            both(model, decoder, prompts(3, seed=seed), max_new_tokens=12, **settings)


def test_own_logits_processors(model: PreTrainedModel) -> None:
    class Alternate(LogitsProcessor):
        """Allows even tokens after odd ones, and odd ones after even ones."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            allowed = (torch.arange(VOCAB) + input_ids[:, -1:]) % 2 == 1
            return scores.masked_fill(~allowed, -float("inf"))

    decoder = SpeculativeDecoder(TokenRecycling(VOCAB), num_candidates=9)
    both(model, decoder, prompts(2), logits_processor=LogitsProcessorList([Alternate()]))


def test_stop_strings(model: PreTrainedModel) -> None:
    words = {chr(ord("a") + i): i for i in range(VOCAB)}
    unknown = {"unk_token": "a"}
    letters = Tokenizer(WordLevel(words, **unknown))
    letters.pre_tokenizer, letters.decoder = Split("", "isolated"), Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, **unknown)
    decoder = SpeculativeDecoder(DraftModel(model, num_tokens=7), num_candidates=7)
    lengths = set()
    for seed in range(4):
        inputs = prompts(1, seed=seed)
        text = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [tokenizer.decode(text[0, -7:-5])])])
        both(model, decoder, inputs, stopping_criteria=criteria)
        lengths.add(decoder.stats.tokens)
    assert max(lengths) < 16


def test_streams_what_each_forward_brings(model: PreTrainedModel) -> None:
    steps: list[list[list[int]]] = []
    decoder = SpeculativeDecoder(DraftModel(model, num_tokens=5), num_candidates=5)
    inputs = prompts(2)
    text = model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=decoder, callback=steps.append)
    for row in range(2):
        assert [token for step in steps for token in step[row]] == text[row, 9:].tolist()
    assert 2 < len(steps) == decoder.stats.forwards < 8


@pytest.mark.parametrize("batch", [1, 2])
def test_returns_dictionaries(model: PreTrainedModel, batch: int) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.3}
    settings |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    decoder = SpeculativeDecoder(DraftModel(model, num_tokens=5), num_candidates=5)
    plain = model.generate(**prompts(batch), **settings)
    ours = model.generate(**prompts(batch), **settings, custom_generate=decoder)
    assert torch.equal(plain.sequences, ours.sequences)
    torch.testing.assert_close(plain.scores, ours.scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain.logits, ours.logits, atol=1e-4, rtol=1e-4)
    if batch == 1:
        assert cache_of(ours).get_seq_length() == ours.sequences.shape[1] - 1
    else:
        assert cache_of(ours) is None


def test_drafters_get_the_states_that_they_need(model: PreTrainedModel) -> None:
    class Watching(PromptLookup):
        needs_hidden_states = True
        prefill: Prefill
        states: list[list[Tensor]]

        def reset(self, prompts: Any, prefill: Any = None) -> None:
            super().reset(prompts, prefill)
            self.prompts, self.prefill, self.alive = prompts, prefill, [0, 1]
            self.states = [[prefill.hidden_states[row][prefill.mask[row]]] for row in range(2)]

        def observe(self, verified: Verified) -> None:
            super().observe(verified)
            assert verified.hidden_states is not None
            for i, row in enumerate(self.alive):
                nodes = [0, *verified.decision.path[i, : verified.decision.lengths[i]].tolist()]
                self.states[row].append(verified.hidden_states[i, nodes])

        def select_rows(self, rows: Any) -> None:
            super().select_rows(rows)
            self.alive = [self.alive[i] for i in rows]

    drafter = Watching()
    text = model.generate(
        **prompts(2), do_sample=False, max_new_tokens=8, custom_generate=SpeculativeDecoder(drafter, num_candidates=4)
    )
    for row in range(2):
        ids = torch.cat([drafter.prompts[row], text[row, 9:]])
        with torch.no_grad():
            expected = model(ids[None], output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(torch.cat(drafter.states[row]), expected[:-1], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- any target


class Bigrams(TargetModel):
    """What follows a token depends on that token alone."""

    def __init__(self, vocab: int = 9) -> None:
        self.table = torch.randn(vocab, vocab, generator=Generator().manual_seed(0)) * 2

    def forward_tree(self, tree: DraftTree, output_hidden_states: bool = False) -> tuple[Tensor, None]:
        return self.table[tree.tokens], None

    def commit(self, decision: Decision) -> None: ...

    def discard(self) -> None: ...

    def select_rows(self, rows: Any) -> None: ...


@pytest.mark.parametrize("drafter", [PromptLookup(), TokenRecycling(9), ADED()])
def test_the_core_draws_with_the_numbers_that_it_is_given(drafter: Drafter) -> None:
    target, batch, count = Bigrams(), 3, 40
    uniforms = torch.rand(batch, count, generator=Generator().manual_seed(1), dtype=torch.float64)
    texts: list[list[int]] = [[] for _ in range(batch)]
    decoder = SpeculativeDecoder(drafter, num_candidates=6)
    starts = [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([5, 4, 3])]
    for done in decoder.decode(target, starts, count, do_sample=True, uniforms=uniforms):
        for row, tokens, is_last in zip(done.rows, done.tokens, done.finished, strict=True):
            texts[row] += tokens
            assert is_last == (len(texts[row]) == count)
    for row in range(batch):
        token, expected = starts[row][-1], []
        for number in uniforms[row]:
            token = sample_inverse_cdf(torch.softmax(target.table[token], -1), number)
            expected.append(int(token))
        assert texts[row] == expected
    stats = decoder.stats
    assert stats.accepted > 0
    assert stats.tokens == batch * count
    assert stats.accepted_at[0] <= stats.drafted_at[0] <= stats.row_forwards
    assert sum(stats.accepted_at) == stats.accepted
    assert stats.tokens_per_forward == batch * count / stats.row_forwards


# ---------------------------------------------------------------- the cost model


def test_costs_lie_on_lines_between_known_ones() -> None:
    model = CostModel({1: 2.0, 5: 4.0, 9: 8.0})
    assert [model.cost(k) for k in (1, 3, 5, 7, 9, 18)] == [1.0, 1.5, 2.0, 3.0, 4.0, 8.0]
    assert model.costs == {1: 1.0, 5: 2.0, 9: 4.0}


def test_chooses_what_brings_most_by_hand() -> None:
    model = CostModel({1: 1.0, 4: 1.5, 8: 2.0}, probe_share=0.0)
    brings = {0: 0.0, 3: 0.0, 7: 3.0}
    chosen = []
    for _ in range(9):
        size = model.choose()
        chosen.append(size)
        model.record(size, size + 1, brings[size])
    # Trying 3 loses 1.5 - 1 forwards; 7 brings 4 tokens for 2. Then trying 3 loses 1.5 - 1 / 2 each time, and may lose
    # 4 in all.
    assert chosen == [3, 7, 3, 3, 3, 7, 7, 7, 7]
    assert model.gain(7) == 2.0
    assert model.choose(limit=2) == 0
    assert model.choose(limit=0) == 0
    for _ in range(60):
        model.record(7, 8, 0.9)  # 1.9 tokens for 2 forwards
    assert model.choose() == 0


def test_drafting_time_counts_where_costs_were_measured() -> None:
    model = CostModel()
    model.calibrate(lambda k: torch.zeros(1), (1, 4))
    for _ in range(9):
        model.record(3, 4, 3.0)
    assert model.choose() == 3
    model.record(3, 4, 3.0, seconds=60.0)
    assert model.choose() == 0


def test_falls_back_at_a_bounded_cost_and_comes_back() -> None:
    model = CostModel({1: 1.0, 4: 1.6, 8: 1.8, 16: 2.16, 32: 2.94})
    spent, rounds = 0.0, 4000
    for _ in range(rounds):
        size = model.choose()
        model.record(size, size + 1, 0.0)
        spent += model.cost(size + 1)
    assert 1.02 * rounds < spent < 1.03 * rounds
    last = [0] * 200
    for i in range(200):
        last[i] = model.choose()
        model.record(last[i], last[i] + 1, 1.0 if last[i] else 0.0)
    assert set(last[-20:]) <= {3, 7}  # 2 tokens for 1.6 or 1.8


def test_measures_once_for_each_context() -> None:
    calls: list[int] = []

    def forward(k: int) -> Tensor:
        calls.append(k)
        return torch.zeros(1, k)

    model = CostModel()
    with pytest.raises(RuntimeError, match="not known yet"):
        model.choose()
    costs = model.calibrate(forward, (4, 1, 2), context="short")
    assert calls == [1, 1, 2, 4, 1, 2, 4]
    assert 1.0 == costs[1] <= costs[2] <= costs[4]
    for _ in range(9):
        model.record(3, 4, 30.0)
    model.calibrate(forward, (1, 2), context="long")
    assert len(calls) == 12
    assert set(model.costs) == {1, 2}
    assert model.calibrate(forward, (1, 2, 4), context="short") == costs
    assert len(calls) == 12
    assert model.gain(3) == pytest.approx(31 / costs[4])


def test_falls_back_where_drafts_are_useless(model: PreTrainedModel) -> None:
    class Useless(PromptLookup):
        """Always proposes the wrong token."""

        def propose_row(self, row: Any, budget: int, generators: Any) -> DraftTree:
            wrong = torch.zeros(1, budget, dtype=torch.int64)
            return DraftTree.chain(torch.tensor(row.ids[-1:]), wrong)

    decoder = SpeculativeDecoder(Useless(), cost_model=CostModel({1: 1.0, 2: 1.5, 65: 4.0}))
    both(model, decoder, prompts(1), suppress_tokens=[0], max_new_tokens=150)
    # Each of the larger trees loses 3 forwards, each of the smaller ones half of one.
    assert 0 < decoder.stats.drafted <= 2 * 64 + 8
    assert decoder.stats.tokens_per_forward == 1


# ---------------------------------------------------------------- what goes wrong


def test_bad_input(model: PreTrainedModel) -> None:
    inputs = prompts(2)

    def generate(decoder: SpeculativeDecoder, target: PreTrainedModel = model, **settings: Any) -> None:
        target.generate(**inputs, **{"max_new_tokens": 4, "do_sample": False} | settings, custom_generate=decoder)

    class Untouched(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            raise AssertionError("a forward came first")

    with pytest.raises(ValueError, match="TokenRecycling knows 9 tokens, but the target has 24"):
        generate(SpeculativeDecoder(TokenRecycling(9)), logits_processor=LogitsProcessorList([Untouched()]))
    with pytest.raises(ValueError, match="Rejection samples, but do_sample is False"):
        generate(SpeculativeDecoder(PromptLookup(), Rejection()))
    with pytest.raises(ValueError, match="Greedy does not sample, but do_sample is True"):
        generate(SpeculativeDecoder(PromptLookup(), Greedy()), do_sample=True)
    with pytest.raises(ValueError, match="asked for beam_search"):
        generate(SpeculativeDecoder(PromptLookup()), num_beams=2)
    with pytest.raises(ValueError, match="hidden states are not returned"):
        generate(SpeculativeDecoder(PromptLookup()), output_hidden_states=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="UnbatchedClassifierFreeGuidanceLogitsProcessor counts its calls"):
        generate(SpeculativeDecoder(PromptLookup()), guidance_scale=2.0)
    draft = llama()
    for drafter, rule, message in (
        (PromptLookup(), KSeq(), "KSeq takes .*drawn one by one or drawn with replacement.*PromptLookup are chosen"),
        (DySpec(draft), KSeq(), "DySpec are drawn without replacement"),
        (DraftModel(draft, do_sample=True, num_sequences=2), Rejection(), "DraftModel are drawn with replacement"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeculativeDecoder(drafter, rule)
    with pytest.raises(ValueError, match="one for each of 2 rows, got 3"):
        generate(SpeculativeDecoder(PromptLookup(), generator=[Generator()] * 3), do_sample=True)
    with pytest.raises(ValueError, match="StaticCache of 0 tokens"):
        generate(SpeculativeDecoder(PromptLookup()), cache_implementation="static")
    flexible = llama()
    flexible.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention', which aborts the process"):
        generate(SpeculativeDecoder(PromptLookup()), flexible)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="MambaForCausalLM takes no positions"):
        HFTarget(mamba)
    jamba = JambaConfig(**SIZES, num_experts=1, mamba_d_state=4)
    with pytest.raises(ValueError, match="cannot be cut back to a path of a tree: .*linear_attention"):
        HFTarget(JambaForCausalLM(jamba))
    with pytest.raises(TypeError, match="drafter must be a Drafter, got str"):
        SpeculativeDecoder("prompt_lookup")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="acceptance must be an AcceptanceRule or None, got str"):
        SpeculativeDecoder(PromptLookup(), "greedy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_candidates must be an integer of at least 0, got -1"):
        SpeculativeDecoder(PromptLookup(), num_candidates=-1)
    with pytest.raises(ValueError, match="pass one of them, got 3 too"):
        SpeculativeDecoder(PromptLookup(), num_candidates=3, cost_model=CostModel())
    for costs in ({2: 1.0}, {1: 0.0}, {0: 1.0, 1: 1.0}):
        with pytest.raises(ValueError, match="costs must be positive for numbers of tokens from 1 on"):
            CostModel(costs)
    with pytest.raises(ValueError, match="probe_share must be at least 0 and below 1, got 1"):
        CostModel({1: 1.0}, probe_share=1)
    with pytest.raises(ValueError, match="from 0 to at most 1, with 0 among them; got \\[1\\]"):
        EarlyExit(model, layers=(1,))
    with pytest.raises(ValueError, match="either num_layers or layers"):
        EarlyExit(model, num_layers=1, layers=(0,))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no layers in model.model.layers"):
        EarlyExit(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=1)), num_layers=1)


def test_early_exit_shares_the_weights_and_leaves_the_model_alone() -> None:
    model = llama(num_layers=3)
    before = model.generate(**prompts(1), do_sample=False, max_new_tokens=5)
    drafter = EarlyExit(model, layers=(0, 2))
    drafter.reset([prompts(1)["input_ids"][0]])
    shallow = drafter._rows[0].model.model
    assert shallow.model.layers[1].self_attn.q_proj is model.model.layers[2].self_attn.q_proj
    assert (len(shallow.model.layers), len(model.model.layers)) == (2, 3)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert torch.equal(model.generate(**prompts(1), do_sample=False, max_new_tokens=5), before)
    whole = SpeculativeDecoder(EarlyExit(model, num_layers=3, num_tokens=5), num_candidates=5)
    both(model, whole, prompts(1), max_new_tokens=13)
    assert whole.stats.acceptance_rate == 1.0


@pytest.mark.parametrize("kind", MADE)
def test_an_exception_leaves_model_and_cache_usable(kind: str) -> None:
    class Failing(PromptLookup):
        fails = True

        def observe(self, verified: Any) -> None:
            super().observe(verified)
            if self.fails and len(self._rows[0].ids) > 20:
                raise RuntimeError("in the middle")

    make_model, make_cache = MADE[kind]
    model = make_model()
    cache = make_cache(model)
    prefix = model.generate(**prompts(1), do_sample=False, max_new_tokens=5, **{CACHE: cache})
    length = int(cache.get_seq_length())
    drafter = Failing()
    decoder = SpeculativeDecoder(drafter, num_candidates=4)
    settings = {"do_sample": False, "max_new_tokens": 10}
    with pytest.raises(RuntimeError, match="in the middle"):
        model.generate(prefix, **settings, **{CACHE: cache}, custom_generate=decoder)
    assert int(cache.get_seq_length()) == length
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(prefix, **settings, **{CACHE: cache}, custom_generate=decoder)
    handle.remove()
    assert int(cache.get_seq_length()) == length
    drafter.fails = False
    got = model.generate(prefix, **settings, **{CACHE: cache}, custom_generate=decoder)
    assert torch.equal(got, model.generate(prefix, **settings))


def test_the_rule_says_whether_a_decoder_is_lossless() -> None:
    assert SpeculativeDecoder(PromptLookup(), Matching()).lossless
    assert not SpeculativeDecoder(PromptLookup(), Lantern(nearest_codes(torch.eye(4), 2), k=2)).lossless
