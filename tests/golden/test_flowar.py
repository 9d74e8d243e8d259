"""FlowAR against recorded outputs of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from generators.annealing import StepAnnealing
from generators.flowar import GENERATION_PRESETS, FlowAR
from generators.heads.flow import HEAD_DIM
from tests.golden.util import (
    assert_manifest,
    golden_cases,
    golden_index,
    golden_manifests,
    load_json,
    load_tensors,
)

CASES = golden_cases("flowar")


@pytest.fixture(scope="module")
def model() -> FlowAR:
    return FlowAR.from_original(
        load_tensors("flowar", golden_index("flowar").get("weights", "tiny_weights.safetensors"))
    )


@pytest.mark.parametrize(("name", "case"), CASES[:1])
def test_configuration(model: FlowAR, name: str, case: dict[str, Any]) -> None:
    published = golden_index("flowar")["config"]
    ours = {"hidden_size": "encoder_embed_dim", "encoder_layers": "encoder_depth", "decoder_layers": "decoder_depth"}
    ours |= {"num_heads": "encoder_num_heads", "head_width": "diffloss_w", "head_depth": "diffloss_d"}
    ours |= {"cross_attention": "cross", "latent_channels": "vae_embed_dim", "scales": "scales"}
    assert {name: model.config[name] for name in ours} == {name: published[key] for name, key in ours.items()}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_generate(model: FlowAR, name: str, case: dict[str, Any]) -> None:
    golden, args = load_tensors("flowar", case["file"]), case["args"]
    batch, num_scales = len(args["labels"]), len(model.scales)
    annealing = StepAnnealing(args["flow_upper_steps"], args["flow_lower_steps"])
    assert [annealing.steps(i, num_scales) for i in range(num_scales)] == case["steps_per_scale"]
    settings: dict[str, Any] = {
        "class_labels": args["labels"],
        "guidance_scale": args["cfg"],
        "guidance_high": args["guidance"],
        "annealing": annealing,
    }
    noise = [golden[f"scale{i}/init_noise"][:batch] for i in range(num_scales)]
    scales: list[Tensor] = []
    output = model.generate(**settings, noise=noise, callback=lambda _, latents: scales.append(latents))
    torch.testing.assert_close(output.latents, golden["latents"], atol=1e-4, rtol=0)
    drawn = model.generate(**settings, generator=torch.Generator().manual_seed(case["rng_seed"]))
    assert torch.equal(drawn.latents, output.latents)
    # An odd number of steps makes one step less.
    assert output.trace.forwards == num_scales + sum(count // 2 * 2 for count in case["steps_per_scale"])

    # The published z, from the whole prefix at once.
    labels = torch.tensor(args["labels"])
    if len(golden["scale0/z"]) > batch:
        labels = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
    z = model.conditions([x.repeat(len(labels) // batch, 1, 1, 1) for x in scales[:-1]], labels)
    recorded = torch.cat([golden[f"scale{i}/z"] for i in range(num_scales)], 1)
    torch.testing.assert_close(z, recorded, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "case"), CASES[:1])
def test_annealed_steps(model: FlowAR, name: str, case: dict[str, Any]) -> None:
    recorded = {k: v for k, v in golden_index("disa")["flow_step_counts"].items() if k.startswith("flowar_")}
    assert recorded
    for key, counts in recorded.items():
        upper, lower = map(int, key.split("_")[1:])
        assert [StepAnnealing(upper, lower).steps(i, len(model.scales)) for i in range(len(counts))] == counts


@pytest.mark.parametrize("variant", golden_manifests("flowar", "flowar_"))
def test_manifest(variant: str) -> None:
    facts = load_json("flowar", f"config_{variant}.json")
    preset = variant.removeprefix("flowar_")[0].upper()
    with torch.device("meta"):
        model = FlowAR.preset(preset)
    # Tables that follow from the configuration are not kept as weights.
    manifest = load_json("flowar", f"state_dict_{variant}.json")
    tables = {key for key in manifest if key == "mask" or ".rope." in key}
    assert_manifest(model, {key: value for key, value in manifest.items() if key not in tables})
    assert sum(p.numel() for p in model.parameters()) == facts["num_parameters"]
    config = model.config
    assert manifest["encoder_blocks.0.attn.rope.freqs"][0][0] == config.hidden_size // config.num_heads // 4
    assert (config.num_heads, config.head_width // HEAD_DIM) == (facts["num_heads"], facts["flow_head_heads"])
    assert list(model.scales) == facts["scales"]
    published = {"num_steps": facts["eval"]["num_steps"], "guidance_scale": facts["eval"]["cfg"]}
    assert GENERATION_PRESETS[preset] == published | {"guidance_high": facts["eval"]["guidance_high"]}
