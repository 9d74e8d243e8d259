"""Drafters that need no training: what they propose, row by row and step by step."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Generator, Tensor
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from mmsdk.decoding.base import WITH_REPLACEMENT, Decision, Drafter, Verified
from mmsdk.decoding.drafters import DRAFTERS
from mmsdk.decoding.drafters.aded import ADED
from mmsdk.decoding.drafters.cached_model import CachedModel
from mmsdk.decoding.drafters.draft_model import DraftModel
from mmsdk.decoding.drafters.dyspec import DySpec
from mmsdk.decoding.drafters.early_exit import EarlyExit
from mmsdk.decoding.drafters.prompt_lookup import PromptLookup
from mmsdk.decoding.drafters.token_recycling import TokenRecycling, top_ids
from mmsdk.decoding.sampling import draw_uniforms, process_logits, sample_inverse_cdf
from mmsdk.decoding.tree import DraftTree

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def spread(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give a model weights large enough that its choices depend on all of its input."""
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def llama(seed: int) -> PreTrainedModel:
    return spread(LlamaForCausalLM(LlamaConfig(**SIZES)), seed)


def mistral(seed: int) -> PreTrainedModel:
    return spread(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)), seed)


MAKE: dict[str, Callable[[], Drafter]] = {
    "prompt_lookup": lambda: PromptLookup(),
    "token_recycling": lambda: TokenRecycling(VOCAB),
    "aded": lambda: ADED(),
    "dyspec": lambda: DySpec(llama(1)),
    "draft_model": lambda: DraftModel(llama(1), do_sample=True),
    "independent sequences": lambda: DraftModel(llama(1), num_tokens=2, do_sample=True, num_sequences=2),
    "early_exit": lambda: EarlyExit(llama(1), num_layers=1),
}


def make(name: str) -> Drafter:
    assert name in MAKE, f"add the drafter {name!r} to these tests"
    return MAKE[name]()


def generators(count: int, seed: int = 0) -> list[Generator]:
    return [Generator().manual_seed(seed + i) for i in range(count)]


def prompts_of(lengths: Sequence[int], vocab: int = VOCAB, seed: int = 0) -> list[Tensor]:
    generator = Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]


def accept_greedy(tree: DraftTree, logits: Tensor) -> Decision:
    """Follow the target's choices from the root down, without the code of the package."""
    choices = logits.argmax(-1)
    paths, bonus = [], []
    for row in range(len(tree.tokens)):
        node, path = 0, []
        while True:
            wanted = choices[row, node]
            children = (tree.parents[row] == node) & (tree.tokens[row] == wanted)
            if not children.any():
                break
            node = int(children.nonzero()[0])
            path.append(node)
        paths.append(path)
        bonus.append(int(wanted))
    depth = max(map(len, paths))
    return Decision(
        torch.tensor([[*path, *[-1] * (depth - len(path))] for path in paths], dtype=torch.int64),
        torch.tensor([len(path) for path in paths]),
        torch.tensor(bonus),
    )


def continuation(tree: DraftTree, decision: Decision, row: int) -> list[int]:
    path = decision.path[row, : decision.lengths[row]]
    return [*tree.tokens[row, path].tolist(), int(decision.bonus[row])]


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Return what the unmodified model goes on with."""
    prompt = torch.tensor([ids])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()


def bigrams(vocab: int = VOCAB, seed: int = 7) -> Tensor:
    """Return logits `(vocab, vocab)` of a target that knows only the last token, and soon repeats itself."""
    return torch.randn(vocab, vocab, generator=Generator().manual_seed(seed))


def steps(drafter: Drafter, prompts: list[Tensor], count: int, budget: int, table: Tensor) -> list[DraftTree]:
    """Return the trees of some verified steps."""
    drafter.reset(prompts)
    own, trees = generators(len(prompts)), []
    for _ in range(count):
        trees.append(drafter.propose(budget, own))
        logits = table[trees[-1].tokens]
        drafter.observe(Verified(trees[-1], logits, accept_greedy(trees[-1], logits)))
    return trees


def paths_of(tree: DraftTree, row: int = 0) -> list[tuple[int, ...]]:
    """Return the tokens from below the root to each candidate, in the order of the nodes."""
    paths: dict[int, tuple[int, ...]] = {0: ()}
    for node in range(1, tree.num_nodes):
        parent = int(tree.parents[row, node])
        if parent >= 0:
            paths[node] = (*paths[parent], int(tree.tokens[row, node]))
    return list(paths.values())[1:]


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """Return the p-value of the counts under the probabilities."""
    possible = probs > 0
    assert not counts[~possible].any()
    expected = probs[possible].double() * counts.sum()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc((possible.sum() - 1) / 2, statistic / 2))


# --- every drafter --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAFTERS)
def test_registered(name: str) -> None:
    module, attribute = DRAFTERS[name].split(":")
    assert type(make(name)) is getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", MAKE)
def test_greedy_output_is_the_targets(name: str) -> None:
    """With every draft verified against a real model, the output is that model's own, and drafts are accepted."""
    target, prompt = llama(1), prompts_of([9], seed=3)[0]
    drafter, sequence, own, forwards = make(name), prompt.tolist(), generators(1), 0
    expected = sequence + greedy(target, sequence, 60)
    drafter.reset([prompt])
    with torch.no_grad():
        while len(sequence) < len(expected):
            tree = drafter.propose(6, own)
            assert int(tree.tokens[0, 0]) == sequence[-1]
            prefixes = [sequence, *([*sequence, *path] for path in paths_of(tree))]
            longest = max(map(len, prefixes))
            padded = torch.tensor([[*prefix, *[0] * (longest - len(prefix))] for prefix in prefixes])
            ends = torch.tensor([len(prefix) - 1 for prefix in prefixes])
            logits = target(padded).logits[torch.arange(len(prefixes)), ends][None]
            decision = accept_greedy(tree, logits)
            drafter.observe(Verified(tree, logits, decision))
            sequence += continuation(tree, decision, 0)
            forwards += 1
    assert sequence[: len(expected)] == expected
    assert forwards < 60


