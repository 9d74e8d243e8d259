"""TiTok and One-D-Piece against recorded outputs of the published code, stage by stage."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmsdk.loading import resolve
from mmsdk.tokens import ImageTokens
from tests.golden.util import assert_manifest, golden_cases, golden_index, golden_manifests, load_json, load_tensors
from tokenizers_img.titok import TiTok

SYSTEMS = ("titok", "one_d_piece")
# Through the pixel decoder float32 itself is off by up to 1e-4, so the recordings ask for no more than this there.
PIXEL_DECODER_ATOL = 1e-3
CASES = [
    pytest.param(system, *case.values, marks=case.marks, id=f"{system}-{case.id}")
    for system in SYSTEMS
    for case in golden_cases(system)
]
MANIFESTS = [
    pytest.param(system, *variant.values, marks=variant.marks, id=f"{system}-{variant.id}")
    for system in SYSTEMS
    for variant in golden_manifests(system, "")
]


def published_config(system: str, case: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a case, with the sizes that only golden.json knows put in place of their names."""
    index = golden_index(system)
    sizes = {k: v for k, v in index["model_sizes"].items() if isinstance(v, dict)}
    model = dict(case["config"]["model"]["vq_model"])
    for key in ("vit_enc_model_size", "vit_dec_model_size"):
        if model[key] in sizes:
            size = sizes[model[key]]
            model[key] = (size["width"], size["num_layers"], size["num_heads"])
    shape = index["pixel_decoder"]
    pixel_decoder = {
        "channels": shape["hidden_channels"],
        "channel_mult": shape["channel_mult"],
        "num_res_blocks": shape["num_res_blocks"],
        "z_channels": shape["z_channels"],
    }
    config = case["config"]
    return {**config, "model": {**config["model"], "vq_model": model}, "pixel_decoder": pixel_decoder}


def tolerance_of(index: dict[str, Any]) -> float:
    return index.get("tolerance", {}).get("float32_atol", 1e-4)


