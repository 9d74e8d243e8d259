"""xAR: its cache and savings against a plain loop, its samplers by hand, training, loading, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from generators.annealing import StepAnnealing
from generators.base import Trace
from generators.guidance import ConstantGuidance, Guidance, IntervalGuidance
from generators.heads.flow import BlockState
from generators.xar import GENERATION_PRESETS, PRESETS, XAR, sampler_times
from mmsdk.errors import CheckpointError, UnknownNameError
from tests.tiny import tiny_xar

LABELS = torch.tensor([3, 0, 4])
CELLS, TOKENS, CHANNELS = 4, 4, 3


@pytest.fixture(scope="module")
def model() -> XAR:
    return tiny_xar()


def make_generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def make_noise(steps: list[int], batch: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, batch, TOKENS, CHANNELS, generator=generator, dtype=torch.float64) for n in steps]


def make_latents(batch: int = 3) -> Tensor:
    return torch.randn(batch, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Listed(Guidance):
    """A scale for every cell."""

    listed: tuple[float, ...] = ()

    def scale(self, step: int, num_steps: int, progress: float | None = None) -> float:
        return self.listed[step]


@torch.no_grad()
def plain(model: XAR, noise: list[Tensor], scales: list[float], steps: list[int], euler: bool = False) -> Tensor:
    """No cache and no savings: the whole prefix at every step, twice the rows always, the score as it is defined."""
    rows = torch.cat([LABELS, torch.full_like(LABELS, model.config.num_classes)])
    finished: list[Tensor] = []
    for cell in range(CELLS):
        x = noise[cell][0].double()
        times = sampler_times("euler" if euler else "euler_maruyama", steps[cell])
        for step, (t, end) in enumerate(zip(times[:-1], times[1:], strict=True)):
            cells = torch.stack([*finished, x.float()], 1).repeat(2, 1, 1, 1)
            time = torch.zeros(len(rows), cell + 1, dtype=torch.float64)
            time[:, -1] = t
            cond, uncond = model.velocity(cells, time, rows)[:, -1].double().chunk(2)
            if euler:
                x = x + (end - t) * (uncond + (cond - uncond) * scales[cell])
                continue
            drifts = [v - t * (-(1 - t) * v - x) / t for v in (cond, uncond)]
            x = x + (end - t) * (drifts[1] + (drifts[0] - drifts[1]) * scales[cell])
            if step < steps[cell] - 1:
                x = x + (2 * t).sqrt() * (end - t).abs().sqrt() * noise[cell][step + 1]
        finished.append(x.float())
    return model.from_cells(torch.stack(finished, 1))


# ---------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("euler", [False, True])
@pytest.mark.parametrize(
    "scales", [(1.0, 1.0, 1.0, 1.0), (3.0, 3.0, 3.0, 3.0), (2.0, 1.0, 1.0, 1.0), (1.0, 0.0, 2.5, 1.0)]
)
def test_generation_equals_the_plain_loop(model: XAR, scales: tuple[float, ...], euler: bool) -> None:
    noise = make_noise([1 if euler else 5] * CELLS)
    output = model.generate(
        LABELS,
        guidance_scale=Listed(1.0, scales),
        num_steps=5,
        sampler="euler" if euler else "euler_maruyama",
        noise=noise,
    )
    expected = plain(model, noise, list(scales), [5] * CELLS, euler)
    torch.testing.assert_close(output.latents, expected, atol=1e-5, rtol=1e-5)


def test_a_number_guides_linearly(model: XAR) -> None:
    noise = make_noise([4] * CELLS)
    output = model.generate(LABELS, guidance_scale=4.0, num_steps=4, noise=noise)
    torch.testing.assert_close(
        output.latents, plain(model, noise, [1.0, 2.0, 3.0, 4.0], [4] * CELLS), atol=1e-5, rtol=1e-5
    )
    assert output.trace.guidance == [1.0, 2.0, 3.0, 4.0]


def test_annealing(model: XAR) -> None:
    """Fewer steps from cell to cell: the plain loop with these, and as many passes."""
    steps = [7, 5, 4, 3]
    noise = make_noise(steps)
    output = model.generate(LABELS, guidance_scale=2.5, annealing=StepAnnealing(7, 3), noise=noise)
    torch.testing.assert_close(output.latents, plain(model, noise, [1.0, 1.5, 2.0, 2.5], steps), atol=1e-5, rtol=1e-5)
    assert output.trace.forwards == sum(steps) + CELLS - 1
    constant = StepAnnealing(9, 3, strategy="constant")
    fixed, annealed = (
        model.generate(LABELS, noise=make_noise([3] * CELLS), **steps).latents
        for steps in ({"num_steps": 3}, {"annealing": constant})
    )
    assert torch.equal(fixed, annealed)


def test_what_is_executed(model: XAR) -> None:
    """Rows of every forward: steps of a cell, then its entry into the cache."""

    def rows(guidance: float | Guidance) -> list[int]:
        trace = model.generate(LABELS, guidance_scale=guidance, num_steps=2).trace
        assert trace.positions == [TOKENS] * trace.forwards
        return trace.rows

    assert rows(1.0) == [3] * 11
    assert rows(4.0) == [3, 3, 6] + [6, 6, 6] * 2 + [6, 6]
    assert rows(Listed(1.0, (2.0, 1.0, 3.0, 1.0))) == [6, 6, 6] + [3, 3, 6] + [6, 6, 3] + [3, 3]
    assert rows(IntervalGuidance(2.0, 0)) == [6, 6, 6] + [6, 6, 3] + [3, 3, 3] + [3, 3]


def test_batch_equals_single(model: XAR) -> None:
    settings: dict[str, Any] = {"guidance_scale": 3.0, "num_steps": 4}
    together = model.generate(LABELS, generator=make_generators(1, 2, 3), **settings).latents
    for i in range(3):
        lone = model.generate(LABELS[i : i + 1], generator=make_generators(i + 1), **settings).latents
        torch.testing.assert_close(lone[0], together[i], atol=1e-5, rtol=1e-5)
        single = model.generate(LABELS[i : i + 1], generator=make_generators(i + 1)[0], **settings).latents
        assert torch.equal(single, lone)


def test_random_numbers(model: XAR) -> None:
    before = torch.get_rng_state()
    one, other = (model.generate(LABELS, num_steps=2).latents for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one, other)
    seeded = [model.generate(LABELS, num_steps=2, generator=make_generators(5)[0]).latents for _ in range(2)]
    assert torch.equal(*seeded)


def test_draws_of_one_generator(model: XAR) -> None:
    """Cell by cell: its start in float32, then every step but the last in float64."""
    generator = make_generators(5)[0]
    noise = []
    for _ in range(CELLS):
        start = torch.randn(3, TOKENS, CHANNELS, generator=generator)
        steps = [torch.randn(3, TOKENS, CHANNELS, generator=generator, dtype=torch.float64) for _ in range(3)]
        noise.append(torch.stack([start.double(), *steps]))
    drawn = model.generate(LABELS, num_steps=4, generator=make_generators(5)[0]).latents
    assert torch.equal(drawn, model.generate(LABELS, num_steps=4, noise=noise).latents)


def test_streaming_and_callback(model: XAR) -> None:
    noise = make_noise([3] * CELLS)
    full = model.to_cells(model.generate(LABELS, num_steps=3, noise=noise).latents)
    seen: list[tuple[int, Tensor]] = []
    latents, trace = model.generate(
        LABELS, num_steps=3, noise=noise, callback=lambda *step: seen.append(step), return_dict=False
    )
    assert trace.forwards == 15
    streamed = list(model.iter_generate(LABELS, num_steps=3, noise=noise))
    for steps in (seen, streamed):
        assert [cell for cell, _ in steps] == list(range(CELLS))
        for cell, partial in steps:
            cells = model.to_cells(partial)
            assert torch.equal(cells[:, : cell + 1], full[:, : cell + 1])
            assert not bool(cells[:, cell + 1 :].any())
    assert torch.equal(model.to_cells(latents), full)


def test_one_cell_and_one_step() -> None:
    model = tiny_xar(cell_size=4)
    assert (model.num_cells, model.cell_tokens) == (1, 16)
    output = model.generate([1, 2], guidance_scale=3.0, num_steps=1)
    assert output.latents.shape == (2, CHANNELS, 4, 4)
    assert output.trace.rows == [4]  # of a single step, linear guidance is full


def test_trace_is_filled(model: XAR) -> None:
    trace = Trace()
    assert model.generate(LABELS, num_steps=1, trace=trace).trace is trace
    assert trace.forwards == 7


# ---------------------------------------------------------------------------------------------------- by hand


def test_times_by_hand() -> None:
    assert sampler_times("euler", 4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert sampler_times("euler_maruyama", 1).tolist() == [1, 0]
    torch.testing.assert_close(
        sampler_times("euler_maruyama", 4), torch.tensor([1, 0.68, 0.36, 0.04, 0], dtype=torch.float64)
    )


def test_constant_velocity_by_hand() -> None:
    model = tiny_xar()
    with torch.no_grad():
        model.pred.weight.zero_()
        model.pred.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    velocity = model.pred.bias.double()
    noise = make_noise([1] * CELLS)
    start = model.from_cells(torch.cat(noise).transpose(0, 1).float())
    euler = model.generate(LABELS, num_steps=3, sampler="euler", noise=noise).latents
    torch.testing.assert_close(euler, start - model.pred.bias[:, None, None], atol=1e-6, rtol=0)
    # One stochastic step goes from time 1 to 0: x - (velocity + x).
    once = model.generate(LABELS, num_steps=1, noise=noise).latents
    torch.testing.assert_close(once, -model.pred.bias[:, None, None].expand_as(once), atol=1e-6, rtol=0)
    # Two: to 0.04 with noise, then to 0 without.
    noise = make_noise([2] * CELLS)
    twice = model.to_cells(model.generate(LABELS, num_steps=2, noise=noise).latents)[:, 0]
    x = noise[0][0] - 0.96 * (velocity + noise[0][0]) + (2 * 0.96) ** 0.5 * noise[0][1]
    torch.testing.assert_close(twice, (x - 0.04 * (1.96 * velocity + x)).float(), atol=1e-6, rtol=0)


def test_cells_by_hand(model: XAR) -> None:
    latents = torch.arange(16.0).view(1, 1, 4, 4)
    assert model.to_cells(latents)[0, :, :, 0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]
    assert torch.equal(model.from_cells(model.to_cells(latents)), latents)


# ---------------------------------------------------------------------------------------------------- training


def test_loss_by_hand() -> None:
    model = tiny_xar()
    with torch.no_grad():
        model.pred.weight.zero_()
        model.pred.bias.zero_()
    latents, noise = make_latents(), make_latents().flip(0)
    velocity, loss = model(latents, LABELS, noise=noise, return_dict=False)
    assert not bool(velocity.any())
    torch.testing.assert_close(loss, (noise - latents).square().mean())


def test_cells_see_themselves_and_noisy_ones_before(model: XAR) -> None:
    latents, noise, times = make_latents(), make_latents().flip(0), torch.rand(3, CELLS)
    base = model.to_cells(model(latents, LABELS, times, noise).velocity)
    for cell in range(CELLS):
        cells = model.to_cells(noise).clone()
        cells[:, cell] += 1
        other = model.to_cells(model(latents, LABELS, times, model.from_cells(cells)).velocity)
        changed = [bool((other[:, i] - base[:, i]).abs().max() > 1e-6) for i in range(CELLS)]
        assert changed == [i >= cell for i in range(CELLS)]


def test_training_reaches_every_parameter() -> None:
    model = tiny_xar().train()
    model.generate(LABELS, num_steps=1)  # tables made before must not disturb
    output = model(make_latents(), LABELS, drop_condition=torch.tensor([True, False, False]))
    output.loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_a_new_model_predicts_zero() -> None:
    torch.manual_seed(0)
    model = XAR(
        hidden_size=16, encoder_layers=1, decoder_layers=1, num_heads=2, grid_size=4, cell_size=2, num_classes=5
    )
    output = model(torch.ones(2, 16, 4, 4), [0, 1])
    assert not bool(output.velocity.any())
    output.loss.backward()
    assert model.pred.weight.grad is not None and bool(model.pred.weight.grad.any())


def test_dropped_condition_is_the_unconditional_class(model: XAR) -> None:
    settings = {"times": torch.rand(3, CELLS), "noise": make_latents().flip(0)}
    dropped = model(make_latents(), LABELS, drop_condition=torch.ones(3), **settings).velocity
    others = model(make_latents(), [1, 1, 1], drop_condition=torch.ones(3), **settings).velocity
    assert torch.equal(dropped, others)
    assert not torch.equal(dropped, model(make_latents(), LABELS, **settings).velocity)


def test_drawn_times_and_noise(model: XAR) -> None:
    losses = [model(make_latents(), LABELS, generator=make_generators(seed)[0]).loss.item() for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]
    stream = make_generators(3)[0]
    times = torch.randn(3, CELLS, generator=stream).sigmoid()
    noise = torch.randn(3, CHANNELS, 4, 4, generator=stream)
    assert model(make_latents(), LABELS, times, noise).loss.item() == losses[0]


# ---------------------------------------------------------------------------------------------------- state, loading


def test_state_rolls_back_and_selects() -> None:
    state = BlockState(torch.arange(6.0).view(1, 1, 6, 1, 1, 1).repeat(1, 2, 1, 1, 4, 1))
    state.append(3)
    state.rollback(1)
    assert (state.length, state.layer(0).start, state.num_rows) == (1, 1, 6)
    state.select_rows([4, 2])
    assert state.layer(0).keys[:, 0, 0, 0].tolist() == [4.0, 2.0]
    with pytest.raises(ValueError, match="from 0 to 1, got 2"):
        state.rollback(2)


def test_saved_model_loads(tmp_path: Path, model: XAR) -> None:
    model.save_pretrained(tmp_path)
    loaded = XAR.from_pretrained(tmp_path)
    noise = make_noise([3] * CELLS)
    expected = model.generate(LABELS, guidance_scale=2.0, num_steps=3, noise=noise).latents
    # Weights lie elsewhere in memory, so products may round differently.
    latents = loaded.generate(LABELS, guidance_scale=2.0, num_steps=3, noise=noise).latents
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)


def published_state(model: XAR) -> dict[str, Tensor]:
    """Return a state dict with the tables that published ones hold."""
    cell = torch.arange(CELLS).repeat_interleave(TOKENS)
    mask = torch.zeros(16, 16).masked_fill(cell[:, None] < cell, float("-inf"))
    tables = {"mask": mask[None, None]}
    for part, layers in (("encoder", 1), ("decoder", 2)):
        for i in range(layers):
            tables[f"{part}_blocks.{i}.attn.rope.freqs"] = torch.ones(2)
            tables[f"{part}_blocks.{i}.attn.rope.freqs_cos"] = torch.ones(16, 8)
    return model.state_dict() | tables


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model_ema": s}, lambda s: {"module": s}])
def test_original_checkpoint(tmp_path: Path, model: XAR, wrap: Any) -> None:
    torch.save(wrap(published_state(model)), tmp_path / "xar.pt")
    loaded = XAR.from_original(tmp_path / "xar.pt")
    for name in (
        "hidden_size",
        "encoder_layers",
        "decoder_layers",
        "num_heads",
        "grid_size",
        "cell_size",
        "num_classes",
    ):
        assert loaded.config[name] == model.config[name]
    assert not loaded.training
    noise = make_noise([2] * CELLS)
    expected = model.generate(LABELS, num_steps=2, noise=noise).latents
    latents = loaded.generate(LABELS, num_steps=2, noise=noise).latents
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)


def test_original_checkpoint_refuses(model: XAR) -> None:
    state_dict = published_state(model)
    with pytest.raises(CheckpointError, match="does not tell num_heads; pass it"):
        XAR.from_original(model.state_dict())
    with pytest.raises(CheckpointError, match="does not tell cell_size; pass it"):
        XAR.from_original(model.state_dict(), {"num_heads": 2})
    assert XAR.from_original(model.state_dict(), {"num_heads": 2, "cell_size": 2}).num_cells == CELLS
    with pytest.raises(CheckpointError, match="no xAR checkpoint: 'z_proj.weight'"):
        XAR.from_original({"encoder.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="stranger"):
        XAR.from_original(state_dict | {"stranger": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="pred.bias"):
        XAR.from_original({key: value for key, value in state_dict.items() if key != "pred.bias"})
    with pytest.raises(CheckpointError, match="encoder_pos_embed_learned"):
        XAR.from_original({k: v for k, v in state_dict.items() if k != "encoder_pos_embed_learned"})


def test_presets() -> None:
    assert PRESETS.keys() == GENERATION_PRESETS.keys()
    with torch.device("meta"):
        assert XAR.preset("B", num_classes=10).class_emb.num_embeddings == 11
    with pytest.raises(UnknownNameError, match="Unknown xAR preset 'XL'.*Available: B, H, L"):
        XAR.preset("XL")


def test_half_precision_keeps_exact_rotations(model: XAR) -> None:
    cast = tiny_xar().to(torch.bfloat16)
    assert cast._rotary.on(torch.device("cpu")).dtype == torch.complex64
    noise = make_noise([3] * CELLS)
    settings: dict[str, Any] = {"guidance_scale": 2.0, "num_steps": 3, "noise": noise}
    latents, expected = (m.generate(LABELS, **settings).latents for m in (cast, model))
    assert latents.dtype == torch.float32
    assert (latents - expected).abs().mean() < 0.1 * expected.abs().mean()


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 20}, r"hidden_size must divide by 4 \* num_heads, got 20 and 2"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"cell_size": 3}, "cell_size must divide grid_size, got 3 and 4"),
        ({"cell_size": 8}, "cell_size must divide grid_size, got 8 and 4"),
        ({"cell_size": 0}, "cell_size must divide grid_size, got 0 and 4"),
    ],
)
def test_bad_configuration(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_xar(**config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "flow steps must be an integer of at least 1, got 0"),
        ({"num_steps": 2.0}, "flow steps must be an integer of at least 1, got 2.0"),
        ({"num_steps": True}, "flow steps must be an integer of at least 1, got True"),
        ({"num_steps": 9, "annealing": StepAnnealing(9, 3)}, "num_steps or annealing, not both; got num_steps=9"),
        ({"guidance_scale": -1.0}, "finite and at least 0, got -1.0"),
        ({"guidance_scale": Listed(1.0, (1.0, 1.0, -2.0, 1.0))}, "at least 0, got -2.0 at block 2"),
        ({"sampler": "euler_maryama"}, "Unknown sampler 'euler_maryama'. Did you mean 'euler_maruyama'"),
        ({"generator": make_generators(1, 2)}, "each of 3 rows, got 2"),
        ({"generator": make_generators(1)[0], "noise": make_noise([3] * 4)}, "noise or a generator, not both"),
        ({"noise": make_noise([3] * 3), "num_steps": 3}, r"noise must hold tensors of the shapes \[\(3, 3, 4, 3\), "),
        ({"noise": make_noise([3] * 4), "num_steps": 4}, r"got \[\(3, 3, 4, 3\), "),
        ({"noise": make_noise([3] * 4), "num_steps": 3, "sampler": "euler"}, r"shapes \[\(1, 3, 4, 3\), "),
        ({"class_labels": [0, 5]}, "Class labels must be 0 to 4, got 5 at position 1"),
        ({"class_labels": [-1]}, "Class labels must be 0 to 4, got -1 at position 0"),
        ({"class_labels": torch.zeros(2, 2, dtype=torch.int64)}, r"class_labels must be \(batch,\), got \(2, 2\)"),
        ({"class_labels": torch.zeros(0, dtype=torch.int64)}, r"class_labels must be \(batch,\), got \(0,\)"),
    ],
)
def test_bad_generation(model: XAR, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):  # at once, not at the first cell
        model.iter_generate(**({"class_labels": LABELS} | arguments))


def test_bad_types(model: XAR) -> None:
    with pytest.raises(TypeError, match="annealing must be a StepAnnealing, got 15"):
        model.generate([0], annealing=15)
    with pytest.raises(TypeError, match="Class labels must be integers, got torch.float32"):
        model.generate([0.5])
    with pytest.raises(TypeError, match="Generator 1 must be a torch.Generator, got int"):
        model.generate([0, 1], generator=[make_generators(1)[0], 2])
    with pytest.raises(TypeError, match="must be a number, got '3'"):
        model.generate([0], guidance_scale="3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": torch.zeros(3, 4, 4, CHANNELS)}, r"latents must be \(batch, 3, 4, 4\), got \(3, 4, 4, 3\)"),
        ({"class_labels": [0, 1]}, "Got 2 class_labels for 3 latents"),
        ({"times": torch.zeros(3, 3)}, r"times must be \(3, 4\), got \(3, 3\)"),
        ({"times": torch.full((3, 4), 1.5)}, r"times must be in \[0, 1\]"),
        ({"noise": torch.zeros(3, 3, 4, 5)}, r"noise must be \(3, 3, 4, 4\), got \(3, 3, 4, 5\)"),
        ({"drop_condition": torch.zeros(2)}, r"drop_condition must be \(3,\), one per row, got \(2,\)"),
    ],
)
def test_bad_training_input(model: XAR, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**({"latents": make_latents(), "class_labels": LABELS} | arguments))


def test_constant_guidance_is_not_linear(model: XAR) -> None:
    trace = model.generate(LABELS, guidance_scale=ConstantGuidance(2.0), num_steps=1).trace
    assert trace.guidance == [2.0] * CELLS
