"""LlamaGen's grid tokenizer against recorded outputs of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.golden.util import (
    assert_manifest,
    golden_cases,
    golden_manifests,
    load_json,
    load_tensors,
    select_cases,
)
from tokenizers_img.vq import VQ

CASES = select_cases(golden_cases("llamagen"), lambda name, case: "z_channels" in case.get("config", {}))


def load_model(case: dict[str, Any], image_size: int) -> VQ:
    config = case["config"]
    return VQ.from_original(
        load_tensors("llamagen", case["weights"]),
        {
            "channels": config["ch"],
            "channel_mult": config["ch_mult"],
            "num_res_blocks": config["num_res_blocks"],
            "z_channels": config["z_channels"],
            "codebook_size": config["codebook_size"],
            "codebook_dim": config["codebook_embed_dim"],
            "l2_norm": config["l2"],
            "image_size": image_size,
        },
    )


@pytest.mark.parametrize(("name", "case"), CASES)
def test_case(name: str, case: dict[str, Any]) -> None:
    golden = load_tensors("llamagen", case["file"])
    model = load_model(case, golden["image"].shape[-1])
    images = golden["image"] * 0.5 + 0.5  # recorded in [-1, 1]
    latents = model.encode_latents(images)
    torch.testing.assert_close(latents.permute(0, 3, 1, 2), golden["pre_quant"], atol=1e-4, rtol=0)
    output = model.quantize(latents)
    assert torch.equal(output.token_ids.flatten(), golden["indices"])
    torch.testing.assert_close(output.latents.permute(0, 3, 1, 2), golden["quant"], atol=1e-4, rtol=0)
    decoded = model.decode_latents(output.latents) * 2 - 1
    torch.testing.assert_close(decoded, golden["decoded"], atol=1e-4, rtol=0)
    rows = model.quantize.dequantize(golden["indices"]).view(latents.shape)
    again = model.decode_latents(rows) * 2 - 1
    torch.testing.assert_close(again, golden["decoded_from_indices"], atol=1e-4, rtol=0)
    assert set(golden) == {"image", "indices", "decoded", "decoded_from_indices", "pre_quant", "quant"}
    if bool(((images >= 0) & (images <= 1)).all()):  # `encode` takes nothing else
        tokens = model.encode(images)
        assert torch.equal(tokens.token_ids.flatten(), golden["indices"])
        public = model.decode(tokens).images
        expected = (golden["decoded_from_indices"] * 0.5 + 0.5).clamp(0, 1)
        torch.testing.assert_close(public, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", golden_manifests("llamagen", "vq"))
def test_manifest(variant: str) -> None:
    manifest = load_json("llamagen", f"state_dict_{variant}.json")
    config = load_json("llamagen", f"config_{variant}.json")
    with torch.device("meta"):
        model = VQ.preset(variant)
        published = {k: torch.empty(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in manifest.items()}
        loaded = VQ.from_original(published, variant)
    # A buffer of usage statistics, which the loader leaves out.
    for built in (model, loaded):
        assert_manifest(built, {k: v for k, v in manifest.items() if k != "quantize.codebook_used"})
    assert list(model.config.channel_mult) == config["ch_mult"]
    assert model.config.codebook_size == config["codebook_size"]
    assert sum(p.numel() for p in model.parameters()) == config["num_parameters"]