@pytest.mark.parametrize("name", MAKE)
def test_rows_are_independent(name: str) -> None:
    prompts, table = prompts_of([5, 30, 1], seed=1), bigrams()
    together = steps(make(name), prompts, 8, 12, table)
    for row, prompt in enumerate(prompts):
        drafter = make(name)
        drafter.reset([prompt])
        own = generators(1, seed=row)
        for batched in together:
            single = drafter.propose(12, own)
            candidates = 1 + int(batched.is_candidate[row].sum())
            assert torch.equal(single.tokens[0], batched.tokens[row, :candidates])
            assert torch.equal(single.parents[0], batched.parents[row, :candidates])
            if single.probs is not None:
                torch.testing.assert_close(single.probs[0], batched.probs[row, :candidates])
            logits = table[single.tokens]
            drafter.observe(Verified(single, logits, accept_greedy(single, logits)))


@pytest.mark.parametrize("name", MAKE)
def test_select_rows(name: str) -> None:
    prompts, table = prompts_of([20, 30, 25], seed=2), bigrams()
    selected, whole = make(name), make(name)
    for drafter in (selected, whole):
        steps(drafter, prompts, 5, 12, table)
    selected.select_rows([2, 0])
    for step in range(3):
        own, all_own = generators(2, seed=10 * step), generators(3, seed=10 * step)
        few = selected.propose(12, own)
        many = whole.propose(12, [all_own[1], all_own[2], all_own[0]])
        for row, before in enumerate((2, 0)):
            assert paths_of(few, row) == paths_of(many, before)
            assert few.tokens[row, 0] == many.tokens[before, 0]
        for drafter, tree in ((selected, few), (whole, many)):
            logits = table[tree.tokens]
            drafter.observe(Verified(tree, logits, accept_greedy(tree, logits)))


@pytest.mark.parametrize("name", MAKE)
def test_budget(name: str) -> None:
    table, most = bigrams(8), []
    drafter = TokenRecycling(8, top_k=4, tree=[(0,), (1,), (0, 0)]) if name == "token_recycling" else make(name)
    if getattr(drafter, "vocab_size", None) == VOCAB:
        table = bigrams()
    prompts = prompts_of([40, 7], vocab=len(table), seed=5)
    for budget in (0, 1, 2, 3, 7):
        trees = steps(drafter, prompts, 6, budget, table)  # DraftTree itself refuses children before their parents
        most.append(max(int(tree.is_candidate.sum(1).max()) for tree in trees))
        assert most[-1] <= budget
    assert most[:3] == [0, 1, 2]


@pytest.mark.parametrize("name", MAKE)
def test_inputs_are_not_changed(name: str) -> None:
    prompts, table = prompts_of([12, 12]), bigrams()
    copies = [prompt.clone() for prompt in prompts]
    drafter = make(name)
    drafter.reset(prompts)
    tree = drafter.propose(5, generators(2))
    tokens, logits = tree.tokens.clone(), table[tree.tokens]
    decision = accept_greedy(tree, logits)
    drafter.observe(Verified(tree, logits, decision))
    bonus = decision.bonus.clone()
    drafter.propose(5, generators(2))
    assert all(torch.equal(a, b) for a, b in zip(prompts, copies, strict=True))
    assert (
        torch.equal(tree.tokens, tokens) and torch.equal(logits, table[tokens]) and torch.equal(decision.bonus, bonus)
    )


