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


def kind(name: str, case: dict[str, Any]) -> str:
    """Return what a case checks; a case that nothing checks fails the collection."""
    for key, checks in (("args", "generate"), ("respacings", "schedules"), ("ch_mult", "vae")):  # vae: test_mar_vae.py
        if key in case or key in case.get("config", {}):
            return checks
    for checks in ("transformer", "head"):
        if name.startswith(checks):
            return checks
    raise LookupError(f"Do not know how to check the golden case {name!r}.")


CASES = golden_cases("mar")
GENERATE = select_cases(CASES, lambda name, case: kind(name, case) == "generate")
SCHEDULES = select_cases(CASES, lambda name, case: kind(name, case) == "schedules")
TRANSFORMER = select_cases(CASES, lambda name, case: kind(name, case) == "transformer")
HEAD = select_cases(CASES, lambda name, case: kind(name, case) == "head")


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


def generation_settings(golden: dict[str, Tensor], args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a recorded generation shares with any other."""
    linear = {"linear": True, "constant": False}[args["cfg_schedule"]]
    return {
        "class_labels": args["labels"],
        "batch_size": args["bsz"] if args["labels"] is None else None,
        "num_iter": args["num_iter"],
        "guidance_scale": args["cfg"] if linear else ConstantGuidance(args["cfg"]),
        "temperature": args["temperature"],
        "orders": golden["orders"],
    }


def check_generation(
    model: MAR, golden: dict[str, Tensor], case: dict[str, Any], settings: dict[str, Any], timesteps: tuple[int, ...]
) -> None:
    """Check latents, those after every step, and what was executed; then the same with the published draws."""
    seen: list[Tensor] = []
    output = model.generate(
        **settings,
        noise=recorded_noise(golden, case["args"]["bsz"]),
        callback=lambda step, latents: seen.append(model.to_tokens(latents)),
    )
    atol = tolerance(golden["latents"], timesteps)
    torch.testing.assert_close(output.latents, golden["latents"], atol=atol, rtol=0)
    for i, tokens in enumerate(seen[:-1], 1):
        torch.testing.assert_close(tokens, golden[f"step{i:02d}/tokens_before"], atol=atol, rtol=0)
        assert torch.equal((tokens == 0).all(-1), golden[f"step{i:02d}/mask_before"].bool())
    trace, copies = output.trace, 1 if case["args"]["cfg"] == 1 else 2
    assert trace.head_steps == case["steps_executed"]
    assert trace.head_rows == [copies * count for count in case["tokens_per_step"]]
    assert trace.guidance == pytest.approx([float(golden[f"step{i:02d}/cfg"]) for i in range(len(seen))])
    # The published code shuffles with numpy, then draws all noise from one generator.
    drawn = model.generate(**settings, generator=torch.Generator().manual_seed(case["rng_seed"]))
    torch.testing.assert_close(drawn.latents, golden["latents"], atol=atol, rtol=0)


def tolerance(expected: Tensor, timesteps: tuple[int, ...]) -> float:
    """Return the absolute tolerance: where pure noise is denoised, an untrained head blows up to thousands."""
    return 1e-5 * float(expected.abs().max()) if max(timesteps) >= 990 else 1e-4


@pytest.fixture(scope="module")
def model() -> MAR:
    return load_model()


@pytest.mark.parametrize(("name", "case"), SCHEDULES)
def test_schedules(name: str, case: dict[str, Any]) -> None:
    golden = load_tensors("mar", case["file"])
    names = sorted({key.split("/")[0] for key in golden})
    assert names == sorted(f"respace_{respacing}" if respacing else "full1000" for respacing in case["respacings"])
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
        for condition_name, condition in conditions.items():
            held = tokens.take_along_dim(known[..., None], 1)
            encoded = model.encode(held, known, condition)
            torch.testing.assert_close(encoded, golden[f"{case_name}/{condition_name}/encoder"], atol=1e-4, rtol=0)
            everything = torch.arange(model.num_tokens).expand(len(tokens), -1)
            recorded = golden[f"{case_name}/{condition_name}/z"]
            torch.testing.assert_close(model.decode(encoded, known, everything), recorded, atol=1e-4, rtol=0)
            expected = recorded.take_along_dim(positions[..., None], 1)
            torch.testing.assert_close(model.decode(encoded, known, positions), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "case"), HEAD)
def test_head(model: MAR, name: str, case: dict[str, Any]) -> None:
    golden, head = load_tensors("mar", case["file"]), model.diffloss

    def close(ours: Tensor, theirs: str, step: int | None = None) -> None:
        expected = golden[theirs] if step is None else golden[theirs][step]
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)

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

    plan, rows = head.plan(tuple(golden["timestep_map"].tolist())), len(z)
    start, schedule = golden["init_noise"][None], plan.schedule
    trajectories = sorted({match[1] for key in golden if (match := re.match(r"(trajectory_temp[\d.]+)/", key))})
    assert trajectories
    for trajectory in trajectories:
        noise = torch.cat([start, golden["step_noise"]])
        sampled = head.sample(z, noise, plan, temperature=float(trajectory.removeprefix("trajectory_temp")))
        torch.testing.assert_close(sampled, golden[f"{trajectory}/sample"][-1], atol=1e-4, rtol=0)
        prepared, x = head.prepare(z, plan), golden["init_noise"]
        for step, index in enumerate(reversed(range(len(plan)))):
            predicted, _ = prepared.predict(x, index)
            a, b = (schedule.sqrt_recip_alphas_cumprod[index], schedule.sqrt_recipm1_alphas_cumprod[index])
            close(a.float() * x - b.float() * predicted, f"{trajectory}/pred_xstart", step)
            mean, std = prepared.posterior(x, index)
            close(mean, f"{trajectory}/mean", step)
            close(2 * std.log(), f"{trajectory}/log_variance", step)
            x = golden[f"{trajectory}/sample"][step]

    guided_keys = [key for key in golden if re.fullmatch(r"cfg[\d.]+/sample", key)]
    assert guided_keys
    for key in guided_keys:
        settings = {"guidance_scale": float(key.split("/")[0].removeprefix("cfg"))}
        recorded = golden[key.replace("sample", "step_noise")][:, :rows]  # those of unconditional rows are not used
        both, sampled = torch.cat([z, uncond]), golden[key][:, :rows]
        ours = head.sample(both, torch.cat([start, recorded]), plan, **settings)
        torch.testing.assert_close(ours, sampled[-1], atol=1e-4, rtol=0)
        for step, index in enumerate(reversed(range(len(plan)))):
            mean, std = head.posterior(sampled[step - 1] if step else start[0], index, both, plan, **settings)
            torch.testing.assert_close(mean + (index > 0) * std * recorded[step], sampled[step], atol=1e-4, rtol=0)

    deterministic, prepared = golden["ddim_eta0/sample"], head.prepare(z, plan)
    close(head.sample(z, start, plan, sampler="ddim"), "ddim_eta0/sample", -1)
    for step, index in enumerate(reversed(range(len(plan)))):
        close(prepared.ddim(deterministic[step - 1] if step else start[0], index), "ddim_eta0/sample", step)


@pytest.mark.parametrize(("name", "case"), GENERATE)
def test_generate(model: MAR, name: str, case: dict[str, Any]) -> None:
    golden = load_tensors("mar", case["file"])
    spacing = "leading" if case["num_sampling_steps"].startswith("ddim") else "linspace"
    steps = int(case["num_sampling_steps"].removeprefix("ddim"))
    annealing = StepAnnealing(steps, steps, "constant", last_timestep=None, spacing=spacing)
    timesteps = annealing.timesteps(0, case["args"]["num_iter"])
    assert list(timesteps) == case["timestep_map"]
    settings = generation_settings(golden, case["args"]) | {"annealing": annealing}
    check_generation(model, golden, case, settings, timesteps)


@pytest.mark.parametrize("variant", golden_manifests("mar", "mar_"))
def test_manifest(variant: str) -> None:
    facts = load_json("mar", f"config_{variant}.json")
    preset = variant.removeprefix("mar_")[0].upper()
    manifest = load_json("mar", f"state_dict_{variant}.json")
    with torch.device("meta"):
        model = MAR.preset(preset, facts["img_size"])
        loaded = MAR.from_original({k: torch.empty(s, dtype=getattr(torch, d)) for k, (s, d) in manifest.items()})
    assert_manifest(model, manifest)
    public = [{key: value for key, value in m.config.items() if key[0] != "_"} for m in (loaded, model)]
    assert public[0] == public[1]
    assert sum(p.numel() for p in model.parameters()) == facts["num_parameters"]
    shapes = [(facts["embed_dim"], facts[f"{part}_depth"], facts["num_heads"]) for part in ("encoder", "decoder")]
    assert [model.config.encoder_shape, model.config.decoder_shape] == shapes
    assert model.config.head_shape == (facts["diffloss_width"], facts["diffloss_depth"])
    assert math.prod(model.latent_shape) == facts["seq_len"] * facts["token_dim"]
    published = facts["eval"]
    assert GENERATION_PRESETS[preset] == {
        "num_iter": published["num_iter"],
        "num_steps": int(published["num_sampling_steps"]),
        "guidance_scale": published["cfg"],
        "temperature": published["temperature"],
    }
