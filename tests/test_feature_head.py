"""Draft heads of LlamaGen: the head, the trees that grow with it, LANTERN's checkpoints and the training."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from generators.feature_head import MC_SIM_7B_63, FeatureDrafter, FeatureHead
from generators.guidance import combine
from generators.llamagen import LlamaGen
from generators.speculation import Conditions
from mmsdk.data.captions import MAX_PROMPT_TOKENS, train_caption_tokenizer
from mmsdk.data.emoji import EmojiRecord
from mmsdk.decoding.base import Decision, Prefill, Verified
from mmsdk.decoding.decoder import SpeculativeDecoder
from mmsdk.decoding.tree import DraftTree
from mmsdk.errors import CheckpointError
from mmsdk.training.feature_head_recipe import FeatureHeadRecipe
from mmsdk.training.generator_recipes import TextToImageModule, tiny_text_encoder
from mmsdk.training.loop import train
from tests.tiny import randomised, tiny_token_shuffle

VOCAB, TOKENS, CONDITION, CAPTION_DIM = 12, 16, 5, 6
CHAIN = [(0,) * (i + 1) for i in range(4)]


def make_generator(positions: str = "learned", seed: int = 0, **overrides: Any) -> LlamaGen:
    config: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "multiple_of": 8}
    config |= {"codebook_size": VOCAB, "max_tokens": TOKENS, "condition": "text", "num_classes": None}
    config |= {"caption_dim": CAPTION_DIM, "num_condition_tokens": CONDITION, "positions": positions}
    return randomised(LlamaGen(**(config | overrides)), seed)


def make_head(generator: LlamaGen, seed: int = 1, **overrides: Any) -> FeatureHead:
    """A head whose every weight matters."""
    head = FeatureHead.for_generator(generator, **overrides)
    torch.manual_seed(seed)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head.eval()


def make_condition(batch: int = 3) -> dict[str, Tensor]:
    """Features with 1, 2, 3, ... tokens of padding: the first column is padding in every row."""
    features = torch.randn(batch, CONDITION, CAPTION_DIM, generator=Generator().manual_seed(5))
    return {"caption_features": features, "caption_mask": torch.arange(CONDITION) > torch.arange(batch)[:, None] % 4}


def make_tokens(batch: int = 3, length: int = 1, seed: int = 6) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=Generator().manual_seed(seed))


def make_drafter(generator: LlamaGen, head: FeatureHead, scale: float = 1.0, **settings: Any) -> FeatureDrafter:
    drafter = FeatureDrafter(head, generator, **settings)
    drafter.condition(Conditions({}, [scale] * TOKENS))
    return drafter


@torch.no_grad()
def read(generator: LlamaGen, condition: dict[str, Tensor], tokens: Tensor, guided: bool = False) -> Prefill:
    """Return the generator's states at the condition and at `tokens` `(batch, n)`."""
    state = generator.prefill(**condition, guided=guided)
    states, before = state.condition_hidden_states, state.condition_length
    if tokens.shape[1]:
        states = torch.cat([states, generator.advance(tokens.repeat(1 + guided, 1), state)], 1)
    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    mask[:, :before] = condition["caption_mask"][:, CONDITION - before :].repeat(1 + guided, 1)
    return Prefill(states, mask)


def begin(
    drafter: FeatureDrafter, condition: dict[str, Tensor], tokens: Tensor, guided: bool = False
) -> FeatureDrafter:
    drafter.reset(list(tokens), read(drafter.generator, condition, tokens[:, :-1], guided))
    return drafter


def paths_of(tree: DraftTree, row: int = 0) -> dict[int, list[int]]:
    """Return the nodes from below the root to each candidate."""
    paths: dict[int, list[int]] = {0: []}
    for node, parent in enumerate(tree.parents[row].tolist()):
        if parent >= 0:
            paths[node] = [*paths[parent], node]
    return paths