@pytest.mark.parametrize("name", MAKE)
def test_bad_input(name: str) -> None:
    drafter = make(name)
    with pytest.raises(RuntimeError, match="reset"):
        drafter.propose(3)
    with pytest.raises(ValueError, match="at least one row"):
        drafter.reset([])
    with pytest.raises(ValueError, match="1-D int64"):
        drafter.reset([torch.zeros(0, dtype=torch.int64)])
    with pytest.raises(ValueError, match="1-D int64"):
        drafter.reset([torch.zeros(2, 3, dtype=torch.int64)])
    with pytest.raises(ValueError, match="1-D int64"):
        drafter.reset([torch.zeros(3)])
    with pytest.raises(ValueError, match="ids from -1"):
        drafter.reset([torch.tensor([3, -1])])
    drafter.reset(prompts_of([9, 9]))
    with pytest.raises(ValueError, match="budget must be an integer of at least 0, got -1"):
        drafter.propose(-1)
    tree = drafter.propose(3, generators(2))
    logits = bigrams()[tree.tokens]
    one = DraftTree.stack([DraftTree(tree.tokens[:1], tree.parents[:1])])
    with pytest.raises(ValueError, match="2 rows, but 1"):
        drafter.observe(Verified(one, logits[:1], accept_greedy(one, logits[:1])))
    fresh = make(name)
    with pytest.raises(RuntimeError, match="reset"):
        fresh.observe(Verified(tree, logits, accept_greedy(tree, logits)))


@pytest.mark.parametrize("name", ["token_recycling", "dyspec", "draft_model"])
def test_vocabulary_mismatch(name: str) -> None:
    drafter = make(name)
    with pytest.raises(ValueError, match=f"0 to {VOCAB - 1}, the drafter's vocabulary"):
        drafter.reset([torch.tensor([1, VOCAB])])
    drafter.reset(prompts_of([9]))
    tree = drafter.propose(3, generators(1))
    logits = torch.randn(1, tree.num_nodes, VOCAB + 1)
    with pytest.raises(ValueError, match=f"{VOCAB} ids, the target's {VOCAB + 1}"):
        drafter.observe(Verified(tree, logits, accept_greedy(tree, logits)))


@pytest.mark.parametrize("name", ["dyspec", "draft_model"])
def test_generators_are_one_for_each_row(name: str) -> None:
    drafter = make(name)
    drafter.reset(prompts_of([9, 9]))
    with pytest.raises(ValueError, match="one generator for each of 2 rows, got 3"):
        drafter.propose(3, generators(3))


# --- prompt lookup --------------------------------------------------------------------------------------------------


def lookup(sequence: list[int], budget: int = 100, **settings: int) -> list[int]:
    drafter = PromptLookup(**settings)
    drafter.reset([torch.tensor(sequence)])
    tree = drafter.propose(budget)
    assert torch.equal(tree.parents[0], torch.arange(-1, tree.num_nodes - 1)) and tree.tokens[0, 0] == sequence[-1]
    return tree.tokens[0, 1:].tolist()


def lookup_by_search(sequence: list[int], max_ngram: int, min_ngram: int, num_tokens: int) -> list[int]:
    for n in range(max_ngram, min_ngram - 1, -1):
        for start in range(len(sequence) - 1, n - 1, -1):
            if sequence[start - n : start] == sequence[-n:]:
                copied = list(sequence)
                for i in range(num_tokens):
                    copied.append(copied[start + i])
                return copied[len(sequence) :]
    return []


def test_prompt_lookup_by_hand() -> None:
    assert lookup([1, 2, 3, 4, 5, 6, 1, 2, 3], num_tokens=3) == [4, 5, 6]
    assert lookup([1, 2, 3, 4, 5, 6, 1, 2, 3], num_tokens=8) == [4, 5, 6, 1, 2, 3, 4, 5]  # goes on with its own copy
    assert lookup([1, 2, 7, 9, 2, 8, 1, 2], num_tokens=1) == [7]  # the longer match before the more recent one
    assert lookup([2, 7, 9, 2, 8, 5, 2], num_tokens=1) == [8]  # the most recent one
    assert lookup([3, 3], num_tokens=4) == [3, 3, 3, 3]
    assert lookup([1, 2, 3]) == []
    assert lookup([5]) == []
    assert lookup([2, 7, 9, 2], min_ngram=2) == []
    assert lookup([1, 2, 3, 1], budget=2) == [2, 3]


def test_prompt_lookup_equals_a_search() -> None:
    generator, table = Generator().manual_seed(0), bigrams(6, seed=3)
    found = 0
    for trial in range(40):
        length = int(torch.randint(1, 30, (1,), generator=generator))
        sequence = torch.randint(0, 6, (length,), generator=generator).tolist()
        low = 1 + trial % 2
        settings = {"max_ngram": low + trial % 3, "min_ngram": low, "num_tokens": 1 + trial % 7}
        drafter = PromptLookup(**settings)
        drafter.reset([torch.tensor(sequence)])
        for _ in range(6):  # the index grows with what is accepted
            tree = drafter.propose(100)
            expected = lookup_by_search(sequence, **settings)
            assert tree.tokens[0].tolist() == [sequence[-1], *expected]
            logits = table[tree.tokens] + torch.randn(1, tree.num_nodes, 6, generator=generator)
            decision = accept_greedy(tree, logits)
            drafter.observe(Verified(tree, logits, decision))
            sequence += continuation(tree, decision, 0)
            found += bool(expected)
    assert found > 100


