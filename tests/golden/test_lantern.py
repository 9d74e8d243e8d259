"""LANTERN's decisions against recorded ones of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmsdk.decoding.rules import Greedy, Lantern, Rejection
from mmsdk.decoding.rules.lantern import nearest_codes
from mmsdk.decoding.sampling import process_logits
from mmsdk.decoding.tree import DraftTree
from tests.golden.util import golden_cases, load_json, load_tensors, select_cases

CASES = golden_cases("lantern")
NEIGHBOURS = select_cases(CASES, lambda name, case: name.startswith("neighbours"))
ACCEPTANCE = select_cases(CASES, lambda name, case: "index" in case)


def recorded_neighbours() -> Tensor:
    """Return recorded neighbours."""
    (case,) = (c.values[1] for c in NEIGHBOURS)
    return load_tensors("lantern", case["file"])["indices"].long()


@pytest.mark.parametrize(("name", "case"), NEIGHBOURS)
def test_neighbours(name: str, case: dict[str, Any]) -> None:
    tensors = load_tensors("lantern", case["file"])
    codebook = next(v for k, v in tensors.items() if v.is_floating_point())
    recorded = next(v for k, v in tensors.items() if not v.is_floating_point())
    assert torch.equal(nearest_codes(codebook, recorded.shape[1]), recorded.long())


def to_tree(tensors: dict[str, Tensor], case: dict[str, Any]) -> tuple[DraftTree, Tensor, dict[tuple[int, ...], int]]:
    """Turn leaves `(leaves, depth)`, padded with -1, into nodes; the logits of each node; and the node of each path."""
    is_drawn = "draft_distributions" in tensors
    buffers = load_json("lantern", "tree_buffers.json")[case["tree"]] if is_drawn else None
    nodes: dict[tuple[int, ...], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    logits: list[Tensor] = []
    probs: list[Tensor] = []
    for leaf, row in enumerate(tensors["candidates"].tolist()):
        for depth, token in enumerate(row):
            path = tuple(row[: depth + 1])
            if token == -1 or path in nodes:
                continue
            nodes[path] = len(tokens)
            tokens.append(token)
            parents.append(nodes[path[:-1]] if depth else -1)
            logits.append(tensors["logits"][leaf, depth])
            if buffers is not None:
                probs.append(torch.zeros_like(logits[-1]))
                if depth:
                    first = sum(case["draft_rows_per_level"][: depth - 1])
                    drawn_from = tensors["draft_distributions"][first + buffers["p_indices"][leaf][depth]]
                    probs[parents[-1]] = drawn_from
    tree = DraftTree(torch.tensor([tokens]), torch.tensor([parents]), torch.stack(probs)[None] if probs else None)
    return tree, torch.stack(logits)[None], nodes


@pytest.mark.parametrize(("name", "case"), ACCEPTANCE)
def test_decisions(name: str, case: dict[str, Any]) -> None:
    recorded = load_tensors("lantern", case["file"])
    decisions = load_json("lantern", case["index"])
    assert decisions
    for one in decisions:
        tensors = {k.split("/")[1]: v for k, v in recorded.items() if k.startswith(one["case"] + "/")}
        tree, logits, nodes = to_tree(tensors, one)
        is_greedy = one["temperature"] == 0
        if not is_greedy:
            logits = process_logits(logits, one["temperature"], one["top_k"], one["top_p"])
        uniforms = torch.full((1, tree.num_nodes), 0.5, dtype=torch.float64)
        uniforms[0, : one["uniforms_used"]] = tensors["uniforms"]
        neighbours = recorded_neighbours()
        rule: Any = Lantern(neighbours, one["lantern_delta"], one["lantern_k"], not is_greedy, mode="official")
        if not one["lantern"]:
            rule = Greedy() if is_greedy else Rejection()
        decision = rule.verify(tree, logits, uniforms)
        best = tensors["candidates"][one["best_candidate"]].tolist()
        expected = [nodes[tuple(best[: i + 2])] for i in range(one["accept_length"])]
        assert decision.path[0, : decision.lengths[0]].tolist() == expected, one
        if is_greedy:
            last = expected[-1] if expected else 0
            torch.testing.assert_close(logits[0, last], tensors["sample_p"])
            assert decision.bonus[0] == logits[0, last].argmax()
        else:
            _, rest = rule.walk(tree, logits, uniforms)
            rest = rest[0] / rest[0].sum()
            torch.testing.assert_close(rest.float(), tensors["sample_p"], atol=1e-5, rtol=1e-4, msg=one["case"])
