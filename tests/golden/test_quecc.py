"""QueCC against recorded outputs of the published module."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pruning.quecc import QueCC
from tests.golden.listed import listed_cases
from tests.golden.util import load_tensors


@pytest.mark.parametrize("case", listed_cases("quecc"))
@torch.no_grad()
def test_case(case: dict[str, Any]) -> None:
    assert case["stride"] == case["kernel"], "cells that overlap or leave gaps are not supported"
    golden = load_tensors("quecc", f"{case['name']}.safetensors")
    weights = {k.removeprefix("weight."): v for k, v in golden.items() if k.startswith("weight.")}
    inputs = (golden["features"], golden["multi_level_features"], golden["text_query"])
    for prefix in ("", "model.mm_projector."):
        model = QueCC.from_original({prefix + k: v for k, v in weights.items()}).eval()
        assert model.config.kernel_size == case["kernel"]
        torch.testing.assert_close(model(*inputs), golden["output"], atol=1e-5, rtol=1e-5)
    assert model.num_tokens(case["tokens"]) == case["out_shape"][1]
