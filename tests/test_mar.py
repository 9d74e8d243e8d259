"""MAR: fast paths, orders, batches, annealing, inpainting, training, bad input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from generators.annealing import STRATEGIES, StepAnnealing
from generators.base import Trace
from generators.guidance import Guidance, IntervalGuidance
from generators.heads.diffusion import DiffusionSchedule, respaced_timesteps
from generators.mar import GENERATION_PRESETS, MAR, PRESETS
from generators.orders import RandomCosineMask
from mmsdk.bench.mar import PlainMAR
from mmsdk.errors import CheckpointError, UnknownNameError
from tests.tiny import tiny_mar

# Without timesteps near pure noise, where a random head divides by almost nothing.
CALM: dict[str, Any] = {"annealing": StepAnnealing(5, 5, "constant")}


@dataclass(frozen=True)
class Listed(Guidance):
    """A scale for every step."""

    listed: tuple[float, ...] = ()

    def scale(self, step: int, num_steps: int, progress: float | None = None) -> float:
        return self.listed[step]


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def model() -> MAR:
    return tiny_mar().eval()


def recorded(model: MAR, batch: int, num_iter: int, steps: int = 5) -> dict[str, Any]:
    """Return orders and noise of a generation."""
    generator = torch.Generator().manual_seed(7)
    orders = torch.rand(batch, model.num_tokens, generator=generator).argsort(-1)
    counts = [s.positions.shape[1] for s in RandomCosineMask(num_iter).steps(orders, model.num_tokens)]
    noise = [torch.randn(1 + steps, batch, count, model.token_dim, generator=generator) for count in counts]
    return {"orders": orders, "noise": noise}


# ---------------------------------------------------------------- orders


def test_the_schedule_by_hand() -> None:
    # floor(16 cos(pi (s + 1) / 8)) = 14, 11, 6, 0; the last step takes all.
    assert RandomCosineMask(4).lengths(16) == [14, 11, 6, 1]
    orders = torch.tensor([[3, 1, 0, 2]])
    steps = list(RandomCosineMask(2).steps(orders, 4))
    # floor(4 cos(pi / 4)) = 2 are left: those that stand first in the order.
    assert [s.positions.tolist() for s in steps] == [[[0, 2]], [[1, 3]]]
    assert [s.known.tolist() for s in steps] == [[[]], [[0, 2]]]
    assert [s.progress for s in steps] == [0.5, 0.75]


@pytest.mark.parametrize("num_iter", [1, 2, 5, 16, 40])
def test_every_position_is_predicted_once(num_iter: int) -> None:
    orders = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).argsort(-1)
    steps = list(RandomCosineMask(num_iter).steps(orders, 16))
    assert len(steps) == min(num_iter, 16)
    predicted = torch.cat([s.positions for s in steps], 1)
    assert torch.equal(predicted.sort(-1).values, torch.arange(16).expand(3, -1))
    assert steps[-1].step == num_iter - 1


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("num_iter", [1, 3, 16])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_savings_change_nothing(model: MAR, num_iter: int, guidance_scale: float) -> None:
    draws = recorded(model, 2, num_iter)
    labels = [1, 4]
    ours = model.generate(labels, num_iter=num_iter, guidance_scale=guidance_scale, **CALM, **draws).latents
    plain = PlainMAR(model).generate(
        labels, num_iter, CALM["annealing"].timesteps(0, num_iter), guidance_scale, **draws
    )
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@torch.no_grad()
def test_one_step_by_the_formulas(model: MAR, sampler: str) -> None:
    """A single iteration: all tokens from condition tokens and mask tokens, through whole blocks, both halves."""
    draws, size = recorded(model, 2, 1), model.config.buffer_size
    settings: dict[str, Any] = {"guidance_scale": Listed(1.0, (2.5,)), "temperature": 0.8, "sampler": sampler, **CALM}
    output = model.generate([1, 4], num_iter=1, **settings, **draws)
    assert (output.trace.rows, output.trace.head_rows) == ([4], [4 * model.num_tokens])

    labels = torch.tensor([1, 4])
    condition = torch.cat([model.class_emb(labels)[:, None], model.fake_latent.expand(2, 1, -1)]).expand(-1, size, -1)
    hidden = model.z_proj_ln(condition + model.encoder_pos_embed_learned[:, :size])
    for block in model.encoder_blocks:
        hidden = block(hidden)
    hidden = model.decoder_embed(model.encoder_norm(hidden))
    hidden = torch.cat([hidden, model.mask_token.expand(4, model.num_tokens, -1)], 1) + model.decoder_pos_embed_learned
    for block in model.decoder_blocks:
        hidden = block(hidden)
    z = (model.decoder_norm(hidden)[:, size:] + model.diffusion_pos_embed_learned).flatten(0, 1)

    schedule = DiffusionSchedule((0, 250, 500, 749, 950))
    before = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:-1]])
    noise = draws["noise"][0].flatten(1, 2)
    x = noise[0]
    for step, index in enumerate((4, 3, 2, 1, 0)):
        times = torch.full((2 * len(x),), schedule.timesteps[index])
        conditional, unconditional = model.diffloss.net(torch.cat([x, x]), times, z).split(len(x))
        cond_eps, position = conditional.chunk(2, -1)
        eps = unconditional.chunk(2, -1)[0]
        eps = eps + 2.5 * (cond_eps - eps)
        signal, previous, beta = (float(table[index]) for table in (schedule.alphas_cumprod, before, schedule.betas))
        clean = (1 / signal) ** 0.5 * x - (1 / signal - 1) ** 0.5 * eps
        if sampler == "ddim":
            x = previous**0.5 * clean + (1 - previous) ** 0.5 * eps
            continue
        x = (beta * previous**0.5 * clean + (1 - previous) * (1 - beta) ** 0.5 * x) / (1 - signal)
        if index:
            share = (position + 1) / 2
            logvar = share * math.log(beta) + (1 - share) * math.log(beta * (1 - previous) / (1 - signal))
            x = x + 0.8 * (logvar / 2).exp() * noise[step + 1]
    expected = model.to_latents(x.view(2, model.num_tokens, -1))
    torch.testing.assert_close(output.latents, expected, atol=1e-4, rtol=1e-4)


def test_unguided_steps_of_a_guided_generation(model: MAR) -> None:
    """They need no unconditional rows; a scale next to 1, which does, gives the same."""
    draws = recorded(model, 2, 3)
    scales = [(1.0, 3.0, 1.0), (1 + 1e-9, 3.0, 1 - 1e-9)]
    ours, doubled = (
        model.generate([1, 4], num_iter=3, guidance_scale=Listed(1.0, listed), **CALM, **draws) for listed in scales
    )
    assert (ours.trace.rows, doubled.trace.rows) == ([2, 4, 2], [4, 4, 4])
    assert ours.trace.guidance == [1.0, 3.0, 1.0]
    torch.testing.assert_close(ours.latents, doubled.latents, atol=1e-4, rtol=1e-4)
    interval = model.generate([1], num_iter=4, guidance_scale=IntervalGuidance(2.0, 0), **CALM, generator=seeded(0))
    assert interval.trace.rows == [2, 2, 1, 1]


def test_modulations_of_many_steps_at_once(model: MAR) -> None:
    """More steps times rows than are computed at once: the same as every step on its own."""
    head, generator = model.diffloss, seeded(0)[0]
    plan = head.plan(respaced_timesteps(40, last_timestep=950))
    z = torch.randn(2 * 30, 24, generator=generator)
    noise = torch.randn(1 + len(plan), 30, model.token_dim, generator=generator)
    sampled, x = head.sample(z, noise, plan, guidance_scale=1.5), noise[0]
    for step, index in enumerate(reversed(range(len(plan)))):
        mean, std = head.posterior(x, index, z, plan, guidance_scale=1.5)
        x = mean + std * noise[1 + step] if index else mean
    torch.testing.assert_close(sampled, x, atol=1e-4, rtol=1e-4)


def test_unconditional_rows_only_where_guided(model: MAR) -> None:
    free = model.generate([1], num_iter=3, **CALM, generator=seeded(0)).trace
    assert free.rows == [1, 1, 1]
    guided = model.generate([1], num_iter=3, guidance_scale=2.0, **CALM, generator=seeded(0)).trace
    assert guided.rows == [2, 2, 2]
    assert sum(guided.head_rows) == 2 * sum(free.head_rows) == 2 * model.num_tokens


def test_batch_equals_single(model: MAR) -> None:
    settings: dict[str, Any] = {"num_iter": 4, "guidance_scale": 2.0, **CALM}
    batch = model.generate([0, 3, 2], **settings, generator=seeded(1, 2, 3)).latents
    for i, label in enumerate([0, 3, 2]):
        single = model.generate([label], **settings, generator=seeded(i + 1)).latents
        torch.testing.assert_close(batch[i : i + 1], single, atol=1e-4, rtol=1e-4)


def test_the_same_generator_gives_the_same_image_and_the_global_one_is_left_alone(model: MAR) -> None:
    state = torch.get_rng_state()
    one, other = (model.generate([1], num_iter=2, **CALM, generator=seeded(5)).latents for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, model.generate([1], num_iter=2, **CALM, generator=seeded(6)).latents)
    assert not torch.equal(one, model.generate([1], num_iter=2, **CALM).latents)
    assert torch.equal(state, torch.get_rng_state())


def test_annealing_executes_what_it_announces(model: MAR) -> None:
    annealing = StepAnnealing(9, 3, "linear")
    trace = model.generate([1], num_iter=4, annealing=annealing, generator=seeded(0)).trace
    assert trace.head_steps == [9, 7, 5, 3]
    plain = model.generate([1], num_iter=4, num_steps=4, generator=seeded(0))
    constant = StepAnnealing(4, 4, "constant", last_timestep=None)
    assert torch.equal(plain.latents, model.generate([1], num_iter=4, annealing=constant, generator=seeded(0)).latents)


def test_every_step_has_its_number_of_head_steps(model: MAR) -> None:
    """Also where some steps predict nothing, and where published timesteps become the same."""
    annealing = StepAnnealing(50, 2, "cosine")
    trace = model.generate([1], num_iter=20, annealing=annealing, generator=seeded(0)).trace
    orders = torch.arange(16)[None]
    steps = [s.step for s in RandomCosineMask(20).steps(orders, 16)]
    assert len(steps) == 16
    assert trace.head_steps == [len(annealing.timesteps(step, 20)) for step in steps]
    assert trace.head_steps[0] == 48


def test_timesteps_by_hand() -> None:
    assert respaced_timesteps(5) == (0, 250, 500, 749, 999)
    assert respaced_timesteps(5, last_timestep=950) == (0, 250, 500, 749, 950)
    assert respaced_timesteps(4, "leading") == (0, 250, 500, 750)
    assert respaced_timesteps(50, "leading", 930) == (*range(0, 921, 20), 930)
    counts = {steps: len(StepAnnealing(steps, steps).timesteps(0, 1)) for steps in (100, 50, 25)}
    assert counts == {100: 96, 50: 48, 25: 24}


def test_annealing_by_hand() -> None:
    expected = {"linear": [9, 7, 5, 3], "cosine": [9, 7, 4, 3], "two-stage": [9, 9, 3, 3], "constant": [3] * 4}
    alone = {"linear": 9, "cosine": 9, "two-stage": 3, "constant": 3}
    assert expected.keys() == alone.keys() == set(STRATEGIES)
    for strategy, counts in expected.items():
        annealing = StepAnnealing(9, 3, strategy)
        assert [annealing.steps(i, 4) for i in range(4)] == counts
        assert annealing.steps(0, 1) == alone[strategy]  # nothing is divided by zero


def test_temperature_0_and_ddim_depend_on_the_first_noise_only(model: MAR) -> None:
    draws = recorded(model, 1, 2)
    other = {**draws, "noise": [torch.cat([n[:1], torch.randn_like(n[1:])]) for n in draws["noise"]]}
    for settings in ({"temperature": 0.0}, {"sampler": "ddim"}):
        one, two = (model.generate([1], num_iter=2, **CALM, **settings, **d).latents for d in (draws, other))
        assert torch.equal(one, two)
    one, two = (model.generate([1], num_iter=2, **CALM, **d).latents for d in (draws, other))
    assert not torch.equal(one, two)


def test_steps_fill_the_image(model: MAR) -> None:
    seen: list[Tensor] = []
    steps: list[int] = []

    def callback(step: int, latents: Tensor) -> None:
        steps.append(step)
        seen.append(latents)

    trace = Trace()
    output = model.generate([1], num_iter=4, **CALM, generator=seeded(0), callback=callback, trace=trace)
    assert output.trace is trace
    assert steps == [0, 1, 2, 3]
    streamed = list(model.iter_generate([1], num_iter=4, **CALM, generator=seeded(0)))
    assert [step for step, _ in streamed] == steps
    assert all(torch.equal(latents, other) for (_, latents), other in zip(streamed, seen, strict=True))
    latents, _ = model.generate([1], num_iter=4, **CALM, generator=seeded(0), return_dict=False)
    assert torch.equal(latents, output.latents)
    known = [int((latents != 0).any(1).sum()) for latents in seen]
    assert known == sorted(known)
    assert known[-1] == model.num_tokens
    assert torch.equal(seen[-1], output.latents)


def test_text_condition() -> None:
    model = tiny_mar(condition="text").eval()
    features = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    draws = recorded(model, 2, 2)
    latents = model.generate(caption_features=features, caption_mask=mask, num_iter=2, **CALM, **draws).latents
    changed = features.clone()
    changed[0, 0] = 9.0  # padding
    again = model.generate(caption_features=changed, caption_mask=mask, num_iter=2, **CALM, **draws).latents
    assert torch.equal(latents, again)
    padded = features * mask[..., None]  # features of padding count as 0
    again = model.generate(caption_features=padded, num_iter=2, **CALM, **draws).latents
    torch.testing.assert_close(latents, again)
    changed[0, 1] = 9.0
    again = model.generate(caption_features=changed, caption_mask=mask, num_iter=2, **CALM, **draws).latents
    assert not torch.equal(latents[0], again[0])
    torch.testing.assert_close(latents[1], again[1])
    guided = model.generate(caption_features=features, num_iter=2, guidance_scale=3.0, **CALM, **draws)
    assert guided.trace.rows == [4, 4]


def test_without_a_condition(model: MAR) -> None:
    """As if every condition were dropped; guidance then has nothing to do."""
    draws = recorded(model, 2, 2)
    free, guided = (
        model.generate(batch_size=2, num_iter=2, guidance_scale=scale, **CALM, **draws).latents for scale in (1.0, 3.0)
    )
    torch.testing.assert_close(free, guided, atol=1e-4, rtol=1e-4)
    # A scale of 0 is the unconditional half alone.
    zero = Listed(1.0, (0.0, 0.0))
    unmixed = model.generate([1, 4], num_iter=2, guidance_scale=zero, temperature=0.0, **CALM, **draws).latents
    cold = model.generate(batch_size=2, num_iter=2, temperature=0.0, **CALM, **draws).latents
    torch.testing.assert_close(unmixed, cold, atol=1e-4, rtol=1e-4)


def test_half_precision(model: MAR) -> None:
    cast = tiny_mar().to(torch.bfloat16)
    draws = recorded(model, 2, 3)
    latents, expected = (
        m.generate([1, 4], num_iter=3, guidance_scale=2.0, **CALM, **draws).latents for m in (cast, model)
    )
    assert latents.dtype == torch.float32
    assert (latents - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("patch_size", [1, 2])
def test_inpainting_leaves_what_is_not_masked(patch_size: int) -> None:
    model = tiny_mar(patch_size=patch_size).eval()
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(model.num_tokens, dtype=torch.bool)
    mask[::3] = True
    output = model.generate(
        [1, 2], num_iter=2, guidance_scale=2.0, **CALM, latents=latents, mask=mask, generator=seeded(1, 2)
    )
    before, after = model.to_tokens(latents), model.to_tokens(output.latents)
    assert torch.equal(after[:, ~mask], before[:, ~mask])
    assert bool((after[:, mask] != before[:, mask]).any(-1).all())
    everything = torch.ones_like(mask)
    full = model.generate([1, 2], num_iter=2, **CALM, latents=latents, mask=everything, generator=seeded(1, 2))
    assert torch.equal(full.latents, model.generate([1, 2], num_iter=2, **CALM, generator=seeded(1, 2)).latents)


def test_inpainting_of_different_tokens(model: MAR) -> None:
    """Every image has its own mask; masked latents are not looked at, and known ones are."""
    latents = torch.randn(2, *model.latent_shape, generator=seeded(0)[0])
    mask = torch.stack([torch.arange(16) < 5, torch.arange(16) >= 11])
    settings: dict[str, Any] = {"num_iter": 3, "mask": mask, **CALM}

    def regenerate(known: Tensor) -> Tensor:
        output = model.generate([1, 2], latents=known, generator=seeded(1, 2), **settings)
        assert [step.count(0) for step in model.to_tokens(output.latents).abs().sum(-1).tolist()] == [0, 0]
        return model.to_tokens(output.latents)

    copy = latents.clone()
    after, before = regenerate(latents), model.to_tokens(latents)
    assert torch.equal(latents, copy)
    assert torch.equal(after[~mask], before[~mask])
    assert bool((after[mask] != before[mask]).any(-1).all())
    assert torch.equal(regenerate(model.to_latents(before.masked_fill(mask[..., None], 7.0))), after)
    assert not torch.equal(regenerate(model.to_latents(before + 1))[mask], after[mask])
    steps = [latents for _, latents in model.iter_generate([1, 2], latents=latents, generator=seeded(1, 2), **settings)]
    for partial in steps:
        assert torch.equal(model.to_tokens(partial)[~mask], before[~mask])
    to_come = [int((model.to_tokens(partial) == 0).all(-1)[mask].sum()) for partial in steps]
    # floor(5 cos(pi / 6)) = 4 and floor(5 cos(pi / 3)) = 2 are left of each image.
    assert to_come == [8, 4, 0]


def test_masks_of_latents_mask_their_tokens() -> None:
    model = tiny_mar(patch_size=2)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 6] = True  # row 1, column 2: the second of 2 x 2 tokens
    arguments = model.inpainting(torch.zeros(1, 3, 4, 4), mask)
    assert arguments["mask"].tolist() == [[False, True, False, False]]
    model.generate([0], num_iter=1, **CALM, **arguments)


def test_patches_by_hand() -> None:
    model = tiny_mar(patch_size=2, latent_channels=1)
    latents = torch.arange(16.0).view(1, 1, 4, 4)
    assert model.to_tokens(latents)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    # The numbers of one channel stand together.
    channels = torch.cat([latents, -latents, 2 * latents], 1)
    assert tiny_mar(patch_size=2).to_tokens(channels)[0, 0].tolist() == [0, 1, 4, 5, 0, -1, -4, -5, 0, 2, 8, 10]
    assert torch.equal(model.to_latents(model.to_tokens(latents)), latents)


# ---------------------------------------------------------------- training and files


def test_masked_tokens_do_not_leak(model: MAR) -> None:
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(16)[None] < 10
    z = model(latents, [1], mask=mask, generator=torch.Generator().manual_seed(0)).hidden_states
    tokens = model.to_tokens(latents)
    tokens[:, :10] = 9.0
    again = model(model.to_latents(tokens), [1], mask=mask, generator=torch.Generator().manual_seed(0)).hidden_states
    assert torch.equal(z, again)
    tokens[:, 12] = 9.0
    other = model(model.to_latents(tokens), [1], mask=mask, generator=torch.Generator().manual_seed(0)).hidden_states
    assert not torch.equal(z, other)


def test_known_tokens_reach_the_encoder_alone(model: MAR) -> None:
    """`z` of training and of generation are the same."""
    latents = torch.randn(2, *model.latent_shape, generator=seeded(0)[0])
    mask = torch.arange(16) < 6
    loss, drawn, z = model(latents, [1, 4], mask=mask, generator=seeded(0)[0], return_dict=False)
    assert torch.equal(drawn, mask.expand(2, -1))
    known, positions = (m.nonzero()[:, 0].expand(2, -1) for m in (~mask, mask))
    tokens = model.to_tokens(latents)
    encoded = model.encode(tokens[:, ~mask], known, model.embed_condition([1, 4]))
    everywhere = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(model.decode(encoded, known, positions), z)
    torch.testing.assert_close(model.decode(encoded, known, everywhere)[:, mask], z)
    # A change of the order in which known tokens are passed changes nothing.
    shuffled = model.encode(tokens[:, ~mask].flip(1), known.flip(1), model.embed_condition([1, 4]))
    torch.testing.assert_close(model.decode(shuffled, known.flip(1), positions), z)
    assert loss.ndim == 0 and bool(loss.isfinite())


def test_dropped_conditions(model: MAR) -> None:
    settings: dict[str, Any] = {"mask": torch.arange(16) < 9, "drop_condition": torch.tensor([True, False])}
    latents = torch.randn(2, *model.latent_shape, generator=seeded(0)[0])
    one, other = (
        model(latents, labels, generator=seeded(0)[0], **settings).hidden_states for labels in ([1, 1], [2, 2])
    )
    torch.testing.assert_close(one[0], other[0])
    assert not torch.allclose(one[1], other[1])


def test_losses_repeat_with_their_generator(model: MAR) -> None:
    latents = torch.randn(2, *model.latent_shape, generator=seeded(0)[0])
    state = torch.get_rng_state()
    losses = [float(model(latents, [1, 4], generator=seeded(seed)[0]).loss.detach()) for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]
    assert float(model(latents, [1, 4]).loss.detach()) != losses[0]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("condition", ["class", "text"])
def test_training_reaches_every_parameter(condition: str) -> None:
    model = tiny_mar(condition=condition).train()
    given: dict[str, Any] = {"class_labels": [1, 4]}
    if condition == "text":
        given = {"caption_features": torch.randn(2, 3, 6, generator=seeded(0)[0])}
    latents = torch.randn(2, *model.latent_shape, generator=seeded(0)[0])
    with torch.inference_mode():  # tables made there must not disturb
        model.generate(**given, num_iter=1, **CALM)
    given |= {"drop_condition": torch.tensor([True, False]), "mask": torch.arange(16) < 9}
    model(latents, **given, generator=seeded(0)[0]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


def test_a_new_head_predicts_no_noise() -> None:
    """The squared error is then that of the noise itself."""
    torch.manual_seed(0)
    config = {k: v for k, v in tiny_mar().config.items() if k[0] != "_"}
    head = MAR(**config).diffloss
    z, target, noise = (torch.randn(5, size, generator=seeded(size)[0]) for size in (24, 3, 4))
    terms = head.loss_terms(z, target, torch.tensor([0, 1, 300, 800, 999]), noise[:, :3])
    torch.testing.assert_close(terms.mse, noise[:, :3].square().mean(-1))
    torch.testing.assert_close(terms.loss, terms.mse + terms.vb)


def test_masks_of_training_follow_their_distribution(model: MAR) -> None:
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([float(model.draw_mask(1, generator).float().mean()) for _ in range(2000)])
    assert float(shares.min()) >= model.config.mask_ratio_min
    # Of a normal distribution around 1 with deviation 0.25, cut to 0.7 ... 1; shares are rounded up to sixteenths.
    assert float(shares.mean()) == pytest.approx(0.868 + 0.5 / 16, abs=0.01)


def test_training_lowers_the_loss() -> None:
    model = tiny_mar(std=0.1).train()
    latents = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(60):
        loss = model(latents, [0, 1, 2, 3], generator=torch.Generator().manual_seed(step % 5)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_save_and_load(tmp_path: Path, model: MAR) -> None:
    model.save_pretrained(tmp_path)
    loaded = MAR.from_pretrained(tmp_path).eval()
    draws = recorded(model, 1, 2)
    one, other = (m.generate([1], num_iter=2, **CALM, **draws).latents for m in (model, loaded))
    # Weights lie elsewhere in memory, so products may round differently.
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert tuple(loaded.config.head_shape) == model.config.head_shape


@pytest.mark.parametrize("name", PRESETS)
def test_published_layouts_are_recognised(name: str) -> None:
    with torch.device("meta"):
        model = MAR.preset(name, image_size=128, num_classes=10)
        loaded = MAR.from_original({"model_ema": dict(model.state_dict())})
    one, other = ({k: v for k, v in m.config.items() if k[0] != "_"} for m in (model, loaded))
    assert one == other
    assert one["grid_size"] == 8


def test_original_checkpoints_of_patches_and_of_files(tmp_path: Path) -> None:
    model = tiny_mar(patch_size=2)
    config = {name: model.config[name] for name in ("encoder_shape", "decoder_shape", "patch_size")}
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint-last.pth")
    loaded = MAR.from_original(tmp_path / "checkpoint-last.pth", config)
    assert (loaded.latent_shape, loaded.num_tokens, loaded.training) == ((3, 4, 4), 4, False)
    draws = recorded(model, 2, 2)
    one, other = (m.generate([1, 2], num_iter=2, **CALM, **draws).latents for m in (model, loaded))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_original_checkpoints_are_nested_and_tell_their_shapes(model: MAR) -> None:
    shapes = {"encoder_shape": model.config.encoder_shape, "decoder_shape": model.config.decoder_shape}
    loaded = MAR.from_original({"model_ema": model.state_dict(), "epoch": 3}, shapes)
    assert loaded.config.head_shape == model.config.head_shape
    with pytest.raises(CheckpointError, match="number of heads"):
        MAR.from_original(model.state_dict())
    with pytest.raises(CheckpointError, match="This is no MAR checkpoint: 'z_proj.weight' is missing"):
        MAR.from_original({"weight": torch.zeros(2)}, shapes)
    with pytest.raises(CheckpointError, match="stranger"):
        MAR.from_original(model.state_dict() | {"stranger": torch.zeros(1)}, shapes)
    with pytest.raises(CheckpointError, match="mask_token"):
        MAR.from_original({k: v for k, v in model.state_dict().items() if k != "mask_token"}, shapes)
    with pytest.raises(UnknownNameError, match="Unknown MAR preset 'XL'.*Available: B, H, L"):
        MAR.preset("XL")
    assert PRESETS.keys() == GENERATION_PRESETS.keys() == {"B", "L", "H"}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_iter": 0}, "num_iter must be an integer of at least 1, got 0"),
        ({"num_iter": True}, "num_iter must be an integer of at least 1, got True"),
        ({"num_steps": 1}, "diffusion steps must be 2 to 1000, got 1"),
        ({"num_steps": 0}, "diffusion steps must be 2 to 1000, got 0"),
        ({"num_steps": 2.0}, "diffusion steps must be 2 to 1000, got 2.0"),
        ({"annealing": StepAnnealing(5, 1)}, "diffusion steps must be 2 to 1000, got 1"),
        ({"annealing": StepAnnealing(600, spacing="leading")}, "No integer stride gives 600 diffusion steps"),
        ({"num_steps": 5, "annealing": StepAnnealing()}, "num_steps or annealing, not both; got num_steps=5"),
        ({"sampler": "ddmp"}, "Unknown sampler 'ddmp'. Did you mean 'ddpm'"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0"),
        ({"temperature": float("inf")}, "temperature must be finite and at least 0, got inf"),
        ({"guidance_scale": float("nan")}, "guidance scale must be finite and at least 0, got nan"),
        ({"guidance_scale": Listed(1.0, (1.0, -2.0))}, "finite and at least 0, got -2.0 at step 1"),
        ({"class_labels": [5]}, "Class labels must be 0 to 4, got 5 at position 0"),
        ({"class_labels": None}, "class-conditional: pass class_labels"),
        ({"caption_features": torch.zeros(1, 3, 6)}, "class-conditional: pass class_labels and no caption"),
        ({"batch_size": 2}, "got 2 and a condition"),
        ({"batch_size": 0, "class_labels": None}, "batch_size must be an integer of at least 1, got 0"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, "Pass latents and mask together"),
        ({"latents": torch.zeros(1, 3, 4, 5), "mask": torch.ones(16, dtype=torch.bool)}, r"latents must be \(batch, 3"),
        ({"latents": torch.zeros(1, 3, 4, 4), "mask": torch.zeros(16, dtype=torch.bool)}, "at least 1 token"),
        ({"latents": torch.zeros(2, 3, 4, 4), "mask": torch.ones(16, dtype=torch.bool)}, "1 conditions for 2"),
        ({"orders": torch.zeros(1, 16, dtype=torch.int64)}, "all masked positions"),
        ({"orders": torch.arange(15)[None]}, r"orders must be \(1, 16\), .* got \(1, 15\), the first row \[0, 1"),
        ({"mask": torch.ones(16, dtype=torch.bool)}, "Pass latents and mask together"),
        ({"latents": torch.zeros(1, 3, 4, 4), "mask": torch.ones(2, 16).bool()}, r"mask must be \(16,\) or \(1, 16\)"),
        ({"noise": [torch.zeros(1)], **CALM}, r"shapes \[\(6, 1, 5, 3\), \(6, 1, 11, 3\)\], got \[\(1,\)\]"),
        (
            {"noise": [torch.zeros(1)], "orders": torch.arange(16)[None], "generator": seeded(1)[0]},
            "generator has nothing to draw",
        ),
        ({"generator": seeded(1, 2)}, "each of 1 rows, got 2"),
    ],
)
def test_bad_generations(model: MAR, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):  # at once, not at the first step
        model.iter_generate(**({"class_labels": [1], "num_iter": 2} | arguments))


def test_bad_types(model: MAR) -> None:
    with pytest.raises(TypeError, match="annealing must be a StepAnnealing, got 15"):
        model.generate([1], annealing=15)
    with pytest.raises(TypeError, match="Class labels must be integers, got torch.float32"):
        model.generate([0.5])
    with pytest.raises(TypeError, match="must be a number, got '3'"):
        model.generate([1], guidance_scale="3")
    with pytest.raises(TypeError, match="Generator 1 must be a torch.Generator, got int"):
        model.generate([0, 1], generator=[seeded(1)[0], 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [1, 1]}, "text-conditional: pass caption_features and no class_labels"),
        ({"caption_features": None}, "text-conditional: pass caption_features"),
        ({"caption_features": torch.zeros(2, 3, 5)}, r"caption_features must be \(batch, 3, 6\), got \(2, 3, 5\)"),
        ({"caption_features": torch.zeros(0, 3, 6)}, r"caption_features must be \(batch, 3, 6\), got \(0, 3, 6\)"),
        ({"caption_mask": torch.ones(2, 4)}, r"caption_mask must be \(2, 3\), as the features, got \(2, 4\)"),
    ],
)
def test_bad_captions(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_mar(condition="text").generate(**({"caption_features": torch.zeros(2, 3, 6)} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": torch.zeros(2, 4, 4, 3)}, r"latents must be \(batch, 3, 4, 4\), got \(2, 4, 4, 3\)"),
        ({"class_labels": [1]}, "Got 1 conditions for 2 latents"),
        ({"drop_condition": torch.zeros(3)}, r"drop_condition must be \(2,\), one per row, got \(3,\)"),
        ({"mask": torch.ones(3, 16, dtype=torch.bool)}, r"mask must be \(16,\) or \(2, 16\), got \(3, 16\)"),
        ({"mask": torch.zeros(2, 16, dtype=torch.bool)}, r"at least 1 token of every image, got \[0, 0\]"),
    ],
)
def test_bad_training_input(model: MAR, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**({"latents": torch.zeros(2, 3, 4, 4), "class_labels": [0, 1]} | arguments))


def test_masks_must_be_bool_and_even(model: MAR) -> None:
    latents = torch.zeros(2, 3, 4, 4)
    with pytest.raises(TypeError, match="mask must be bool"):
        model.generate([1, 2], latents=latents, mask=torch.ones(16))
    with pytest.raises(ValueError, match=r"as many tokens in every image of a batch, got \[4, 5\]"):
        model.generate([1, 2], latents=latents, mask=torch.arange(16) < torch.tensor([[4], [5]]))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"encoder_shape": (16, 1, 3)}, "encoder_shape must be width, layers and heads"),
        ({"decoder_shape": (24, 0, 2)}, "decoder_shape"),
        ({"head_shape": (20,)}, "head_shape must be width and depth"),
        ({"head_shape": (20, 0)}, "depth must be at least 1"),
        ({"patch_size": 3}, "patch_size must divide grid_size, got 3 and 4"),
        ({"encoder_shape": (16, 1)}, r"encoder_shape must be width, layers and heads.* got \(16, 1\)"),
        ({"latent_channels": 0}, "latent_channels must be at least 1, got 0"),
        ({"buffer_size": 0}, "buffer_size must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes of at least 1"),
        ({"condition": "text", "caption_dim": 0}, "caption_dim"),
        ({"condition": "image"}, "'class' or 'text', got 'image'"),
        ({"mask_ratio_min": 0.0}, "mask_ratio_min must be above 0 and at most 1, got 0.0"),
        ({"diffusion_batch_mul": 0}, "diffusion_batch_mul must be at least 1, got 0"),
    ],
)
def test_bad_sizes(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_mar(**sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"upper": 4, "lower": 5}, "lower must be at most upper"),
        ({"upper": 0}, "upper must be an integer of at least 1, got 0"),
        ({"lower": 2.5}, "lower must be an integer of at least 1, got 2.5"),
        ({"strategy": "linaer"}, "Unknown annealing strategy 'linaer'. Did you mean 'linear'"),
        ({"last_timestep": 1000}, "last_timestep must be 1 to 999, or None, got 1000"),
        ({"spacing": "log"}, "Unknown timestep spacing 'log'"),
    ],
)
def test_bad_annealing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepAnnealing(**arguments)


@pytest.mark.parametrize("step", [-1, 4])
def test_bad_steps(step: int) -> None:
    with pytest.raises(ValueError, match=f"step must be 0 to num_steps - 1, got {step} of 4 steps"):
        StepAnnealing().steps(step, 4)


def test_one_generator_and_a_list_of_it_draw_the_same_image(model: MAR) -> None:
    settings: dict[str, Any] = {"num_iter": 3, "guidance_scale": 2.0, **CALM}
    one = model.generate([1], **settings, generator=torch.Generator().manual_seed(4)).latents
    assert torch.equal(one, model.generate([1], **settings, generator=seeded(4)).latents)
