"""Token Recycling against a recorded generation of the published code: trees, acceptance, output and table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmsdk.decoding.base import Decision, Verified
from mmsdk.decoding.drafters.token_recycling import STATIC_TREE, TokenRecycling
from mmsdk.decoding.tree import DraftTree
from tests.golden.util import GOLDEN, golden_path, load_json, load_tensors

SYSTEM = "text/token_recycling"


def recorded_cases() -> list[Any]:
    """Return the cases, each a JSON file beside its tensors; a folder without any is an error."""
    if not GOLDEN.is_dir():
        return [pytest.param("", marks=pytest.mark.skip(reason=f"no golden data at {GOLDEN}"), id="absent")]
    found = sorted(Path(golden_path(SYSTEM)).glob("case*.json"))
    if not found:
        raise LookupError(f"{golden_path(SYSTEM)} has no case.")
    return [pytest.param(path.stem, id=path.stem) for path in found]


CASES = recorded_cases()


def accept_greedy(tree: DraftTree, logits: Tensor) -> Decision:
    """Accept the longest path of the target's choices, of several as long the first, without the code under test."""
    choices, tokens, parents = logits[0].argmax(-1).tolist(), tree.tokens[0].tolist(), tree.parents[0].tolist()
    paths: dict[int, list[int]] = {0: []}
    for node in range(1, len(tokens)):
        if parents[node] in paths and tokens[node] == choices[parents[node]]:
            paths[node] = [*paths[parents[node]], node]
    path = max(paths.values(), key=len)
    bonus = choices[path[-1] if path else 0]
    return Decision(torch.tensor([path], dtype=torch.int64), torch.tensor([len(path)]), torch.tensor([bonus]))


@pytest.mark.parametrize("name", CASES)
def test_generation(name: str) -> None:
    case, golden = load_json(SYSTEM, f"{name}.json"), load_tensors(SYSTEM, f"{name}.safetensors")
    drafter = TokenRecycling(case["vocab_size"], case["top_k"], case["tree_paths"])
    sequence = golden["prompt"][0].tolist()
    drafter.reset([golden["prompt"][0]])
    prompt_length = len(sequence)
    assert len(golden["trees"]) == len(case["accept_lengths"]) == case["steps"] + 1
    for step, expected in enumerate(golden["trees"]):
        assert len(sequence) - 1 - prompt_length < case["max_new_tokens"]
        assert len(sequence) - 1 == golden["past_lengths"][step]
        tree = drafter.propose(len(case["tree_paths"]))
        assert torch.equal(tree.tokens[0], expected)
        if step == 0:
            assert torch.equal(tree.tokens[0], golden["first_tree"])
            assert torch.equal(tree.mask[0].long(), golden["tree_mask"])
            assert torch.equal(tree.depths[0], golden["tree_depth"])
        logits = golden["logit_table"][tree.tokens]
        decision = accept_greedy(tree, logits)
        drafter.observe(Verified(tree, logits, decision))
        accepted = tree.tokens[0, decision.path[0]].tolist()
        assert 1 + len(accepted) == case["accept_lengths"][step]
        sequence += [*accepted, int(decision.bonus)]
    # The recording ends before the token that the last step would have gone on with.
    assert sequence[:-1] == golden["output_ids"][0].tolist()
    assert len(sequence) - 1 - prompt_length == case["num_new_tokens"]
    assert torch.equal(drafter.adjacency[0].long(), golden["final_adjacency"])


@pytest.mark.parametrize("name", CASES)
def test_published_tree_is_the_default(name: str) -> None:
    case = load_json(SYSTEM, f"{name}.json")
    assert [list(path) for path in STATIC_TREE] == case["tree_paths"]
    assert TokenRecycling(case["vocab_size"]).top_k == case["top_k"]
