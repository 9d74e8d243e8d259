"""DivPrune against recorded selections of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pruning.base import PruningContext
from pruning.divprune import DivPrune
from tests.golden.util import GOLDEN, golden_index, load_tensors

ABSENT = [pytest.param({}, marks=pytest.mark.skip(reason=f"no golden data at {GOLDEN}"), id="absent")]


def recorded(section: str) -> list[Any]:
    """Return the entries of a section of golden.json, which must hold some."""
    if not (index := golden_index("divprune")):
        return ABSENT
    if not index.get(section):
        raise LookupError(f"golden.json of divprune has no {section}.")
    return [pytest.param(entry, id=entry.get("name", str(i))) for i, entry in enumerate(index[section])]


@pytest.mark.parametrize("case", recorded("cases"))
def test_selection(case: dict[str, Any]) -> None:
    golden = load_tensors("divprune", f"{case['name']}.safetensors")
    features, distinct = golden["features"], case["n_unique_selected"]
    assert features.shape == (case["n_tokens"], case["dim"])
    pruner = DivPrune(keep_ratio=case["ratio"])
    picks = pruner.select_in_order(features)
    # Once every distinct vector is taken, the published code repeats itself; here the rest are further tokens.
    assert torch.equal(picks[:distinct], golden["selected_in_order"][:distinct])
    assert len(picks) == len(set(picks.tolist())) == case["n_keep"]
    kept = pruner.select(features, PruningContext())
    assert torch.equal(kept, picks.sort().values)
    if distinct == case["n_keep"]:
        assert torch.equal(kept, golden["selected_sorted"])
    if "nearest_distance" in golden:
        assert picks[0] == golden["nearest_distance"].argmax()
    if "sequence_keep_indices" in golden:
        prefix, suffix = case["prompt_prefix"], case["prompt_suffix"]
        end = prefix + case["n_tokens"]
        columns = torch.cat([torch.arange(prefix), prefix + kept, torch.arange(end, end + suffix)])
        assert torch.equal(columns, golden["sequence_keep_indices"])


@pytest.mark.parametrize("count", recorded("counts"))
def test_count(count: dict[str, Any]) -> None:
    """Half to even, as published; but every image keeps a token, where the published code may keep none."""
    assert DivPrune(keep_ratio=count["ratio"]).budget(count["n_tokens"]) == max(1, count["n_keep"])
