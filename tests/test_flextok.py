"""FlexTok: the exact speed-ups against the plain computation, guidance, noise, precision, training."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmsdk.bench.flextok import PlainFlexTok
from mmsdk.errors import UnknownNameError
from mmsdk.tokens import ImageTokens
from tests.tiny import tiny_flextok, tiny_vae
from tokenizers_img.flextok import (
    FlexTok,
    draw_num_tokens,
    draw_sigmas,
    mode_sigmas,
    projected_guidance,
)
from tokenizers_img.vae import vae_config

N = 8


def pictures(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def random_tokens(model: FlexTok, lengths: list[int]) -> ImageTokens:
    ids = torch.randint(0, 40, (len(lengths), N), generator=torch.Generator().manual_seed(1))
    return ImageTokens(token_ids=ids, lengths=torch.tensor(lengths), spec=model.token_spec())


def noise_for(count: int, seed: int = 2) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the same results as without shortcuts


@torch.no_grad()
def test_prefix_encoding_gives_the_same_ids() -> None:
    model, images = tiny_flextok(), pictures(16)
    latents = model.encode_latents(images)
    plain = PlainFlexTok(model).features(latents)
    expected = model.quantize.quantize(plain)
    assert len(expected.unique()) > 20
    torch.testing.assert_close(model.encode_features(latents), plain, atol=1e-5, rtol=0)
    for count in range(1, N + 1):
        torch.testing.assert_close(model.encode_features(latents, count), plain[:, :count], atol=1e-5, rtol=0)
        assert torch.equal(model.encode(images, num_tokens=count).token_ids, expected[:, :count])


@pytest.mark.parametrize("lengths", [[8, 8], [1, 1], [3, 3], [7, 2], [8, 1], [5, 6]])
@pytest.mark.parametrize("drop", [None, [True, True], [False, True]])
@torch.no_grad()
def test_the_merged_tail_gives_the_same_velocity(lengths: list[int], drop: list[bool] | None) -> None:
    model = tiny_flextok()
    tokens, x, network = random_tokens(model, lengths), noise_for(2), model.flow_decoder
    # What stands behind the tokens that are kept must not matter.
    codes = model.quantize.dequantize(torch.randint(0, 40, (2, N), generator=torch.Generator().manual_seed(1)))
    dropped = torch.tensor(drop or [False, False])
    time = torch.tensor([0.9, 0.3])
    plain = PlainFlexTok(model)
    expected = plain.velocity(x, time, codes, tokens.lengths, dropped)
    registers, bias = network.registers(codes, tokens.lengths, None if drop is None else dropped)
    kept = [0 if d else k for k, d in zip(lengths, dropped.tolist(), strict=True)]
    assert registers.shape[1] == min(max(kept) + 1, N)
    fast = network(x, registers, bias, network.modulations(time))[0]
    torch.testing.assert_close(fast, expected, atol=1e-5, rtol=0)
    other = plain.velocity(x, time, -codes, tokens.lengths, dropped)
    assert drop == [True, True] or not torch.allclose(expected[0], other[0])


def test_one_register_stands_for_many() -> None:
    model = tiny_flextok()
    codes = torch.zeros(2, 4, 2)
    _, bias = model.flow_decoder.registers(codes, torch.tensor([2, 4]))
    # The first image has three registers for six, the second one for four.
    expected = [[0, 0, math.log(2), math.log(2), math.log(2)], [0, 0, 0, 0, math.log(4)]]
    torch.testing.assert_close(bias, torch.tensor(expected))
    registers, bias = model.flow_decoder.registers(codes, torch.tensor([2, 4]), torch.ones(2, dtype=torch.bool))
    assert registers.shape == (2, 1, 16)
    torch.testing.assert_close(bias, torch.full((2, 1), math.log(8)))
    assert model.flow_decoder.registers(torch.zeros(2, 8, 2), torch.tensor([2, 7]))[1] is None


@pytest.mark.parametrize("guidance", ["cfg", "apg"])
@torch.no_grad()
def test_sampling_equals_the_plain_loop(guidance: str) -> None:
    model = tiny_flextok()
    tokens = random_tokens(model, [2, 8, 5])
    codes, x, plain = model.quantize.dequantize(tokens.token_ids), noise_for(3), PlainFlexTok(model)
    fast = model.sample_latents(codes, tokens.lengths, x, 4, lambda t: 1 + 2 * t, guidance)
    running: Any = 0.0
    for step in (4, 3, 2, 1):
        t = torch.full((3,), step / 4)
        cond, uncond = (plain.velocity(x, t, codes, tokens.lengths, torch.full((3,), drop)) for drop in (False, True))
        if guidance == "apg":
            velocity, running = projected_guidance(cond, uncond, 1 + 2 * step / 4, running)
        else:
            velocity = uncond + (1 + 2 * step / 4) * (cond - uncond)
        x = x - velocity / 4
    torch.testing.assert_close(fast, x, atol=1e-5, rtol=0)


def test_work_is_done_once_and_only_where_needed() -> None:
    model = tiny_flextok()
    tokens = random_tokens(model, [3, 5])
    lengths: list[int] = []
    times: list[int] = []
    model.flow_decoder.blocks[0].register_forward_hook(lambda m, inputs, out: lengths.append(inputs[0].shape[1]))
    model.flow_decoder.dec_time_embedder["mlp"].register_forward_hook(lambda m, i, out: times.append(len(out)))

    def passes(**settings: Any) -> list[int]:
        lengths.clear()
        times.clear()
        model.decode(tokens, num_inference_steps=4, **settings)
        assert times == [4]
        return [length - 16 for length in lengths]

    # The longest prefix and one register more; one register for the unconditional pass.
    assert passes() == [6, 1] * 4
    assert passes(guidance_scale=1) == [6] * 4
    assert passes(guidance_scale=lambda t: 3 if t > 0.5 else 1.0) == [6, 1, 6, 1, 6, 6]
    registers: list[int] = []
    encoder_block = model.register_encoder.enc_transformer["blocks"][0]
    encoder_block.register_forward_hook(lambda m, inputs, out: registers.append(inputs[0].shape[1] - 16))
    model.encode(pictures(), num_tokens=[1, 3, 2])
    assert registers == [3]


# ---------------------------------------------------------------- guidance


def test_projected_guidance_by_hand() -> None:
    def vectors(*rows: list[float]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float32).view(len(rows), 1, 1, 2)

    cond, uncond = vectors([1, 0], [0, 2]), vectors([0, -1], [-3, -2])
    # Differences (1, 1), short enough, and (3, 4), cut to (1.5, 2); what is parallel to `cond` goes.
    guided, running = projected_guidance(cond, uncond, 3.0)
    torch.testing.assert_close(guided, vectors([1, 2], [3, 2]))
    torch.testing.assert_close(running, vectors([1, 1], [3, 4]))
    # The next step takes half of the last difference off.
    guided, running = projected_guidance(cond, uncond, 3.0, running)
    torch.testing.assert_close(running, vectors([0.5, 0.5], [1.5, 2]))
    torch.testing.assert_close(guided, vectors([1, 1], [3, 2]))
    guided, _ = projected_guidance(cond, uncond, 2.0, eta=1.0, norm_threshold=math.inf)
    torch.testing.assert_close(guided, vectors([2, 1], [3, 6]))
    # Nothing to follow: no division by zero.
    assert torch.equal(projected_guidance(cond, cond, 7.5)[0], cond)


def test_without_guidance_both_kinds_agree_and_scale_zero_forgets_the_tokens() -> None:
    model = tiny_flextok()
    one, other = random_tokens(model, [3, 8]), model.encode(pictures(2))
    settings: dict[str, Any] = {"num_inference_steps": 3}
    plain = [model.decode(one, guidance=g, guidance_scale=1, **settings).images for g in ("cfg", "apg")]
    assert torch.equal(*plain)
    unconditional = [model.decode(t, guidance="cfg", guidance_scale=0, **settings).images for t in (one, other)]
    torch.testing.assert_close(*unconditional, atol=1e-6, rtol=0)
    assert not torch.allclose(plain[0], unconditional[0], atol=1e-3)
    guided = [model.decode(one, guidance=g, guidance_scale=4.0, **settings).images for g in ("cfg", "apg")]
    assert not torch.allclose(*guided, atol=1e-4)


def test_the_configuration_sets_the_guidance() -> None:
    model = tiny_flextok()
    tokens = random_tokens(model, [4])
    assert torch.equal(model.decode(tokens).images, model.decode(tokens, guidance_scale=7.5).images)
    model.register_to_config(guidance_scale=1.5)
    tokens = random_tokens(model, [4])
    assert torch.equal(model.decode(tokens).images, model.decode(tokens, guidance_scale=1.5).images)
    with pytest.raises(ValueError, match="guidance_scale must be finite"):
        FlexTok(guidance_scale=-1.0)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1, "x", [2.0], lambda t: math.nan, lambda t: 0.9 - t])
def test_guidance_scales_that_make_no_sense(scale: Any) -> None:
    model = tiny_flextok()
    with pytest.raises(ValueError, match="guidance_scale must be finite and at least 0, got"):
        model.decode(random_tokens(model, [4]), guidance_scale=scale)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "4", True, None])
def test_steps_that_make_no_sense(steps: Any) -> None:
    model = tiny_flextok()
    with pytest.raises(ValueError, match=f"num_inference_steps must be an integer of at least 1, got {steps!r}"):
        model.decode(random_tokens(model, [4]), num_inference_steps=steps)


def test_unknown_guidance_and_unknown_keywords() -> None:
    model = tiny_flextok()
    tokens = random_tokens(model, [4])
    with pytest.raises(UnknownNameError, match="guidance 'agp'. Did you mean 'apg'"):
        model.decode(tokens, guidance="agp")
    with pytest.raises(TypeError, match="timesteps"):
        model.decode(tokens, timesteps=3)


# ---------------------------------------------------------------- noise


def test_noise_is_fixed_unless_it_is_drawn() -> None:
    model = tiny_flextok()
    tokens = random_tokens(model, [8, 8])
    before = torch.random.get_rng_state()
    assert torch.equal(model.decode(tokens).images, model.decode(tokens).images)
    noise = model.draw_noise(3)
    assert torch.equal(noise[0], noise[1])
    assert torch.equal(before, torch.random.get_rng_state())
    drawn = model.draw_noise(2, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(drawn, torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2)]))
    images = model.decode(tokens, torch.Generator().manual_seed(5)).images
    assert torch.equal(images, model.decode(tokens, noise=drawn).images)
    assert not torch.allclose(images, model.decode(tokens).images, atol=1e-3)


def test_with_a_generator_each_an_image_does_not_depend_on_its_batch() -> None:
    model, lengths = tiny_flextok(), [2, 8, 5]
    tokens = random_tokens(model, lengths)
    batch = model.decode(tokens, [torch.Generator().manual_seed(s) for s in (3, 4, 5)]).images
    for i, seed in enumerate((3, 4, 5)):
        alone = model.decode(tokens[i : i + 1], torch.Generator().manual_seed(seed)).images
        torch.testing.assert_close(alone, batch[i : i + 1], atol=1e-5, rtol=0)


def test_bad_noise() -> None:
    model = tiny_flextok()
    tokens = random_tokens(model, [4, 4])
    with pytest.raises(ValueError, match="Got 3 generators for 2 images"):
        model.decode(tokens, [torch.Generator() for _ in range(3)])
    with pytest.raises(ValueError, match="either `noise` or `generator`"):
        model.decode(tokens, torch.Generator(), noise=noise_for(2))
    for noise in (noise_for(1), torch.zeros(2, 4, 8, 9), torch.full((2, 4, 8, 8), math.nan)):
        with pytest.raises(ValueError, match=r"noise must be finite and of shape \(2, 4, 8, 8\)"):
            model.decode(tokens, noise=noise)
    with pytest.raises(TypeError, match="noise must be a tensor, got list"):
        model.decode(tokens, noise=[1])


# ---------------------------------------------------------------- the VAE's posterior


def test_the_posterior_is_sampled_only_when_asked_for() -> None:
    model, images = tiny_flextok(), pictures(8)
    tokens = model.encode(images)
    assert tokens.equal(model.encode(images, generator=torch.Generator().manual_seed(1)))
    sampled = [model.encode(images, generator=torch.Generator().manual_seed(s), sample=True) for s in (1, 1, 2)]
    assert sampled[0].equal(sampled[1])
    assert not sampled[0].equal(sampled[2])
    assert not sampled[0].equal(tokens)
    with pytest.raises(ValueError, match="sample=True needs a generator"):
        model.encode(images, sample=True)
    # `reconstruct` draws noise with its generator, but still encodes the mode.
    generator = torch.Generator().manual_seed(1)
    expected = model.decode(tokens, torch.Generator().manual_seed(1)).images
    assert torch.equal(model.reconstruct(images, generator=generator).images, expected)


# ---------------------------------------------------------------- precision


CASTS: dict[str, Callable[[FlexTok, Path], FlexTok]] = {
    "to": lambda model, folder: model.to(torch.bfloat16),
    "bfloat16": lambda model, folder: model.bfloat16(),
    "half": lambda model, folder: model.half(),
    "back": lambda model, folder: model.half().to(torch.float32),
    "loaded": lambda model, folder: FlexTok.from_pretrained(folder, torch_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("cast", list(CASTS))
def test_half_precision_gives_the_ids_of_float32(cast: str, tmp_path: Path) -> None:
    model, images = tiny_flextok(), pictures(64)
    model.save_pretrained(tmp_path)
    tokens = model.encode(images)
    narrow = CASTS[cast](tiny_flextok(), tmp_path)
    dtype = torch.float32 if cast == "back" else torch.float16 if cast == "half" else torch.bfloat16
    assert narrow.dtype == dtype
    vae = narrow.vae.vae
    assert {p.dtype for m in (narrow.decoder, vae.decoder) for p in m.parameters()} == {dtype}
    encoding = (narrow.encoder, vae.encoder, vae.quant_conv)
    assert {p.dtype for module in encoding for p in module.parameters()} == {torch.float32}
    assert torch.equal(narrow.encode(images).token_ids, tokens.token_ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(narrow.encode(images).token_ids, tokens.token_ids)
    narrowed = ImageTokens(token_ids=tokens.token_ids[:4], spec=narrow.token_spec())
    decoded = narrow.decode(narrowed).images
    assert decoded.dtype == torch.float32
    assert float((decoded - model.decode(tokens[:4]).images).abs().mean()) < 0.02


def test_bfloat16_would_change_ids() -> None:
    """The test above can fail: without float32 ids do change."""
    model, images = tiny_flextok(), pictures(64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        narrow = model.quantize.quantize(model.encode_features(model.encode_latents(images)))
    assert not torch.equal(narrow, model.encode(images).token_ids)


def test_wider_types_and_devices_are_followed() -> None:
    model = tiny_flextok()
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}


# ---------------------------------------------------------------- training


def training_batch(model: FlexTok, lengths: list[int]) -> dict[str, Tensor]:
    count = len(lengths)
    with torch.no_grad():
        latents = model.encode_latents(pictures(count))
    return {
        "latents": latents,
        "num_tokens": torch.tensor(lengths),
        "sigmas": draw_sigmas(count, torch.Generator().manual_seed(0)),
        "noise": noise_for(count),
    }


def test_the_loss_is_that_of_the_plain_computation() -> None:
    model = tiny_flextok()
    batch, drop = training_batch(model, [2, 7, 8]), torch.tensor([False, False, True])
    output = model(**batch, drop_condition=drop, hidden_block=0)
    level = batch["sigmas"].view(-1, 1, 1, 1)
    noised = level * batch["noise"] + (1 - level) * batch["latents"]
    codes = model.quantize(PlainFlexTok(model).features(batch["latents"])).latents
    plain = PlainFlexTok(model).velocity(noised, batch["sigmas"], codes, batch["num_tokens"], drop)
    torch.testing.assert_close(output.velocity, plain, atol=1e-5, rtol=0)
    expected = (plain - (batch["noise"] - batch["latents"])).square().mean()
    torch.testing.assert_close(output.loss, expected)
    assert output.token_ids.shape == (3, 8)
    assert output.hidden_states.shape == (3, 16, 16)
    learned = [p for p in model.encoder.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, learned) for loss in (output.loss, expected)]
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-6, rtol=1e-4)


def test_everything_but_the_vae_learns(tmp_path: Path) -> None:
    model = tiny_flextok().train()
    model.save_pretrained(tmp_path)
    batch = training_batch(model, [3, 8, 8])
    model(**batch, drop_condition=torch.tensor([False, False, True])).loss.backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())}
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {n for n in idle if not n.startswith("vae.")} == fixed
    loaded = FlexTok.from_pretrained(tmp_path)
    assert fixed == {name for name, p in loaded.named_parameters() if not p.requires_grad}
    assert fixed == {
        "encoder.module_dict.enc_posemb_module.posembs",
        "decoder.module_dict.dec_patches_posemb_module.posembs",
    }


def test_dropped_tokens_teach_nothing() -> None:
    model = tiny_flextok()
    output = model(**training_batch(model, [2, 3]))
    assert output.token_ids.shape == (2, 3)
    output.loss.backward()
    registers = model.register_encoder.enc_register_module["registers"].grad
    assert bool(registers[:3].any(1).all())
    assert not bool(registers[3:].any())
    model.zero_grad()
    model(**training_batch(model, [2, 3]), drop_condition=torch.tensor([True, True])).loss.backward()
    assert not any(bool(p.grad.any()) for p in model.encoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("block", [-1, 2])
def test_hidden_states_of_blocks_that_are_not_there(block: int) -> None:
    model = tiny_flextok()
    with pytest.raises(ValueError, match=rf"hidden_block must lie in 0\.\.1, got {block}"):
        model(**training_batch(model, [2, 3]), hidden_block=block)


def test_a_new_model_predicts_nothing_and_learns() -> None:
    torch.manual_seed(0)
    config = {k: v for k, v in tiny_flextok().config.items() if not k.startswith("_")}
    model = FlexTok(**config)
    batch = training_batch(model, [2, 5, 8])
    first = model(**batch)
    assert not bool(first.velocity.any())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.7 * float(first.loss.detach())


def test_what_nested_dropout_keeps() -> None:
    def drawn(mode: str, most: int = 6) -> list[int]:
        return draw_num_tokens(3000, most, random.Random(0), mode)

    assert drawn("uniform") == drawn("uniform")
    shares = {mode: {k: drawn(mode).count(k) / 3000 for k in set(drawn(mode))} for mode in ("uniform", "pow2")}
    assert shares["uniform"] == pytest.approx(dict.fromkeys(range(1, 7), 1 / 6), abs=0.03)
    assert shares["pow2"] == pytest.approx({1: 1 / 3, 2: 1 / 3, 4: 1 / 3}, abs=0.03)
    # 1 | 2 | 3, 4 | 5, 6: the last would be rounded to more than there are.
    counts = drawn("uniform_pow2")
    shares_rounded = {k: counts.count(k) / 3000 for k in set(counts)}
    assert shares_rounded == pytest.approx({1: 1 / 6, 2: 1 / 6, 4: 1 / 3, 6: 1 / 3}, abs=0.03)
    assert set(drawn("pow2", 1)) == set(drawn("uniform_pow2", 1)) == {1}
    with pytest.raises(UnknownNameError, match="nested dropout mode 'pow'. Did you mean 'pow2'"):
        drawn("pow")


def test_noise_levels() -> None:
    normal = torch.randn(5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw_sigmas(5, torch.Generator().manual_seed(3)), normal.sigmoid())
    uniform = torch.rand(5, generator=torch.Generator().manual_seed(3))
    levels = draw_sigmas(5, torch.Generator().manual_seed(3), mode_scale=0.25)
    assert torch.equal(levels, mode_sigmas(uniform, 0.25))
    # u = 1/3: cos^2(pi / 6) = 3/4.
    by_hand = 2 / 3 - 0.25 * (3 / 4 - 2 / 3)
    torch.testing.assert_close(
        mode_sigmas(torch.tensor([0.0, 1 / 3, 1.0]), 0.25), torch.tensor([1.0, by_hand, 0.0]), atol=1e-6, rtol=0
    )


# ---------------------------------------------------------------- configurations


def test_the_latents_of_another_vae() -> None:
    vae = tiny_vae()
    config = {k: v for k, v in tiny_flextok().config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    model = FlexTok(**config | {"vae_config": vae_config(vae)}).eval()
    model.vae.load_state_dict(vae.state_dict())
    assert torch.equal(model.encode_latents(pictures()), vae.encode_latents(pictures()))
    tokens = model.encode(pictures(), num_tokens=[1, 8, 3])
    expected = model.decode(tokens).images
    assert expected.shape == (3, 3, 16, 16)
    model.to(torch.bfloat16)
    assert torch.equal(model.encode(pictures(), num_tokens=[1, 8, 3]).token_ids, tokens.token_ids)
    assert float((model.decode(tokens).images - expected).abs().mean()) < 0.02


def test_learned_positions_are_the_sum_of_rows_and_columns() -> None:
    config = {k: v for k, v in tiny_flextok().config.items() if not k.startswith("_")}
    model = FlexTok(**config | {"decoder_positions": "learnable_sum", "encoder_positions": "learnable_sum"})
    table = model.register_encoder.enc_posemb_module["posembs"]
    assert table.shape == (2, 1, 16, 4)
    assert table.requires_grad
    sums = (table[0, 0, :, :, None] + table[1, 0, :, None, :]).flatten(1).T
    encoder, seen = model.register_encoder, []
    encoder.enc_transformer["blocks"][0].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    latents = noise_for(1)
    encoder(latents, 1)
    torch.testing.assert_close(seen[0][0, :16], encoder.enc_patch_emb(latents)[0] + sums)
    assert model.decode(model.encode(pictures())).images.shape == (3, 3, 16, 16)


def test_bad_configurations() -> None:
    config = {k: v for k, v in tiny_flextok().config.items() if not k.startswith("_")}
    for match, settings in {
        "multiple of 4, the pixels per patch; got 18": {"image_size": 18},
        "multiple of 4, the pixels per patch; got 0": {"image_size": 0},
        r"encoder_shape must be .* got \(16, 1, 3\)": {"encoder_shape": (16, 1, 3)},
        r"decoder_shape must be .* got \(16, 1\)": {"decoder_shape": (16, 1)},
        r"integers >= 2, got \[\]": {"fsq_levels": ()},
        "Unknown positional embedding 'sincoss'. Did you mean 'sincos'": {"decoder_positions": "sincoss"},
        "Unknown kind of VAE 'autoencoder-kl'. Did you mean 'autoencoder_kl'": {
            "vae_config": config["vae_config"] | {"kind": "autoencoder-kl"}
        },
        "Unknown kind of VAE 'None'": {"vae_config": {}},
        "max_timestep must be a positive number, got 0": {"max_timestep": 0},
        "num_registers must be at least 1, got 0": {"num_registers": 0},
    }.items():
        with pytest.raises(ValueError, match=match):
            FlexTok(**config | settings)
    with pytest.raises(UnknownNameError, match="FlexTok preset 'd12_d13'. Did you mean 'd12_d12'"):
        FlexTok.preset("d12_d13")


def test_images_are_resized_bilinearly() -> None:
    array = np.random.default_rng(0).integers(0, 255, (40, 32, 3), dtype=np.uint8)
    expected = Image.fromarray(array).resize((16, 16), Image.Resampling.BILINEAR, box=(0, 4, 32, 36))
    found = tiny_flextok().preprocess(array)
    assert torch.equal(found[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255)


def test_tokens_of_a_generator_decode() -> None:
    model = tiny_flextok()
    tokens = random_tokens(model, [3, 8])
    assert model.decode(tokens).images.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="40"):
        ImageTokens(token_ids=torch.full((1, 8), 40), spec=model.token_spec())
