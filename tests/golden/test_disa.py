"""DiSA on MAR against recorded outputs of the published code."""

from __future__ import annotations

import re
from typing import Any

import pytest

from generators.annealing import StepAnnealing
from generators.heads.diffusion import DiffusionSchedule, respaced_timesteps
from generators.mar import MAR
from tests.golden.test_mar import check_generation, generation_settings, load_model
from tests.golden.util import golden_cases, golden_index, load_json, load_tensors, select_cases

CASES = golden_cases("disa")
SCHEDULES = select_cases(CASES, lambda name, case: "args" not in case)
GENERATE = select_cases(CASES, lambda name, case: "args" in case)


@pytest.fixture(scope="module")
def model() -> MAR:
    return load_model("disa")


@pytest.mark.parametrize(("name", "case"), SCHEDULES)
def test_schedules(name: str, case: dict[str, Any]) -> None:
    recorded = load_json("disa", case["file"])
    assert recorded["mar_schedules"]
    for setting, schedule in recorded["mar_schedules"].items():
        strategy, *numbers = re.fullmatch(r"([a-z-]+)_upper(\d+)_lower(\d+)_iters(\d+)", setting).groups()
        upper, lower, iterations = map(int, numbers)
        annealing = StepAnnealing(upper, lower, strategy)
        nominal = [annealing.steps(i, iterations) for i in range(iterations)]
        assert nominal == schedule["nominal_steps"], setting
        executed = [len(annealing.timesteps(i, iterations)) for i in range(iterations)]
        assert executed == schedule["executed_steps"], setting
        assert sum(executed) == schedule["total_executed"]


@pytest.mark.parametrize(("name", "case"), SCHEDULES)
def test_clipped_timesteps(name: str, case: dict[str, Any]) -> None:
    respacings = load_json("disa", case["file"])["respacings"]
    checked = 0
    for setting, respacing in respacings.items():
        found = re.fullmatch(r"(?:default_sampler_)?(steps|ddim)(\d+)_clip(\d+)", setting)
        if setting == "train_diffusion":  # the published clip also touches the schedule of training
            assert len(DiffusionSchedule()) == 1000 > respacing["executed"]
            continue
        assert found is not None, setting
        spacing = "leading" if found[1] == "ddim" else "linspace"
        timesteps = respaced_timesteps(int(found[2]), spacing, int(found[3]))
        assert list(timesteps) == respacing["timestep_map"], setting
        assert len(timesteps) == respacing["executed"]
        checked += 1
    assert checked


@pytest.mark.parametrize(("name", "case"), GENERATE)
def test_generate(model: MAR, name: str, case: dict[str, Any]) -> None:
    golden, diffusion = load_tensors("disa", case["file"]), case["diffusion"]
    upper, lower, strategy = (diffusion[f"diff_{key}"] for key in ("upper_steps", "lower_steps", "annealing_strategy"))
    annealing = {
        "DiSA": StepAnnealing(upper, lower, strategy),
        "DDIM": StepAnnealing(upper, lower, strategy, last_timestep=980, spacing="leading"),
        "default": StepAnnealing(upper, upper, "constant", last_timestep=None),
    }[diffusion["diff_sampler"]]
    settings = generation_settings(golden, case["args"]) | {"annealing": annealing}
    settings["sampler"] = "ddim" if diffusion["diff_sampler"] == "DDIM" else "ddpm"
    check_generation(model, golden, case, settings, annealing.timesteps(0, case["args"]["num_iter"]))


def test_published_counts() -> None:
    """What the paper's setting executes: 1681 of the 6400 steps of 100 at each of 64 iterations."""
    if not golden_index("disa"):
        pytest.skip("no golden data")
    annealing = StepAnnealing(50, 5, "linear")
    assert sum(len(annealing.timesteps(i, 64)) for i in range(64)) == 1681
