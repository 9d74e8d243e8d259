"""TokenBridge: what the quantizer adds to a VAE, its scale, its knob, saving, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmsdk.errors import CheckpointError, TokenStreamError, UnknownNameError
from mmsdk.images import images_to_tensor
from mmsdk.tokens import ImageTokens
from tests.test_vae import published, settings
from tests.tiny import tiny_autoencoder_kl, tiny_tokenbridge, tiny_vae
from tokenizers_img.tokenbridge import TokenBridge

BOTH = pytest.mark.parametrize("make_vae", [tiny_vae, tiny_autoencoder_kl])


def pictures(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


class Exact(torch.nn.Module):
    """Quantizes nothing."""

    def quantize(self, latents: Tensor) -> Tensor:
        return latents

    dequantize = quantize


@BOTH
@torch.no_grad()
def test_without_rounding_it_is_the_vae(make_vae) -> None:
    tokenizer, images = tiny_tokenbridge(make_vae()), pictures()
    latents = tokenizer.vae.encode_latents(images)
    tokenizer.quantize = Exact()
    restored = tokenizer.dequantize_ids(tokenizer.quantize_latents(latents))
    torch.testing.assert_close(restored, latents)
    torch.testing.assert_close(tokenizer.vae.decode_latents(restored), tokenizer.vae.decode_latents(latents))


@BOTH
def test_a_vae_becomes_a_tokenizer(make_vae) -> None:
    vae = make_vae()
    tokenizer = TokenBridge(vae, bits=3)
    tokens = tokenizer.encode(pictures())
    assert tokens.token_ids.shape == (3, 64, 4)
    assert tokens.spec.codebook_size == (8,) * 4
    assert tokens.spec.grid == (8, 8)
    assert tokens.num_bits.tolist() == [64 * 4 * 3] * 3
    assert tokenizer.config.image_size == 16
    assert {p.data_ptr() for p in tokenizer.parameters()} == {p.data_ptr() for p in vae.parameters()}


def test_tokens_are_one_index_for_each_number() -> None:
    tokenizer = TokenBridge(tiny_vae(), bits=1)
    latents = torch.full((1, 4, 8, 8), -1.0)
    latents[0, 2, 3, 5] = 1.0
    ids = tokenizer.quantize_latents(latents)
    assert ids.nonzero().tolist() == [[0, 8 * 3 + 5, 2]]
    assert torch.equal(tokenizer.dequantize_ids(ids).sign(), latents)


@torch.no_grad()
def test_every_bit_brings_it_closer_to_the_vae() -> None:
    images, errors = pictures(8), []
    for bits in range(1, 9):
        tokenizer = tiny_tokenbridge(bits=bits)
        latents = tokenizer.vae.encode_latents(images)
        restored = tokenizer.dequantize_ids(tokenizer.quantize_latents(latents))
        errors.append(float((restored - latents).square().mean() / latents.var()))
    assert all(more < 0.5 * fewer for fewer, more in zip(errors, errors[1:], strict=False))
    assert errors[5] < 5e-3


def test_channels_have_their_own_scale() -> None:
    tokenizer = TokenBridge(tiny_vae(), latent_mean=[0.0, 10.0, 0.0, 0.0], latent_std=[1.0, 1.0, 100.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, 4, 8, 8, generator=generator)
    latents = normal.clone()
    latents[:, 1] += 10
    latents[:, 2] *= 100
    ids = tokenizer.quantize_latents(latents)
    plain = TokenBridge(tiny_vae()).quantize_latents(normal)
    assert float((ids == plain).float().mean()) > 0.99  # 10 + x - 10 is not always x
    errors = (tokenizer.dequantize_ids(ids) - latents).abs().amax((0, 2, 3))
    assert float(errors[1]) < 0.6 and 1 < float(errors[2]) < 60


@BOTH
@torch.no_grad()
def test_fit_scale_normalises(make_vae) -> None:
    tokenizer = TokenBridge(make_vae())
    fingerprint = tokenizer.fingerprint()
    tokenizer.fit_scale(pictures(20), batch_size=7)
    assert tokenizer.fingerprint() != fingerprint
    latents = tokenizer.vae.encode_latents(pictures(20))
    std, mean = torch.std_mean(latents, (0, 2, 3))
    torch.testing.assert_close(torch.tensor(tokenizer.config.latent_mean), mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(tokenizer.config.latent_std), std, atol=1e-5, rtol=1e-2)


def test_fit_scale_of_a_constant_channel() -> None:
    vae = tiny_vae()
    vae.quant_conv.weight.data[:4] = 0
    tokenizer = TokenBridge(vae)
    tokenizer.fit_scale(pictures())
    assert bool(torch.isfinite(tokenizer.reconstruct(pictures()).images).all())


def test_posterior_is_sampled_only_when_asked() -> None:
    tokenizer, images = tiny_tokenbridge(bits=6), pictures()
    mode = tokenizer.encode(images)
    assert tokenizer.encode(images, generator=torch.Generator().manual_seed(1)).equal(mode)
    one, same, other = (
        tokenizer.encode(images, generator=torch.Generator().manual_seed(seed), sample=True) for seed in (1, 1, 2)
    )
    assert one.equal(same)
    assert not one.equal(other) and not one.equal(mode)
    with pytest.raises(ValueError, match="sample=True needs a generator"):
        tokenizer.encode(images, sample=True)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_give_the_ids_of_float32(make_vae, dtype: torch.dtype, tmp_path: Path) -> None:
    tokenizer = tiny_tokenbridge(make_vae(), bits=8)
    ids = tokenizer.encode(pictures()).token_ids
    tokenizer.save_pretrained(tmp_path)
    loaded = TokenBridge.from_pretrained(tmp_path, torch_dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loaded.encode(pictures()).token_ids, ids)
    assert torch.equal(tokenizer.to(dtype).encode(pictures()).token_ids, ids)
    assert tokenizer.dtype == loaded.dtype == dtype


def test_channel_order() -> None:
    assert TokenBridge(tiny_vae()).channel_order == (0, 1, 2, 3)
    assert TokenBridge(tiny_vae(), channel_order=[2, 0, 3, 1]).channel_order == (2, 0, 3, 1)


def test_large_images_are_halved_before_they_are_scaled() -> None:
    images = [image.mul(255).byte() for image in pictures(1, 100)]
    tokenizer = TokenBridge(tiny_vae())
    assert torch.equal(tokenizer.preprocess(images), images_to_tensor(images, (16, 16), resize="adm_crop"))
    assert not torch.equal(tokenizer.preprocess(images), images_to_tensor(images, (16, 16)))


def test_truncation_names_the_knob() -> None:
    with pytest.raises(ValueError, match=r"cannot be truncated: .* got 3\. Fewer `bits` make them cheaper"):
        tiny_tokenbridge().encode(pictures(), num_tokens=3)


# ---------------------------------------------------------------- saving and loading


@BOTH
def test_the_configuration_holds_the_vae(make_vae, tmp_path: Path) -> None:
    tokenizer = TokenBridge(make_vae(), 5, 4.0, channel_order=[3, 2, 1, 0])
    tokenizer.fit_scale(pictures())
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bits"], config["value_range"], config["channel_order"]) == (5, 4.0, [3, 2, 1, 0])
    assert config["vae"]["kind"] in ("kl_vae", "autoencoder_kl")
    loaded = TokenBridge.from_pretrained(tmp_path)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    tokens = tokenizer.encode(pictures())
    assert loaded.encode(pictures()).equal(tokens)
    assert torch.equal(loaded.decode(tokens).images, tokenizer.eval().decode(tokens).images)
    # Arguments given by position count, too.
    rebuilt = TokenBridge.from_config(tokenizer.config)
    rebuilt.load_state_dict(tokenizer.state_dict())
    assert rebuilt.fingerprint() == tokenizer.fingerprint()


def test_tokens_of_other_bits_are_refused() -> None:
    tokens = TokenBridge(tiny_vae(), bits=6).encode(pictures())
    with pytest.raises(TokenStreamError, match="made by 'tokenbridge' with fingerprint"):
        TokenBridge(tiny_vae(), bits=5).decode(tokens)


def test_a_stream_takes_as_many_bits_as_asked_for() -> None:
    sizes = [len(TokenBridge(tiny_vae(), bits=bits).encode(pictures(1)).to_bytes()) for bits in (2, 8)]
    assert sizes[1] - sizes[0] in range(64 * 4 * 6 // 8 - 1, 64 * 4 * 6 // 8 + 2)
    tokens = tiny_tokenbridge().encode(pictures())
    assert ImageTokens.from_bytes(tokens.to_bytes()).equal(tokens)


def test_from_original() -> None:
    vae = tiny_vae()
    loaded = TokenBridge.from_original(published(vae), settings(vae), bits=3)
    assert loaded.fingerprint() == TokenBridge(vae, bits=3).fingerprint()
    assert not loaded.training
    with pytest.raises(CheckpointError, match="does not fit KLVAE"):
        TokenBridge.from_original({"stranger": torch.ones(1)}, settings(vae))


def test_presets() -> None:
    with torch.device("meta"):
        tokenizer = TokenBridge.preset("kl16", bits=8)
    assert tokenizer.codebook_sizes == (256,) * 16
    assert tokenizer.grid == (16, 16)
    with pytest.raises(UnknownNameError, match="Unknown TokenBridge preset 'kl61'. Did you mean 'kl16'"):
        TokenBridge.preset("kl61")


# ---------------------------------------------------------------- bad input


def test_bad_configurations() -> None:
    for match, change in {
        "bits must be an integer from 1 to 8, got 9": {"bits": 9},
        "value_range must be positive and finite, got -1": {"value_range": -1},
        r"latent_mean must have 4 finite entries, .* got \[0.0\]": {"latent_mean": [0.0]},
        "latent_mean must have 4 finite entries": {"latent_mean": [0.0, 0.0, 0.0, float("nan")]},
        "latent_std must have 4 finite entries": {"latent_std": [1.0] * 5},
        "latent_std must be positive": {"latent_std": [1.0, 1.0, 0.0, 1.0]},
        r"channel_order must be a permutation of 0..3, got \[0, 1, 2, 2\]": {"channel_order": [0, 1, 2, 2]},
        "image_size must be a multiple of 2, the pixels per token; got 15": {"image_size": 15},
    }.items():
        with pytest.raises(ValueError, match=match):
            TokenBridge(tiny_vae(), **change)
    with pytest.raises(TypeError, match="vae must be a KLVAE, .* got str"):
        TokenBridge("kl16")
