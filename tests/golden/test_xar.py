"""xAR against recorded outputs of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from generators.annealing import StepAnnealing
from generators.base import Trace
from generators.guidance import ConstantGuidance
from generators.xar import GENERATION_PRESETS, XAR
from tests.golden.util import (
    assert_manifest,
    golden_cases,
    golden_index,
    golden_manifests,
    load_json,
    load_tensors,
    select_cases,
)


def kind(name: str, case: dict[str, Any]) -> str:
    """Return what a case checks, by what it holds; a case that nothing checks fails the collection."""
    args = case.get("args", {})
    if "cfg" in args:
        return "generate"
    if "scale_index" in args:
        return "euler"
    if not args:
        return "forward"
    raise LookupError(f"Do not know how to check the golden case {name!r}.")


CASES = golden_cases("xar")
FORWARD = select_cases(CASES, lambda name, case: kind(name, case) == "forward")
GENERATE = select_cases(CASES, lambda name, case: kind(name, case) == "generate")
EULER = select_cases(CASES, lambda name, case: kind(name, case) == "euler")


@pytest.fixture(scope="module")
def model() -> XAR:
    return XAR.from_original(load_tensors("xar", golden_index("xar").get("weights", "tiny_weights.safetensors")))


@pytest.mark.parametrize(("name", "case"), CASES[:1])
def test_configuration(model: XAR, name: str, case: dict[str, Any]) -> None:
    published = golden_index("xar")["config"]
    ours = {"hidden_size": "encoder_embed_dim", "encoder_layers": "encoder_depth", "decoder_layers": "decoder_depth"}
    ours |= {"num_heads": "encoder_num_heads", "intermediate_size": "swiglu_hidden", "latent_channels": "token_dim"}
    ours |= {"num_classes": "null_class"}
    assert {name: model.config[name] for name in ours} == {name: published[key] for name, key in ours.items()}
    assert (model.num_cells, model.num_cells * model.cell_tokens) == (published["clusters"], published["seq_len"])


@pytest.mark.parametrize(("name", "case"), FORWARD)
def test_forward(model: XAR, name: str, case: dict[str, Any]) -> None:
    golden = load_tensors("xar", case["file"])
    rotary = torch.view_as_real(model._rotary.on(torch.device("cpu"))).unbind(-1)
    for ours, theirs in zip(rotary, (golden["rope_cos"], golden["rope_sin"]), strict=True):
        torch.testing.assert_close(ours.repeat_interleave(2, -1), theirs, atol=1e-5, rtol=0)
    cells = golden["cells"].transpose(0, 1)
    assert torch.equal(model.to_cells(golden["latents"]), cells)
    assert torch.equal(model.from_cells(cells), golden["unclusterify_check"])
    output = model(
        golden["latents"],
        golden["labels"],
        times=golden["times"].view(model.num_cells, -1).T,
        noise=model.from_cells(golden["noise"].transpose(0, 1)),
    )
    velocity = model.to_cells(output.velocity).flatten(1, 2)
    torch.testing.assert_close(velocity, golden["velocity"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss, golden["loss"], atol=1e-4, rtol=0)


def recorded_noise(golden: dict[str, Tensor], num_cells: int) -> list[Tensor]:
    """Return the noise of every cell, that of its start first."""
    cells = [(golden[f"cell{i}/init_noise"], golden[f"cell{i}/em_noise"]) for i in range(num_cells)]
    return [torch.cat([start[None].double(), steps]) for start, steps in cells]


@pytest.mark.parametrize(("name", "case"), GENERATE)
def test_generate(model: XAR, name: str, case: dict[str, Any]) -> None:
    golden, args = load_tensors("xar", case["file"]), case["args"]
    settings: dict[str, Any] = {"class_labels": args["label"], "guidance_scale": args["cfg"]}
    settings["num_steps"] = args["num_steps"]
    noise = recorded_noise(golden, model.num_cells)
    output = model.generate(**settings, noise=noise)
    torch.testing.assert_close(output.latents, golden["latents"], atol=1e-4, rtol=0)
    # All steps, and each cell but the last once more, for the cache; the published loop doubles all of them.
    assert output.trace.forwards == case["network_calls"] + model.num_cells - 1
    assert output.trace.tokens < 2 * output.trace.forwards * model.cell_tokens * len(args["label"])
    drawn = model.generate(**settings, generator=torch.Generator().manual_seed(case["rng_seed"]))
    assert torch.equal(drawn.latents, output.latents)


@pytest.mark.parametrize(("name", "case"), GENERATE)
def test_velocities(model: XAR, name: str, case: dict[str, Any]) -> None:
    """The first velocities, both halves of the published batch, with finished cells at time 0 and no cache."""
    golden, args = load_tensors("xar", case["file"]), case["args"]
    labels = torch.tensor(args["label"])
    rows = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
    finished = model.to_cells(golden["latents"])
    for cell in range(model.num_cells):
        cells = torch.cat([finished[:, :cell], golden[f"cell{cell}/init_noise"][:, None]], 1).repeat(2, 1, 1, 1)
        times = torch.zeros(len(rows), cell + 1)
        times[:, -1] = 1
        velocity = model.velocity(cells, times, rows)[:, -1]
        torch.testing.assert_close(velocity, golden[f"cell{cell}/first_velocity"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "case"), EULER)
def test_euler(model: XAR, name: str, case: dict[str, Any]) -> None:
    golden, args = load_tensors("xar", case["file"]), case["args"]
    assert args["scale_index"] == 0
    cells = model.iter_generate(
        golden["labels"],
        guidance_scale=ConstantGuidance(args["cfg_scale"]),
        num_steps=args["num_steps"],
        sampler="euler",
        noise=[golden["init_noise"][None]] * model.num_cells,
        trace=Trace(),
    )
    _, latents = next(cells)
    sample = model.to_cells(latents)[:, 0]
    torch.testing.assert_close(sample, golden["sample"].float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "case"), CASES[:1])
def test_annealed_steps(model: XAR, name: str, case: dict[str, Any]) -> None:
    recorded = {k: v for k, v in golden_index("disa")["flow_step_counts"].items() if k.startswith("xar_")}
    assert recorded
    for key, counts in recorded.items():
        upper, lower = map(int, key.split("_")[1:])
        assert [StepAnnealing(upper, lower).steps(i, model.num_cells) for i in range(len(counts))] == counts


@pytest.mark.parametrize("variant", golden_manifests("xar", "xar_"))
def test_manifest(variant: str) -> None:
    facts = load_json("xar", f"config_{variant}.json")
    preset = variant.removeprefix("xar_")[0].upper()
    with torch.device("meta"):
        model = XAR.preset(preset)
    # Tables that follow from the configuration are not kept as weights.
    manifest = load_json("xar", f"state_dict_{variant}.json")
    tables = {key for key in manifest if key == "mask" or ".rope." in key}
    assert_manifest(model, {key: value for key, value in manifest.items() if key not in tables})
    assert sum(p.numel() for p in model.parameters()) == facts["num_parameters"]
    frequencies = manifest["encoder_blocks.0.attn.rope.freqs"][0][0]
    assert (model.config.hidden_size // model.config.num_heads, facts["num_heads"]) == (
        4 * frequencies,
        model.config.num_heads,
    )
    assert (model.num_cells, model.cell_tokens) == (facts["clusters"], facts["cell_tokens"])
    published = {"num_steps": facts["eval"]["num_steps"], "guidance_scale": facts["eval"]["cfg"]}
    assert GENERATION_PRESETS[preset] == published
