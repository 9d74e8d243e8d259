"""Continuous speculation: exact where it says so, counted, and refused where it does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from generators.annealing import StepAnnealing
from generators.continuous import ContinuousSpeculation
from generators.mar import MAR
from generators.orders import RandomCosineMask
from mmsdk.decoding.decoder import SpeculativeDecoder
from mmsdk.decoding.drafters.prompt_lookup import PromptLookup
from mmsdk.decoding.rules.continuous import Continuous, Normals
from mmsdk.errors import UnknownNameError
from tests.tiny import tiny_latent_pipeline, tiny_mar, tiny_pipeline

SAMPLES = 100_000
STEPS = StepAnnealing(5, 5, "constant")


def seeded(count: int, first: int = 0) -> list[Generator]:
    return [Generator().manual_seed(first + i) for i in range(count)]


# ---------------------------------------------------------------- one token, many times


def continue_tokens(rule: Continuous, dim: int, trajectory: float) -> tuple[Tensor, Normals]:
    """Verify drafts of one distribution for a target of another; return what comes out of it, and the target."""
    generator = Generator().manual_seed(0)

    def normals() -> Tensor:
        return torch.randn(SAMPLES, dim, generator=generator, dtype=torch.float64)

    def uniforms() -> Tensor:
        return torch.rand(SAMPLES, generator=generator, dtype=torch.float64)

    shift = 0.6 / dim**0.5
    target = Normals(torch.zeros(SAMPLES, dim).double(), torch.full((SAMPLES, dim), 1.0).double())
    draft = Normals(torch.full((SAMPLES, dim), shift).double(), torch.full((SAMPLES, dim), 1.1).double())
    given = torch.full((SAMPLES,), trajectory, dtype=torch.float64)
    tokens = draft.mean + draft.std * normals()
    passes = rule.log_ratio(tokens, target, draft, given) > uniforms().log()
    assert float(passes.double().mean()) > 0.2
    others = rule.resample(~passes, target, draft, given, lambda: (normals(), uniforms()))
    return torch.where(passes[:, None], tokens, others), target


def distance_to_normal(values: Tensor) -> float:
    """Return the statistic of Kolmogorov and Smirnov, times the square root of the number of values."""
    ordered = torch.special.ndtr(values.sort().values)
    steps = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    return float(torch.maximum(ordered - steps[:-1], steps[1:] - ordered).max()) * len(values) ** 0.5


CRITICAL = 1.95  # exceeded once in a thousand times


@pytest.mark.parametrize("dim", [1, 16])
def test_paper_mode_follows_the_target(dim: int) -> None:
    tokens, _ = continue_tokens(Continuous("paper", max_proposals=1000), dim, 0.0)
    for direction in (torch.eye(dim)[0], torch.ones(dim) / dim**0.5):
        assert distance_to_normal(tokens @ direction.double()) < CRITICAL
    lengths = tokens.square().sum(1)
    assert float(lengths.mean()) == pytest.approx(dim, abs=4 * (2 * dim / SAMPLES) ** 0.5)


@pytest.mark.parametrize("dim", [1, 16])
def test_official_mode_does_not(dim: int) -> None:
    tokens, _ = continue_tokens(Continuous("official", temperature=42.0), dim, 0.0)
    assert distance_to_normal(tokens @ (torch.ones(dim) / dim**0.5).double()) > 3 * CRITICAL


def test_the_factor_of_the_trajectories_would_change_the_distribution() -> None:
    class WithFactor(Continuous):
        """As the paper writes it: p times the ratio of what both trajectories were drawn from."""

        def log_ratio(self, tokens: Tensor, target: Normals, draft: Normals, trajectory: Tensor) -> Tensor:
            return super().log_ratio(tokens, target, draft, trajectory) - trajectory

        def residual_probability(self, tokens: Tensor, target: Normals, draft: Normals, trajectory: Tensor) -> Tensor:
            ratio = draft.log_density(tokens) - target.log_density(tokens) + trajectory
            return (1 - ratio.exp()).clamp_min(0)

    tokens, _ = continue_tokens(WithFactor("paper", max_proposals=1000), 1, 0.4)
    assert distance_to_normal(tokens[:, 0]) > 3 * CRITICAL


def test_ratio_by_hand() -> None:
    target, draft = (
        Normals(torch.tensor([[0.0]]), torch.tensor([[1.0]])),
        Normals(torch.tensor([[1.0]]), torch.tensor([[2.0]])),
    )
    x, trajectory = torch.tensor([[1.0]]), torch.tensor([0.3])
    # exp(-1/2) over (1 / 2) exp(0).
    assert float(Continuous("paper").log_ratio(x, target, draft, trajectory).exp()) == pytest.approx(
        2 * 0.6065, abs=1e-3
    )
    official = Continuous("official", temperature=2.0).log_ratio(x, target, draft, trajectory)
    assert float(official) == pytest.approx(-1 / 8 + 0.6931 + 0.3, abs=1e-3)


# ---------------------------------------------------------------- whole images


@pytest.fixture(scope="module")
def target() -> MAR:
    return tiny_mar(seed=0)


@pytest.fixture(scope="module")
def draft() -> MAR:
    return tiny_mar(seed=1)


def settings(model: MAR, batch: int = 2) -> dict[str, Any]:
    return {"batch_size": batch, "num_iter": 6, "guidance_scale": 2.0, "annealing": STEPS}


def test_the_target_alone_writes_what_it_writes_without(target: MAR, draft: MAR) -> None:
    batch, plain_noise = 2, []
    generator = Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(target.num_tokens, generator=generator) for _ in range(batch)])
    start = torch.randn(batch, target.num_tokens, target.token_dim, generator=generator)
    inner = torch.randn(batch, target.num_tokens, 5, target.token_dim, generator=generator)
    left = target.num_tokens
    rows = torch.arange(batch)[:, None]
    for step in RandomCosineMask(6).steps(orders, target.num_tokens):
        at = inner[rows, step.positions]  # the last diffusion index comes first
        count = len(STEPS.timesteps(0, 6))
        plain_noise.append(
            torch.stack([start[rows, step.positions], *(at[:, :, index] for index in reversed(range(count)))])
        )
        left -= step.positions.shape[1]
    assert left == 0
    plain = target.generate(**settings(target), orders=orders, noise=plain_noise)
    alone = ContinuousSpeculation(draft, prefill_ratio=1.0)
    output = target.generate(**settings(target), orders=orders, noise=[start, inner], speculation=alone)
    torch.testing.assert_close(output.latents, plain.latents, atol=1e-4, rtol=1e-5)
    assert alone.stats.drafted == alone.stats.draft_forwards == 0
    assert output.trace.forwards == plain.trace.forwards == alone.stats.target_forwards


def test_a_draft_that_is_the_target_is_always_accepted(target: MAR) -> None:
    alone = target.generate(
        **settings(target, 1),
        speculation=ContinuousSpeculation(target, mode="paper", prefill_ratio=1.0),
        generator=seeded(1),
    )
    # Verified step by step, the target sees what the draft saw.
    stepwise = ContinuousSpeculation(target, num_draft=1, mode="paper", prefill_ratio=0.0)
    output = target.generate(**settings(target, 1), speculation=stepwise, generator=seeded(1))
    assert stepwise.stats.acceptance_rate == 1.0
    torch.testing.assert_close(output.latents, alone.latents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["official", "paper"])
def test_a_batch_equals_its_images(target: MAR, draft: MAR, mode: str) -> None:
    speculation = ContinuousSpeculation(draft, num_draft=3, mode=mode)
    together = target.generate(**settings(target, 3), speculation=speculation, generator=seeded(3)).latents
    for i in range(3):
        alone = target.generate(**settings(target, 1), speculation=speculation, generator=seeded(1, i)).latents
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["official", "paper"])
def test_verifications_are_counted(target: MAR, draft: MAR, mode: str) -> None:
    speculation = ContinuousSpeculation(draft, num_draft=2, mode=mode, prefill_ratio=0.2)
    steps: list[int] = []
    output = target.generate(
        **settings(target), speculation=speculation, generator=seeded(2), callback=lambda step, _: steps.append(step)
    )
    stats = speculation.stats
    assert output.trace.forwards == stats.target_forwards
    assert steps == sorted(steps)
    assert steps[-1] == 5
    assert bool((output.latents != 0).all())
    if mode == "official":
        # Steps 0 and 1 are the target's; 2, 3 and 4, and 5 are drafted and verified.
        assert (stats.target_forwards, stats.draft_forwards) == (2 + 3, 4)
    else:
        assert stats.accepted < stats.drafted
        assert not speculation.lossless or stats.target_forwards >= 5


def test_regenerates_a_part(target: MAR, draft: MAR) -> None:
    latents = torch.randn(1, *target.latent_shape, generator=Generator().manual_seed(3))
    mask = torch.zeros(target.num_tokens, dtype=torch.bool)
    mask[target.num_tokens // 2 :] = True
    output = target.generate(
        **settings(target, 1), speculation=ContinuousSpeculation(draft), latents=latents, mask=mask, generator=seeded(1)
    )
    kept, new = (target.to_tokens(x)[:, ~mask] for x in (latents, output.latents))
    assert torch.equal(kept, new)


def test_goes_with_fewer_and_fewer_diffusion_steps(target: MAR, draft: MAR) -> None:
    annealed = settings(target) | {"annealing": StepAnnealing(8, 2)}
    output = target.generate(**annealed, speculation=ContinuousSpeculation(draft), generator=seeded(2))
    assert output.trace.head_steps == sorted(output.trace.head_steps, reverse=True)
    assert bool(output.latents.isfinite().all())


def test_in_a_pipeline(draft: MAR) -> None:
    pipeline = tiny_latent_pipeline()
    speculation = ContinuousSpeculation(pipeline.transformer, num_draft=2)
    images = pipeline("pizza", num_iter=4, accelerator=speculation, generator=seeded(1), output_type="pt").images
    assert images.shape == (1, 3, 16, 16)
    assert speculation.stats.drafted > 0


# ---------------------------------------------------------------- what does not fit


def test_bad_input(target: MAR, draft: MAR) -> None:
    with pytest.raises(TypeError, match="The draft must be a MAR, whose tokens are continuous, got LlamaGen"):
        ContinuousSpeculation(tiny_pipeline().transformer)
    with pytest.raises(ValueError, match="num_draft must be an integer of at least 1, got 0"):
        ContinuousSpeculation(draft, num_draft=0)
    with pytest.raises(ValueError, match="prefill_ratio must be 0 to 1, got 1.5"):
        ContinuousSpeculation(draft, prefill_ratio=1.5)
    with pytest.raises(UnknownNameError, match="mode"):
        ContinuousSpeculation(draft, mode="papre")
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        Continuous("official", temperature=0)
    with pytest.raises(ValueError, match="max_proposals must be an integer of at least 1, got 0"):
        Continuous(max_proposals=0)
    speculation = ContinuousSpeculation(draft)
    with pytest.raises(TypeError, match="MAR writes continuous tokens: speculation must be a ContinuousSpeculation"):
        target.generate(**settings(target), speculation=SpeculativeDecoder(PromptLookup()))
    with pytest.raises(ValueError, match="sampler='ddpm' and a temperature above 0; got 'ddim'"):
        target.generate(**settings(target), sampler="ddim", speculation=speculation)
    with pytest.raises(ValueError, match="got 'ddpm' and 0"):
        target.generate(**settings(target), temperature=0, speculation=speculation)
    with pytest.raises(ValueError, match="noise is that of positions, and needs orders"):
        target.generate(**settings(target), noise=[], speculation=speculation)
    with pytest.raises(TypeError, match="LlamaGen writes token ids: speculation must be a SpeculativeDecoder"):
        tiny_pipeline()("pizza", accelerator=speculation)


def test_a_draft_of_other_latents(target: MAR) -> None:
    config = {k: v for k, v in target.config.items() if not k.startswith("_")}
    other = MAR(**config | {"latent_channels": 4})
    with pytest.raises(ValueError, match="The draft has latent_channels=4, the target 3: they must write the same"):
        target.generate(**settings(target), speculation=ContinuousSpeculation(other))


def test_exhausted_proposals_are_an_error() -> None:
    same = Normals(torch.zeros(1, 1), torch.ones(1, 1))
    with pytest.raises(RuntimeError, match="1 tokens had no proposal accepted in max_proposals=3"):
        Continuous("paper", max_proposals=3).resample(
            torch.tensor([True]), same, same, torch.zeros(1), lambda: (torch.zeros(1, 1), torch.tensor([0.5]))
        )