def accept(
    drafter: FeatureDrafter,
    condition: dict[str, Tensor],
    known: list[Tensor],
    tree: DraftTree,
    depths: Sequence[int],
    guided: bool,
) -> list[Tensor]:
    """Accept the first path that is long enough in each row, with token 7 behind it; return the longer sequences."""
    paths = [next(p for p in paths_of(tree, row).values() if len(p) == depth) for row, depth in enumerate(depths)]
    decision = Decision(
        torch.tensor([path + [-1] * (max(depths) - len(path)) for path in paths], dtype=torch.int64),
        torch.tensor(depths),
        torch.full((len(depths),), 7),
    )
    width = drafter.generator.config.hidden_size
    states = torch.full((1 + guided, len(depths), tree.num_nodes, width), float("nan"))
    longer = []
    for row, path in enumerate(paths):
        new = tree.tokens[row, path]
        lone = {key: value[row : row + 1] for key, value in condition.items()}
        kept = read(drafter.generator, lone, torch.cat([known[row], new])[None], guided).hidden_states
        states[:, row, [0, *path]] = kept[:, kept.shape[1] - 1 - len(path) :]
        longer.append(torch.cat([known[row], new, decision.bonus[row : row + 1]]))
    logits = torch.zeros(len(depths), tree.num_nodes, VOCAB)
    drafter.observe(Verified(tree, logits, decision, states.flatten(0, 1)))
    return longer


def assert_same(one: DraftTree, other: DraftTree, atol: float = 1e-5) -> None:
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.parents, other.parents)
    assert (one.probs is None) == (other.probs is None)
    if one.probs is not None and other.probs is not None:
        torch.testing.assert_close(one.probs, other.probs, atol=atol, rtol=0)


@torch.no_grad()
def logits_along(
    generator: LlamaGen, head: FeatureHead, prefill: Prefill, root: int, path: Sequence[int], scale: float
) -> Tensor:
    """Return the guided logits behind a path of tokens, for one row, without a cache or a tree."""
    states, length = prefill.hidden_states, prefill.hidden_states.shape[1]
    for depth in range(len(path) + 1):
        known = torch.tensor([root, *path[:depth]])
        ids = torch.cat([known.new_zeros(length - 1), known])
        mask = (
            torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            & F.pad(prefill.mask, (0, depth), value=True)[:, None]
        )
        mask = mask | torch.eye(len(ids), dtype=torch.bool)
        positions = torch.arange(len(ids)) + CONDITION - length + 1
        features = head(generator.embed_tokens(ids).expand(len(states), -1, -1), states, positions, mask)
        states = torch.cat([states, features[:, -1:]], 1)
    logits = generator.predict(states[:, -1])
    return logits[0] if scale == 1.0 else combine(*logits, scale)


# ---------------------------------------------------------------------------------------------------- the trees


@pytest.mark.parametrize(("positions", "scale"), [("learned", 3.0), ("rope2d", 1.0)])
def test_dynamic_tree_by_hand(positions: str, scale: float) -> None:
    """With every successor of every node in the race, a tree holds the most probable of all sequences."""
    generator = make_generator(positions)
    head, condition, root = make_head(generator), make_condition(1), make_tokens(1)
    prefill = read(generator, condition, root[:, :0], scale != 1.0)
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    for depth in range(2):
        for path in list(product(range(VOCAB), repeat=depth)):
            logits = logits_along(generator, head, prefill, int(root), path, scale)
            for token, value in enumerate(torch.log_softmax(logits, -1).tolist()):
                scores[*path, token] = scores[path] + value
    best = sorted(list(scores)[1:], key=lambda path: -scores[path])
    for size in (1, 5, 30):
        drafter = make_drafter(generator, head, scale, total_tokens=31, depth=1, tree_top_k=VOCAB + 1)
        drafter.reset(list(root), prefill)
        tree = drafter.propose(size)
        found = {tuple(tree.tokens[0, path].tolist()) for path in paths_of(tree).values() if path}
        assert found == set(best[:size])


