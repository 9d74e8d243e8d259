"""Quantizers by hand: tables, ties, losses, gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmsdk.training.tokenizer_recipes import CodeReviver
from tokenizers_img.quantizers import FSQ, GaussianQuantizer, VectorQuantizer


def codebook(rows: list[list[float]], **settings: object) -> VectorQuantizer:
    quantizer = VectorQuantizer(len(rows), len(rows[0]), **settings)
    quantizer.embedding.weight.data = torch.tensor(rows)
    return quantizer


def test_vq_by_hand() -> None:
    quantizer = codebook([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    latents = torch.tensor([[0.4, 0.1], [0.9, 0.3], [0.2, 1.5]])
    assert quantizer.quantize(latents).tolist() == [0, 1, 2]
    output = quantizer(latents)
    assert torch.equal(output.latents, quantizer.dequantize(output.token_ids))
    error = float((latents - output.latents).square().mean())
    assert float(output.loss.detach()) == pytest.approx(1.25 * error)


def test_vq_losses_by_hand() -> None:
    # Errors of (0.2, 0.4) and (0.6, 0.0): the mean square is (0.04 + 0.16 + 0.36 + 0.0) / 4 = 0.14.
    rows, latents = [[0.0, 0.0], [2.0, 2.0]], torch.tensor([[0.2, -0.4], [1.4, 2.0]])
    for cost, loss in ((0.0, 0.14), (0.25, 0.175), (1.0, 0.28)):
        output = codebook(rows, commitment_cost=cost)(latents)
        assert float(output.loss.detach()) == pytest.approx(loss)
    # On the sphere (3, 4) is (0.6, 0.8), and its nearest row (0, 1): (0.36 + 0.04) / 2 = 0.2.
    output = codebook([[0.0, 7.0], [5.0, 0.0]], l2_norm=True)(torch.tensor([[3.0, 4.0]]))
    assert output.token_ids.tolist() == [0]
    assert float(output.loss.detach()) == pytest.approx(1.25 * 0.2)
    torch.testing.assert_close(output.latents.detach(), torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("l2_norm", [False, True])
def test_vq_finds_the_nearest_row(l2_norm: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, latents = torch.randn(50, 6, generator=generator), torch.randn(4, 9, 6, generator=generator)
    quantizer = codebook(rows.tolist(), l2_norm=l2_norm)
    if l2_norm:
        rows, latents = rows / rows.norm(dim=-1, keepdim=True), latents / latents.norm(dim=-1, keepdim=True)
    nearest = (latents[..., None, :] - rows).square().sum(-1).argmin(-1)
    token_ids = quantizer.quantize(latents)
    assert token_ids.dtype == torch.int64
    assert torch.equal(token_ids, nearest)
    torch.testing.assert_close(quantizer.dequantize(token_ids), rows[nearest])
    assert torch.equal(quantizer.quantize(quantizer.codebook), torch.arange(50))


def test_vq_expectation() -> None:
    probs = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    assert codebook([[2.0, 0.0], [0.0, 4.0]]).expectation(probs).tolist() == [[1.0, 2.0], [0.5, 3.0]]
    # The rows as they are stored are averaged, then the mean is normalised.
    mean = codebook([[3.0, 0.0], [0.0, 4.0]], l2_norm=True).expectation(probs[:1])
    torch.testing.assert_close(mean, torch.tensor([[0.6, 0.8]]))


def test_vq_ties_go_to_the_lowest_index() -> None:
    quantizer = codebook([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert quantizer.quantize(torch.tensor([[1.0, 0.0], [0.0, 5.0]])).tolist() == [0, 0]


def test_vq_on_the_sphere() -> None:
    quantizer = codebook([[10.0, 0.0], [0.0, 0.1]], l2_norm=True)
    latents = torch.tensor([[0.1, 0.2], [3.0, 1.0]])
    assert quantizer.quantize(latents).tolist() == [1, 0]
    assert quantizer.dequantize(torch.tensor([0, 1])).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert torch.equal(quantizer.expectation(torch.eye(2)), F.normalize(quantizer.embedding.weight, dim=-1))


def test_vq_gradients_are_straight_through() -> None:
    quantizer = codebook([[0.0, 0.0], [1.0, 1.0]], commitment_cost=0.5)
    latents = torch.tensor([[0.8, 0.6]], requires_grad=True)
    output = quantizer(latents)
    (output.latents * torch.tensor([2.0, 3.0])).sum().backward(retain_graph=True)
    assert latents.grad.tolist() == [[2.0, 3.0]]
    latents.grad = None
    output.loss.backward()
    # commitment: 0.5 * d/dx mean((x - 1)^2) = 0.5 * (x - 1)
    torch.testing.assert_close(latents.grad, torch.tensor([[-0.1, -0.2]]))
    torch.testing.assert_close(quantizer.embedding.weight.grad, torch.tensor([[0.0, 0.0], [0.2, 0.4]]))


def test_fsq_by_hand() -> None:
    fsq = FSQ([3, 4])
    assert fsq.codebook_size == 12
    # Three levels are -1, 0, 1; four levels are -1, -0.5, 0, 0.5: even counts are asymmetric.
    values = fsq.dequantize(torch.arange(12))
    assert values[:3].tolist() == [[-1.0, -1.0], [0.0, -1.0], [1.0, -1.0]]
    assert values[::3, 1].tolist() == [-1.0, -0.5, 0.0, 0.5]
    extreme = torch.tensor([[-9.0, -9.0], [0.0, 0.0], [9.0, 9.0]])
    assert fsq.quantize(extreme).tolist() == [0, 1 + 3 * 2, 2 + 3 * 3]


@pytest.mark.parametrize(
    ("levels", "table"),
    [(2, [-1.0, 0.0]), (3, [-1.0, 0.0, 1.0]), (5, [-1.0, -0.5, 0.0, 0.5, 1.0]), (4, [-1.0, -0.5, 0.0, 0.5])],
)
def test_fsq_of_one_dimension(levels: int, table: list[float]) -> None:
    fsq = FSQ([levels])
    assert fsq.dequantize(torch.arange(levels)).flatten().tolist() == table
    # From -infinity to infinity every level is passed once, in order.
    ids = fsq.quantize(torch.linspace(-9, 9, 2001).unsqueeze(-1)).tolist()
    assert sorted(set(ids)) == list(range(levels))
    assert ids == sorted(ids)


def test_fsq_thresholds() -> None:
    # Five levels: h = 2.002, no offset; the middle level ends where tanh(z) * h = 0.5.
    edge = math.atanh(0.5 / 2.002)
    fsq = FSQ([5])
    assert fsq.quantize(torch.tensor([[-edge - 1e-4], [-edge + 1e-4], [edge - 1e-4], [edge + 1e-4]])).tolist() == [
        1,
        2,
        2,
        3,
    ]
    # Four levels: h = 1.5015, offset 0.5; zero is shifted so that it stays zero, level 2.
    low, high = (math.atanh(x / 1.5015) - math.atanh(0.5 / 1.5015) for x in (0.0, 1.0))
    assert FSQ([4]).quantize(torch.tensor([[low - 1e-4], [low + 1e-4], [high - 1e-4], [high + 1e-4]])).tolist() == [
        1,
        2,
        2,
        3,
    ]


@pytest.mark.parametrize("levels", [(8, 8, 8, 8), (8, 8, 8, 5, 5, 5), (2,), (2, 3, 4, 6), (7, 5, 5, 5, 5)])
def test_fsq_is_a_bijection(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    ids = torch.arange(fsq.codebook_size)
    values = fsq.dequantize(ids)
    assert float(values.abs().max()) <= 1.0
    assert len(set(map(tuple, values.tolist()))) == math.prod(levels) == fsq.codebook_size
    # The tanh of these latents is what `quantize` bounds: undo it to come back to the same index.
    half = (fsq.levels - 1) * 1.001 / 2
    offset = torch.where(fsq.levels % 2 == 0, 0.5, 0.0)
    scaled = ((values * (fsq.levels // 2) + offset) / half).double().clamp(-0.9999999, 0.9999999)
    latents = torch.atanh(scaled) - torch.atanh((offset / half).double())
    assert torch.equal(fsq.quantize(latents), ids)


def test_fsq_trains_straight_through() -> None:
    latents = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = FSQ([8, 5])(latents)
    assert torch.equal(output.latents.detach(), FSQ([8, 5]).dequantize(output.token_ids))
    output.latents.sum().backward()
    assert bool((latents.grad > 0).all())
    assert float(output.loss.detach()) == 0.0


def test_quantizers_decide_in_float32() -> None:
    fsq = FSQ([8, 8, 8, 5, 5, 5])
    latents = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(fsq.quantize(latents), fsq.quantize(latents.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fsq(latents).token_ids, fsq.quantize(latents.float()))


def test_fsq_has_no_state() -> None:
    assert FSQ([8, 5]).state_dict() == {}
    with torch.device("meta"):
        fsq = FSQ([8, 5])
    assert fsq.codebook_size == 40
    assert torch.equal(fsq.dequantize(torch.arange(40)), FSQ([8, 5]).dequantize(torch.arange(40)))


def test_fsq_refuses_bad_levels() -> None:
    for levels in ([], [8, 1], [8, 2.5]):
        with pytest.raises(ValueError, match=r"integers >= 2, got \["):
            FSQ(levels)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("value_range", [1.0, 5.0])
def test_gaussian_finds_the_nearest_level(bits: int, value_range: float) -> None:
    quantizer = GaussianQuantizer(bits, value_range)
    assert quantizer.codebook_size == len(quantizer.levels) == 2**bits
    values = (torch.rand(7, 30, 40, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1) * value_range
    scaled = ((values + value_range) / (2 * value_range) * 6 - 3).clamp(-3, 3)
    nearest = (scaled[..., None] - quantizer.centroids).abs().argmin(-1)
    assert nearest.unique().tolist() == list(range(2**bits))
    ids = quantizer.quantize(values)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, nearest)
    assert torch.equal(quantizer.quantize(values.mT), nearest.mT)
    assert torch.equal(quantizer.quantize(quantizer.levels), torch.arange(2**bits))
    assert torch.equal(quantizer.dequantize(ids), quantizer.levels[ids])


def test_gaussian_by_hand() -> None:
    # Two halves of a normal distribution that is cut off at 3: their means are +-(phi(0) - phi(3)) / (Phi(3) - 1/2).
    mean = (0.39894228 - 0.00443185) / 0.49865010
    quantizer = GaussianQuantizer(1, value_range=5)
    torch.testing.assert_close(quantizer.centroids, torch.tensor([-mean, mean]))
    torch.testing.assert_close(quantizer.levels, torch.tensor([-mean, mean]) * 5 / 3)
    # What is halfway goes to the lower index; what is beyond the range to the outermost ones.
    values = torch.tensor([-math.inf, -99.0, -0.01, 0.0, 0.01, 99.0, math.inf])
    assert quantizer.quantize(values).tolist() == [0, 0, 0, 0, 1, 1, 1]
    # Levels, not boundaries, decide: the mean of the part from 0 to 0.674 is 0.324, that of the part above it 1.260.
    quantizer = GaussianQuantizer(2, value_range=3)
    torch.testing.assert_close(quantizer.boundaries, torch.tensor([-3.0, -0.67448975, 0.0, 0.67448975, 3.0]))
    torch.testing.assert_close(quantizer.levels[2:], torch.tensor([0.3247, 1.2602]), atol=1e-4, rtol=0)
    assert quantizer.quantize(torch.tensor([0.79, 0.80])).tolist() == [2, 3]


def test_gaussian_levels_are_conditional_means() -> None:
    values = torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = values[values.abs() < 3]
    quantizer = GaussianQuantizer(4, value_range=3)
    parts = torch.bucketize(values, quantizer.boundaries[1:-1].double())
    means = torch.bincount(parts, values) / torch.bincount(parts)
    torch.testing.assert_close(quantizer.levels.double(), means, atol=5e-3, rtol=0)


def test_gaussian_trains_straight_through() -> None:
    latents = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer = GaussianQuantizer(3)
    output = quantizer(latents)
    torch.testing.assert_close(output.latents.detach(), quantizer.dequantize(output.token_ids))
    output.latents.sum().backward()
    assert torch.equal(latents.grad, torch.ones(5, 2))
    assert float(output.loss.detach()) == 0.0


def test_gaussian_has_no_state_that_casts_or_meta_could_harm() -> None:
    latents = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    ids = GaussianQuantizer(8).quantize(latents)
    with torch.device("meta"):
        quantizer = GaussianQuantizer(8).to(torch.bfloat16)
    assert quantizer.state_dict() == {}
    assert torch.equal(quantizer.quantize(latents), ids)
    assert quantizer.dequantize(ids).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(latents).token_ids, ids)


@pytest.mark.parametrize("bits", [0, -1, 9, 16, 6.0, "6", None])
def test_gaussian_refuses_bits_without_a_table(bits: object) -> None:
    with pytest.raises(ValueError, match=f"bits must be an integer from 1 to 8, got {bits!r}"):
        GaussianQuantizer(bits)


@pytest.mark.parametrize("value_range", [0, -5.0, math.inf, math.nan])
def test_gaussian_refuses_bad_ranges(value_range: float) -> None:
    with pytest.raises(ValueError, match="value_range must be positive and finite"):
        GaussianQuantizer(6, value_range)


def test_unused_codes_are_revived_and_used_ones_kept() -> None:
    torch.manual_seed(0)
    quantizer = codebook([[1.0, 0.0], [0.0, 1.0], [-9.0, 0.0], [0.0, -9.0]])
    reviver = CodeReviver(quantizer, every=2, until=100)
    latents = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    reviver.observe(quantizer.quantize(latents))
    assert reviver.step(0, latents) == 0
    assert reviver.step(1, latents) == 2
    assert quantizer.embedding.weight[:2].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    rows = {tuple(row) for row in latents.tolist()}
    assert all(tuple(row) in rows for row in quantizer.embedding.weight[2:].tolist())
    # The window starts anew: what it has not seen yet counts as unused.
    reviver.observe(torch.tensor([0, 1, 2, 3]))
    assert reviver.step(3, latents) == 0
    assert quantizer.embedding.weight[:2].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    reviver.observe(torch.tensor([1, 2, 3]))
    assert reviver.step(5, latents) == 1
    assert tuple(quantizer.embedding.weight[0].tolist()) in rows
    # Nothing is revived in the last part of the training.
    assert reviver.step(101, latents) == 0


def test_codes_are_revived_on_the_sphere_and_no_more_than_there_are_vectors() -> None:
    torch.manual_seed(0)
    quantizer = codebook([[1.0, 0.0]] * 5, l2_norm=True)
    before = quantizer.embedding.weight.detach().clone()
    reviver = CodeReviver(quantizer, every=1, until=1)
    reviver.observe(torch.tensor([0]))
    assert reviver.step(0, torch.tensor([[0.0, 3.0], [0.0, 5.0]])) == 2
    assert quantizer.embedding.weight[1:3].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert torch.equal(quantizer.embedding.weight[[0, 3, 4]], before[[0, 3, 4]])
