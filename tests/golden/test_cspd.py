"""Continuous speculative decoding on MAR against recorded outputs of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from generators.annealing import StepAnnealing
from generators.continuous import ContinuousSpeculation
from generators.guidance import ConstantGuidance, LinearGuidance
from generators.heads.flow import NoiseStream
from generators.mar import MAR
from mmsdk.decoding.rules.continuous import Continuous, Normals
from tests.golden.util import golden_cases, golden_index, load_tensors, select_cases

CASES = golden_cases("cspd")
PROCESSOR = select_cases(CASES, lambda name, case: "args" not in case)
RUNS = select_cases(CASES, lambda name, case: "args" in case)
GUIDANCE = {"linear": LinearGuidance, "constant": ConstantGuidance}


def load_model(kind: str) -> MAR:
    config = golden_index("cspd")["config"]
    sizes = config["common"] | config[kind]
    shapes = {
        f"{part}_shape": tuple(sizes[f"{part}_{name}"] for name in ("embed_dim", "depth", "num_heads"))
        for part in ("encoder", "decoder")
    }
    weights = load_tensors("cspd", f"tiny_{kind}_weights.safetensors")
    return MAR.from_original(weights, {"patch_size": sizes["patch_size"], **shapes}).eval()


def recorded_steps() -> StepAnnealing:
    """Return the timesteps of golden.json, such as `ddim20`."""
    steps = golden_index("cspd")["config"]["num_sampling_steps"]
    count = int(steps.removeprefix("ddim"))
    return StepAnnealing(count, count, "constant", None, "leading" if steps.startswith("ddim") else "linspace")


@pytest.mark.parametrize(("name", "case"), PROCESSOR)
def test_decisions_and_residuals(name: str, case: dict[str, Any]) -> None:
    golden = load_tensors("cspd", case["file"])
    target, draft = (Normals(golden[f"{side}_mean"], golden[f"{side}_std"]) for side in ("target", "draft"))
    trajectory = (golden["target_log_std_sum"] - golden["draft_log_std_sum"]).sum(-1)
    torch.testing.assert_close(trajectory.exp(), golden["fixed_term"])
    kinds = sorted({key.split("/")[0] for key in golden if "/" in key})
    assert kinds
    for kind in kinds:
        rule = Continuous("official", temperature=float(kind.removeprefix("T")))
        ratio = rule.log_ratio(golden["x"], target, draft, trajectory).exp()
        torch.testing.assert_close(ratio, golden[f"{kind}/ratio"], atol=1e-5, rtol=1e-4)
        passes = ratio > golden[f"{kind}/accept_uniform"]
        assert torch.equal(passes, golden[f"{kind}/accept"])
        proposals = zip(golden[f"{kind}/proposal_normal"], golden[f"{kind}/proposal_uniform"], strict=True)
        others = rule.resample(~passes, target, draft, trajectory, lambda left=proposals: next(left))
        torch.testing.assert_close(torch.where(passes[:, None], golden["x"], others), golden[f"{kind}/result"])
    stays = rule.residual_probability(golden["x"], target, draft, trajectory)
    torch.testing.assert_close(stays, golden["residual_accept_prob_at_x"], atol=1e-5, rtol=1e-4)


class Replayed(ContinuousSpeculation):
    """Verifies with recorded numbers, and checks what is verified."""

    golden: dict[str, Tensor]
    verification = -1

    def _recorded(self, name: str) -> Tensor:
        return self.golden[f"verify{self.verification:02d}/{name}"]

    def draw_uniforms(self, stream: NoiseStream, num_positions: int) -> Tensor:
        self.verification += 1
        self.proposal = 0
        return self._recorded("accept_uniform").view(stream.batch, num_positions)

    def draw_proposal(self, stream: NoiseStream, num_positions: int, token_dim: int) -> tuple[Tensor, Tensor]:
        normals, uniforms = (self._recorded(name)[self.proposal] for name in ("proposal_normal", "proposal_uniform"))
        self.proposal += 1
        return normals.view(stream.batch, num_positions, -1), uniforms.view(stream.batch, num_positions)


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_runs(name: str, case: dict[str, Any]) -> None:
    golden, args = load_tensors("cspd", case["file"]), case["args"]
    speculation = Replayed(load_model("draft"), args["num_draft"], "official", args["ratio"], args["T"])
    speculation.golden = golden
    latents = load_model("target").generate(
        class_labels=args["labels"],
        num_iter=args["num_iter"],
        guidance_scale=GUIDANCE[args["cfg_schedule"]](args["cfg"]),
        annealing=recorded_steps(),
        temperature=args["temperature"],
        speculation=speculation,
        orders=golden["orders"],
        noise=[golden["noise"], golden["inter_noise"]],
    )[0]
    scale = golden["latents"].abs().max()
    torch.testing.assert_close(latents, golden["latents"], atol=1e-4 * float(scale), rtol=1e-4)
    assert speculation.verification + 1 == case["verifications"]
    assert (speculation.stats.drafted, speculation.stats.accepted) == (case["verified"], case["accepted"])