def test_dynamic_tree_expands_the_best_nodes() -> None:
    generator = make_generator()
    head, condition, root = make_head(generator), make_condition(1), make_tokens(1)
    prefill = read(generator, condition, root[:, :0])
    beams: dict[tuple[int, ...], float] = {(): 0.0}
    scores: dict[tuple[int, ...], float] = {}
    for _ in range(4):
        new = {}
        for path, score in beams.items():
            logits = torch.log_softmax(logits_along(generator, head, prefill, int(root), path, 1.0), -1)
            for value, token in zip(*logits.topk(3), strict=True):
                new[*path, int(token)] = score + float(value)
        scores |= new
        beams = dict(sorted(new.items(), key=lambda item: -item[1])[:3])
    drafter = make_drafter(generator, head, total_tokens=10, depth=3, tree_top_k=3)
    drafter.reset(list(root), prefill)
    tree = drafter.propose(100)
    found = {tuple(tree.tokens[0, path].tolist()) for path in paths_of(tree).values() if path}
    assert found == set(sorted(scores, key=lambda path: -scores[path])[:9])


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 100])
def test_sizes_of_dynamic_trees(budget: int) -> None:
    generator = make_generator()
    drafter = make_drafter(generator, make_head(generator), total_tokens=20, depth=2, tree_top_k=4)
    tree = begin(drafter, make_condition(), make_tokens()).propose(budget)
    assert tree.tokens.shape == (3, 1 + min(budget, 19))
    assert bool((tree.parents[:, 1:] >= 0).all()) and int(tree.depths.max()) <= min(budget, 3)
    assert torch.equal(tree.tokens[:, :1], make_tokens())
    assert len({tuple(tree.tokens[0, path].tolist()) for path in paths_of(tree).values()}) == tree.num_nodes
    assert_same(drafter.propose(budget), tree)  # a proposal leaves nothing behind


