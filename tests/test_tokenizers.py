"""Image tokenizers: round trips, prefixes, batches, identity, saving and loading, bad input."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmsdk.errors import CheckpointError, ImageError, TokenStreamError, UnknownNameError
from mmsdk.loading import TOKENIZERS, load_into, resolve
from mmsdk.tokens import ImageTokens
from tests.tiny import tiny_autoencoder_kl, tiny_flextok, tiny_one_d_piece, tiny_tokenbridge, tiny_vae, tiny_vq
from tokenizers_img.base import ImageTokenizer
from tokenizers_img.one_d_piece import OneDPiece
from tokenizers_img.titok import TiTok
from tokenizers_img.vq import VQ


def tiny_titok(model: type[TiTok] = TiTok, **settings: object) -> TiTok:
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 4, "num_latent_tokens": 6, "token_size": 4, "is_legacy": False}
    shape |= {"encoder_shape": (16, 1, 2), "decoder_shape": (16, 1, 2)}
    return model(**(shape | settings)).eval()


def tiny_legacy() -> TiTok:
    decoder = {"channels": 32, "channel_mult": (1, 1, 1), "num_res_blocks": 1, "z_channels": 8}
    model = tiny_titok(is_legacy=True, pixel_decoder_config=decoder)
    # Proxy codes as different as trained ones, or the pixel decoder's norms would amplify rounding errors.
    torch.nn.init.normal_(model.decoder.ffn[2].weight)
    torch.nn.init.normal_(model.pixel_quantize.embedding.weight)
    return model


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
    "one_d_piece vae": lambda: tiny_titok(OneDPiece, quantize_mode="vae", num_latent_tokens=8),
    "flextok": tiny_flextok,
    "tokenbridge": tiny_tokenbridge,
    "tokenbridge diffusers": lambda: tiny_tokenbridge(tiny_autoencoder_kl()),
    "vae": tiny_vae,
}
ORDERED = [kind for kind in TINY if kind.startswith(("one_d_piece", "flextok"))]
UNORDERED = [kind for kind in TINY if kind not in ORDERED]
every_kind = pytest.mark.parametrize("kind", list(TINY))


def pictures(count: int = 3, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def values(tokens: ImageTokens) -> Tensor:
    return tokens.latents if tokens.token_ids is None else tokens.token_ids


class Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, entry: logging.LogRecord) -> None:
        self.messages.append(entry.getMessage())


@pytest.fixture
def diffusers_log() -> Iterator[list[str]]:
    """What diffusers logs, which does not reach the root logger."""
    logger, collector = logging.getLogger("diffusers"), Collector()
    logger.addHandler(collector)
    yield collector.messages
    logger.removeHandler(collector)


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


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind: str, dtype: torch.dtype, diffusers_log: list[str]) -> None:
    tokenizer = TINY[kind]().to(dtype)
    assert tokenizer.dtype == dtype
    tokens = tokenizer.encode(pictures())
    images = tokenizer.decode(tokens).images
    assert images.dtype == torch.float32
    assert images.shape == (3, 3, 16, 16)
    exact = TINY[kind]().to(dtype).to(torch.float32).decode(tokens).images
    assert float((images - exact).abs().mean()) < 0.02
    assert diffusers_log == []


@pytest.mark.parametrize("kind", ORDERED)
def test_prefixes(kind: str) -> None:
    tokenizer, images = TINY[kind](), pictures()
    full = tokenizer.encode(images)
    assert torch.equal(values(tokenizer.encode(images, num_tokens=3)), values(full)[:, :3])
    progressive = list(tokenizer.decode_progressive(full))
    assert [count for count, _ in progressive] == [1, 2, 4, 8]
    for count, decoded in progressive:
        assert torch.equal(decoded, tokenizer.decode(full.truncate(count)).images)
    assert torch.equal(progressive[-1][1], tokenizer.decode(full).images)
    assert not torch.equal(progressive[0][1], progressive[1][1])
    assert [count for count, _ in tokenizer.decode_progressive(full, counts=[3, 7])] == [3, 7]
    with pytest.raises(ValueError, match="Cannot keep 9 tokens"):
        list(tokenizer.decode_progressive(full, counts=[9]))


@pytest.mark.parametrize("kind", ORDERED)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_mixed_lengths_equal_one_by_one(kind: str, as_tensor: bool) -> None:
    tokenizer, images, counts = TINY[kind](), pictures(), [2, 7, 5]
    mixed = tokenizer.encode(images, num_tokens=torch.tensor(counts) if as_tensor else counts)
    assert mixed.lengths.tolist() == counts
    decoded = tokenizer.decode(mixed).images
    for i, count in enumerate(counts):
        single = tokenizer.encode(images[i : i + 1], num_tokens=count)
        if mixed.token_ids is not None:
            assert torch.equal(mixed.token_ids[i, :count], single.token_ids[0])
        alone = tokenizer.decode(single).images
        torch.testing.assert_close(decoded[i : i + 1], alone, atol=1e-5, rtol=0)
    # A prefix longer than an image has is all that it has.
    progressive = dict(tokenizer.decode_progressive(mixed))
    assert list(progressive) == [1, 2, 4, 7]
    torch.testing.assert_close(progressive[4][0], decoded[0], atol=1e-5, rtol=0)
    assert torch.equal(progressive[7], decoded)


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
    with pytest.raises(ValueError, match=r"\(1, 77, 768\); received the shape \(2, 77, 768\)"):
        tokenizer.decode(tokens, text_features=torch.zeros(2, 77, 768))
    features = torch.randn(2, 1, 77, 768, generator=torch.Generator().manual_seed(0))
    one, other = (tokenizer.decode(tokens, text_features=text).images for text in features)
    assert not torch.equal(one, other)
    assert torch.equal(tokenizer.reconstruct(pictures(1), text_features=features[0]).images, one)
    # In the model's dtype, whatever the features have.
    tokenizer.to(torch.bfloat16)
    assert tokenizer.decode(tokens, text_features=features[0]).images.shape == one.shape
    plain = tiny_titok()
    with pytest.raises(ValueError, match="not text-aware"):
        plain.decode(plain.encode(pictures(1)), text_features=features[0])


def test_unknown_keywords_of_decoders_are_refused() -> None:
    tokenizer = tiny_vq()
    with pytest.raises(TypeError, match="num_steps"):
        tokenizer.decode(tokenizer.encode(pictures(1)), num_steps=3)


def test_ids_of_a_generator_decode() -> None:
    tokenizer = tiny_one_d_piece()
    encoded = tokenizer.encode(pictures())
    written = ImageTokens(token_ids=encoded.token_ids.clone(), spec=tokenizer.token_spec())
    assert torch.equal(tokenizer.decode(written).images, tokenizer.decode(encoded).images)
    with pytest.raises(ValueError, match="32"):
        ImageTokens(token_ids=torch.full((1, 8), 32), spec=tokenizer.token_spec())


def test_tail_drop_is_a_prefix_in_training() -> None:
    model, images = tiny_one_d_piece(), pictures()
    with torch.no_grad():
        short, output = model(images, num_tokens=2)
        assert torch.equal(short, model.decode_latents(output.latents[:, :2]))
        assert output.token_ids.shape == (3, 8)


# The loss of a flow is another: test_flextok.py.
@pytest.mark.parametrize("kind", [kind for kind in TINY if not kind.startswith("flextok")])
def test_forward_trains_every_part(kind: str) -> None:
    model = TINY[kind]().train()
    if getattr(model.config, "quantize_mode", None) == "vae":
        with pytest.raises(ValueError, match="no quantizer to train through"):
            model(pictures())
        return
    decoded, quantized = model(pictures())
    assert decoded.shape == (3, 3, 16, 16)
    (decoded.square().mean() + quantized.loss).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    # The codec's latents are not quantized.
    assert [name for name in without if not name.startswith("codec.quantize.")] == []


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
    for key, value in tokenizer.state_dict().items():
        before = value.clone()
        value.add_(1)
        assert tokenizer.fingerprint() != fingerprint, key
        value.copy_(before)
    assert tokenizer.fingerprint() == fingerprint


@every_kind
def test_the_dtype_does_not_change_the_fingerprint(kind: str, tmp_path: Path) -> None:
    tokenizer = TINY[kind]().to(torch.float16)
    fingerprint = tokenizer.fingerprint()
    tokenizer.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        loaded = type(tokenizer).from_pretrained(tmp_path, torch_dtype=dtype)
        assert loaded.dtype == dtype
        assert loaded.fingerprint() == fingerprint


def test_the_configuration_changes_the_fingerprint() -> None:
    one, other = (tiny_titok(use_l2_norm=flag) for flag in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.fingerprint() != other.fingerprint()


def test_tokens_of_another_tokenizer_are_refused() -> None:
    tokens = tiny_vq(seed=0).encode(pictures())
    with pytest.raises(TokenStreamError, match="made by 'vq' with fingerprint"):
        tiny_vq(seed=1).decode(tokens)


# ---------------------------------------------------------------- saving and loading


@every_kind
def test_save_and_load(kind: str, tmp_path: Path, diffusers_log: list[str]) -> None:
    tokenizer = TINY[kind]()
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.encode(pictures()).equal(tokenizer.encode(pictures()))
    assert diffusers_log == []


@every_kind
def test_models_on_the_meta_device_take_a_state_dict(kind: str) -> None:
    tokenizer = TINY[kind]()
    settings = {k: v for k, v in tokenizer.config.items() if not k.startswith("_")}
    with torch.device("meta"):
        empty = type(tokenizer)(**settings)
    load_into(empty, tokenizer.state_dict())
    assert empty.eval().encode(pictures()).equal(tokenizer.encode(pictures()))


@pytest.mark.parametrize("wrapper", ["model", None])
def test_published_files(wrapper: str | None, tmp_path: Path) -> None:
    path, model = tmp_path / "published.pt", tiny_vq()
    # The published file has a buffer of usage statistics, too.
    state = model.state_dict() | {"quantize.codebook_used": torch.zeros(65536)}
    torch.save({wrapper: state} if wrapper else state, path)
    settings = {k: v for k, v in model.config.items() if not k.startswith("_")}
    loaded = VQ.from_original(path, settings)
    assert loaded.fingerprint() == model.fingerprint()
    assert not loaded.training
    with pytest.raises(CheckpointError, match="'quant_conv.bias' has shape"):
        VQ.from_original(state | {"quant_conv.bias": torch.ones(99)}, settings)
    with pytest.raises(CheckpointError, match="'quantize.usage'"):
        VQ.from_original(state | {"quantize.usage": torch.ones(1)}, settings)


def test_an_interrupted_save_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    old, new = tiny_vq(seed=0), tiny_vq(seed=1)
    old.save_pretrained(tmp_path / "old")
    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    for folder in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path / folder)
    assert VQ.from_pretrained(tmp_path / "old").fingerprint() == old.fingerprint()
    with pytest.raises(CheckpointError, match="no file named diffusion_pytorch_model.safetensors"):
        VQ.from_pretrained(tmp_path / "new")


def test_pickled_weights_are_read_only_when_asked_for(tmp_path: Path) -> None:
    tiny_vq().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(CheckpointError, match="no file named diffusion_pytorch_model.safetensors"):
        VQ.from_pretrained(tmp_path)
    assert VQ.from_pretrained(tmp_path, use_safetensors=False).fingerprint() == tiny_vq().fingerprint()


def test_every_truncation_of_the_weights_is_refused(tmp_path: Path) -> None:
    tiny_vq().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    content = path.read_bytes()
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="Cannot load VQ"):
            VQ.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("", "config.json"),
        ("{", "config.json"),
        ("null", "NoneType"),
        ("[1]", r"must be an object, got \[1\]"),
        ('"owner/repository"', "must be an object, got 'owner/repository'"),
        ('{"channel_mult": null}', "NoneType"),
        ('{"channels": "x"}', "str"),
        ('{"image_size": 17}', "multiple of"),
    ],
)
def test_damaged_configurations(config: str, reason: str, tmp_path: Path) -> None:
    tiny_vq().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=f"Cannot load VQ(?s:.*){reason}"):
        VQ.from_pretrained(tmp_path)


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


@pytest.mark.parametrize("kind", UNORDERED)
def test_unordered_tokens_cannot_be_truncated(kind: str) -> None:
    tokenizer, images = TINY[kind](), pictures()
    count = tokenizer.max_tokens
    for counts in (2, [count, count, count - 1]):
        with pytest.raises(ValueError, match=f"not ordered by importance .* must be {count} or None"):
            tokenizer.encode(images, num_tokens=counts)
    tokens = tokenizer.encode(images)
    with pytest.raises(ValueError, match="not ordered, and only all"):
        tokens.truncate(2)
    with pytest.raises(ValueError, match="not ordered, and only all"):
        next(tokenizer.decode_progressive(tokens))
    for counts in (count, [count] * 3):
        assert tokenizer.encode(images, num_tokens=counts).equal(tokens)


@pytest.mark.parametrize("count", [0, 9, -1])
def test_token_counts_outside_the_range(count: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.8 .* got {count}"):
        tiny_one_d_piece().encode(pictures(), num_tokens=count)


@pytest.mark.parametrize("count", [2.5, "3", [1, 2.5, 3], torch.tensor([1.0, 2.0, 3.0])])
def test_token_counts_are_integers(count: object) -> None:
    with pytest.raises(TypeError, match="integer or one integer per image"):
        tiny_one_d_piece().encode(pictures(), num_tokens=count)


def test_as_many_counts_as_images() -> None:
    with pytest.raises(ValueError, match="2 entries for 3 images"):
        tiny_one_d_piece().encode(pictures(), num_tokens=[1, 2])


@every_kind
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_values_outside_the_range_are_refused(kind: str, value: float) -> None:
    images = pictures()
    images[0, 0, 0, 0] = value
    with pytest.raises(ImageError, match=r"must be in \[0, 1\]" + (".*NaN" if math.isnan(value) else "")):
        TINY[kind]().encode(images)


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
    codec = {k: v for k, v in tiny_vq().config.items() if not k.startswith("_")}
    pixels = {"channels": 32, "channel_mult": (1, 1, 1), "num_res_blocks": 1, "z_channels": 8}
    for match, settings in {
        "patch_size must divide 16": {"patch_size": 5},
        r"encoder_shape must be .* got \(16, 1, 3\)": {"encoder_shape": (16, 1, 3)},
        r"decoder_shape must be .* got \(16, 1\)": {"decoder_shape": (16, 1)},
        r"integers >= 2, got \[\]": {"quantize_mode": "fsq"},
        "number of fsq_levels, 2; got 4": {"quantize_mode": "fsq", "fsq_levels": (8, 8)},
        "image_size must be that of the codec, 16; got 32": {"codec_config": codec, "image_size": 32},
        "not a codec's latents": {"codec_config": codec, "is_legacy": True},
        "Only a legacy model has a pixel decoder": {"pixel_decoder_config": pixels},
    }.items():
        with pytest.raises(ValueError, match=match):
            tiny_titok(**settings)
    with pytest.raises(ValueError, match="multiple of 16, the pixels per token of 5 resolutions; got 100"):
        VQ.preset("vq16", image_size=100)
    with pytest.raises(ValueError, match="lacks the entry 'model'"):
        TiTok.config_from_original({})
    with pytest.raises(UnknownNameError, match="model size 'smal'. Did you mean 'small'"):
        TiTok.config_from_original({"model": {"vq_model": {"vit_enc_model_size": "smal"}}})
    with pytest.raises(ValueError, match="one patch size, got 16 and 8"):
        config = {"vit_enc_model_size": "small", "vit_dec_model_size": "small"}
        config |= {"vit_enc_patch_size": 16, "vit_dec_patch_size": 8}
        TiTok.config_from_original({"model": {"vq_model": config}})


def test_a_config_file_is_json_that_anyone_can_read(tmp_path: Path) -> None:
    tiny_over_latents().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["codec_config"]["codebook_size"] == 32