def test_prompt_lookup_needs_no_more_forwards_than_that_of_transformers() -> None:
    """On texts that repeat themselves with changes, counted with a target that says exactly those texts."""

    def count_forwards(text: list[int], start: int, propose: Callable[[list[int]], list[int]]) -> int:
        done, forwards = start, 0
        while done < len(text):
            for token in propose(text[:done]):
                if done == len(text) or token != text[done]:
                    break
                done += 1
            done += 1
            forwards += 1
        return forwards

    theirs = PromptLookupCandidateGenerator(num_output_tokens=10, max_matching_ngram_size=3, max_length=10_000)

    def propose_theirs(done: list[int]) -> list[int]:
        return theirs.get_candidates(torch.tensor([done]))[0][0, len(done) :].tolist()

    ours, other = 0, 0
    for seed in range(8):
        generator = Generator().manual_seed(seed)
        paragraph = torch.randint(0, 40, (60,), generator=generator).tolist()
        text = list(paragraph)
        for _ in range(3):
            changed = torch.rand(60, generator=generator) < 0.1
            paragraph = torch.where(
                changed, torch.randint(0, 40, (60,), generator=generator), torch.tensor(paragraph)
            ).tolist()
            text += paragraph
        text += [1, 2, 3] * 10
        ours += count_forwards(text, 60, lookup_of(10))
        other += count_forwards(text, 60, propose_theirs)
    assert ours <= other


def lookup_of(num_tokens: int) -> Callable[[list[int]], list[int]]:
    return lambda done: lookup(done, num_tokens=num_tokens)


def test_prompt_lookup_settings() -> None:
    with pytest.raises(ValueError, match="max_ngram must be an integer of at least 3, got 2"):
        PromptLookup(max_ngram=2, min_ngram=3)
    with pytest.raises(ValueError, match="min_ngram must be an integer of at least 1"):
        PromptLookup(min_ngram=0)
    with pytest.raises(ValueError, match="num_tokens must be an integer of at least 1"):
        PromptLookup(num_tokens=0)


# --- Token Recycling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 9, 130, 1000, 1001, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_ids_prefers_the_lowest_of_equal_logits(size: int, dtype: torch.dtype) -> None:
    generator = Generator().manual_seed(size)
    drawn = torch.randn(2, 4, size, generator=generator).to(dtype)
    few = torch.randint(-3, 4, (2, 4, size), generator=generator).to(dtype)
    zeros = torch.where(torch.rand(2, 4, size, generator=generator) < 0.5, 0.0, -0.0).to(dtype)
    for logits in (drawn, few, zeros, torch.full_like(few, float("-inf")), drawn.double()):
        for k in (1, 3):
            expected = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
            assert torch.equal(top_ids(logits, k), expected)


def observe_chain(drafter: Drafter, tokens: list[int], logits: Tensor, bonus: int) -> None:
    tree = DraftTree.chain(torch.tensor(tokens[:1]), torch.tensor([tokens[1:]], dtype=torch.int64))
    refused = Decision(torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0]), torch.tensor([bonus]))
    drafter.observe(Verified(tree, logits, refused))


def test_token_recycling_by_hand() -> None:
    drafter = TokenRecycling(6, top_k=2, tree=[(0,), (1,), (0, 0), (0, 1), (1, 0)])
    drafter.reset([torch.tensor([4, 3])])
    logits = torch.full((1, 3, 6), -9.0)
    logits[0, 0, [5, 1]] = torch.tensor([2.0, 1.0])  # after 3: 5, then 1
    logits[0, 1, [3, 2]] = torch.tensor([2.0, 1.0])  # after 5, refused: remembered all the same
    logits[0, 2, [0, 4]] = torch.tensor([1.0, 1.0])  # after 1: equal, the lower id first
    observe_chain(drafter, [3, 5, 1], logits, bonus=3)
    tree = drafter.propose(5)
    assert tree.tokens.tolist() == [[3, 5, 1, 3, 2, 0]]
    assert tree.parents.tolist() == [[-1, 0, 0, 1, 1, 2]]
    assert drafter.adjacency[0].tolist() == [[0, 0], [0, 4], [0, 0], [5, 1], [0, 0], [3, 2]]


def test_token_recycling_remembers_the_last_node_of_a_token() -> None:
    drafter = TokenRecycling(6, top_k=1, tree=[(0,)])
    drafter.reset([torch.tensor([3])])
    logits = torch.eye(6)[torch.tensor([[4, 2, 5, 1]])]
    observe_chain(drafter, [3, 0, 3, 0], logits, bonus=3)
    assert drafter.adjacency[0].flatten().tolist() == [1, 0, 0, 5, 0, 0]