def test_a_certain_child_does_not_come_without_its_parent() -> None:
    """Where a token is certain, a child has the score of its parent."""
    generator = make_generator()
    with torch.no_grad():
        generator.output.weight.mul_(1000.0)
    drafter = make_drafter(generator, make_head(generator), depth=3, tree_top_k=4)
    begin(drafter, make_condition(), make_tokens())
    for budget in (1, 2, 3, 4):
        tree = drafter.propose(budget)
        assert bool((tree.parents[:, 1:] >= 0).all())
        assert tree.parents[:, 1:].tolist() == [list(range(budget))] * 3


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_static_tree_by_hand(scale: float) -> None:
    generator = make_generator("rope2d")
    head, condition, root = make_head(generator), make_condition(1), make_tokens(1)
    choices = [(0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (2, 0, 0), (2, 0, 1)]
    drafter = make_drafter(generator, head, scale, tree_choices=choices)
    prefill = read(generator, condition, root[:, :0], scale != 1.0)
    drafter.reset(list(root), prefill)
    tree = drafter.propose(100)
    assert tree.probs is None and tree.num_nodes == 9
    tokens: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
    for path in choices:
        above = tokens[path[:-1]]
        ranked = logits_along(generator, head, prefill, int(root), above, scale).argsort(descending=True)
        tokens[path] = (*above, int(ranked[path[-1]]))
    assert [tuple(tree.tokens[0, path].tolist()) for path in paths_of(tree).values()] == list(tokens.values())


def test_budget_of_a_static_tree() -> None:
    generator = make_generator()
    drafter = make_drafter(generator, make_head(generator), tree_choices=MC_SIM_7B_63)
    begin(drafter, make_condition(), make_tokens())
    full = drafter.propose(25)
    assert full.num_nodes == 26
    for budget in range(25):
        tree = drafter.propose(budget)
        assert tree.num_nodes == budget + 1
        found = {tuple(tree.tokens[0, path].tolist()) for path in paths_of(tree).values()}
        assert found <= {tuple(full.tokens[0, path].tolist()) for path in paths_of(full).values()}
    assert drafter.propose(4).parents[0].tolist() == [-1, 0, 0, 1, 3]  # the best child, its best child, and so on


def test_drawn_trees() -> None:
    generator = make_generator()
    head, condition, root = make_head(generator), make_condition(1), make_tokens(1)
    sampling = {"do_sample": True, "temperature": 2.0, "top_k": 8}
    drafter = make_drafter(generator, head, 2.0, tree_choices=MC_SIM_7B_63, **sampling)
    prefill = read(generator, condition, root[:, :0], True)
    drafter.reset(list(root), prefill)
    before = torch.get_rng_state()
    tree = drafter.propose(25, [Generator().manual_seed(3)])
    assert_same(drafter.propose(25, [Generator().manual_seed(3)]), tree)
    assert not torch.equal(drafter.propose(25).tokens, tree.tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert tree.probs is not None and not tree.with_replacement
    inner = {int(parent) for parent in tree.parents[0, 1:]}
    for node, path in paths_of(tree).items():
        if node not in inner:
            assert not tree.probs[0, node].any()
            continue
        logits = logits_along(generator, head, prefill, int(root), tree.tokens[0, path].tolist(), 2.0) / 2.0
        logits[logits < logits.topk(8).values[-1]] = float("-inf")
        torch.testing.assert_close(tree.probs[0, node], torch.softmax(logits, -1), atol=1e-5, rtol=0)
        children = tree.tokens[0, tree.parents[0] == node]
        assert len(set(children.tolist())) == len(children)
        assert bool((tree.probs[0, node, children] > 0).all())


def test_draws_are_those_of_torch() -> None:
    generator = make_generator()
    drafter = make_drafter(generator, make_head(generator), tree_choices=CHAIN, do_sample=True)
    probs = torch.rand(2, 3, VOCAB, generator=Generator().manual_seed(1))
    ids = drafter.draw(probs, 5, [Generator().manual_seed(seed) for seed in (1, 2)])
    for row, seed in enumerate((1, 2)):
        expected = torch.multinomial(probs[row], 5, generator=Generator().manual_seed(seed))
        assert torch.equal(ids[row], expected)


def test_children_that_cannot_be_drawn_are_no_candidates() -> None:
    generator = make_generator()
    choices = [(0,), (1,), (2,), (3,), (3, 0), (0, 0)]
    drafter = make_drafter(generator, make_head(generator), tree_choices=choices, do_sample=True, top_k=2)
    tree = begin(drafter, make_condition(), make_tokens()).propose(10)
    assert tree.parents.tolist() == [[-1, 0, 0, -1, -1, 1, -1]] * 3
    assert tree.probs is not None and bool(((tree.probs[:, :2] > 0).sum(-1) == 2).all())


# ---------------------------------------------------------------------------------------------------- sequences


@pytest.mark.parametrize("positions", ["learned", "rope2d"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("layers", [1, 2])
def test_cache_equals_recomputation(positions: str, scale: float, layers: int) -> None:
    """After rounds of other lengths in every row, trees are those of a drafter that begins with all tokens."""
    generator, condition, guided = make_generator(positions), make_condition(), scale != 1.0
    head = make_head(generator, num_layers=layers)
    sampling = {"tree_choices": MC_SIM_7B_63, "do_sample": True}
    for settings in ({"total_tokens": 12, "depth": 2, "tree_top_k": 3}, sampling):
        drafter = make_drafter(generator, head, scale, **settings)
        known = list(begin(drafter, condition, make_tokens(), guided)._root[:, None])
        for depths in ([0, 2, 1], [2, 0, 2], [0, 0, 0], [1, 2, 0]):
            known = accept(drafter, condition, known, drafter.propose(25), depths, guided)
        tree = drafter.propose(25, [Generator().manual_seed(row) for row in range(3)])
        for row, tokens in enumerate(known):
            lone = {key: value[row : row + 1] for key, value in condition.items()}
            fresh = begin(make_drafter(generator, head, scale, **settings), lone, tokens[None], guided)
            expected = fresh.propose(25, [Generator().manual_seed(row)])
            probs = None if tree.probs is None else tree.probs[row : row + 1]
            # float32, rounded differently from run to run: 1.5e-5 was seen.
            assert_same(DraftTree(tree.tokens[row : row + 1], tree.parents[row : row + 1], probs), expected, atol=3e-5)


def test_rows_that_end() -> None:
    generator, condition = make_generator(), make_condition()
    head = make_head(generator)
    together, apart = (make_drafter(generator, head, 2.0, tree_choices=MC_SIM_7B_63) for _ in range(2))
    known = list(make_tokens())
    begin(together, condition, make_tokens(), True)
    for depths in ([0, 2, 1], [1, 0, 2]):
        known = accept(together, condition, known, together.propose(25), depths, True)
    together.select_rows([2, 1])
    some = {key: value[[2, 1]] for key, value in condition.items()}
    begin(apart, some, make_tokens()[[2, 1]], True)
    kept = list(make_tokens()[[2, 1]])
    for depths in ([1, 2], [2, 0]):
        kept = accept(apart, some, kept, apart.propose(25), depths, True)
    assert_same(together.propose(25), apart.propose(25))
    kept = accept(together, some, kept, together.propose(25), [1, 1], True)
    assert together.propose(25).tokens[:, 0].tolist() == [7, 7]


def test_rounds_without_a_proposal_are_read_too() -> None:
    generator, condition = make_generator(), make_condition()
    head = make_head(generator)
    drafter = begin(make_drafter(generator, head), condition, make_tokens())
    known = list(make_tokens())
    for _ in range(2):
        root = DraftTree.chain(torch.stack([tokens[-1] for tokens in known]), torch.empty(3, 0, dtype=torch.int64))
        known = accept(drafter, condition, known, root, [0, 0, 0], False)
    fresh = begin(make_drafter(generator, head), condition, torch.stack(known))
    assert_same(drafter.propose(20), fresh.propose(20))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_rounds_of_other_lengths_are_read_when_a_tree_is_wanted(scale: float) -> None:
    generator, condition, guided = make_generator(), make_condition(), scale != 1.0
    head = make_head(generator)
    drafter = begin(make_drafter(generator, head, scale), condition, make_tokens(), guided)
    known = list(make_tokens())
    for depths in ([2, 0, 2], None, None, [1, 2, 0], None):
        roots = DraftTree.chain(torch.stack([tokens[-1] for tokens in known]), torch.empty(3, 0, dtype=torch.int64))
        tree = roots if depths is None else drafter.propose(25)
        known = accept(drafter, condition, known, tree, depths or [0, 0, 0], guided)
    tree = drafter.propose(25)
    for row, tokens in enumerate(known):
        lone = {key: value[row : row + 1] for key, value in condition.items()}
        fresh = begin(make_drafter(generator, head, scale), lone, tokens[None], guided)
        assert_same(DraftTree(tree.tokens[row : row + 1], tree.parents[row : row + 1]), fresh.propose(25))


def test_end_of_the_image() -> None:
    """Trees reach beyond the last token, where the generator keeps nothing."""
    generator = make_generator()
    drafter = make_drafter(generator, make_head(generator), tree_choices=MC_SIM_7B_63)
    tree = begin(drafter, make_condition(), make_tokens(length=TOKENS)).propose(25)
    assert tree.num_nodes == 26


def copying_head(generator: LlamaGen) -> FeatureHead:
    """A head that says what a generator of one layer without attention says, up to a norm that changes no choice."""
    head = make_head(generator)
    block, own = generator.layers[0], head.layers[0]
    with torch.no_grad():
        generator.norm.weight.fill_(1.0)
        block.attention.wo.weight.zero_()
        own.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("attention_norm")})
        head.fc.weight.copy_(torch.eye(*head.fc.weight.shape))
        head.fc.bias.zero_()
        head.position_embedding.weight.copy_(generator.position_embedding.weight)
    return head


def test_a_head_that_copies_the_generator_is_always_right() -> None:
    generator, condition = make_generator(num_layers=1), make_condition()
    drafter = make_drafter(generator, copying_head(generator), tree_choices=CHAIN)
    expected = generator.generate(**condition, do_sample=False)
    begin(drafter, condition, expected.token_ids[:, :1])
    assert torch.equal(drafter.propose(4).tokens, expected.token_ids[:, :5])
    decoder = SpeculativeDecoder(drafter, num_candidates=4)
    output = generator.generate(**condition, do_sample=False, speculation=decoder)
    assert torch.equal(output.token_ids, expected.token_ids)
    assert decoder.stats.acceptance_rate == 1.0
    assert output.trace.positions == [5, 5, 5]  # the condition gives the first token, each forward five more


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("settings", [{"tree_top_k": 4}, {"tree_choices": MC_SIM_7B_63}])
def test_speculation_writes_the_same_images(scale: float, settings: dict[str, Any]) -> None:
    generator, condition = make_generator(), make_condition()
    decoder = SpeculativeDecoder(FeatureDrafter(make_head(generator), generator, **settings), num_candidates=12)
    for sampling in ({"do_sample": False}, {"top_k": 5}):
        arguments = condition | sampling | {"guidance_scale": scale}
        seeds = [[Generator().manual_seed(i) for i in range(3)] for _ in range(2)]
        plain = generator.generate(**arguments, generator=seeds[0])
        output = generator.generate(**arguments, generator=seeds[1], speculation=decoder)
        assert torch.equal(output.token_ids, plain.token_ids)
        assert 0 < decoder.stats.accepted < decoder.stats.drafted
        assert output.trace.forwards < plain.trace.forwards


# ---------------------------------------------------------------------------------------------------- loading


def test_saved_head_loads(tmp_path: Path) -> None:
    generator, condition = make_generator(), make_condition()
    head = make_head(generator)
    head.save_pretrained(tmp_path)
    loaded = FeatureHead.from_pretrained(tmp_path)
    assert not any("embed" in key and "position" not in key for key in loaded.state_dict())
    trees = [begin(make_drafter(generator, h), condition, make_tokens()).propose(20) for h in (head, loaded)]
    assert_same(*trees)


def llama_layout(state_dict: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Bring layers into the layout of transformers' Llama."""
    names = {"attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm"}
    names |= {"ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj"}
    names |= {"feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj"}
    named = {}
    for key, value in state_dict.items():
        if key.endswith("wqkv.weight"):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                named[prefix + key.replace("attention.wqkv", f"self_attn.{name}_proj")] = part
            continue
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        named[prefix + key] = value
    return named


def original_head(head: FeatureHead, generator: LlamaGen) -> dict[str, Tensor]:
    return llama_layout(head.state_dict()) | {"embed_tokens.weight": generator.tok_embeddings.weight.detach()}


HEAD_CONFIG = {"num_attention_heads": 2, "num_key_value_heads": 2, "block_size": TOKENS, "cls_token_num": CONDITION - 1}


def test_original_head(tmp_path: Path) -> None:
    generator = make_generator("rope2d", padding_attends=True)
    head = make_head(generator, norm_eps=1e-6)
    torch.save(original_head(head, generator), tmp_path / "pytorch_model.bin")
    loaded = FeatureHead.from_original(tmp_path / "pytorch_model.bin", HEAD_CONFIG | {"model_type": "llama"})
    assert {k: v for k, v in loaded.config.items() if v != head.config[k] and k[0] != "_"} == {}
    trees = [begin(make_drafter(generator, h), make_condition(), make_tokens()).propose(20) for h in (head, loaded)]
    assert_same(*trees)
    assert not loaded.training


def test_original_head_refuses() -> None:
    generator = make_generator("rope2d", padding_attends=True)
    state_dict = original_head(make_head(generator), generator)
    with pytest.raises(CheckpointError, match="does not tell num_attention_heads; pass it"):
        FeatureHead.from_original(state_dict)
    with pytest.raises(CheckpointError, match=r"num_key_value_heads must be num_attention_heads, got \[1, 2\]"):
        FeatureHead.from_original(state_dict, HEAD_CONFIG | {"num_key_value_heads": 1})
    for key in state_dict:
        broken = {name: value for name, value in state_dict.items() if name != key}
        with pytest.raises(CheckpointError):
            FeatureHead.from_original(broken, HEAD_CONFIG)
    with pytest.raises(CheckpointError, match="unexpected 'layers.0.attention_norm.weight'"):
        FeatureHead.from_original(state_dict | {"layers.0.input_layernorm.weight": torch.ones(16)}, HEAD_CONFIG)
    with pytest.raises(CheckpointError, match="no draft head of LANTERN: 'embed_tokens.weight'"):
        FeatureHead.from_original({"encoder.weight": torch.zeros(2, 2)})


def test_original_base_of_lantern() -> None:
    generator = make_generator("rope2d", padding_attends=True, norm_eps=1e-6)
    layers = {k: v for k, v in generator.state_dict().items() if k.startswith(("layers.", "cls_embedding."))}
    original = llama_layout(layers, "model.") | {
        "model.embed_tokens.weight": generator.tok_embeddings.weight,
        "model.norm.weight": generator.norm.weight,
        "lm_head.weight": generator.output.weight,
    }
    config = {"num_attention_heads": 2, "block_size": TOKENS, "model_type": "llama", "hidden_act": "silu"}
    loaded = LlamaGen.from_original(original, config)
    assert loaded.config.padding_attends and loaded.config.norm_eps == 1e-6
    condition = make_condition()
    one, other = (model.generate(**condition, do_sample=False).token_ids for model in (generator, loaded))
    assert torch.equal(one, other)
    with pytest.raises(CheckpointError, match="unexpected 'layers.0.attention.k_proj.weight'"):
        LlamaGen.from_original(
            {k: v for k, v in original.items() if k != "model.layers.0.self_attn.q_proj.weight"}, config
        )
    with pytest.raises(CheckpointError, match="does not tell num_heads"):
        LlamaGen.from_original(original)


def test_states_of_padding() -> None:
    """Padding that attends to others changes the states of padding, and nothing else."""
    plain, other = make_generator("rope2d"), make_generator("rope2d", padding_attends=True)
    condition = make_condition()
    states = other.prefill(**condition).condition_hidden_states
    assert states.shape[1] == CONDITION  # plain leaves out what all rows share
    kept = condition["caption_mask"][:, 1:]
    expected = plain.prefill(**condition).condition_hidden_states
    torch.testing.assert_close(states[:, 1:][kept], expected[kept], atol=1e-5, rtol=0)
    assert not torch.allclose(states[:, 1:][~kept], expected[~kept], atol=1e-2)
    ids = make_tokens(length=TOKENS)
    torch.testing.assert_close(plain(ids, **condition).logits, other(ids, **condition).logits, atol=1e-5, rtol=0)


def test_states_of_a_forward() -> None:
    generator, condition, ids = make_generator(), make_condition(), make_tokens(length=6)
    output = generator(ids, **condition, output_hidden_states=True)
    assert torch.equal(output.logits, generator(ids, **condition).logits)
    states = read(generator, condition, ids[:, :-1])
    found = output.hidden_states[:, -states.mask.shape[1] :]
    torch.testing.assert_close(found[states.mask], states.hidden_states[states.mask], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 24}, "with hidden_size=16, but this one has 24"),
        ({"codebook_size": 13}, "with codebook_size=12, but this one has 13"),
        ({"num_condition_tokens": 6}, "with num_condition_tokens=5, but this one has 6"),
        ({"max_tokens": 17}, "positions for 16 tokens, but the generator writes up to 17"),
    ],
)
def test_another_generator(overrides: dict[str, Any], message: str) -> None:
    head = make_head(make_generator())
    with pytest.raises(ValueError, match=message):
        FeatureDrafter(head, make_generator(**overrides))


