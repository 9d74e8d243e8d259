"""LANTERN's base model and draft head against recorded outputs of the published code.

The acceptance rules and whole generations are checked elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from generators.feature_head import MC_SIM_7B_63, FeatureDrafter, FeatureHead
from generators.guidance import combine
from generators.llamagen import LlamaGen
from generators.speculation import Conditions
from mmsdk.decoding.base import Prefill
from mmsdk.decoding.sampling import process_logits
from tests.golden.util import (
    golden_cases,
    golden_index,
    golden_manifests,
    load_json,
    load_tensors,
    select_cases,
)

# The files that golden.json does not name.
BASE_WEIGHTS, HEAD_WEIGHTS = "tiny_base_weights.safetensors", "tiny_drafter_weights.safetensors"

CASES = golden_cases("lantern")
DRAFTER = select_cases(CASES, lambda name, case: "drafter" in case["file"])
TREES = select_cases(CASES, lambda name, case: name == "tree_buffers")
DRAWN = select_cases(
    CASES, lambda name, case: "args" in case and case["args"]["static_tree"] and case["args"]["temperature"] > 0
)


def load_models() -> tuple[LlamaGen, FeatureHead]:
    config = golden_index("lantern")["config"]
    base = LlamaGen.from_original(load_tensors("lantern", BASE_WEIGHTS), config["base"])
    # What the drafter's configuration does not say is the base's.
    return base, FeatureHead.from_original(load_tensors("lantern", HEAD_WEIGHTS), config["base"] | config["drafter"])


def read_condition(base: LlamaGen, golden: dict[str, Tensor]) -> tuple[Tensor, Prefill]:
    """Return the state of the first token in both rows, and all states."""
    state = base.prefill(caption_features=golden["cond"], caption_mask=golden["mask"], guided=True)
    mask = golden["mask"].bool().repeat(2, 1)
    return state.condition_hidden, Prefill(state.condition_hidden_states, mask)


@pytest.mark.parametrize(("name", "case"), DRAFTER)
@torch.no_grad()
def test_prefill(name: str, case: dict[str, Any]) -> None:
    base, golden = load_models()[0], load_tensors("lantern", case["file"])
    last, prefill = read_condition(base, golden)
    torch.testing.assert_close(prefill.hidden_states, golden["hidden_states"], atol=1e-4, rtol=0)
    torch.testing.assert_close(base.predict(last), golden["prefill_logits"], atol=1e-4, rtol=0)
    first = base.guided_logits(last, len(golden["cond"]), case["cfg"]).argmax(-1, keepdim=True)
    assert torch.equal(first, golden["first_token"])


def guided(scale: float) -> Conditions:
    return Conditions({}, [scale])


def pairs_along(base: LlamaGen, head: FeatureHead, golden: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Return the head's predictions along a chain of tokens `(k,)` behind the first, without a cache or trees."""
    states = golden["hidden_states"]
    first = golden["first_token"][0]
    while True:
        known = torch.cat([first, tokens[: states.shape[1] - golden["hidden_states"].shape[1]]])
        ids = torch.cat([known.new_zeros(states.shape[1] - len(known)), known])
        features = head(base.embed_tokens(ids).expand(len(states), -1, -1), states)
        if len(known) == len(tokens) + 1:
            return features
        states = torch.cat([states, features[:, -1:]], 1)


@pytest.mark.parametrize(("name", "case"), DRAFTER)
@torch.no_grad()
def test_head(name: str, case: dict[str, Any]) -> None:
    (base, head), golden = load_models(), load_tensors("lantern", case["file"])
    features = pairs_along(base, head, golden, torch.empty(0, dtype=torch.int64))
    torch.testing.assert_close(features, golden["drafter_out"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "case"), DRAFTER)
def test_dynamic_trees(name: str, case: dict[str, Any]) -> None:
    (base, head), golden = load_models(), load_tensors("lantern", case["file"])
    settings = golden_index("lantern")["config"]["drafter"]
    kinds = sorted({key.split("/")[0] for key in golden if key.startswith("dynamic_")})
    assert kinds
    for kind in kinds:
        drafter = FeatureDrafter(
            head,
            base,
            total_tokens=settings["total_tokens"],
            depth=settings["depth"],
            tree_top_k=settings["top_k"],
        )
        drafter.condition(guided(case["cfg"]))
        drafter.reset(list(golden["first_token"]), read_condition(base, golden)[1])
        tree = drafter.propose(budget=1000)
        assert torch.equal(tree.tokens, golden[f"{kind}/draft_tokens"])
        assert torch.equal(tree.depths[0], golden[f"{kind}/tree_position_ids"])
        assert torch.equal(tree.mask[0].float(), golden[f"{kind}/tree_mask"][0, 0])
        nodes = golden[f"{kind}/retrieve_indices"]
        assert bool(((tree.parents[0, nodes[:, 1:]] == nodes[:, :-1]) | (nodes[:, 1:] < 0)).all())


