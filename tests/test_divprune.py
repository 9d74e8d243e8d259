"""DivPrune: what it selects, and what that costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pruning import divprune
from pruning.base import PruningContext
from pruning.divprune import DivPrune


def order(features: Tensor, count: int) -> list[int]:
    return DivPrune(num_tokens=count).select_in_order(features).tolist()


def features_of(total: int, dim: int = 24, seed: int = 0, clusters: int = 0) -> Tensor:
    """Independent tokens, or tokens near one of some centres."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(total, dim, generator=generator)
    if not clusters:
        return noise
    centres = torch.randn(clusters, dim, generator=generator)
    return centres[torch.randint(clusters, (total,), generator=generator)] + 0.3 * noise


def distances(features: Tensor) -> Tensor:
    vectors = torch.nn.functional.normalize(features.double(), dim=-1)
    return 1 - vectors @ vectors.T


def assert_greedy(features: Tensor, picks: list[int], tolerance: float = 2e-6) -> None:
    """Every pick is a farthest token by the published rule, up to the rounding of float32."""
    between = distances(features)
    nearest = between.clone().fill_diagonal_(torch.inf).amin(1)
    assert nearest[picks[0]] >= nearest.max() - tolerance
    assert len(set(picks)) == len(picks)
    for step in range(1, len(picks)):
        closest = between[picks[:step]].amin(0)
        closest[picks[:step]] = -torch.inf
        assert closest[picks[step]] >= closest.max() - tolerance


def test_by_hand() -> None:
    angles = torch.tensor([0.0, 10.0, 90.0, 200.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], -1) * torch.tensor([[1.0], [3.0], [0.5], [7.0]])
    # 200 degrees is 110 from its nearest; 10 is the farthest from it; then 90 is 80 from both, 0 only 10.
    assert order(features, 3) == [3, 1, 2]
    assert DivPrune(num_tokens=3).select(features, PruningContext()).tolist() == [1, 2, 3]
    assert order(features, 4) == [0, 1, 2, 3]


def test_ties_and_duplicates() -> None:
    # The only one without a twin, then one of each kind by lowest index, then the twins by lowest index.
    features = torch.eye(3)[[0, 0, 1, 2, 2]]
    assert [order(features, count) for count in range(1, 5)] == [[2], [2, 0], [2, 0, 3], [2, 0, 3, 1]]
    assert order(torch.ones(200, 4), 70) == list(range(70))
    assert order(torch.eye(100), 40) == list(range(40))


def test_zero_vectors_are_at_distance_one() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 0.0], [-1.0, 0.0]])
    assert order(features, 3) == [2, 0, 3] or order(features, 3) == [3, 1, 2]
    assert_greedy(features, order(features, 3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    features = features_of(20)
    features[3, 5] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        order(features, 5)


@pytest.mark.parametrize("total", [2, 15, 16, 17, 63, 65, 127, 128, 129, 257, 600])
@pytest.mark.parametrize("clusters", [0, 7])
@pytest.mark.parametrize("all_pairs", [4096, 0])
def test_every_pick_is_the_farthest(total: int, clusters: int, all_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divprune, "_ALL_PAIRS", all_pairs)
    features = features_of(total, seed=total, clusters=clusters)
    assert_greedy(features, order(features, max(1, total // 3)))
    assert_greedy(features, order(features, total - 1)[:200])


@pytest.mark.parametrize("clusters", [0, 7])
def test_blocks_equal_the_whole_matrix(clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of(300, clusters=clusters)
    expected, tied = order(features, 90), torch.eye(20).repeat(15, 1)
    assert order(tied, 90) == list(range(90))
    monkeypatch.setattr(divprune, "_ALL_PAIRS", 0)
    for columns, candidates in ((16, 2), (50, 17), (128, 64), (1000, 1000)):
        monkeypatch.setattr(divprune, "_COLUMNS", columns)
        monkeypatch.setattr(divprune, "_CANDIDATES", candidates)
        assert order(features, 90) == expected
        assert order(tied, 90) == list(range(90))


def test_selection_ignores_scale_and_dtype() -> None:
    features = features_of(100).bfloat16()
    before = features.clone()
    scaled = features.float() * (torch.arange(100)[:, None] % 3 + 1).exp2()
    assert order(features, 30) == order(features.float(), 30) == order(scaled, 30)
    assert torch.equal(features, before)


class Largest(TorchFunctionMode):
    """Records the size of the largest tensor made."""

    numbers = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_many_tokens_make_no_square_matrix() -> None:
    total, dim = 5000, 8
    for features in (features_of(total, dim), features_of(total, dim, clusters=50), torch.ones(total, dim)):
        with Largest() as largest:
            order(features, total // 50)
        assert largest.numbers <= total * 128


@pytest.mark.parametrize("all_pairs", [4096, 0])
def test_fewer_operations_than_the_whole_matrix(all_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divprune, "_ALL_PAIRS", all_pairs)
    total, dim = 2880, 64
    for features in (features_of(total, dim), features_of(total, dim, clusters=50)):
        with FlopCounterMode(display=False) as counter:
            order(features, 282)
        assert counter.get_total_flops() < 0.6 * 2 * total * total * dim
