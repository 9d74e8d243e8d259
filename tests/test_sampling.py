"""Sampling functions: filters, inverse-CDF draws and generators."""

from __future__ import annotations

import math

import pytest
import torch

from mmsdk.decoding.sampling import check_sampling, draw_uniforms, process_logits, sample_inverse_cdf

INF = float("inf")


def test_filters_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    before = logits.clone()

    kept = process_logits(logits, top_k=2)
    torch.testing.assert_close(kept.exp(), torch.tensor([[0.0, 0.5, 0.0, 0.25]]))
    # 0.5 alone does not exceed 0.7; 0.5 + 0.25 does, and the id that brings the sum above stays.
    kept = process_logits(logits, top_p=0.7)
    torch.testing.assert_close(kept.exp(), torch.tensor([[0.0, 0.5, 0.0, 0.25]]))
    kept = process_logits(logits, top_p=0.4)
    torch.testing.assert_close(kept.exp(), torch.tensor([[0.0, 0.5, 0.0, 0.0]]))
    # Top-p works on what top-k has left: 0.5 of 0.75 is above 0.6.
    kept = process_logits(logits, top_k=2, top_p=0.6)
    torch.testing.assert_close(kept.exp(), torch.tensor([[0.0, 0.5, 0.0, 0.0]]))
    # Temperature comes first: at 1/2 the probabilities are squared, and 0.25 / 0.345 exceeds 0.7.
    kept = process_logits(logits, temperature=0.5, top_p=0.7)
    torch.testing.assert_close(kept.exp(), torch.tensor([[0.0, 0.25, 0.0, 0.0]]))
    assert torch.equal(logits, before)


def test_filters_keep_ties_and_all() -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 3.0])
    assert process_logits(logits, top_k=2).isfinite().tolist() == [False, True, True, True]
    assert process_logits(logits, top_k=99) is logits
    assert process_logits(logits) is logits
    assert process_logits(logits, temperature=1e-30).isfinite().all()


def test_filters_treat_rows_alone() -> None:
    logits = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0))
    together = process_logits(logits, 0.8, 9, 0.7)
    for i in range(5):
        for j in range(3):
            assert torch.equal(together[i, j], process_logits(logits[i, j], 0.8, 9, 0.7))


def test_inverse_cdf_by_hand() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    expected = {0.0: 1, 0.2499: 1, 0.25: 3, 0.7499: 3, 0.75: 4, 1 - 2**-53: 4}
    for u, index in expected.items():
        assert sample_inverse_cdf(probs, torch.tensor(u, dtype=torch.float64)).item() == index


def test_inverse_cdf_never_draws_probability_zero() -> None:
    # In float32 these sum to less than 1, and the ids at the end have probability 0.
    probs = torch.softmax(torch.randn(300, 1000, generator=torch.Generator().manual_seed(1)), -1)
    probs[:, -5:] = 0
    probs[:, :5] = 0
    for u in (0.0, math.nextafter(1.0, 0.0)):
        ids = sample_inverse_cdf(probs, torch.full((300,), u, dtype=torch.float64))
        assert (probs.gather(1, ids[:, None]) > 0).all()


def test_inverse_cdf_frequencies() -> None:
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniforms = draw_uniforms(torch.Generator().manual_seed(0), 1, 20000)[0]
    counts = torch.bincount(sample_inverse_cdf(probs.expand(20000, 4), uniforms), minlength=4) / 20000
    torch.testing.assert_close(counts, probs, atol=0.02, rtol=0)
    assert counts[1] == 0


@pytest.mark.parametrize("row", [[float("nan"), 1.0], [INF, 1.0], [0.0, 0.0]])
def test_inverse_cdf_refuses(row: list[float]) -> None:
    probs = torch.tensor([[0.5, 0.5], row])
    with pytest.raises(ValueError, match="NaN or infinity"):
        sample_inverse_cdf(probs, torch.zeros(2, dtype=torch.float64))


def test_uniforms_depend_on_their_generator_only() -> None:
    def make(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    together = draw_uniforms([make(3), make(4)], 2, 50)
    assert together.shape == (2, 50) and together.dtype == torch.float64
    assert torch.equal(together[1:], draw_uniforms([make(4)], 1, 50))
    assert torch.equal(together[1:], draw_uniforms(make(4), 1, 50))
    generator = make(4)
    one_by_one = torch.cat([draw_uniforms([generator], 1) for _ in range(50)], 1)
    assert torch.equal(together[1:], one_by_one)
    assert torch.equal(draw_uniforms(make(5), 3, 10)[:, :4], draw_uniforms(make(5), 3, 4))


def test_uniforms_without_generator_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    assert not torch.equal(draw_uniforms(None, 1, 4), draw_uniforms(None, 1, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_uniforms_refuse() -> None:
    with pytest.raises(ValueError, match="each of 3 rows, got 2"):
        draw_uniforms([torch.Generator(), torch.Generator()], 3)
    with pytest.raises(TypeError, match="Generator 1 must be a torch.Generator, got int"):
        draw_uniforms([torch.Generator(), 7], 2)  # type: ignore[list-item]


@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, float("nan")])
def test_temperature_range(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        check_sampling(temperature=temperature)


@pytest.mark.parametrize("top_k", [-1, 2.5, True])
def test_top_k_range(top_k: int) -> None:
    with pytest.raises(ValueError, match="top_k must be an integer of at least 0"):
        process_logits(torch.zeros(4), top_k=top_k)


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.01, float("nan")])
def test_top_p_range(top_p: float) -> None:
    with pytest.raises(ValueError, match="top_p must be above 0 and at most 1"):
        process_logits(torch.zeros(4), top_p=top_p)
