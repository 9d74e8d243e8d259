"""The FlexTok benchmark on a tiny model: both sides agree, or are not compared; what it counts is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmsdk.bench import flextok as flextok_bench
from mmsdk.bench.flextok import PeakMemory, PlainFlexTok, flop_counter, transformer_flops
from mmsdk.bench.runner import BenchResult, run_benchmark
from mmsdk.errors import MMSDKError, UnknownNameError
from tests.tiny import tiny_flextok
from tokenizers_img.flextok import FlexTok

PUBLISHED = FlexTok.presets
OPERATIONS = ["encoder", "tokenize", "flow decoder", "detokenize"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the published sizes by a tiny one."""
    config = {k: v for k, v in tiny_flextok().config.items() if not k.startswith("_")}
    monkeypatch.setattr(FlexTok, "presets", {"tiny": config})


def run(**options: Any) -> BenchResult:
    settings: dict[str, Any] = {"preset": "tiny", "num_tokens": 3, "batch_size": 2, "repeats": 1}
    return run_benchmark("flextok", **settings | options)


# ---------------------------------------------------------------- the plain path


@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_the_plain_path_gives_our_results(packed: bool) -> None:
    model, lengths = tiny_flextok(), torch.tensor([3, 8, 1])
    plain, latents, noise = PlainFlexTok(model, packed), draw(3, 4, 8, 8), draw(3, 4, 8, 8, seed=1)
    features = plain.features(latents)
    torch.testing.assert_close(features, model.encode_features(latents), atol=1e-5, rtol=0)
    codes = model.quantize(features).latents
    ours = model.sample_latents(codes, lengths, noise, 3, 7.5)
    torch.testing.assert_close(plain.sample(codes, lengths, noise, 3, 7.5), ours, atol=1e-5, rtol=0)
    assert not torch.allclose(plain.sample(codes, lengths, noise, 3, 2.0), ours, atol=1e-3)
    assert not torch.allclose(plain.sample(codes, lengths.clamp(max=7), noise, 3, 7.5), ours, atol=1e-4)


@torch.no_grad()
def test_images_in_one_sequence_do_not_see_each_other() -> None:
    model = tiny_flextok()
    plain, latents, drop = PlainFlexTok(model), draw(2, 4, 8, 8), torch.tensor([False, True])
    others = torch.cat([latents[:1], draw(1, 4, 8, 8, seed=1)])
    codes, times, lengths = draw(2, 8, 2), torch.tensor([0.9, 0.2]), torch.tensor([5, 2])
    for function in (plain.features, lambda x: plain.velocity(x, times, codes, lengths, drop)):
        first, second = function(latents), function(others)
        torch.testing.assert_close(first[0], second[0], atol=1e-6, rtol=0)
        assert not torch.allclose(first[1], second[1], atol=1e-3)
    lengths_seen: list[torch.Size] = []
    model.flow_decoder.blocks[0].attn.register_forward_hook(lambda m, inputs, out: lengths_seen.append(out.shape))
    for packed in (True, False):
        PlainFlexTok(model, packed).velocity(latents, times, codes, lengths, drop)
    assert lengths_seen == [(1, 48, 16), (2, 24, 16)]


# ---------------------------------------------------------------- what is counted


def test_memory_by_hand() -> None:
    known = torch.zeros(1000)
    with PeakMemory([known]) as memory:
        first = known + 1  # 4000 bytes
        second = first.view(10, 100)[:5] * 2  # and 2000
        del first
        third = known[:10].clone()  # 2040 now
        known.add_(1)
        del second
    assert memory.peak == 6000
    assert memory.live == third.nbytes == 40


@pytest.mark.parametrize("num_tokens", [3, 7, 8])
@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_the_formula_is_what_torch_counts(num_tokens: int, packed: bool) -> None:
    model, batch = tiny_flextok(), 3
    plain, latents, codes = PlainFlexTok(model, packed), draw(3, 4, 8, 8), draw(3, 8, 2)
    lengths, drop = torch.full((batch,), num_tokens), torch.ones(batch, dtype=torch.bool)
    network, times = model.flow_decoder, torch.ones(batch)
    modulations = network.modulations(times[:1])

    def our_step() -> None:
        network(latents, *network.registers(codes, lengths), modulations)
        network(latents, *network.registers(codes, lengths, drop), modulations)

    def plain_step() -> None:
        plain.velocity(latents, times, codes, lengths, ~drop)
        plain.velocity(latents, times, codes, lengths, drop)

    measured = []
    for function in (
        lambda: model.encode_features(latents, num_tokens), lambda: plain.features(latents), our_step, plain_step,
    ):  # fmt: skip
        with flop_counter() as counter:
            function()
        # Named by their class where nothing around them is called as a module.
        names = (".attn", ".mlp", "Attention", "SwiGLU")
        counts = counter.get_flop_counts().items()
        measured.append(sum(sum(count.values()) for name, count in counts if str(name).endswith(names)))
    encoder, step = transformer_flops(model, num_tokens, batch, packed)
    assert measured == [*encoder, *step]