class Recorder:
    """Collects what modules see and return."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def output(self, module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _, __, out: self.values.__setitem__(name, out))

    def input(self, module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _, args: self.values.__setitem__(name, args[0]))


def record(model: TiTok) -> Recorder:
    recorder = Recorder()
    for part in ("encoder", "decoder"):
        network = getattr(model, part)
        recorder.input(network.ln_pre, f"{part}.embeddings")
        for i, block in enumerate(network.transformer):
            recorder.output(block, f"{part}.block{i}")
    recorder.output(model.encoder.ln_post, "encoder.ln_post")
    if hasattr(model, "pixel_decoder"):
        recorder.input(model.pixel_decoder, "pixel.states")
    return recorder


def columns(latents: Tensor) -> Tensor:
    """Arrange vectors `(batch, tokens, dim)` as the published code keeps them, `(batch, dim, 1, tokens)`."""
    return latents.transpose(1, 2).unsqueeze(2)


@pytest.mark.parametrize(("system", "name", "case"), CASES)
def test_case(system: str, name: str, case: dict[str, Any]) -> None:
    golden, index = load_tensors(system, case["file"]), golden_index(system)
    model = resolve(system).from_original(load_tensors(system, case["weights"]), published_config(system, case))
    tolerance = tolerance_of(index)
    image_tolerance = max(tolerance, PIXEL_DECODER_ATOL) if hasattr(model, "pixel_decoder") else tolerance
    unchecked = set(golden) - {"images", "quantize.soft_in"}

    def check(key: str, value: Tensor, atol: float = tolerance) -> None:
        # What a case did not record is not compared; at the end everything that it did record must have been.
        if key in golden:
            torch.testing.assert_close(value, golden[key], atol=atol, rtol=0)
            unchecked.discard(key)

    recorder = record(model)
    latents = model.encode_latents(golden["images"])
    check("encoder.z", columns(latents))
    if model.config.quantize_mode == "vae":
        mean, logvar = model.posterior(latents)
        check("posterior.mean", columns(mean))
        check("posterior.logvar", columns(logvar))
        vectors = mean
        if "posterior.sample" in golden:
            seed = int(re.search(r"manual_seed\((\d+)\)", case["tensors"]["posterior.sample"]["description"])[1])
            sampled = model.encode(golden["images"], generator=torch.Generator().manual_seed(seed)).latents
            check("posterior.sample", columns(sampled))
            recorded = golden["posterior.sample"].squeeze(2).transpose(1, 2)
            check("decode.sample", model.decode_latents(recorded), atol=image_tolerance)
    else:
        output = model.quantize(latents)
        assert torch.equal(output.token_ids, golden["tokens"].squeeze(1))
        unchecked.discard("tokens")
        assert torch.equal(model.quantize.quantize(latents), output.token_ids)
        check("z_quantized", columns(output.latents))
        vectors = model.quantize.dequantize(golden["tokens"].squeeze(1))
        check("quantize.entry", vectors.flatten(0, 1))
        if "quantize.soft_in" in golden:
            check("quantize.soft_entry", model.quantize.expectation(golden["quantize.soft_in"]))
        check("loss.quantizer_loss", output.loss.reshape(1))
        model.quantize.commitment_cost = 0.0
        codebook = model.quantize(latents).loss
        check("loss.codebook_loss", codebook.reshape(1))
        check("loss.commitment_loss", (output.loss - codebook).reshape(1))

    def decode(count: int | None) -> Tensor:
        if model.config.is_legacy and model.config.pixel_decoder_config is None:
            return model.decode_features(vectors[:, :count])
        return model.decode_latents(vectors[:, :count])

    for key in [k for k in golden if re.fullmatch(r"decode\.k\d+", k)]:
        check(key, decode(int(key.removeprefix("decode.k"))), atol=image_tolerance)
    check("decode.full", decode(None), atol=image_tolerance)
    check("decoder.out", model.decode_features(vectors))
    for key, value in recorder.values.items():
        check(key, value)
    assert not unchecked, f"recorded but not checked: {sorted(unchecked)}"


@pytest.mark.parametrize(("system", "name", "case"), CASES)
def test_public_round_trip(system: str, name: str, case: dict[str, Any]) -> None:
    """`encode` and `decode` give the recorded tokens and images (clamped)."""
    golden, tolerance = load_tensors(system, case["file"]), tolerance_of(golden_index(system))
    model = resolve(system).from_original(load_tensors(system, case["weights"]), published_config(system, case))
    tokens = model.encode(golden["images"])
    if tokens.token_ids is not None:
        assert torch.equal(tokens.token_ids, golden["tokens"].squeeze(1))
    else:
        torch.testing.assert_close(columns(tokens.latents), golden["posterior.mean"], atol=tolerance, rtol=0)
    if model.config.is_legacy and model.config.pixel_decoder_config is None:
        with pytest.raises(ValueError, match="stage-1"):
            model.decode(tokens)
        return
    images = model.decode(ImageTokens.from_bytes(tokens.to_bytes())).images
    atol = max(tolerance, PIXEL_DECODER_ATOL) if hasattr(model, "pixel_decoder") else tolerance
    torch.testing.assert_close(images, golden["decode.full"].clamp(0, 1), atol=atol, rtol=0)
    if not model.ordered:
        return
    for key in [k for k in golden if re.fullmatch(r"decode\.k\d+", k)]:
        prefix = model.encode(golden["images"], num_tokens=int(key.removeprefix("decode.k")))
        torch.testing.assert_close(model.decode(prefix).images, golden[key].clamp(0, 1), atol=atol, rtol=0)


@pytest.mark.parametrize(("system", "variant"), MANIFESTS)
def test_manifest(system: str, variant: str) -> None:
    manifest = load_json(system, f"state_dict_{variant}.json")
    config = {**load_json(system, f"config_{variant}.json"), "text_aware": variant.startswith("ta_")}
    with torch.device("meta"):
        preset = resolve(system).preset(variant)
        configured = resolve(system)(**resolve(system).config_from_original(config))
    assert_manifest(preset, manifest)
    assert_manifest(configured, manifest)
    assert {k: v for k, v in preset.config.items() if k[0] != "_"} == {
        k: v for k, v in configured.config.items() if k[0] != "_"
    }
