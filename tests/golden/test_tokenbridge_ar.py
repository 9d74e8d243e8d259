"""TokenBridge-AR against recorded outputs of the published code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from generators.base import Trace
from generators.guidance import ConstantGuidance, Guidance, LinearGuidance, combine
from generators.heads.flow import NoiseStream
from generators.mar import scatter_positions
from generators.tokenbridge_ar import GENERATION_PRESETS, TokenBridgeAR
from tests.golden.util import (
    golden_cases,
    golden_index,
    golden_manifests,
    load_json,
    load_tensors,
    select_cases,
)

SYSTEM = "tokenbridge_ar"
TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 0}
# Recorded draws nearer than this to the border between two indices are decided by rounding.
BORDER = 1e-5
GUIDANCE: dict[str, type[Guidance]] = {"linear": LinearGuidance, "constant": ConstantGuidance}


def kind(name: str, case: dict[str, Any]) -> str:
    """Return what a case checks, by what it holds; a case that nothing checks fails the collection."""
    args = case.get("args", {})
    if {"num_iter", "cfg", "temperature"} <= set(args):
        return "generate"
    if not args:
        return "forward"
    raise LookupError(f"Do not know how to check the golden case {name!r}.")


CASES = golden_cases(SYSTEM)
FORWARD = select_cases(CASES, lambda name, case: kind(name, case) == "forward")
GENERATE = select_cases(CASES, lambda name, case: kind(name, case) == "generate")


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Translate the recorded configuration into arguments of the model."""
    assert config["quant_min"] == -config["quant_max"]
    assert config["std_range"] == 3.0
    values: dict[str, Any] = {
        f"{part}_shape": (
            config[f"{part}_embed_dim"],
            config[f"{part}_depth"],
            config[f"{part}_{'heads' if part == 'channel' else 'num_heads'}"],
        )
        for part in ("encoder", "decoder", "channel")
    }
    values["head_shape"] = values.pop("channel_shape")
    return values | {
        "patch_size": config["patch_size"],
        "value_range": config["quant_max"],
        "channel_order": config["channel_order"],
    }


@pytest.fixture(scope="module")
def model() -> TokenBridgeAR:
    index = golden_index(SYSTEM)
    weights = load_tensors(SYSTEM, index.get("weights", "tiny_weights.safetensors"))
    return TokenBridgeAR.from_original(weights, settings(index["config"]))


@pytest.mark.parametrize(("name", "case"), CASES[:1])
def test_configuration(model: TokenBridgeAR, name: str, case: dict[str, Any]) -> None:
    published = golden_index(SYSTEM)["config"]
    ours = {
        "grid_size": published["img_size"] // published["vae_stride"],
        "latent_channels": published["vae_embed_dim"],
        "mlp_ratio": published["mlp_ratio"],
        "bits": math.log2(published["quant_levels"]),
        "num_classes": published["class_num"],
        "buffer_size": published["buffer_size"],
    }
    assert {key: model.config[key] for key in ours} == ours
    assert model.num_tokens == published["seq_len"]
    assert list(model.head.inverse_order) == published["inv_channel_order"]


@pytest.mark.parametrize(("name", "case"), FORWARD)
def test_forward(model: TokenBridgeAR, name: str, case: dict[str, Any]) -> None:
    golden = load_tensors(SYSTEM, case["file"])
    latents, mask = golden["latents"], golden["mask"].bool()
    ids = model.quantize_latents(latents)
    assert torch.equal(ids, golden["indices"])
    assert torch.equal(ids[..., list(model.head.channel_order)], golden["channel_targets_reordered"])
    assert torch.equal(model.to_tokens(model.dequantize_ids(ids)), golden["dequantized"])
    assert torch.equal(model.quantize.boundaries, golden["boundaries"])
    assert torch.equal(model.quantize.centroids, golden["reconstruction_values"])

    known = (~mask).nonzero()[:, 1].view(len(mask), -1)
    condition = model.embed_condition(golden["labels"])
    tokens = golden["dequantized"].gather(1, known[..., None].expand(-1, -1, model.token_dim))
    encoded = model.encode(tokens, known, condition)
    torch.testing.assert_close(encoded, golden["encoder"], **TOLERANCE)
    z = model.decode(encoded, known, torch.arange(model.num_tokens).expand(len(mask), -1))
    torch.testing.assert_close(z, golden["z"], **TOLERANCE)
    logits = model.head.logits(golden["z"][mask], ids[mask])[:, list(model.head.channel_order)]
    torch.testing.assert_close(logits, golden["channel_logits"], **TOLERANCE)
    for given in ({"latents": latents}, {"token_ids": ids}):
        output = model(**given, class_labels=golden["labels"], mask=mask)
        torch.testing.assert_close(output.loss, golden["loss"], **TOLERANCE)
        torch.testing.assert_close(output.hidden_states.flatten(0, 1), golden["z"][mask], **TOLERANCE)


def recorded(golden: dict[str, Tensor], name: str) -> list[Tensor]:
    """Return what was recorded of this name at every step."""
    return [golden[key] for key in sorted(golden) if key.startswith("step") and key.endswith(f"/{name}")]


