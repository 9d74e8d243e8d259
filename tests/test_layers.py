"""The layers that the generators share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from generators.layers import Linear


@pytest.mark.parametrize("shape", [(1,), (2,), (2, 2), (4, 1), (5,), (3, 4)])
def test_linear_gives_what_a_linear_layer_gives(shape: tuple[int, ...]) -> None:
    layer = Linear(512, 1024, bias=False)
    x = torch.randn(*shape, 512, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = layer(x)
    assert output.shape == (*shape, 1024)
    assert output.is_contiguous()
    torch.testing.assert_close(output, F.linear(x, layer.weight), atol=1e-5, rtol=1e-5)


def test_linear_is_exactly_a_linear_layer_elsewhere() -> None:
    x = torch.randn(2, 512)
    layer = Linear(512, 1024, bias=False)
    assert torch.equal(layer(x), F.linear(x, layer.weight))  # with gradients
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        small = Linear(512, 16, bias=False)
        assert torch.equal(small(x), F.linear(x, small.weight))
        with_bias = Linear(512, 1024)
        assert torch.equal(with_bias(x), F.linear(x, with_bias.weight, with_bias.bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        layer.to(torch.bfloat16)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
