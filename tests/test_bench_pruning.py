"""The benchmarks of pruning on tiny models: what their tables hold, and what they refuse to compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmsdk.bench import prune_select as prune_select_bench
from mmsdk.bench.prune_select import best_times, equal_picks, make_features, published_selection
from mmsdk.bench.runner import BenchResult, run_benchmark
from mmsdk.errors import MMSDKError, UnknownNameError
from pruning.diffrate import DiffRate
from pruning.divprune import DivPrune

TINY_VLM: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "vision_hidden_size": 16,
    "vision_layers": 2, "crops": 1, "text_tokens": 6, "repeats": 1,
}  # fmt: skip


def rows_of(result: BenchResult) -> list[dict[str, Any]]:
    return [dict(zip(result.columns, row, strict=True)) for row in result.rows]


# ---------------------------------------------------------------- prune-select


def test_prune_select() -> None:
    result = run_benchmark("prune-select", token_counts=[40, 90], dim=16, keep_ratio=0.1, seconds=0.0)
    rows = rows_of(result)
    assert [(row["features"], row["tokens"], row["kept"]) for row in rows] == [
        ("independent", 40, 4), ("independent", 90, 9), ("clusters", 40, 4), ("clusters", 90, 9),
    ]  # fmt: skip
    for row in rows:
        assert row["ratio"] == pytest.approx(row["published ms"] / row["ours ms"])
        assert row["of product"] == pytest.approx(row["ours ms"] / row["product ms"])
        assert row["same picks"] == row["kept"]
        # The published algorithm holds the matrix of distances, and while making it the product too.
        assert row["published MiB"] >= 2 * 4 * row["tokens"] ** 2 / 2**20


def test_published_selection_by_hand() -> None:
    angles = torch.tensor([0.0, 10.0, 90.0, 200.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], -1)
    assert published_selection(features, 3).tolist() == [3, 1, 2]
    features = make_features("independent", 60, 8, 0)
    assert torch.equal(published_selection(features, 12), DivPrune(num_tokens=12).select_in_order(features))


def test_other_picks_are_not_compared() -> None:
    features = make_features("clusters", 60, 8, 0)
    picks = published_selection(features, 6)
    assert equal_picks(features, picks, picks) == 6
    worse = picks.clone()
    worse[3] = next(i for i in range(60) if i not in picks)
    with pytest.raises(MMSDKError, match=f"pick 3 of 60 is {int(worse[3])} here and {int(picks[3])} as published"):
        equal_picks(features, worse, picks)
    with pytest.raises(MMSDKError, match="pick 0 of 60"):
        equal_picks(features, picks.flip(0), picks)
    with pytest.raises(MMSDKError, match="same number, but got 5 and 6"):
        equal_picks(features, picks[:5], picks)


def test_equally_far_tokens_may_be_picked_either_way() -> None:
    # The second pick is at a right angle from the first either way.
    features = torch.eye(3)
    assert equal_picks(features, torch.tensor([0, 2]), torch.tensor([0, 1])) == 1


def test_prune_select_refuses_a_wrong_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    def nearest(features: torch.Tensor, count: int) -> torch.Tensor:
        return published_selection(features, count).flip(0)

    monkeypatch.setattr(prune_select_bench, "published_selection", nearest)
    with pytest.raises(MMSDKError, match="their times cannot be compared"):
        run_benchmark("prune-select", token_counts=[60], dim=8, seconds=0.0)
    with pytest.raises(UnknownNameError, match="Did you mean 'clusters'"):
        run_benchmark("prune-select", token_counts=[60], features=["cluster"], seconds=0.0)


def test_best_times_run_everything_and_each_first_in_turn() -> None:
    called: list[int] = []

    def slow() -> None:
        called.append(0)
        sum(range(100_000))

    wall, processor = best_times([slow, lambda: called.append(1)], 0.3)
    assert called[:4] == [0, 1, 1, 0]
    assert wall[0] > wall[1] >= 0
    assert processor[0] > processor[1] >= 0


# ---------------------------------------------------------------- prune-vlm


def test_prune_vlm() -> None:
    state = torch.get_rng_state()
    result = run_benchmark("prune-vlm", keep_ratios=[0.5, 0.1], **TINY_VLM)
    assert torch.equal(state, torch.get_rng_state())
    full, half, tenth = rows_of(result)
    visual = 24 * 24 + 24 * 25
    assert [row["tokens"] for row in (full, half, tenth)] == [visual, visual // 2, round(visual * 0.1)]
    assert full["speed-up"] == full["allowed"] == full["LM allowed"] == 1
    for row in (half, tenth):
        assert row["speed-up"] == pytest.approx(full["prefill s"] / row["prefill s"])
        assert row["%"] == pytest.approx(100 * row["speed-up"] / row["allowed"])
        assert row["LM %"] == pytest.approx(100 * row["LM speed-up"] / row["LM allowed"])
        assert row["LM allowed"] > row["allowed"] > 1
    assert full["GFLOP"] > half["GFLOP"] > tenth["GFLOP"]
    # One layer of 16 x 16 x 4 + 16 x 32 x 3 weights, causal attention, and what both save: half of the tokens.
    before, after = visual + 6, visual // 2 + 6
    weights = 4 * 16 * 16 + 3 * 16 * 32
    saved = 2 * weights * (before - after) + 2 * 16 * (before**2 - after**2)
    assert full["GFLOP"] - half["GFLOP"] == pytest.approx(saved / 1e9, rel=0.01)


def test_prune_vlm_takes_every_method_and_clock() -> None:
    for method in ("hired", "random"):
        result = run_benchmark("prune-vlm", method=method, keep_ratios=[0.2], clock="processor", **TINY_VLM)
        assert result.value("tokens", keep_ratio=0.2) < 300
    with pytest.raises(UnknownNameError, match="Did you mean 'processor'"):
        run_benchmark("prune-vlm", clock="processors", **TINY_VLM)
    with pytest.raises(ValueError, match="repeats"):
        run_benchmark("prune-vlm", **{**TINY_VLM, "repeats": 0})


def test_prune_vlm_refuses_changed_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(self: DivPrune, features: torch.Tensor, *_: object) -> torch.Tensor:
        return 2 * features

    monkeypatch.setattr(DivPrune, "gather", doubled)
    with pytest.raises(MMSDKError, match="must leave the logits as they are"):
        run_benchmark("prune-vlm", **TINY_VLM)


# ---------------------------------------------------------------- diffrate


def test_diffrate(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    result = run_benchmark("diffrate", model="test_vit", rates=[0.0, 0.3], batch_size=2, seconds=0.0)
    assert torch.equal(state, torch.get_rng_state())
    none, some = rows_of(result)
    assert none["GMAC"] == none["executed"]
    assert none["GMAC allow"] == 1
    assert some["tokens"] < none["tokens"]
    assert some["GMAC"] < some["executed"] < none["executed"]
    assert some["GMAC allow"] == pytest.approx(none["GMAC"] / some["GMAC"])
    monkeypatch.setattr(DiffRate, "flops", lambda *_: 10**12)
    with pytest.raises(MMSDKError, match="where the formula says 2000000000000"):
        run_benchmark("diffrate", model="test_vit", rates=[0.3], batch_size=2, seconds=0.0)
