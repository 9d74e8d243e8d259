"""Image tokenizers: round trips, prefixes, batches, identity, saving and loading, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmsdk.errors import CheckpointError, ImageError, TokenStreamError, UnknownNameError
from mmsdk.loading import TOKENIZERS, resolve
from mmsdk.tokens import ImageTokens
from tests.tiny import tiny_one_d_piece, tiny_vq
from tokenizers_img.base import ImageTokenizer
from tokenizers_img.one_d_piece import OneDPiece
from tokenizers_img.titok import TiTok
from tokenizers_img.vq import VQ


def tiny_titok(**settings: object) -> TiTok:
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 4, "num_latent_tokens": 6, "token_size": 4, "is_legacy": False}
    return TiTok(encoder_shape=(16, 1, 2), decoder_shape=(16, 1, 2), **(shape | settings)).eval()


def tiny_legacy() -> TiTok:
    decoder = {"channels": 32, "channel_mult": (1, 1, 1), "num_res_blocks": 1, "z_channels": 8}
    return tiny_titok(is_legacy=True, pixel_decoder_config=decoder)


def tiny_over_latents() -> OneDPiece:
    codec = {k: v for k, v in tiny_vq().config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    return OneDPiece(
        image_size=16,
        patch_size=2,
        num_latent_tokens=8,
        encoder_shape=(16, 1, 2),
        decoder_shape=(16, 1, 2),
        quantize_mode="fsq",
        fsq_levels=(8, 5),
        token_size=2,
        is_legacy=False,
        codec_config=codec,
    ).eval()


# One row for each kind of model; every registered tokenizer must have one.
TINY: dict[str, Callable[[], ImageTokenizer]] = {
    "vq": tiny_vq,
    "titok": tiny_titok,
    "titok legacy": tiny_legacy,
    "titok vae": lambda: tiny_titok(quantize_mode="vae"),
    "one_d_piece": tiny_one_d_piece,
    "one_d_piece over latents": tiny_over_latents,
}
ORDERED = ["one_d_piece", "one_d_piece over latents"]
every_kind = pytest.mark.parametrize("kind", list(TINY))


def pictures(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_every_tokenizer_is_tested() -> None:
    assert {kind.split()[0] for kind in TINY} == set(TOKENIZERS)
    assert all(issubclass(resolve(name), ImageTokenizer) for name in TOKENIZERS)


@every_kind
def test_round_trip(kind: str) -> None:
    tokenizer = TINY[kind]()
    tokens = tokenizer.encode(pictures())
    assert len(tokens) == 3
    assert tokens.num_tokens == tokenizer.max_tokens == tokens.spec.max_tokens
    images = tokenizer.decode(tokens).images
    assert images.shape == (3, 3, 16, 16)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert torch.equal(images, tokenizer.reconstruct(pictures()).images)
    again = tokenizer.decode(ImageTokens.from_bytes(tokens.to_bytes())).images
    assert torch.equal(images, again)
    assert not tokenizer.lossless


@every_kind
def test_batch_equals_single(kind: str) -> None:
    tokenizer, images = TINY[kind](), pictures()
    batch = tokenizer.encode(images)
    decoded = tokenizer.decode(batch).images
    for i in range(3):
        single = tokenizer.encode(images[i : i + 1])
        if batch.token_ids is not None:
            assert torch.equal(single.token_ids, batch.token_ids[i : i + 1])
        else:
            torch.testing.assert_close(single.latents, batch.latents[i : i + 1])
        torch.testing.assert_close(tokenizer.decode(single).images, decoded[i : i + 1], atol=1e-5, rtol=0)


@every_kind
def test_any_kind_of_image_goes_in(kind: str, tmp_path: Path) -> None:
    tokenizer = TINY[kind]()
    array = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "picture.png")
    inputs = [array, Image.fromarray(array), tmp_path / "picture.png", str(tmp_path / "picture.png")]
    first, *others = (tokenizer.encode(source) for source in inputs)
    assert all(first.equal(other) for other in others)


@pytest.mark.parametrize("kind", ORDERED)
def test_prefixes(kind: str) -> None:
    tokenizer, images = TINY[kind](), pictures()
    full = tokenizer.encode(images)
    assert torch.equal(tokenizer.encode(images, num_tokens=3).token_ids, full.token_ids[:, :3])
    progressive = list(tokenizer.decode_progressive(full))
    assert [count for count, _ in progressive] == [1, 2, 4, 8]
    for count, decoded in progressive:
        assert torch.equal(decoded, tokenizer.decode(full.truncate(count)).images)
    assert torch.equal(progressive[-1][1], tokenizer.decode(full).images)
    assert not torch.equal(progressive[0][1], progressive[1][1])


@pytest.mark.parametrize("kind", ORDERED)
def test_mixed_lengths_equal_one_by_one(kind: str) -> None:
    tokenizer, images = TINY[kind](), pictures()
    mixed = tokenizer.encode(images, num_tokens=[2, 8, 5])
    assert mixed.lengths.tolist() == [2, 8, 5]
    decoded = tokenizer.decode(mixed).images
    for i, count in enumerate([2, 8, 5]):
        alone = tokenizer.decode(tokenizer.encode(images[i : i + 1], num_tokens=count)).images
        torch.testing.assert_close(decoded[i : i + 1], alone, atol=1e-5, rtol=0)


def test_posterior_is_sampled_only_with_a_generator() -> None:
    tokenizer, images = TINY["titok vae"](), pictures()
    mean = tokenizer.encode(images).latents
    assert torch.equal(mean, tokenizer.encode(images).latents)
    sampled = [tokenizer.encode(images, generator=torch.Generator().manual_seed(s)).latents for s in (1, 1, 2)]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    assert not torch.equal(sampled[0], mean)


def test_text_aware_decoder_needs_text() -> None:
    tokenizer = tiny_titok(text_aware=True)
    tokens = tokenizer.encode(pictures(1))
    with pytest.raises(ValueError, match="text_features"):
        tokenizer.decode(tokens)
    features = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(0))
    images = tokenizer.decode(tokens, text_features=features).images
    assert images.shape == (1, 3, 16, 16)


def test_tail_drop_is_a_prefix_in_training() -> None:
    model, images = tiny_one_d_piece(), pictures()
    with torch.no_grad():
        short, output = model(images, num_tokens=2)
        assert torch.equal(short, model.decode_latents(output.latents[:, :2]))
        assert output.token_ids.shape == (3, 8)


# ---------------------------------------------------------------- identity


@every_kind
def test_fingerprint(kind: str, tmp_path: Path) -> None:
    tokenizer = TINY[kind]()
    fingerprint = tokenizer.fingerprint()
    assert fingerprint == TINY[kind]().fingerprint()
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.fingerprint() == fingerprint
    assert loaded.to(torch.bfloat16).fingerprint() == fingerprint
    next(tokenizer.parameters()).data.mul_(2)
    assert tokenizer.fingerprint() != fingerprint


def test_tokens_of_another_tokenizer_are_refused() -> None:
    tokens = tiny_vq(seed=0).encode(pictures())
    with pytest.raises(TokenStreamError, match="made by 'vq' with fingerprint"):
        tiny_vq(seed=1).decode(tokens)


# ---------------------------------------------------------------- saving and loading


@every_kind
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    tokenizer = TINY[kind]()
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.encode(pictures()).equal(tokenizer.encode(pictures()))


def test_damaged_folders(tmp_path: Path) -> None:
    tiny_vq().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    good, config = load_file(path), (tmp_path / "config.json").read_text()

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            VQ.from_pretrained(tmp_path)

    save_file({k: v for k, v in good.items() if k != "quant_conv.bias"}, path)
    refused("quant_conv.bias")
    save_file(good | {"stranger": torch.ones(1)}, path)
    refused("stranger")
    save_file(good | {"quant_conv.bias": torch.ones(99)}, path)
    refused("quant_conv.bias")
    save_file(good, path)
    path.write_bytes(path.read_bytes()[:-100])
    refused("Cannot load VQ")
    save_file(good, path)
    (tmp_path / "config.json").write_text(config[:-20])
    refused("config.json")
    (tmp_path / "config.json").write_text(config)
    assert VQ.from_pretrained(tmp_path).fingerprint() == tiny_vq().fingerprint()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", ["vq", "titok", "titok vae"])
def test_unordered_tokens_cannot_be_truncated(kind: str) -> None:
    tokenizer = TINY[kind]()
    with pytest.raises(ValueError, match="not ordered by importance"):
        tokenizer.encode(pictures(), num_tokens=2)
    with pytest.raises(ValueError, match="ordered"):
        tokenizer.encode(pictures()).truncate(2)


@pytest.mark.parametrize("count", [0, 9, -1])
def test_token_counts_outside_the_range(count: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.8 .* got {count}"):
        tiny_one_d_piece().encode(pictures(), num_tokens=count)


def test_as_many_counts_as_images() -> None:
    with pytest.raises(ValueError, match="2 entries for 3 images"):
        tiny_one_d_piece().encode(pictures(), num_tokens=[1, 2])


def test_nan_images_are_refused() -> None:
    images = pictures()
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(ImageError, match="NaN|finite"):
        tiny_vq().encode(images)


def test_nan_weights_are_noticed() -> None:
    tokenizer = tiny_vq()
    tokens = tokenizer.encode(pictures())
    tokenizer.decoder.conv_out.bias.data.fill_(float("nan"))
    tokens = ImageTokens(token_ids=tokens.token_ids, spec=tokenizer.token_spec())
    with pytest.raises(ValueError, match="NaN"):
        tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("model", "name", "hint"), [(TiTok, "l23", "l32"), (OneDPiece, "b265", "b256"), (VQ, "vq61", "vq16")]
)
def test_unknown_presets(model: type[ImageTokenizer], name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=hint):
        model.preset(name)


def test_bad_configurations() -> None:
    with pytest.raises(UnknownNameError, match="quantize_mode"):
        tiny_titok(quantize_mode="vqq")
    with pytest.raises(ValueError, match="patch_size must divide 16"):
        tiny_titok(patch_size=5)
    with pytest.raises(ValueError, match="one patch size, got 16 and 8"):
        config = {"vit_enc_model_size": "small", "vit_dec_model_size": "small"}
        config |= {"vit_enc_patch_size": 16, "vit_dec_patch_size": 8}
        TiTok.config_from_original({"model": {"vq_model": config}})


def test_a_config_file_is_json_that_anyone_can_read(tmp_path: Path) -> None:
    tiny_over_latents().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["codec_config"]["codebook_size"] == 32
