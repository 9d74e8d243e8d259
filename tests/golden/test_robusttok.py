"""Latent perturbation against recorded outputs of the published code, with its recorded draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.golden.util import GOLDEN, golden_cases, golden_path, load_tensors
from tokenizers_img.perturbation import LatentPerturbation
from tokenizers_img.quantizers import VectorQuantizer


def recorded(name: str) -> dict[str, torch.Tensor]:
    """All tensors of one case, whichever file holds them."""
    found = {}
    for path in sorted(golden_path("robusttok").glob("*.safetensors")):
        for key, value in load_tensors("robusttok", path.name).items():
            if key.startswith(f"{name}/"):
                found[key.removeprefix(f"{name}/")] = value
    return found


@pytest.mark.parametrize(("name", "case"), golden_cases("robusttok"))
def test_case(name: str, case: dict[str, Any]) -> None:
    golden = recorded(name)
    assert set(golden) == {"codebook", "z", "z_q", "uniform", "random_rank", "result"}, GOLDEN
    quantizer = VectorQuantizer(*golden["codebook"].shape, l2_norm=case["codebook_norm"])
    with torch.no_grad():
        quantizer.embedding.weight.copy_(golden["codebook"])
    latents = golden["z"].permute(0, 2, 3, 1)
    token_ids = quantizer.quantize(latents)
    perturbation = LatentPerturbation(case["alpha"], case["beta"], case["delta"])
    draws = (golden[key].view(token_ids.shape) for key in ("uniform", "random_rank"))
    replaced = quantizer.dequantize(perturbation.perturb(quantizer, latents, token_ids, *draws)).permute(0, 3, 1, 2)
    # The recorded vectors of images that are left alone are independent of the codebook.
    count = int(len(latents) * case["beta"])
    torch.testing.assert_close(replaced[:count], golden["result"][:count], atol=1e-6, rtol=0)
    assert torch.equal(golden["result"][count:], golden["z_q"][count:])
    untouched = quantizer.dequantize(token_ids).permute(0, 3, 1, 2)
    assert torch.equal(replaced[count:], untouched[count:])