def inside(model: TokenBridgeAR, z: Tensor, sampled: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Return recorded uniforms of a step with those moved that rounding alone could push to another index.

    Checks that all lie in the part of the distribution that belongs to the recorded index.
    """
    logits = model.head.logits(z, sampled[:, list(model.head.inverse_order)], as_sampled=True)
    probs = (logits[:, list(model.head.channel_order)].double() / temperature).softmax(-1)
    high = probs.cumsum(-1).gather(-1, sampled[..., None])[..., 0]
    low = high - probs.gather(-1, sampled[..., None])[..., 0]
    assert bool(((low - BORDER <= uniforms) & (uniforms <= high + BORDER)).all())
    margin = torch.minimum((high - low) / 2, torch.full_like(low, BORDER))
    moved = torch.minimum(torch.maximum(uniforms, low + margin), high - margin)
    assert int((moved != uniforms).sum()) <= 1 + uniforms.numel() // 100
    return moved


def arguments(model: TokenBridgeAR, golden: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Any]:
    batch, temperature = len(args["labels"]), args["temperature"]
    steps = (recorded(golden, name) for name in ("guided_feature", "tokens_generation_order", "uniforms"))
    uniforms = [
        inside(model, z, sampled, drawn, temperature).view(batch, -1, model.token_dim)
        for z, sampled, drawn in zip(*steps, strict=temperature > 0)
    ]
    assert bool(uniforms) == (temperature > 0)
    return {
        "class_labels": args["labels"],
        "num_iter": args["num_iter"],
        "guidance_scale": GUIDANCE[args["cfg_schedule"]](args["cfg"]),
        "temperature": temperature,
        "orders": golden["orders"],
        "uniforms": uniforms or None,
    }


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("name", "case"), GENERATE)
def test_generate(model: TokenBridgeAR, name: str, case: dict[str, Any], use_cache: bool) -> None:
    golden, args = load_tensors(SYSTEM, case["file"]), case["args"]
    previous = torch.full((len(args["labels"]), model.num_tokens, model.token_dim), -1)
    tokens = []
    for _, ids in model.iter_generate(**arguments(model, golden, args), use_cache=use_cache):
        new = (previous < 0).all(-1) & (ids >= 0).all(-1)
        tokens.append(ids[new][:, list(model.head.channel_order)])
        previous = ids
    expected = recorded(golden, "tokens_generation_order")
    assert len(tokens) == len(expected)
    for ours, theirs in zip(tokens, expected, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(model.dequantize_ids(previous), golden["latents"], **TOLERANCE)


@pytest.mark.parametrize(("name", "case"), GENERATE)
def test_features(model: TokenBridgeAR, name: str, case: dict[str, Any]) -> None:
    """The guided features of every step, and the probabilities of its channels where they were recorded."""
    golden, args = load_tensors(SYSTEM, case["file"]), case["args"]
    batch, order = len(args["labels"]), list(model.head.channel_order)
    walk = model.plan_generation(
        model.embed_condition(args["labels"]),
        args["num_iter"],
        GUIDANCE[args["cfg_schedule"]](args["cfg"]),
        NoiseStream(None, batch),
        None,
        None,
        golden["orders"],
    )
    tokens = walk.tokens
    for i, step in enumerate(walk.steps):
        z = model.features(walk, i, tokens, Trace())
        if len(z) > batch:
            z = combine(z[:batch], z[batch:], walk.scales[i])
        feature = golden[f"step{step.step:02d}/guided_feature"]
        torch.testing.assert_close(z.flatten(0, 1), feature, **TOLERANCE)
        sampled = golden[f"step{step.step:02d}/tokens_generation_order"][:, list(model.head.inverse_order)]
        probs = golden.get(f"step{step.step:02d}/probs")
        if probs is not None:
            logits = model.head.logits(feature, sampled, as_sampled=True)[:, order]
            torch.testing.assert_close((logits / args["temperature"]).softmax(-1), probs, **TOLERANCE)
        levels = model.quantize.dequantize(sampled).view(batch, -1, model.token_dim)
        tokens = scatter_positions(tokens, step.positions, levels)


@pytest.mark.parametrize("variant", golden_manifests(SYSTEM, "tokenbridge_"))
def test_manifest(variant: str) -> None:
    facts, manifest = load_json(SYSTEM, f"config_{variant}.json"), load_json(SYSTEM, f"state_dict_{variant}.json")
    name = variant.removeprefix("tokenbridge_")[0].upper()
    with torch.device("meta"):
        published = {k: torch.empty(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in manifest.items()}
        model = TokenBridgeAR.from_original({"model_ema": published})
        preset = TokenBridgeAR.preset(name)
    assert {k: v for k, v in model.config.items() if k[0] != "_"} == {
        k: v for k, v in preset.config.items() if k[0] != "_"
    }
    # Three tables follow from the configuration and are not kept as weights.
    tables = {"channel_mask", "boundaries", "reconstruction_values"}
    assert len(model.state_dict()) == len(manifest) - len(tables)
    assert tables <= set(manifest)
    assert sum(p.numel() for p in preset.parameters()) == facts["num_parameters"]
    assert {str(v.dtype).removeprefix("torch.") for v in model.state_dict().values()} == {
        d for _, d in manifest.values()
    }

    widths = (facts["embed_dim"], facts["encoder_depth"], facts["num_heads"])
    assert preset.config.encoder_shape == widths
    assert preset.config.decoder_shape == (widths[0], facts["decoder_depth"], widths[2])
    assert preset.config.head_shape == (facts["channel_embed_dim"], facts["channel_depth"], facts["channel_heads"])
    assert (preset.config.bits, preset.quantize.codebook_size) == (facts["quant_bits"], facts["quant_levels"])
    assert preset.config.value_range == facts["quant_max"] == -facts["quant_min"]
    assert list(preset.head.channel_order) == facts["channel_order"]
    assert (preset.config.buffer_size, preset.num_tokens) == (facts["buffer_size"], facts["seq_len"])
    assert facts["eval"]["cfg_schedule"] == "linear"
    names = {"num_iter": "num_iter", "guidance_scale": "cfg", "temperature": "temperature"}
    evaluated = {ours: facts["eval"][theirs] for ours, theirs in names.items()}
    assert GENERATION_PRESETS[name] == {key: value for key, value in evaluated.items() if value is not None}