def test_token_recycling_ignores_nodes_that_fill_up_a_tree() -> None:
    drafter = TokenRecycling(6, top_k=1, tree=[(0,)])
    drafter.reset([torch.tensor([3]), torch.tensor([3])])
    trees = [
        DraftTree.chain(torch.tensor([3]), torch.tensor([[0]])),
        DraftTree.chain(torch.tensor([3]), torch.zeros(1, 0, dtype=torch.int64)),
    ]
    logits = torch.eye(6)[torch.tensor([[4, 2], [4, 2]])]
    tree = DraftTree.stack(trees)
    drafter.observe(Verified(tree, logits, accept_greedy(tree, logits)))
    assert drafter.adjacency[:, 0].flatten().tolist() == [2, 0]


def test_token_recycling_smaller_budgets_take_the_best_nodes() -> None:
    generator = Generator().manual_seed(0)
    table = torch.stack([torch.randperm(500, generator=generator)[:8] for _ in range(500)])
    drafter = TokenRecycling(500, initial_adjacency=table)
    drafter.reset([torch.tensor([7])])
    whole = drafter.propose(80)
    assert whole.num_nodes == 81 and drafter.propose(1000).num_nodes == 81
    best, second, third = table[7, 0], table[7, 1], table[table[7, 0], 0]
    four = [(int(best),), (int(second),), (int(best), int(third)), (int(best), int(third), int(table[third, 0]))]
    assert paths_of(drafter.propose(4)) == four
    before: set[tuple[int, ...]] = set()
    for budget in range(80):
        tree = drafter.propose(budget)
        paths = paths_of(tree)
        assert len(paths) == budget and before <= set(paths) <= set(paths_of(whole))
        before = set(paths)


def test_token_recycling_learns_prompts_and_starts_hot() -> None:
    table, prompt = bigrams(), torch.tensor([3, 9, 4])
    drafter = TokenRecycling(VOCAB, top_k=4, tree=[(0,)])
    drafter.reset([prompt])
    drafter.learn(prompt[None], table[prompt][None])
    expected = table.sort(dim=-1, descending=True, stable=True).indices[:, :4]
    assert torch.equal(drafter.adjacency[0, prompt].long(), expected[prompt])
    assert not drafter.adjacency[0, 5].any()
    drafter.learn(torch.tensor([[5, 6]]), table[None, 5:7], torch.tensor([[True, False]]))
    assert torch.equal(drafter.adjacency[0, 5].long(), expected[5]) and not drafter.adjacency[0, 6].any()
    hot = TokenRecycling(VOCAB, top_k=4, tree=[(0,)], initial_adjacency=drafter.adjacency[0])
    hot.reset([prompt, prompt])
    assert torch.equal(hot.adjacency, drafter.adjacency.expand(2, -1, -1))
    with pytest.raises(ValueError, match="Expected tokens"):
        drafter.learn(prompt[None], table[prompt][None, :, :5])


def test_token_recycling_settings() -> None:
    with pytest.raises(ValueError, match="vocab_size must be an integer of at least 8, got 4"):
        TokenRecycling(4)
    with pytest.raises(ValueError, match=r"node \(0, 1\) without its parent \(0,\)"):
        TokenRecycling(VOCAB, tree=[(1,), (0, 1)])
    with pytest.raises(ValueError, match="ranks must be 0 to 1"):
        TokenRecycling(VOCAB, top_k=2, tree=[(2,)])
    with pytest.raises(ValueError, match="each node once"):
        TokenRecycling(VOCAB, tree=[(0,), (0,)])
    with pytest.raises(ValueError, match=r"must be \(64, 8\), got \(64, 4\)"):
        TokenRecycling(VOCAB, initial_adjacency=torch.zeros(64, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="ids from 0 to 63"):
        TokenRecycling(VOCAB, initial_adjacency=torch.full((64, 8), 64))


# --- ADED -----------------------------------------------------------------------------------------------------------


def search(sequence: list[int], budget: int = 64, **settings: int) -> list[tuple[int, ...]]:
    drafter = ADED(**settings)
    drafter.reset([torch.tensor(sequence)])
    return paths_of(drafter.propose(budget))


def test_aded_by_hand() -> None:
    # After 1 2 came 3 and 4, once each; after either of them, always 1 2.
    expected = {(3,), (4,), (3, 1), (4, 1), (3, 1, 2), (4, 1, 2)}
    deepest = {(3, 1, 2, 3), (3, 1, 2, 4), (4, 1, 2, 3), (4, 1, 2, 4)}
    paths = search([1, 2, 3, 1, 2, 4, 1, 2])
    assert set(paths) == expected | deepest and len(paths) == 10
    assert set(search([1, 2, 3, 1, 2, 4, 1, 2], max_depth=3)) == expected
    assert search([1, 2, 3, 1, 2, 4, 1, 2], budget=1) == [(3,)]
    assert search([1, 2, 3]) == [] and search([1]) == []


def test_aded_visits() -> None:
    """Three quarters against one: the first three visits go to the first, the fourth to the second."""
    text = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2]
    assert search(text, max_depth=1, iterations=3) == [(3,)]
    assert search(text, max_depth=1, iterations=4) == [(3,), (4,)]
    assert search(text, num_paths=1)[:1] == [(3,)] and all(path[0] == 3 for path in search(text, num_paths=1))
    assert len(search(text, max_nodes=2)) == 2
    assert search(text, max_depth=1, num_successors=1) == [(3,)]


