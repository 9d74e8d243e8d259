"""The token budget planner: exact in operations, monotone in time, clear where nothing fits."""

from __future__ import annotations

import pytest
from PIL import Image

from mmsdk.loading import resolve
from pruning.divprune import DivPrune
from pruning.planner import PrefillCost, measure_prefill, plan
from pruning.uniform import UniformPruner
from tests.tiny_vlms import tiny_inputs, tiny_vlm

METHODS = {"divprune": DivPrune, "uniform": UniformPruner}


@pytest.fixture(scope="module")
def vlm():
    model = tiny_vlm("llava_next")
    return model, tiny_inputs(model)


def test_operations_are_met_exactly(vlm) -> None:
    model, inputs = vlm
    reports = {}
    everything = UniformPruner(keep_ratio=1.0)
    everything.prepare(model, inputs)
    total = everything.report.tokens_before[0]
    for count in (1, total // 2, total):
        pruner = UniformPruner(num_tokens=count)
        pruner.prepare(model, inputs)
        reports[count] = pruner.report.flops_after
    for count, flops in reports.items():
        assert [p.num_tokens for p in plan(model, inputs, METHODS, target_flops=flops)] == [count, count]
        below = plan(model, inputs, METHODS, target_flops=flops - 1) if count > 1 else []
        assert all(p.num_tokens == count - 1 for p in below)
    assert plan(model, inputs, METHODS, target_flops=1e18)[0].keep_ratio == 1.0
    with pytest.raises(ValueError, match=r"No method reaches 1 operations: with a single visual token it takes"):
        plan(model, inputs, METHODS, target_flops=1)


def test_time_allows_more_with_more_time(vlm) -> None:
    model, inputs = vlm
    generous = plan(model, inputs, METHODS, target_seconds=100.0, repeats=1)
    assert [p.keep_ratio for p in generous] == [1.0, 1.0]
    assert all(p.seconds < 100 for p in generous)
    with pytest.raises(ValueError, match=r"No method reaches 1e-06 ms: with a single visual token the fastest takes"):
        plan(model, inputs, METHODS, target_seconds=1e-9, repeats=1)


def test_the_cost_is_fitted() -> None:
    tokens = [10, 50, 200, 1000]
    exact = PrefillCost(0.01, 2e-4, 3e-7)
    found = PrefillCost.fit(tokens, [exact(n) for n in tokens])
    for name in ("fixed", "linear", "quadratic"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=1e-4)
    # Noise that a parabola would follow downwards.
    falling = PrefillCost.fit([1, 2, 3], [1.0, 0.9, 0.95])
    costs = [falling(n) for n in range(1, 100)]
    assert costs == sorted(costs)
    with pytest.raises(ValueError, match="two or more numbers of tokens"):
        PrefillCost.fit([5, 5], [1.0, 1.0])


def test_a_prefill_is_measured(vlm) -> None:
    cost = measure_prefill(*vlm, keep_ratios=(0.1, 0.5, 1.0), repeats=1)
    assert 0 < cost(10) <= cost(1000)


@pytest.mark.parametrize(
    "targets",
    [{}, {"target_seconds": 1.0, "target_flops": 1.0}, {"target_seconds": -1.0}, {"target_flops": float("nan")}],
)
def test_bad_targets_are_refused(vlm, targets) -> None:
    with pytest.raises(ValueError, match="one positive target"):
        plan(*vlm, METHODS, **targets)


def test_several_images_are_refused() -> None:
    model = tiny_vlm("llava_next")
    for images in ((1, 1), (2,)):
        with pytest.raises(ValueError, match="one prompt with one image"):
            plan(model, tiny_inputs(model, images), METHODS, target_flops=1e9)


def test_the_embedded_model_is_planned_for() -> None:
    from mmsdk.loading import load_vlm

    model, processor = load_vlm()
    inputs = processor(images=Image.new("RGB", (256, 256)), text="<s><image>what is at b3?", return_tensors="pt")
    names = ("divprune", "hired", "visionzip")
    plans = plan(model, inputs, {name: resolve(name) for name in names}, target_flops=1e8)
    assert [p.method for p in plans] == list(names)
    pruner = DivPrune(num_tokens=plans[0].num_tokens)
    pruner.prepare(model, inputs)
    assert pruner.report.flops_after == plans[0].flops <= 1e8