def test_generators_that_no_head_drafts_for() -> None:
    with pytest.raises(ValueError, match="TokenShuffle writes 4 at once"):
        FeatureHead.for_generator(tiny_token_shuffle())
    with pytest.raises(TypeError, match="drafts for a LlamaGen, got Linear"):
        make_head(make_generator()).check_generator(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    reading = make_head(make_generator(), reads_padding=False)
    assert not reading.config.reads_padding
    with pytest.raises(ValueError, match="needs a generator with padding_attends=True"):
        FeatureHead.for_generator(make_generator(), reads_padding=True)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        FeatureHead.for_generator(make_generator(), num_layers=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_tokens": 1}, "total_tokens must be an integer of at least 2, got 1"),
        ({"depth": -1}, "depth must be"),
        ({"tree_top_k": 0}, "tree_top_k must be"),
        ({"do_sample": True}, "do_sample=True needs tree_choices"),
        ({"temperature": 0.5}, "change nothing without do_sample=True"),
        ({"tree_choices": CHAIN, "do_sample": True, "top_p": 0.0}, "top_p must be"),
        ({"tree_choices": []}, "at least one"),
        ({"tree_choices": [(0,), (0,)]}, "each node once"),
        ({"tree_choices": [(0,), (1, 0)]}, r"node \(1, 0\) without its parent"),
        ({"tree_choices": [()]}, "root"),
        ({"tree_choices": [(0,), (2,)]}, "ranks 0, 1, 2"),
        ({"tree_choices": [(i,) for i in range(VOCAB + 1)]}, "ranks 0, 1, 2"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    generator = make_generator()
    with pytest.raises(ValueError, match=message):
        FeatureDrafter(make_head(generator), generator, **settings)


def test_bad_sequences() -> None:
    generator, condition, tokens = make_generator(), make_condition(), make_tokens()
    drafter = make_drafter(generator, make_head(generator), 2.0)
    prefill = read(generator, condition, tokens[:, :0], True)
    with pytest.raises(RuntimeError, match="call `reset"):
        drafter.propose(4)
    with pytest.raises(ValueError, match="pass prefill"):
        drafter.reset(list(tokens))
    with pytest.raises(ValueError, match=r"equally many tokens, got \[1, 2, 1\]"):
        drafter.reset([tokens[0], torch.tensor([1, 2]), tokens[2]], prefill)
    for states in (prefill.hidden_states[:3], prefill.hidden_states[..., 1:], prefill.hidden_states.repeat(1, 2, 1)):
        with pytest.raises(ValueError, match=r"must be \(6, 1 to 5, 16\) for 3 rows of 1 tokens with guidance"):
            drafter.reset(list(tokens), Prefill(states, prefill.mask))
    with pytest.raises(ValueError, match=r"prefill.mask must be \(6, 4\), got \(3, 4\)"):
        drafter.reset(list(tokens), Prefill(prefill.hidden_states, prefill.mask[:3]))
    with pytest.raises(ValueError, match="0 to 11, the drafter's vocabulary"):
        drafter.reset([torch.tensor([VOCAB])] * 3, prefill)
    drafter.reset(list(tokens), prefill)
    with pytest.raises(ValueError, match="one generator for each of 3 rows, got 1"):
        drafter.propose(4, [Generator()])
    tree = drafter.propose(4)
    decision = Decision(torch.empty(3, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), tokens[:, 0])
    logits = torch.zeros(3, tree.num_nodes, VOCAB)
    for states in (None, torch.zeros(3, tree.num_nodes, 16)):
        with pytest.raises(ValueError, match=r"hidden states of all nodes, \(6, 5, 16\), got"):
            drafter.observe(Verified(tree, logits, decision, states))
    with pytest.raises(ValueError, match="12 ids, the target's 13"):
        drafter.observe(Verified(tree, torch.zeros(3, tree.num_nodes, VOCAB + 1), decision, None))


# ---------------------------------------------------------------------------------------------------- training


class TinyRecipe(FeatureHeadRecipe):
    """The recipe with a tiny generator, and images whose tokens follow from their emoji."""

    def setup(self) -> torch.nn.Module:
        labels = ("red heart", "pizza", "green apple", "cat face")
        self.caption_tokenizer = train_caption_tokenizer(labels, 120)
        torch.manual_seed(0)
        encoder = tiny_text_encoder(len(self.caption_tokenizer), dim=16, num_layers=1)
        self.generator = make_generator(num_condition_tokens=MAX_PROMPT_TOKENS, caption_dim=16, num_layers=1)
        self.target = TextToImageModule(self.generator, encoder).eval().requires_grad_(False)
        self.records = [EmojiRecord(name, name, name, (), "x", "noto", "train") for name in labels]
        self.pair_records, self.guidance_scale = self.records, 1.0
        self.targets = self.pair_targets = make_tokens(len(labels), TOKENS)
        self.cumulative = np.arange(1, 1 + len(labels)) / len(labels)
        torch.manual_seed(0)
        return self.build(16)


def test_training(tmp_path: Path) -> None:
    recipe = TinyRecipe()
    recipe.config.steps, recipe.config.batch_size, recipe.config.warmup_steps = 100, 4, 5
    recipe.config.learning_rate = recipe.config.muon_learning_rate = 0.02
    recipe.config.mixed_precision, recipe.config.ema_decay = "no", 0.9
    head = FeatureHead.from_pretrained(train(recipe, tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    after = lines[-1]["evaluation"]
    with torch.no_grad():
        before = recipe.evaluate(recipe.setup().eval(), tmp_path)
    assert after["regression"] < 0.7 * before["regression"] and after["agreement"] > before["agreement"]
    assert 1.0 <= after["tokens_per_forward"] <= 5.0
    with torch.no_grad():
        assert recipe.evaluate(head, tmp_path) == pytest.approx(after, abs=1e-5)
    untouched = TinyRecipe()
    untouched.setup()
    for one, other in zip(recipe.generator.parameters(), untouched.generator.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_measures_a_perfect_head(tmp_path: Path) -> None:
    recipe = TinyRecipe()
    recipe.setup()
    with torch.no_grad():
        scores = recipe.evaluate(copying_head(recipe.generator), tmp_path)
    assert scores["agreement"] == 1.0
    # Three chains of four, each with one more token, behind the first, which comes with the condition.
    assert scores["tokens_per_forward"] == 5.0


def test_noise_and_dropped_captions_of_the_training() -> None:
    recipe = TinyRecipe()
    head = recipe.setup().train()
    batch = recipe.batch(0, random.Random(0))
    one, other = (recipe.loss(head, batch, 0)[0] for _ in range(2))
    assert torch.equal(one, other)
    recipe.noise = 0.0
    assert not torch.equal(recipe.loss(head, batch, 0)[0], one)