def test_aded_weights_adapt() -> None:
    # (1, 2) is followed by 3 at first. Each step adds 0.04 to every tri-gram of the window.
    def followed_by(step_count: int, **settings: float) -> list[tuple[int, ...]]:
        drafter = ADED(max_depth=1, window=4, **settings)
        drafter.reset([torch.tensor([1, 2, 3, 1, 2])])
        for _ in range(step_count):
            for root, bonus in ((2, 4), (4, 1), (1, 2)):
                observe_chain(drafter, [root], torch.zeros(1, 1, 8), bonus)
        return paths_of(drafter.propose(64))

    assert followed_by(0) == [(3,)]
    # Twice 0.04 for each cycle (a tri-gram is in the window of 4 for two steps), and once for 3 at the first step.
    assert followed_by(1) == [(3,), (4,)]
    assert followed_by(12) == [(3,), (4,)]  # 0.96 against 1.04
    assert followed_by(14) == [(4,), (3,)]  # 1.12 against 1.04
    assert followed_by(1, increment=0.6, max_weight=1.0) == [(3,), (4,)]  # 1 against 1: the older one first
    assert followed_by(1, num_successors=1) == [(4,)]  # takes the lightest one's place


def test_aded_settings() -> None:
    with pytest.raises(ValueError, match="window must be an integer of at least 3"):
        ADED(window=2)
    with pytest.raises(ValueError, match="increment must be above 0"):
        ADED(increment=0.0)
    with pytest.raises(ValueError, match="iterations must be an integer of at least 1"):
        ADED(iterations=0)
    with pytest.raises(ValueError, match="c2 positive"):
        ADED(c2=0.0)


# --- DySpec ---------------------------------------------------------------------------------------------------------

DRAFT = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05])


def after_last(prefixes: Tensor) -> Tensor:
    """Return a distribution that depends on the last token: `DRAFT`, rolled."""
    return torch.stack([DRAFT.roll(int(prefix[-1])) for prefix in prefixes])


def test_dyspec_draws_follow_the_distribution() -> None:
    """The first two siblings follow the joint distribution of draws without replacement."""
    drafter, joint, generator = DySpec(after_last), torch.zeros(5, 5), generators(1)
    drafter.reset([torch.tensor([3, 0])])
    for _ in range(6000):
        tree = drafter.propose(2, generator)
        assert tree.parents[0].tolist() == [-1, 0, 0]  # no token is as probable as all others together
        joint[tree.tokens[0, 1], tree.tokens[0, 2]] += 1
    without = DRAFT[:, None] * DRAFT / (1 - DRAFT[:, None])
    without.fill_diagonal_(0)
    assert chi_square(joint.sum(1), DRAFT) > 1e-3
    assert chi_square(joint.flatten(), without.flatten()) > 1e-3
    careless = DRAFT[:, None].expand(5, 5) * 0.25  # the second one drawn without looking at the distribution
    careless = careless.clone().fill_diagonal_(0)
    assert chi_square(joint.flatten(), careless.flatten()) < 1e-9
    assert chi_square(joint.sum(1), DRAFT.roll(1)) < 1e-9


def verify(tree: DraftTree, draft: Tensor, target: Tensor, uniforms: Tensor) -> int:
    """Return the first token that rejection over the siblings below the root gives, as the paper writes it."""
    draft, target = draft.double().clone(), target.double()
    draws = iter(uniforms.tolist())
    for node in (tree.parents[0] == 0).nonzero().flatten():
        token = tree.tokens[0, node]
        if next(draws) < target[token] / draft[token]:
            return int(token)
        target = (target - draft).clamp_min(0)
        target /= target.sum()
        draft[token] = 0
        draft /= draft.sum()
    return int(sample_inverse_cdf(target, torch.tensor(next(draws))))


def test_dyspec_is_lossless_under_rejection() -> None:
    """The first token follows the target, whatever the draft; told another draft distribution, it does not."""
    target = torch.tensor([0.05, 0.1, 0.15, 0.2, 0.5])
    drafter, generator = DySpec(after_last), generators(1)
    drafter.reset([torch.tensor([0])])
    counts, wrong = torch.zeros(5), torch.zeros(5)
    for _ in range(3000):
        tree = drafter.propose(4, generator)
        uniforms = torch.rand(6, dtype=torch.float64, generator=generator[0])
        counts[verify(tree, tree.probs[0, 0], target, uniforms)] += 1
        wrong[verify(tree, torch.full((5,), 0.2), target, uniforms)] += 1
    assert chi_square(counts, target) > 1e-3
    assert chi_square(wrong, target) < 1e-9