def test_published_sizes_by_count() -> None:
    gflop = {"d12_d12": (97, 97), "d18_d18": (315, 315), "d18_d28": (315, 1157)}
    for name, expected in gflop.items():
        with torch.device("meta"):
            model = FlexTok.preset(name)
        (_, encoder), (_, step) = transformer_flops(model, 32, 1)
        assert (round(encoder / 1e9), round(step / 2e9)) == expected
    # The largest size: 24 instead of 46 TFLOP for 20 guided steps.
    ours, plain = transformer_flops(model, 32, 1)[1]
    assert (round(20 * ours / 1e12), round(20 * plain / 1e12)) == (24, 46)
    # Packing adds attention of every image to every other.
    assert transformer_flops(model, 32, 8, packed=False)[1][1] == 8 * plain
    packed = transformer_flops(model, 32, 8)[1][1]
    assert packed - 8 * plain == 2 * 28 * 4 * 1792 * (8 * 7 * 512**2)


# ---------------------------------------------------------------- the benchmark


def test_both_sides_in_one_run(tiny_preset: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(FlexTok.presets, "d12_d12", PUBLISHED["d12_d12"])
    state = torch.get_rng_state()
    result = run(json_path=tmp_path / "x.json")
    assert torch.equal(state, torch.get_rng_state())
    sizes = ("tiny", "tiny, counted", "d12_d12, counted")
    assert [row[:2] for row in result.rows] == [[size, name] for size in sizes for name in OPERATIONS]
    for row in result.rows:
        cells = dict(zip(result.columns, row, strict=True))
        assert cells["GFLOP ratio"] == pytest.approx(cells["GFLOP plain"] / cells["GFLOP ours"])
        assert cells["GFLOP ratio"] > 1
        if cells["size"] == "tiny":
            assert cells["ratio"] == pytest.approx(cells["plain s"] / cells["ours s"])
            assert 0 < cells["MB ours"] <= cells["MB plain"]
        else:
            assert {cells[name] for name in ("ours s", "plain s", "ratio", "MB ours", "MB plain")} == {None}
    # The VAE is the same on both sides; the published one takes 273 GFLOP to latents and 622 back.
    for size, only, both, expected in (
        ("tiny", "encoder", "tokenize", None), ("tiny", "flow decoder", "detokenize", None),
        ("d12_d12, counted", "encoder", "tokenize", 273), ("d12_d12, counted", "flow decoder", "detokenize", 622),
    ):  # fmt: skip
        vae = [
            result.value(side, size=size, operation=both) - result.value(side, size=size, operation=only)
            for side in ("GFLOP ours", "GFLOP plain")
        ]
        assert vae[0] == pytest.approx(vae[1])
        assert expected is None or round(vae[0] / 2) == expected
    assert "plain over 24 positions of each image, ours over 20 with tokens and 17 without" in "\n".join(result.notes)
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["columns"] == result.columns
    assert content["rows"][0][2] == result.rows[0][2]


def test_real_batches_leave_less_to_win(tiny_preset: None) -> None:
    packed, batches = run(), run(packed=False)
    for size in ("tiny", "tiny, counted"):
        for operation in OPERATIONS:
            where = {"size": size, "operation": operation}
            assert packed.value("GFLOP ratio", **where) > batches.value("GFLOP ratio", **where) > 1
            assert packed.value("GFLOP ours", **where) == batches.value("GFLOP ours", **where)


def test_the_model_is_none_that_gives_always_the_same(tiny_preset: None) -> None:
    model, label = flextok_bench._random_model("tiny", 0)
    assert label == "tiny"
    assert all(bool(p.any()) for p in model.parameters() if p.ndim == 2)
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert len(model.quantize.quantize(model.encode_features(model.encode_latents(images))).unique()) > 10
    same, _ = flextok_bench._random_model("tiny", 0)
    other, _ = flextok_bench._random_model("tiny", 1)
    weights = [next(m.parameters()) for m in (model, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("features", lambda x: -x, "Both sides must give the same ids, but token 0 of image 0 is"),
        ("velocity", lambda x: x + 1e-3, "velocities of both sides differ by 0.001, more than 1e-05"),
        ("velocity", lambda x: x * torch.nan, "velocities of both sides differ by nan"),
        ("sample", lambda x: x + 0.1, "images of both sides differ by .* more than 0.001"),
    ],
)
def test_sides_that_disagree_are_not_compared(
    tiny_preset: None, monkeypatch: pytest.MonkeyPatch, method: str, change: Any, message: str
) -> None:
    original = getattr(PlainFlexTok, method)
    monkeypatch.setattr(PlainFlexTok, method, lambda self, *arguments: change(original(self, *arguments)))
    with pytest.raises(MMSDKError, match=message):
        run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 1}, "guidance_scale must differ from 1"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_tokens": 9}, r"num_tokens must lie in 1\.\.8, got 9"),
        ({"num_tokens": 0}, r"num_tokens must lie in 1\.\.8, got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense(tiny_preset: None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_unknown_presets(tiny_preset: None) -> None:
    with pytest.raises(UnknownNameError, match="FlexTok preset 'tinny'. Did you mean 'tiny'"):
        run(preset="tinny")
