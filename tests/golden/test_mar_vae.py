"""MAR's KL autoencoder against recorded outputs of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.golden.test_tokenbridge import assert_loads, vae_settings
from tests.golden.util import golden_cases, golden_manifests, load_json, load_tensors, select_cases
from tokenizers_img.vae import KLVAE

CASES = select_cases(golden_cases("mar"), lambda name, case: "ch_mult" in case.get("config", {}))
# Any will do: the recorded outputs are scaled and unscaled, or neither.
SCALE = 0.2325


@pytest.mark.parametrize(("name", "case"), CASES)
def test_case(name: str, case: dict[str, Any]) -> None:
    golden, tolerance = load_tensors("mar", case["file"]), {"atol": 1e-4, "rtol": 0}
    weights = load_tensors("mar", case["weights"])
    vae = KLVAE.from_original(weights, vae_settings(case["config"], scaling_factor=SCALE))
    mean, logvar = vae.posterior(golden["image"] * 0.5 + 0.5)  # recorded in [-1, 1]
    torch.testing.assert_close(torch.cat([mean, logvar], 1), golden["moments"], **tolerance)
    torch.testing.assert_close(mean, golden["mean"], **tolerance)
    std = (0.5 * logvar).exp()
    torch.testing.assert_close(std, golden["std"], **tolerance)
    torch.testing.assert_close(mean + std * golden["eps"], golden["sample"], **tolerance)
    decoded = vae.decode_latents(golden["sample"] * SCALE) * 2 - 1
    for key in ("decoded", "decoded_from_scaled"):
        torch.testing.assert_close(decoded, golden[key], **tolerance)
    assert set(golden) == {"image", "moments", "mean", "std", "eps", "sample", "decoded", "decoded_from_scaled"}


@pytest.mark.parametrize("variant", golden_manifests("mar", "vae_"))
def test_manifest(variant: str) -> None:
    config = load_json("mar", f"config_{variant}.json")
    with torch.device("meta"):
        vae = assert_loads(load_json("mar", f"state_dict_{variant}.json"))
    expected = vae_settings(config, scaling_factor=config["latent_scale"], norm_num_groups=config["groupnorm_groups"])
    assert {k: v if isinstance(v, int | float) else list(v) for k, v in vae.config.items() if k[0] != "_"} == expected
    assert sum(p.numel() for p in vae.parameters()) == config["num_parameters"]