def test_dyspec_grows_where_the_value_is() -> None:
    def certain(prefixes: Tensor) -> Tensor:
        return torch.eye(5)[(prefixes[:, -1] + 1) % 5]

    def even(prefixes: Tensor) -> Tensor:
        return torch.full((len(prefixes), 5), 0.2)

    def nearly(prefixes: Tensor) -> Tensor:
        return 0.999 * certain(prefixes) + 0.0002

    for distribution in (certain, nearly):
        drafter = DySpec(distribution)
        drafter.reset([torch.tensor([0])])
        assert drafter.propose(4, generators(1)).tokens.tolist() == [[0, 1, 2, 3, 4]]  # a chain
    drafter = DySpec(even)
    drafter.reset([torch.tensor([0])])
    star = drafter.propose(4, generators(1))
    assert star.parents.tolist() == [[-1, 0, 0, 0, 0]] and len(set(star.tokens[0, 1:].tolist())) == 4
    drafter = DySpec(after_last, top_k=1)
    drafter.reset([torch.tensor([1])])
    assert drafter.propose(3, generators(1)).tokens.tolist() == [[1, 1, 1, 1]]


def test_dyspec_tells_the_distributions_it_drew_from() -> None:
    drafter = DySpec(after_last, temperature=0.5)
    drafter.reset([torch.tensor([2])])
    tree = drafter.propose(12, generators(1))
    assert not tree.with_replacement
    parents = sorted(set(tree.parents[0, 1:].tolist()))
    assert len(parents) > 2
    for node in parents:
        sharpened = after_last(tree.tokens[:, node, None])[0] ** 2
        torch.testing.assert_close(tree.probs[0, node], sharpened / sharpened.sum())
        children = tree.tokens[0, tree.parents[0] == node].tolist()
        assert len(children) == len(set(children))


def test_dyspec_with_a_model_equals_the_model_without_cache() -> None:
    model, prompts = llama(1), prompts_of([11, 4])

    @torch.no_grad()
    def uncached(prefixes: Tensor) -> Tensor:
        return model(prefixes).logits[:, -1].softmax(-1)

    cached = steps(DySpec(model), prompts, 5, 12, bigrams())
    other = steps(DySpec(uncached), prompts, 5, 12, bigrams())
    for one, two in zip(cached, other, strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.parents, two.parents)
        torch.testing.assert_close(one.probs, two.probs, atol=1e-5, rtol=0)


def test_dyspec_settings() -> None:
    with pytest.raises(TypeError, match="a function of prefixes, got str"):
        DySpec("llama")
    with pytest.raises(ValueError, match="temperature must be positive"):
        DySpec(after_last, temperature=0.0)
    drafter = DySpec(lambda prefixes: DRAFT)
    drafter.reset([torch.tensor([0])])
    with pytest.raises(ValueError, match=r"probabilities \(1, vocab\)"):
        drafter.propose(2)
    drafter = DySpec(lambda prefixes: -after_last(prefixes))
    drafter.reset([torch.tensor([0])])
    with pytest.raises(ValueError, match="NaN"):
        drafter.propose(2)
    drafter = DySpec(after_last)
    drafter.reset([torch.tensor([0])])
    tree = drafter.propose(2, generators(1))
    logits = torch.zeros(1, 3, 6)
    with pytest.raises(ValueError, match="5 ids, the target's 6"):
        drafter.observe(Verified(tree, logits, accept_greedy(tree, logits)))


