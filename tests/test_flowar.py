"""FlowAR: its caches and savings against a plain loop, its sampler by hand, training, loading, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from generators.annealing import StepAnnealing
from generators.flowar import GENERATION_PRESETS, PRESETS, FlowAR
from generators.guidance import ConstantGuidance, Guidance
from generators.heads.flow import FlowHead, flow_times
from mmsdk.errors import CheckpointError, UnknownNameError
from tests.tiny import tiny_flowar

LABELS = torch.tensor([3, 0, 4])
SCALES, CHANNELS = (1, 2, 4), 3
TOKENS = [1, 4, 16]


@pytest.fixture(scope="module", params=[True, False], ids=["cross", "plain"])
def model(request: pytest.FixtureRequest) -> FlowAR:
    return tiny_flowar(cross_attention=request.param)


@pytest.fixture(scope="module")
def cross() -> FlowAR:
    return tiny_flowar()


def make_generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def make_noise(batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, CHANNELS, generator=generator) for tokens in TOKENS]


def make_latents(batch: int = 3) -> Tensor:
    return torch.randn(batch, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Listed(Guidance):
    """A guidance scale for every scale."""

    listed: tuple[float, ...] = ()

    def scale(self, step: int, num_steps: int, progress: float | None = None) -> float:
        return self.listed[step]


@torch.no_grad()
def plain(model: FlowAR, noise: list[Tensor], guidance: list[float], steps: list[int], high: float) -> list[Tensor]:
    """No caches and no savings: the whole prefix for every scale, twice the rows always, the head from z each time."""
    rows = torch.cat([LABELS, torch.full_like(LABELS, model.config.num_classes)])
    scales: list[Tensor] = []
    for i, side in enumerate(SCALES):
        z = model.conditions([x.repeat(2, 1, 1, 1) for x in scales], rows)[:, -TOKENS[i] :]
        rotary = model._head_rotary.on(z.device)[model._slice(i)]
        x = noise[i]
        times = flow_times(steps[i])
        for t, end in zip(times[:-1], times[1:], strict=True):
            clock = model.flownet.time_embed(t)
            velocity = model.flownet.velocity(x.repeat(2, 1, 1), clock, model.flownet.prepare(z, rotary), rotary)
            cond, uncond = velocity.chunk(2)
            x = x + (end - t) * (uncond + (cond - uncond) * (guidance[i] if t < high else 1.0))
        scales.append(x.mT.unflatten(2, (side, side)))
    return scales


# ---------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("high", [0.0, 0.9, 2.0])
@pytest.mark.parametrize("guidance", [(1.0, 1.0, 1.0), (3.0, 2.0, 3.0), (2.0, 1.0, 1.0), (1.0, 0.0, 1.0)])
def test_generation_equals_the_plain_loop(model: FlowAR, guidance: tuple[float, ...], high: float) -> None:
    noise, scales = make_noise(), []
    model.generate(
        LABELS,
        guidance_scale=Listed(1.0, guidance),
        guidance_high=high,
        num_steps=5,
        noise=noise,
        callback=lambda _, latents: scales.append(latents),
    )
    expected = plain(model, noise, list(guidance), [5] * 3, high)
    for ours, theirs in zip(scales, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_number_guides_linearly(cross: FlowAR) -> None:
    noise = make_noise()
    output = cross.generate(LABELS, guidance_scale=3.0, num_steps=4, noise=noise)
    expected = plain(cross, noise, [1.0, 2.0, 3.0], [4] * 3, 0.9)[-1]
    torch.testing.assert_close(output.latents, expected, atol=1e-5, rtol=1e-4)
    assert output.trace.guidance == [1.0, 2.0, 3.0]
    assert cross.generate(LABELS, ConstantGuidance(2.0), num_steps=2).trace.guidance == [2.0] * 3


def test_annealing(cross: FlowAR) -> None:
    """Fewer steps from scale to scale: the plain loop with these, and as many passes."""
    noise = make_noise()
    output = cross.generate(LABELS, guidance_scale=2.0, annealing=StepAnnealing(8, 4), noise=noise)
    expected = plain(cross, noise, [1.0, 1.5, 2.0], [8, 6, 4], 0.9)[-1]
    torch.testing.assert_close(output.latents, expected, atol=1e-5, rtol=1e-4)
    assert output.trace.forwards == 3 + 8 + 6 + 4


def test_what_is_executed(cross: FlowAR) -> None:
    """Rows of every forward: the transformer, then the steps of the head, of which the first is at time 1."""

    def rows(*guidance: float, high: float = 0.9) -> list[int]:
        trace = cross.generate(LABELS, Listed(1.0, guidance), guidance_high=high, num_steps=4).trace
        assert trace.positions == [tokens for tokens in TOKENS for _ in range(5)]
        return trace.rows

    assert rows(1.0, 1.0, 1.0) == [3] * 15
    assert rows(1.0, 2.0, 3.0) == [6, 3, 3, 3, 3] + [6, 3, 6, 6, 6] * 2
    assert rows(1.0, 2.0, 3.0, high=1.5) == [6, 3, 3, 3, 3] + [6, 6, 6, 6, 6] * 2
    assert rows(1.0, 2.0, 1.0) == [6, 3, 3, 3, 3] + [6, 3, 6, 6, 6] + [3] * 5
    assert cross.generate(LABELS, num_steps=5).trace.forwards == 15  # an odd number of steps makes one less


def test_batch_equals_single(model: FlowAR) -> None:
    settings: dict[str, Any] = {"guidance_scale": 3.0, "num_steps": 4}
    together = model.generate(LABELS, generator=make_generators(1, 2, 3), **settings).latents
    for i in range(3):
        lone = model.generate(LABELS[i : i + 1], generator=make_generators(i + 1), **settings).latents
        torch.testing.assert_close(lone[0], together[i], atol=1e-5, rtol=1e-4)


def test_random_numbers(cross: FlowAR) -> None:
    before = torch.get_rng_state()
    one, other = (cross.generate(LABELS, num_steps=2).latents for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one, other)
    seeded = [cross.generate(LABELS, num_steps=2, generator=make_generators(5)[0]).latents for _ in range(2)]
    assert torch.equal(*seeded)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_draws_of_one_generator(cross: FlowAR, guidance: float) -> None:
    """Scale by scale; the published code also draws noise for the unconditional rows, which it does not use."""
    generator = make_generators(5)[0]
    rows = 3 if guidance == 1.0 else 6
    noise = [torch.randn(rows, tokens, CHANNELS, generator=generator)[:3] for tokens in TOKENS]
    drawn = cross.generate(LABELS, guidance, num_steps=4, generator=make_generators(5)[0]).latents
    assert torch.equal(drawn, cross.generate(LABELS, guidance, num_steps=4, noise=noise).latents)


def test_streaming_and_callback(cross: FlowAR) -> None:
    noise = make_noise()
    seen: list[tuple[int, Tensor]] = []
    latents, trace = cross.generate(
        LABELS, num_steps=2, noise=noise, callback=lambda *step: seen.append(step), return_dict=False
    )
    streamed = list(cross.iter_generate(LABELS, num_steps=2, noise=noise))
    assert [scale for scale, _ in seen] == [scale for scale, _ in streamed] == [0, 1, 2]
    for side, (_, one), (_, other) in zip(SCALES, seen, streamed, strict=True):
        assert one.shape == (3, CHANNELS, side, side) and torch.equal(one, other)
    assert torch.equal(latents, seen[-1][1]) and trace.forwards == 9


@pytest.mark.parametrize("scales", [(4,), (1, 4), (2, 4), (1, 3, 6)])
def test_other_scales(scales: tuple[int, ...]) -> None:
    model = tiny_flowar(scales=scales)
    output = model.generate([1, 2], guidance_scale=2.0, num_steps=2)
    assert output.latents.shape == (2, CHANNELS, scales[-1], scales[-1])
    loss = model(output.latents, [1, 2]).loss
    assert bool(loss.isfinite())


# ---------------------------------------------------------------------------------------------------- by hand


def test_times_by_hand() -> None:
    assert flow_times(2).tolist() == flow_times(3).tolist() == [1.0, 0.25, 0.0]
    torch.testing.assert_close(flow_times(6), torch.tensor([1.0, 0.65, 0.3, 0.25, 0.25 * 2 / 3, 0.25 / 3, 0.0]))
    assert torch.equal(flow_times(7), flow_times(6))


def test_constant_velocity_by_hand() -> None:
    model = tiny_flowar()
    final = model.flownet.final_layer.linear
    with torch.no_grad():
        final.weight.zero_()
        final.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    noise = make_noise()
    latents = model.generate(LABELS, guidance_scale=3.0, num_steps=4, noise=noise).latents
    torch.testing.assert_close(latents, (noise[-1] - final.bias).mT.unflatten(2, (4, 4)), atol=1e-6, rtol=0)


def test_pyramid_by_hand(cross: FlowAR) -> None:
    latents = torch.arange(16.0).view(1, 1, 4, 4)
    coarse, middle, fine = cross.pyramid(latents)
    assert (coarse.tolist(), middle.tolist()) == ([[[[7.5]]]], [[[[2.5, 4.5], [10.5, 12.5]]]])
    assert torch.equal(fine, latents)
    # One value stays itself; two go through a bicubic ramp to the finest scale, then means of pairs.
    assert cross.next_input(torch.full((1, 1, 1, 1), 3.0), 2).flatten().tolist() == [3.0] * 4
    ramp = cross.next_input(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]), 2)
    left = (-0.10546875 + 0.2265625) / 2  # cubic kernel with a = -0.75 at quarters, edges repeated
    torch.testing.assert_close(ramp.flatten(), torch.tensor([left, 1 - left, left, 1 - left]))


def test_coarse_positions_are_fine_ones(cross: FlowAR) -> None:
    table = cross._rotary.on(torch.device("cpu"))
    fine = table[5:].view(4, 4, -1)
    assert torch.equal(table[1:5], fine[::2, ::2].flatten(0, 1)) and torch.equal(table[0], fine[0, 0])


# ---------------------------------------------------------------------------------------------------- training


def test_loss_by_hand() -> None:
    model = tiny_flowar()
    with torch.no_grad():
        model.flownet.final_layer.linear.weight.zero_()
        model.flownet.final_layer.linear.bias.zero_()
    latents, noise = make_latents(), torch.cat(make_noise(), 1)
    velocity, loss = model(latents, LABELS, noise=noise, return_dict=False)
    assert velocity.shape == noise.shape and not bool(velocity.any())
    target = torch.cat([x.flatten(2).mT for x in model.pyramid(latents)], 1)
    torch.testing.assert_close(loss, (noise - target).square().mean())


def test_scales_see_coarser_ones_only(cross: FlowAR) -> None:
    labels = LABELS[:1]
    scales = [torch.randn(1, CHANNELS, side, side) for side in SCALES[:2]]
    base = cross.conditions(scales, labels)
    for changed in range(2):
        other = cross.conditions([x + (i == changed) for i, x in enumerate(scales)], labels)
        different = [bool((other[:, cross._slice(i)] != base[:, cross._slice(i)]).any()) for i in range(3)]
        assert different == [i > changed for i in range(3)]


def test_training_reaches_every_parameter(model: FlowAR) -> None:
    model.generate(LABELS, num_steps=2)  # tables made before must not disturb
    output = model(make_latents(), LABELS, drop_condition=torch.tensor([True, False, False]))
    model.zero_grad()
    output.loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_a_new_model_predicts_zero() -> None:
    torch.manual_seed(0)
    model = FlowAR(
        hidden_size=16, encoder_layers=1, decoder_layers=1, num_heads=2, head_width=64, head_depth=1, scales=(1, 2)
    )
    output = model(torch.ones(2, 16, 2, 2), [0, 1])
    assert not bool(output.velocity.any())
    output.loss.backward()
    gradient = model.flownet.final_layer.linear.weight.grad
    assert gradient is not None and bool(gradient.any())


def test_dropped_condition_is_the_unconditional_class(cross: FlowAR) -> None:
    settings = {"times": torch.rand(3, 3), "noise": torch.cat(make_noise(), 1)}
    dropped = cross(make_latents(), LABELS, drop_condition=torch.ones(3), **settings).velocity
    others = cross(make_latents(), [1, 1, 1], drop_condition=torch.ones(3), **settings).velocity
    assert torch.equal(dropped, others)
    assert not torch.equal(dropped, cross(make_latents(), LABELS, **settings).velocity)


def test_drawn_times_and_noise(cross: FlowAR) -> None:
    losses = [cross(make_latents(), LABELS, generator=make_generators(seed)[0]).loss.item() for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]
    stream = make_generators(3)[0]
    times = torch.randn(3, 3, generator=stream).sigmoid()
    noise = torch.randn(3, 21, CHANNELS, generator=stream)
    assert cross(make_latents(), LABELS, times, noise).loss.item() == losses[0]


# ---------------------------------------------------------------------------------------------------- loading


def test_saved_model_loads(tmp_path: Path, model: FlowAR) -> None:
    model.save_pretrained(tmp_path)
    loaded = FlowAR.from_pretrained(tmp_path)
    settings: dict[str, Any] = {"guidance_scale": 2.0, "num_steps": 2, "noise": make_noise()}
    # Weights lie elsewhere in memory, so products may round differently.
    expected = model.generate(LABELS, **settings).latents
    torch.testing.assert_close(loaded.generate(LABELS, **settings).latents, expected, atol=1e-5, rtol=1e-4)


def published_state(model: FlowAR) -> dict[str, Tensor]:
    """Return a state dict with the tables that published ones hold."""
    scale = torch.cat([torch.full((tokens,), i) for i, tokens in enumerate(TOKENS)])
    mask = torch.zeros(21, 21).masked_fill(scale[:, None] < scale, float("-inf"))
    tables = {"mask": mask[None, None], "flownet.res_blocks.0.attn.rope.freqs": torch.ones(16)}
    tables |= {f"encoder_blocks.{i}.attn.rope.freqs": torch.ones(2) for i in range(1)}
    return model.state_dict() | tables


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model_ema": s}, lambda s: {"model": s}])
def test_original_checkpoint(tmp_path: Path, model: FlowAR, wrap: Any) -> None:
    torch.save(wrap(published_state(model)), tmp_path / "flowar.pth")
    loaded = FlowAR.from_original(tmp_path / "flowar.pth")
    assert not loaded.training
    assert (loaded.scales, loaded.config.num_heads) == (SCALES, 2)
    settings: dict[str, Any] = {"guidance_scale": 2.0, "num_steps": 2, "noise": make_noise()}
    expected = model.generate(LABELS, **settings).latents
    torch.testing.assert_close(loaded.generate(LABELS, **settings).latents, expected, atol=1e-5, rtol=1e-4)


def test_original_checkpoint_refuses(cross: FlowAR) -> None:
    state_dict = published_state(cross)
    with pytest.raises(CheckpointError, match="does not tell num_heads; pass it"):
        FlowAR.from_original(cross.state_dict())
    with pytest.raises(CheckpointError, match="does not tell scales; pass them"):
        FlowAR.from_original(cross.state_dict(), {"num_heads": 2})
    assert FlowAR.from_original(cross.state_dict(), {"num_heads": 2, "scales": SCALES}).scales == SCALES
    with pytest.raises(CheckpointError, match="no FlowAR checkpoint: 'z_proj.weight'"):
        FlowAR.from_original({"encoder.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="no flow head under 'flownet.'"):
        FlowAR.from_original({k: v for k, v in state_dict.items() if not k.startswith("flownet.")})
    with pytest.raises(CheckpointError, match="stranger"):
        FlowAR.from_original(state_dict | {"stranger": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="decoder_norm.weight"):
        FlowAR.from_original({k: v for k, v in state_dict.items() if k != "decoder_norm.weight"})


def test_presets() -> None:
    assert PRESETS.keys() == GENERATION_PRESETS.keys()
    with torch.device("meta"):
        assert FlowAR.preset("S", num_classes=10).class_emb.num_embeddings == 11
    with pytest.raises(UnknownNameError, match="Unknown FlowAR preset 'B'.*Available: H, L, S"):
        FlowAR.preset("B")


def test_half_precision_keeps_exact_rotations(cross: FlowAR) -> None:
    cast = tiny_flowar().to(torch.bfloat16)
    assert cast._head_rotary.on(torch.device("cpu")).dtype == torch.complex64
    settings: dict[str, Any] = {"guidance_scale": 2.0, "num_steps": 4, "noise": make_noise()}
    latents, expected = (m.generate(LABELS, **settings).latents for m in (cast, cross))
    assert latents.dtype == torch.float32
    assert (latents - expected).abs().mean() < 0.1 * expected.abs().mean()


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 20}, r"hidden_size must divide by 4 \* num_heads, got 20 and 2"),
        ({"head_depth": 0}, "head_depth must be at least 1, got 0"),
        ({"head_width": 96}, "flow head must be a multiple of 64, got 96"),
        ({"scales": ()}, r"scales must be positive and grow, got \(\)"),
        ({"scales": (1, 2, 2)}, r"scales must be positive and grow, got \(1, 2, 2\)"),
        ({"scales": (0, 2)}, r"scales must be positive and grow, got \(0, 2\)"),
        ({"scales": (1, 3, 4)}, r"Every scale must divide the last, 4; got \(1, 3, 4\)"),
    ],
)
def test_bad_configuration(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_flowar(**config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 1}, "flow steps must be an integer of at least 2, got 1"),
        ({"num_steps": 2.0}, "flow steps must be an integer of at least 2, got 2.0"),
        ({"annealing": StepAnnealing(8, 1)}, "flow steps must be an integer of at least 2, got 1"),
        ({"num_steps": 8, "annealing": StepAnnealing(8, 4)}, "num_steps or annealing, not both; got num_steps=8"),
        ({"guidance_scale": float("nan")}, "finite and at least 0, got nan"),
        ({"guidance_high": -0.5}, "guidance_high must be at least 0, .* got -0.5"),
        ({"guidance_high": float("nan")}, "guidance_high must be at least 0, .* got nan"),
        ({"generator": make_generators(1, 2)}, "each of 3 rows, got 2"),
        ({"generator": make_generators(1)[0], "noise": make_noise()}, "noise or a generator, not both"),
        ({"noise": make_noise()[:2]}, r"noise must hold tensors of the shapes \[\(3, 1, 3\), "),
        ({"noise": make_noise(2)}, r"got \[\(2, 1, 3\), "),
        ({"class_labels": [0, 5]}, "Class labels must be 0 to 4, got 5 at position 1"),
    ],
)
def test_bad_generation(cross: FlowAR, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):  # at once, not at the first scale
        cross.iter_generate(**({"class_labels": LABELS} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": torch.zeros(3, CHANNELS, 8, 8)}, r"latents must be \(batch, 3, 4, 4\), got \(3, 3, 8, 8\)"),
        ({"class_labels": [0, 1]}, "Got 2 class_labels for 3 latents"),
        ({"times": torch.zeros(3, 4)}, r"times must be \(3, 3\), got \(3, 4\)"),
        ({"noise": torch.zeros(3, 20, 3)}, r"noise must be \(3, 21, 3\), got \(3, 20, 3\)"),
    ],
)
def test_bad_training_input(cross: FlowAR, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross(**({"latents": make_latents(), "class_labels": LABELS} | arguments))


def test_the_head_alone() -> None:
    """It samples any grid of positions, without FlowAR around it."""
    torch.manual_seed(0)
    head = FlowHead(condition_dim=8, width=64, depth=1, latent_channels=2, cross_attention=True)
    rotary = torch.ones(9, 32, dtype=torch.complex64)
    sampled = head.sample(torch.randn(2, 9, 8), torch.randn(2, 9, 2), rotary, num_steps=3)
    assert sampled.shape == (2, 9, 2) and bool(sampled.isfinite().all())
