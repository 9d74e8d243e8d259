"""Quantizers by hand: tables, ties, losses, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmsdk.training.tokenizer_recipes import CodeReviver
from tokenizers_img.quantizers import FSQ, VectorQuantizer


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


@pytest.mark.parametrize("levels", [(8, 8, 8, 8), (8, 8, 8, 5, 5, 5), (2,), (7, 5, 5, 5, 5)])
def test_fsq_is_a_bijection(levels: tuple[int, ...]) -> None:
    fsq = FSQ(levels)
    ids = torch.arange(fsq.codebook_size)
    values = fsq.dequantize(ids)
    assert float(values.abs().max()) <= 1.0
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


def test_fsq_refuses_bad_levels() -> None:
    for levels in ([], [8, 1]):
        with pytest.raises(ValueError, match=r"integers >= 2, got \["):
            FSQ(levels)


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
    assert reviver.step(101, latents) == 0
