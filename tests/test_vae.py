"""KL autoencoders: the posterior, sampling, training losses, published checkpoints, diffusers' models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmsdk.errors import CheckpointError, UnknownNameError
from tests.tiny import tiny_autoencoder_kl, tiny_vae
from tokenizers_img.vae import KLVAE, DiffusersVAE, as_vae, vae_config

VAES: dict[str, Callable[[], KLVAE | DiffusersVAE]] = {
    "kl_vae": tiny_vae,
    "autoencoder_kl": lambda: as_vae(tiny_autoencoder_kl()),
}
every_vae = pytest.mark.parametrize("kind", list(VAES))


def pictures(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def settings(model: KLVAE) -> dict[str, object]:
    return {k: v for k, v in model.config.items() if not k.startswith("_")}


# ---------------------------------------------------------------- latents


@every_vae
@torch.no_grad()
def test_latents_are_scaled_modes_or_samples(kind: str) -> None:
    vae, images = VAES[kind](), pictures()
    scale, shift = {"kl_vae": (0.5, 0.0), "autoencoder_kl": (0.18215, 0.1)}[kind]
    mean, logvar = vae.posterior(images)
    assert mean.shape == logvar.shape == (3, vae.latent_channels, 16 // vae.downsample, 16 // vae.downsample)
    assert torch.equal(vae.encode_latents(images), (mean - shift) * scale)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    expected = (mean + (0.5 * logvar).exp() * noise - shift) * scale
    for sample in (None, True):
        sampled = vae.encode_latents(images, torch.Generator().manual_seed(5), sample=sample)
        torch.testing.assert_close(sampled, expected)
    mode = vae.encode_latents(images, torch.Generator().manual_seed(5), sample=False)
    assert torch.equal(mode, vae.encode_latents(images))
    with pytest.raises(ValueError, match="sample=True needs a generator"):
        vae.encode_latents(images, sample=True)


@torch.no_grad()
def test_diffusers_models_are_used_as_diffusers_does() -> None:
    model, images = tiny_autoencoder_kl(), pictures()
    vae = as_vae(model)
    distribution = model.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(vae.encode_latents(images), (distribution.mode() - 0.1) * 0.18215)
    sampled = (distribution.sample(torch.Generator().manual_seed(3)) - 0.1) * 0.18215
    torch.testing.assert_close(vae.encode_latents(images, torch.Generator().manual_seed(3)), sampled)
    expected = model.decode(sampled / 0.18215 + 0.1).sample / 2 + 0.5
    torch.testing.assert_close(vae.decode_latents(sampled), expected)


@every_vae
@torch.no_grad()
def test_any_size_that_the_stride_divides(kind: str) -> None:
    vae = VAES[kind]()
    latents = vae.encode_latents(torch.rand(1, 3, 8, 24))
    assert latents.shape == (1, 4, 4, 12)
    assert vae.decode_latents(latents).shape == (1, 3, 8, 24)


@every_vae
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_latents_of_a_narrow_model_are_those_of_float32(kind: str, dtype: torch.dtype) -> None:
    images, latents = pictures(), VAES[kind]().encode_latents(pictures())
    narrow = VAES[kind]().to(dtype)
    assert narrow.dtype == dtype
    assert {p.dtype for p in narrow.parameters()} == {dtype, torch.float32}
    assert torch.equal(narrow.encode_latents(images), latents)
    assert narrow.decode_latents(latents).dtype == dtype


def test_loading_in_a_narrow_dtype_keeps_the_encoder(tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path)
    narrow = KLVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert narrow.encode(pictures()).equal(vae.encode(pictures()))
    assert {p.dtype for p in narrow.encoder.parameters()} == {torch.float32}
    assert {p.dtype for p in narrow.decoder.parameters()} == {torch.bfloat16}


def test_tokens_are_the_latents_in_raster_order() -> None:
    vae, images = tiny_vae(), pictures()
    with torch.no_grad():
        latents = vae.encode_latents(images)
    tokens = vae.encode(images)
    assert tokens.spec.grid == (8, 8)
    assert torch.equal(tokens.latents[:, 8 * 2 + 5], latents[:, :, 2, 5])
    sampled = vae.encode(images, generator=torch.Generator().manual_seed(1))
    assert not sampled.equal(tokens)
    assert sampled.equal(vae.encode(images, generator=torch.Generator().manual_seed(1)))


# ---------------------------------------------------------------- training


def test_kl_divergence_by_hand() -> None:
    vae, images = tiny_vae(), pictures()
    decoded, posterior = vae(images)
    reference = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    divergence = torch.distributions.kl_divergence(reference, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(posterior.loss, divergence.sum() / 3)
    torch.testing.assert_close(decoded, vae.decode_latents(vae.encode_latents(images)))
    with torch.no_grad():  # of the standard normal distribution itself it is zero
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias.zero_()
        assert float(vae(images)[1].loss) == 0.0


def test_training_samples_are_reparametrised() -> None:
    vae, images = tiny_vae(), pictures()
    decoded, _ = vae(images, torch.Generator().manual_seed(2))
    expected = vae.decode_latents(vae.encode_latents(images, torch.Generator().manual_seed(2)))
    torch.testing.assert_close(decoded, expected)
    decoded.square().mean().backward()
    # Both halves of the moments, mean and log-variance, are trained by the images alone.
    gradient = vae.quant_conv.bias.grad
    assert bool((gradient != 0).all())


# ---------------------------------------------------------------- published checkpoints


def published(vae: KLVAE) -> dict[str, Tensor]:
    """Name the weights of a tiny VAE, which has two resolutions, as published ones are."""
    renamed = {}
    for key, value in vae.state_dict().items():
        for side, level, theirs in (("en", 0, "down.0"), ("en", 1, "down.1"), ("de", 0, "up.1"), ("de", 1, "up.0")):
            key = key.replace(f"{side}coder.conv_blocks.{level}.res", f"{side}coder.{theirs}.block")
            key = key.replace(f"{side}coder.conv_blocks.{level}.", f"{side}coder.{theirs}.")
        for number, name in enumerate(("block_1", "attn_1", "block_2")):
            key = key.replace(f"mid.{number}.", f"mid.{name}.")
        renamed[key] = value
    return renamed


def test_published_files(tmp_path: Path) -> None:
    vae = tiny_vae()
    state = published(vae)
    assert {"encoder.down.1.attn.0.q.weight", "encoder.mid.attn_1.k.bias", "decoder.up.1.upsample.conv.weight"} <= set(
        state
    )
    # Training leaves the discriminator's weights in checkpoints of this family.
    torch.save({"model": state | {"loss.discriminator.main.0.weight": torch.zeros(1)}}, tmp_path / "kl.ckpt")
    loaded = KLVAE.from_original(tmp_path / "kl.ckpt", settings(vae))
    assert loaded.fingerprint() == vae.fingerprint()
    assert not loaded.training
    with pytest.raises(CheckpointError, match="'quant_conv.bias' has shape"):
        KLVAE.from_original(state | {"quant_conv.bias": torch.ones(99)}, settings(vae))
    with pytest.raises(CheckpointError, match="unexpected 'decoder.mid.attn_2.q.weight'"):
        KLVAE.from_original(state | {"decoder.mid.attn_2.q.weight": torch.ones(1)}, settings(vae))
    with pytest.raises(CheckpointError, match="unexpected 'decoder.conv_blocks.-1.res.0.norm1.bias'"):
        KLVAE.from_original(state | {"decoder.up.2.block.0.norm1.bias": torch.ones(1)}, settings(vae))
    state.pop("encoder.down.0.block.0.conv1.bias")
    with pytest.raises(CheckpointError, match="missing 'encoder.conv_blocks.0.res.0.conv1.bias'"):
        KLVAE.from_original(state, settings(vae))


def test_presets() -> None:
    with torch.device("meta"):
        vae = KLVAE.preset("kl16", image_size=512)
    assert (vae.downsample, vae.grid, vae.latent_channels) == (16, (32, 32), 16)
    assert vae.config.scaling_factor == 0.2325
    with pytest.raises(UnknownNameError, match="Unknown KLVAE preset 'kl61'. Did you mean 'kl16'"):
        KLVAE.preset("kl61")


# ---------------------------------------------------------------- any VAE


@every_vae
@torch.no_grad()
def test_a_configuration_builds_the_same_vae(kind: str) -> None:
    vae = VAES[kind]()
    config = vae_config(vae)
    assert config["kind"] == kind
    rebuilt = as_vae(config)
    assert type(rebuilt) is type(vae)
    assert vae_config(rebuilt) == config
    rebuilt.load_state_dict(vae.state_dict())
    images = pictures()
    assert torch.equal(rebuilt.eval().encode_latents(images), vae.encode_latents(images))


def test_block_types_need_not_be_given() -> None:
    vae = as_vae({"kind": "autoencoder_kl", "block_out_channels": (8, 8), "norm_num_groups": 4})
    assert vae.downsample == 2
    assert vae.encode_latents(pictures(1)).shape == (1, 4, 8, 8)


def test_models_are_used_as_they_are() -> None:
    vae, model = tiny_vae(), tiny_autoencoder_kl()
    assert as_vae(vae) is vae
    assert as_vae(model).vae is model


# ---------------------------------------------------------------- bad input


def test_bad_configurations() -> None:
    for match, change in {
        "image_size must be a multiple of 2, the pixels per token of 2 resolutions; got 15": {"image_size": 15},
        r"attention_levels must lie in 0..1, .* got \(2,\)": {"attention_levels": (2,)},
        r"decoder_attention_levels must lie in 0..1, .* got \(-1,\)": {"decoder_attention_levels": (-1,)},
        "scaling_factor must be positive and finite, got 0": {"scaling_factor": 0},
        "scaling_factor must be positive and finite, got nan": {"scaling_factor": float("nan")},
    }.items():
        with pytest.raises(ValueError, match=match):
            KLVAE(**(settings(tiny_vae()) | change))


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a KLVAE, a diffusers AutoencoderKL or .* got Linear"):
        as_vae(torch.nn.Linear(1, 1))
    with pytest.raises(UnknownNameError, match="Unknown kind of VAE 'autoencoder_lk'. Did you mean 'autoencoder_kl'"):
        as_vae({"kind": "autoencoder_lk"})
    with pytest.raises(UnknownNameError, match="Unknown kind of VAE 'None'"):
        as_vae({"block_out_channels": (8,)})
