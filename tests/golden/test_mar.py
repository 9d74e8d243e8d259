"""MAR against recorded outputs of the published code."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from generators.annealing import StepAnnealing
from generators.guidance import ConstantGuidance
from generators.heads.diffusion import DiffusionSchedule, respaced_timesteps
from generators.mar import GENERATION_PRESETS, MAR
from tests.golden.util import (
    assert_manifest,
    golden_cases,
    golden_index,
    golden_manifests,
    load_json,
    load_tensors,
    select_cases,
)

TABLES = (
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
)  # fmt: skip
CASES = golden_cases("mar")
GENERATE = select_cases(CASES, lambda name, case: "args" in case)
SCHEDULES = select_cases(CASES, lambda name, case: "respacings" in case)
TRANSFORMER = select_cases(CASES, lambda name, case: name.startswith("transformer"))
HEAD = select_cases(CASES, lambda name, case: name.startswith("head"))


def load_model(system: str = "mar") -> MAR:
    """Load the tiny model of a system; its shapes do not tell the numbers of heads."""
    index = golden_index(system)
    config = index["config"]
    shapes = {
        f"{part}_shape": tuple(config[f"{part}_{key}"] for key in ("embed_dim", "depth", "num_heads"))
        for part in ("encoder", "decoder")
    }
    return MAR.from_original(load_tensors(system, index["weights"]), shapes | {"patch_size": config["patch_size"]})


def recorded_noise(golden: dict[str, Tensor], batch: int) -> list[Tensor]:
    """Return the noise of every step of a generation, that to start from first."""
    steps = sorted({key.split("/")[0] for key in golden if re.match(r"step\d+/", key)}, key=lambda s: int(s[4:]))
    noise = [torch.cat([golden[f"{s}/init_noise"][None], golden[f"{s}/step_noise"]]) for s in steps]
    return [n.unflatten(1, (batch, -1)) for n in noise]


def tolerance(expected: Tensor, timesteps: tuple[int, ...]) -> float:
    """Return the absolute tolerance: where pure noise is denoised, an untrained head blows up to thousands."""
    return 1e-5 * float(expected.abs().max()) if max(timesteps) >= 990 else 1e-4


@pytest.fixture(scope="module")
def model() -> MAR:
    return load_model()


def test_every_case_is_checked() -> None:
    checked = {case.id for case in (*GENERATE, *SCHEDULES, *TRANSFORMER, *HEAD)} | {"vae"}  # in test_mar_vae.py
    assert {case.id for case in CASES} <= checked


@pytest.mark.parametrize(("name", "case"), SCHEDULES)
def test_schedules(name: str, case: dict[str, Any]) -> None:
    golden = load_tensors("mar", case["file"])
    names = sorted({key.split("/")[0] for key in golden})
    assert len(names) == len(case["respacings"])
    for respacing in names:
        timesteps = tuple(golden[f"{respacing}/timestep_map"].tolist())
        found = re.fullmatch(r"respace_(ddim)?(\d+)", respacing)
        if found is None:
            assert timesteps == tuple(range(1000))
        else:
            assert respaced_timesteps(int(found[2]), "leading" if found[1] else "linspace") == timesteps
        schedule = DiffusionSchedule(timesteps)
        for table in TABLES:
            torch.testing.assert_close(getattr(schedule, table), golden[f"{respacing}/{table}"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "case"), TRANSFORMER)
def test_transformer(model: MAR, name: str, case: dict[str, Any]) -> None:
    golden = load_tensors("mar", case["file"])
    assert torch.equal(model.to_tokens(golden["imgs"]), golden["patchify_of_imgs"])
    assert torch.equal(model.to_latents(golden["patchify_of_imgs"]), golden["imgs"])
    tokens = golden["tokens"]
    conditions = {"cond": model.embed_condition(golden["labels"]), "uncond": model.unconditional(len(tokens))}
    masks = [key for key in golden if key.endswith("/mask")]
    assert masks
    for key in masks:
        case_name, masked = key.split("/")[0], golden[key].bool()
        known = (~masked).nonzero()[:, 1].view(len(tokens), -1)
        positions = masked.nonzero()[:, 1].view(len(tokens), -1)
        for kind, condition in conditions.items():
            held = tokens.take_along_dim(known[..., None], 1)
            encoded = model.encode(held, known, condition)
            torch.testing.assert_close(encoded, golden[f"{case_name}/{kind}/encoder"], atol=1e-4, rtol=0)
            z = model.decode(encoded, known, positions)
            expected = golden[f"{case_name}/{kind}/z"].take_along_dim(positions[..., None], 1)
            torch.testing.assert_close(z, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "case"), HEAD)
def test_head(model: MAR, name: str, case: dict[str, Any]) -> None:
    golden, head = load_tensors("mar", case["file"]), model.diffloss

    def close(ours: Tensor, theirs: str) -> None:
        torch.testing.assert_close(ours, golden[theirs], atol=1e-4, rtol=1e-5)

    z, uncond = golden["z"], golden["z_uncond"]
    close(head.net.time_embed(golden["t"]), "time_embed")
    close(head.net(golden["x"], golden["t"], z), "net_out")
    x, timesteps = torch.cat([golden["x"]] * 2), torch.cat([golden["t"]] * 2)
    noise, variance = head.net(x, timesteps, torch.cat([z, uncond])).chunk(2, -1)
    conditional, unconditional = noise.chunk(2)
    guided = unconditional + 3 * (conditional - unconditional)
    close(torch.cat([torch.cat([guided] * 2), variance], -1), "net_out_cfg3")

    train = {key: golden[f"train/{key}"] for key in ("target", "t", "noise")}
    terms = head.loss_terms(z, train["target"], train["t"], train["noise"])
    close(terms.mse, "train/mse")
    close(terms.vb, "train/vb")
    close(terms.loss, "train/loss")

    plan = head.plan(tuple(golden["timestep_map"].tolist()))
    for key in [key for key in golden if re.fullmatch(r"trajectory_temp[\d.]+/sample", key)]:
        temperature, name = float(re.findall(r"[\d.]+", key)[0]), key.split("/")[0]
        prepared, x = head.prepare(z, plan), golden["init_noise"]
        for step, index in enumerate(reversed(range(len(plan)))):
            mean, std = prepared.posterior(x, index)
            torch.testing.assert_close(mean, golden[f"{name}/mean"][step], atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(2 * std.log(), golden[f"{name}/log_variance"][step], atol=1e-4, rtol=1e-5)
            x = golden[key][step]
        noise = torch.cat([golden["init_noise"][None], golden["step_noise"]])
        torch.testing.assert_close(head.sample(z, noise, plan, temperature), golden[key][-1], atol=1e-4, rtol=1e-5)
    both = torch.cat([z, uncond])
    guided_keys = [key for key in golden if re.fullmatch(r"cfg[\d.]+/sample", key)]
    assert guided_keys
    for key in guided_keys:
        scale, rows = float(key.split("/")[0][3:]), len(z)
        noise = torch.cat([golden["init_noise"][None], golden[key.replace("sample", "step_noise")][:, :rows]])
        ours = head.sample(both, noise, plan, guidance_scale=scale)
        torch.testing.assert_close(ours, golden[key][-1, :rows], atol=1e-4, rtol=1e-5)
    noise = torch.cat([golden["init_noise"][None], torch.zeros(len(plan), *z.shape[:1], model.token_dim)])
    torch.testing.assert_close(
        head.sample(z, noise, plan, sampler="ddim"), golden["ddim_eta0/sample"][-1], atol=1e-4, rtol=1e-5
    )


@pytest.mark.parametrize(("name", "case"), GENERATE)
def test_generate(model: MAR, name: str, case: dict[str, Any]) -> None:
    golden, args = load_tensors("mar", case["file"]), case["args"]
    spacing = "leading" if case["num_sampling_steps"].startswith("ddim") else "linspace"
    steps = int(case["num_sampling_steps"].removeprefix("ddim"))
    linear = args["cfg_schedule"] == "linear"
    settings: dict[str, Any] = {
        "class_labels": args["labels"],
        "batch_size": None if args["labels"] else args["bsz"],
        "num_iter": args["num_iter"],
        "guidance_scale": args["cfg"] if linear else ConstantGuidance(args["cfg"]),
        "annealing": StepAnnealing(steps, steps, "constant", last_timestep=None, spacing=spacing),
        "temperature": args["temperature"],
        "orders": golden["orders"],
    }
    output = model.generate(**settings, noise=recorded_noise(golden, args["bsz"]))
    timesteps = tuple(case["timestep_map"])
    atol = tolerance(golden["latents"], timesteps)
    torch.testing.assert_close(output.latents, golden["latents"], atol=atol, rtol=0)
    assert output.trace.head_steps == case["steps_executed"]
    copies = 1 if args["cfg"] == 1 else 2
    assert output.trace.head_rows == [copies * count for count in case["tokens_per_step"]]
    scales = [float(golden[f"step{i:02d}/cfg"]) for i in range(len(output.trace.guidance))]
    assert output.trace.guidance == pytest.approx(scales)
    # The published code shuffles with numpy, then draws all noise from one generator.
    drawn = model.generate(**settings, generator=torch.Generator().manual_seed(case["rng_seed"]))
    torch.testing.assert_close(drawn.latents, output.latents, atol=atol, rtol=0)


@pytest.mark.parametrize("variant", golden_manifests("mar", "mar_"))
def test_manifest(variant: str) -> None:
    facts = load_json("mar", f"config_{variant}.json")
    preset = variant.removeprefix("mar_")[0].upper()
    with torch.device("meta"):
        model = MAR.preset(preset, facts["img_size"])
        loaded = MAR.from_original(dict(model.state_dict()))
    assert_manifest(model, load_json("mar", f"state_dict_{variant}.json"))
    assert sum(p.numel() for p in model.parameters()) == facts["num_parameters"]
    assert (loaded.config.encoder_shape, loaded.config.head_shape) == (
        model.config.encoder_shape, model.config.head_shape,
    )  # fmt: skip
    assert math.prod(model.latent_shape) == facts["seq_len"] * facts["token_dim"]
    published = facts["eval"]
    assert GENERATION_PRESETS[preset] == {
        "num_iter": published["num_iter"],
        "num_steps": int(published["num_sampling_steps"]),
        "guidance_scale": published["cfg"],
        "temperature": published["temperature"],
    }