# --- draft model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, mistral])
@torch.no_grad()
def test_cache_equals_no_cache_after_rollbacks(build: Callable[[int], PreTrainedModel]) -> None:
    model = build(4)
    cached, generator = CachedModel(model), Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (20,), generator=generator).tolist()
    cuts = [0, 1, 3, 7, 2, 15, 1, 1, 4, 30, 0]
    for cut in cuts:
        ids = ids[: max(len(ids) - cut, 1)] + torch.randint(0, VOCAB, (3,), generator=generator).tolist()
        torch.testing.assert_close(cached(ids), model(torch.tensor([ids])).logits[0, -1], atol=1e-4, rtol=0)
    torch.testing.assert_close(cached(ids), cached(list(ids)), atol=1e-4, rtol=0)
    torch.testing.assert_close(cached(ids[:5]), model(torch.tensor([ids[:5]])).logits[0, -1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_cache_computes_only_what_is_new() -> None:
    model, lengths = llama(4), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    cached = CachedModel(model)
    for ids in ([1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 9, 8], [1, 2]):
        cached(ids)
    assert lengths == [4, 1, 2, 1]


@torch.no_grad()
def test_cache_survives_an_exception() -> None:
    model, ids = llama(4), list(range(12))
    cached = CachedModel(model)
    cached(ids[:8])

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        cached(ids[:10])
    handle.remove()
    torch.testing.assert_close(cached(ids), model(torch.tensor([ids])).logits[0, -1], atol=1e-4, rtol=0)


def test_draft_model_says_what_the_model_says() -> None:
    model, prompts, table = llama(1), prompts_of([9, 3]), bigrams()
    drafter, sequences = DraftModel(model, num_tokens=3), [prompt.tolist() for prompt in prompts]
    drafter.reset(prompts)
    for _ in range(6):  # of an unrelated target: most is rejected
        tree = drafter.propose(10)
        assert tree.probs is None
        for row, sequence in enumerate(sequences):
            assert tree.tokens[row].tolist() == [sequence[-1], *greedy(model, sequence, 3)]
        logits = table[tree.tokens]
        decision = accept_greedy(tree, logits)
        drafter.observe(Verified(tree, logits, decision))
        for row, sequence in enumerate(sequences):
            sequence += continuation(tree, decision, row)


@torch.no_grad()
def test_draft_model_tells_the_distributions_it_drew_from() -> None:
    model, prompt = llama(1), prompts_of([9])[0]
    drafter = DraftModel(model, num_tokens=4, do_sample=True, temperature=0.7, top_k=20, top_p=0.9)
    drafter.reset([prompt])
    tree = drafter.propose(10, generators(1))
    uniforms = draw_uniforms(generators(1), 1, 4)[0]
    ids = prompt.tolist()
    for i in range(4):
        logits = model(torch.tensor([ids])).logits[0, -1]
        expected = torch.softmax(process_logits(logits, 0.7, 20, 0.9), -1)
        torch.testing.assert_close(tree.probs[0, i], expected, atol=1e-5, rtol=0)
        assert tree.tokens[0, i + 1] == sample_inverse_cdf(expected, uniforms[i])
        ids.append(int(tree.tokens[0, i + 1]))
    assert torch.equal(tree.parents[0], torch.arange(-1, 4))


@torch.no_grad()
def test_independent_sequences_of_a_draft_model() -> None:
    model, prompt = llama(1), prompts_of([9])[0]
    drafter = DraftModel(model, num_tokens=3, do_sample=True, num_sequences=4, top_k=2)
    assert drafter.drawing == WITH_REPLACEMENT
    drafter.reset([prompt])
    tree = drafter.propose(100, generators(1))
    assert tree.with_replacement and tree.num_nodes == 1 + 12
    uniforms = draw_uniforms(generators(1), 1, 12)[0]
    nodes = {(): 0}
    for i in range(12):
        if i % 3 == 0:
            path: tuple[int, ...] = ()
        # What follows equal tokens follows the first of them, so that each was drawn from its parent's distribution.
        parent = nodes[path]
        assert tree.parents[0, i + 1] == parent
        logits = model(torch.tensor([[*prompt.tolist(), *path]])).logits[0, -1]
        torch.testing.assert_close(
            tree.probs[0, parent], torch.softmax(process_logits(logits, 1.0, 2, 1.0), -1), atol=1e-5, rtol=0
        )
        assert tree.tokens[0, i + 1] == sample_inverse_cdf(tree.probs[0, parent], uniforms[i])
        path = (*path, int(tree.tokens[0, i + 1]))
        nodes.setdefault(path, i + 1)
    assert len(nodes) < 13  # some were equal
    for budget, shape in ((0, 1), (2, 3), (4, 5), (11, 9), (12, 13)):
        drafter.reset([prompt])
        assert drafter.propose(budget, generators(1)).num_nodes == shape


def test_draft_model_settings() -> None:
    with pytest.raises(ValueError, match="Without do_sample, all of num_sequences=2 sequences would be equal"):
        DraftModel(llama(1), num_sequences=2)
    with pytest.raises(ValueError, match="num_sequences must be .*at least 1, got 0"):
        DraftModel(llama(1), do_sample=True, num_sequences=0)
    with pytest.raises(TypeError, match="causal language model of transformers, got Linear"):
        DraftModel(torch.nn.Linear(2, 2))
    encoder = BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(TypeError, match="got BertModel"):
        DraftModel(encoder)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2))
    for build in (DraftModel, DySpec):
        with pytest.raises(ValueError, match="cannot be rolled back"):
            build(mamba)
    with pytest.raises(ValueError, match="num_tokens must be an integer of at least 1"):
        DraftModel(llama(1), num_tokens=0)
    with pytest.raises(ValueError, match="without do_sample=True"):
        DraftModel(llama(1), temperature=0.5)
    with pytest.raises(ValueError, match="top_p must be above 0"):
        DraftModel(llama(1), do_sample=True, top_p=0.0)
