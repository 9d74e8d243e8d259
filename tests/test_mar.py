"""MAR: fast paths, orders, batches, annealing, inpainting, training, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from generators.annealing import StepAnnealing
from generators.mar import MAR, PRESETS
from generators.orders import RandomCosineMask
from mmsdk.bench.mar import PlainMAR
from mmsdk.errors import CheckpointError, UnknownNameError
from tests.tiny import tiny_mar

# Without timesteps near pure noise, where a random head divides by almost nothing.
CALM: dict[str, Any] = {"annealing": StepAnnealing(5, 5, "constant")}


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
        torch.testing.assert_close(batch[i : i + 1], single, atol=1e-3, rtol=1e-4)


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
    output = model.generate(
        [1], num_iter=4, **CALM, generator=seeded(0), callback=lambda step, latents: seen.append(latents)
    )
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
    changed[0, 1] = 9.0
    again = model.generate(caption_features=changed, caption_mask=mask, num_iter=2, **CALM, **draws).latents
    assert not torch.equal(latents[0], again[0])
    torch.testing.assert_close(latents[1], again[1])


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
    assert torch.equal(one, other)


def test_original_checkpoints_are_nested_and_tell_their_shapes(model: MAR) -> None:
    shapes = {"encoder_shape": model.config.encoder_shape, "decoder_shape": model.config.decoder_shape}
    loaded = MAR.from_original({"model_ema": model.state_dict(), "epoch": 3}, shapes)
    assert loaded.config.head_shape == model.config.head_shape
    with pytest.raises(CheckpointError, match="number of heads"):
        MAR.from_original(model.state_dict())
    with pytest.raises(CheckpointError):
        MAR.from_original({"weight": torch.zeros(2)}, shapes)
    with pytest.raises(UnknownNameError, match="MAR preset"):
        MAR.preset("XL")
    assert set(PRESETS) == {"B", "L", "H"}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_iter": 0}, "num_iter must be an integer of at least 1, got 0"),
        ({"num_iter": True}, "num_iter must be"),
        ({"num_steps": 1}, "must be 2 to 1000, got 1"),
        ({"num_steps": 5, "annealing": StepAnnealing()}, "not both"),
        ({"sampler": "dpm"}, "sampler"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"class_labels": [5]}, "0 to 4"),
        ({"class_labels": None}, "class-conditional"),
        ({"batch_size": 2}, "and a condition"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, "Pass latents and mask together"),
        ({"latents": torch.zeros(1, 3, 4, 5), "mask": torch.ones(16, dtype=torch.bool)}, r"latents must be \(batch, 3"),
        ({"latents": torch.zeros(1, 3, 4, 4), "mask": torch.zeros(16, dtype=torch.bool)}, "at least 1 token"),
        ({"latents": torch.zeros(2, 3, 4, 4), "mask": torch.ones(16, dtype=torch.bool)}, "1 conditions for 2"),
        ({"orders": torch.zeros(1, 16, dtype=torch.int64)}, "all masked positions"),
        ({"noise": [torch.zeros(1)]}, "noise"),
        ({"generator": seeded(1, 2)}, "generator"),
    ],
)
def test_bad_generations(model: MAR, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(**({"class_labels": [1], "num_iter": 2} | arguments))


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
        ({"num_classes": 0}, "num_classes of at least 1"),
        ({"condition": "text", "caption_dim": 0}, "caption_dim"),
        ({"condition": "image"}, "'class' or 'text', got 'image'"),
        ({"mask_ratio_min": 0.0}, "mask_ratio_min"),
        ({"diffusion_batch_mul": 0}, "diffusion_batch_mul"),
    ],
)
def test_bad_sizes(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_mar(**sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"upper": 4, "lower": 5}, "lower must be at most upper"),
        ({"upper": 0}, "upper must be"),
        ({"strategy": "quadratic"}, "annealing strategy"),
        ({"last_timestep": 1000}, "last_timestep must be"),
        ({"spacing": "log"}, "spacing"),
    ],
)
def test_bad_annealing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepAnnealing(**arguments)