@pytest.mark.parametrize(("name", "case"), DRAFTER)
@torch.no_grad()
def test_static_tree(name: str, case: dict[str, Any]) -> None:
    (base, head), golden = load_models(), load_tensors("lantern", case["file"])
    expanded = [(), *(path for path in MC_SIM_7B_63 if (*path, 0) in MC_SIM_7B_63)]
    width = golden["static_greedy/tokens"].shape[1]
    # The same tree with all successors that were recorded.
    wide = [(*path, rank) for path in expanded for rank in range(width)]
    drafter = FeatureDrafter(head, base, tree_choices=wide)
    drafter.condition(guided(case["cfg"]))
    drafter.reset(list(golden["first_token"]), read_condition(base, golden)[1])
    tree = drafter.propose(budget=len(wide))
    tokens = {path: int(tree.tokens[0, i]) for i, path in enumerate([(), *sorted(wide, key=lambda p: (len(p), p))])}
    for i, path in enumerate(expanded):
        assert [tokens[*path, rank] for rank in range(width)] == golden["static_greedy/tokens"][i].tolist()
        known = torch.tensor([tokens[path[: depth + 1]] for depth in range(len(path))], dtype=torch.int64)
        cond, uncond = base.predict(pairs_along(base, head, golden, known)[:, -1]).chunk(2)
        logits = combine(cond, uncond, case["cfg"])[0].topk(width).values
        torch.testing.assert_close(logits, golden["static_greedy/logits"][i], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "case"), DRAWN)
def test_drawn_tree(name: str, case: dict[str, Any]) -> None:
    (base, head), golden, args = load_models(), load_tensors("lantern", case["file"]), case["args"]
    last, prefill = read_condition(base, golden)
    sampling = {key: args[key] for key in ("temperature", "top_k", "top_p")}
    # The published code draws the first token, then the children level by level, from one stream.
    generator = torch.Generator().manual_seed(case["rng_seed"])
    with torch.no_grad():
        logits = base.guided_logits(last, len(golden["cond"]), args["cfg"])
    first = torch.multinomial(torch.softmax(process_logits(logits, **sampling), -1), 1, generator=generator)
    assert int(first) == int(golden["multinomial_picks"][0, 0])
    choices = load_json("lantern", "tree_buffers.json")[args["tree_choices"]]["choices"]
    drafter = FeatureDrafter(
        head,
        base,
        tree_choices=choices,
        do_sample=True,
        **sampling,
    )
    drafter.condition(guided(args["cfg"]))
    drafter.reset(list(first), prefill)
    tree = drafter.propose(len(choices), [generator])
    paths = sorted(tuple(path) for path in choices)
    order = [(), *sorted(paths, key=len)]
    for depth in range(max(map(len, paths))):
        inner = [path for path in order if len(path) == depth and (*path, 0) in paths]
        picks = golden["multinomial_picks"][1 + depth].view(-1)
        rows, count = golden["multinomial_shapes"][1 + depth].tolist()
        assert rows == len(inner)
        picks = picks[: rows * count].view(rows, count)
        for i, path in enumerate(inner):
            nodes = [order.index(child) for child in paths if child[:-1] == path]
            assert tree.tokens[0, nodes].tolist() == picks[i, : len(nodes)].tolist()


@pytest.mark.parametrize(("name", "case"), TREES)
def test_shapes_of_static_trees(name: str, case: dict[str, Any]) -> None:
    base, head = load_models()
    trees = load_json("lantern", case["file"])
    assert trees
    for tree_name, expected in trees.items():
        drafter = FeatureDrafter(head, base, tree_choices=expected["choices"])
        states = torch.zeros(1, base.config.num_condition_tokens, base.config.hidden_size)
        drafter.reset(
            [torch.zeros(1, dtype=torch.int64)], Prefill(states, torch.ones(states.shape[:2], dtype=torch.bool))
        )
        tree = drafter.propose(len(expected["choices"]))
        assert tree.mask[0].long().tolist() == expected["tree_attn_mask"], tree_name
        assert tree.depths[0].tolist() == expected["tree_position_ids"], tree_name
        if tree_name == "mc_sim_7b_63":
            assert [tuple(path) for path in expected["choices"]] == list(MC_SIM_7B_63)


def on_meta(manifest: dict[str, Any]) -> dict[str, Tensor]:
    return {k: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for k, (shape, dtype) in manifest.items()}


@pytest.mark.parametrize("variant", golden_manifests("lantern", "drafter"))
def test_manifest_of_the_head(variant: str) -> None:
    config = load_json("lantern", f"config_{variant}.json")
    manifest = on_meta(load_json("lantern", f"state_dict_{variant}.json"))
    with torch.device("meta"):
        head = FeatureHead.from_original(manifest, config["drafter_json"])
        default = FeatureHead.from_original(manifest)
    assert {key: value for key, value in head.config.items() if value != default.config[key] and key[0] != "_"} == {}
    embedding = manifest["embed_tokens.weight"].numel()
    assert sum(p.numel() for p in head.parameters()) + embedding == config["num_parameters"]
    published = config["drafter_json"]
    assert (head.config.num_heads, head.config.norm_eps) == (
        published["num_attention_heads"],
        published["rms_norm_eps"],
    )
    assert (head.config.max_tokens, head.config.num_condition_tokens) == (256, 120)


@pytest.mark.parametrize("variant", golden_manifests("lantern", "base"))
def test_manifest_of_the_base(variant: str) -> None:
    config = load_json("lantern", f"config_{variant}.json")
    manifest = on_meta(load_json("lantern", f"state_dict_{variant}.json"))
    with torch.device("meta"):
        model = LlamaGen.from_original(manifest, {"max_tokens": 256} | {"max_position_embeddings": 2048})
    assert len(manifest) == config["num_keys"]
    assert sum(p.numel() for p in model.parameters()) == config["num_parameters"]
    assert (model.config.num_heads, model.config.norm_eps) == (config["heads"], 1e-6)
