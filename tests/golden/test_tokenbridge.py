"""TokenBridge's quantizer and VAE against recorded outputs of the published code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mmsdk.tokens import ImageTokens
from tests.golden.util import GOLDEN, golden_index, golden_manifests, load_json, load_tensors
from tokenizers_img.quantizers import GaussianQuantizer
from tokenizers_img.tokenbridge import TokenBridge
from tokenizers_img.vae import KLVAE

SYSTEM = "tokenbridge"
# Key of a recorded tensor -> what the tests below make of it.
TABLE = re.compile(r"table\.bits(\d+)\.(boundaries|centroids)")
QUANTIZED = re.compile(r"ptq\.bits(\d+)\.range(\d+)\.(index|value)")
PIPELINE = re.compile(r"(vae|tok|dequant)\..*|ptq\.x|seq\.(latents|tokens|tokens_channel_order)")
# How the generator cuts latents into larger patches: none of the tokenizer's work.
OF_THE_GENERATOR = {"seq.patch2"}

INDEX = golden_index(SYSTEM)
pytestmark = pytest.mark.skipif(not INDEX, reason=f"no golden data at {GOLDEN}")


def tensors() -> dict[str, Tensor]:
    return load_tensors(SYSTEM, "golden.safetensors")


def recorded(pattern: re.Pattern[str]) -> list[tuple[int, ...]]:
    """Return the numbers in the keys that fit a pattern; none at all is an error."""
    if not INDEX:
        return []
    found = {tuple(map(int, m.groups()[:-1])) for m in map(pattern.fullmatch, INDEX["tensors"]) if m}
    if not found:
        raise LookupError(f"Nothing recorded fits {pattern.pattern!r}.")
    return sorted(found)


def vae_settings(config: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Translate the recorded description of a VAE into arguments of `KLVAE`.

    The published code counts attention by resolution, `KLVAE` by level.
    """
    size = config.get("resolution", 256)

    def levels(part: str) -> list[int]:
        chosen = next(config[k] for k in (f"attn_resolutions_{part}", f"{part}_attn_resolutions") if k in config)
        return [level for level in range(len(config["ch_mult"])) if size // 2**level in chosen]

    return {
        "channels": config["ch"],
        "channel_mult": config["ch_mult"],
        "num_res_blocks": config["num_res_blocks"],
        "attention_levels": levels("encoder"),
        "decoder_attention_levels": levels("decoder"),
        "latent_channels": config["embed_dim"],
        "image_size": size,
        **settings,
    }


def load_tokenizer(**settings: Any) -> TokenBridge:
    weights = load_tensors(SYSTEM, "vae.safetensors")
    vae = KLVAE.from_original(weights, vae_settings(INDEX["vae_config"], scaling_factor=INDEX["scale"]))
    quantizer = INDEX["quantiser"]
    low, high = quantizer["range"]
    assert low == -high
    return TokenBridge(vae, quantizer["bits"], high, channel_order=INDEX["channel_order"]).eval()


def recorded_generator() -> torch.Generator:
    seed = int(re.search(r"manual_seed\((\d+)\)", INDEX["tensors"]["vae.sample"]["description"])[1])
    return torch.Generator().manual_seed(seed)


def test_everything_recorded_is_checked() -> None:
    patterns = (TABLE, QUANTIZED, PIPELINE)
    assert {k for k in tensors() if not any(p.fullmatch(k) for p in patterns)} <= OF_THE_GENERATOR


@pytest.mark.parametrize(("bits",), recorded(TABLE))
def test_table(bits: int) -> None:
    golden, quantizer = tensors(), GaussianQuantizer(bits)
    assert torch.equal(quantizer.boundaries, golden[f"table.bits{bits}.boundaries"])
    assert torch.equal(quantizer.centroids, golden[f"table.bits{bits}.centroids"])


@pytest.mark.parametrize(("bits", "value_range"), recorded(QUANTIZED))
def test_quantizer(bits: int, value_range: int) -> None:
    golden, quantizer = tensors(), GaussianQuantizer(bits, value_range)
    index, value = (golden[f"ptq.bits{bits}.range{value_range}.{name}"] for name in ("index", "value"))
    assert torch.equal(quantizer.quantize(golden["ptq.x"]), index)
    assert torch.equal(quantizer.dequantize(index), value)
    assert torch.equal(quantizer.quantize(value), index)


def test_vae() -> None:
    golden, tokenizer = tensors(), load_tokenizer()
    tolerance = {"atol": INDEX["tolerance"]["float32_atol"], "rtol": 0}
    images, scale = golden["vae.images"] * 0.5 + 0.5, INDEX["scale"]  # recorded in [-1, 1]
    mean, logvar = tokenizer.vae.posterior(images)
    recorded_mean, recorded_logvar = golden["vae.moments"].chunk(2, 1)
    torch.testing.assert_close(mean, recorded_mean, **tolerance)
    torch.testing.assert_close(logvar, recorded_logvar.clamp(-30, 20), **tolerance)
    sampled = tokenizer.vae.encode_latents(images, recorded_generator(), sample=True)
    torch.testing.assert_close(sampled, golden["tok.latents"], **tolerance)
    torch.testing.assert_close(sampled / scale, golden["vae.sample"], **tolerance)
    for key, latents in (
        ("tok.reconst", golden["tok.value"]),
        ("vae.reconst", golden["tok.latents"]),
        ("vae.reconst_mode", recorded_mean * scale),
    ):
        decoded = tokenizer.vae.decode_latents(latents) * 2 - 1
        torch.testing.assert_close(decoded, golden[key], **tolerance)


def test_tokens() -> None:
    golden, tokenizer = tensors(), load_tokenizer()
    ids = tokenizer.quantize_latents(golden["tok.latents"])
    assert torch.equal(ids.mT.unflatten(2, tokenizer.grid), golden["tok.index"])
    assert torch.equal(ids, golden["seq.tokens"])
    assert torch.equal(ids[..., list(tokenizer.channel_order)], golden["seq.tokens_channel_order"])
    assert torch.equal(golden["tok.latents"].flatten(2).mT, golden["seq.latents"])
    assert torch.equal(tokenizer.dequantize_ids(ids), golden["tok.value"])
    assert torch.equal(tokenizer.quantize.levels, golden["dequant.table"])


def test_public_round_trip() -> None:
    """The published pipeline, which tokenizes a posterior sample, through `encode` and `decode`."""
    golden, tokenizer = tensors(), load_tokenizer()
    tolerance = INDEX["tolerance"]["float32_atol"]
    images = golden["vae.images"] * 0.5 + 0.5
    if bool(((images >= 0) & (images <= 1)).all()):  # `encode` takes nothing else
        tokens = tokenizer.encode(images, generator=recorded_generator(), sample=True)
        # A latent within the tolerance of the border between two levels may go to either.
        low, high = (tokenizer.quantize_latents(golden["tok.latents"] + sign * tolerance) for sign in (-1, 1))
        assert float((low == high).float().mean()) > 0.9
        assert bool(((low <= tokens.token_ids) & (tokens.token_ids <= high)).all())
    exact = ImageTokens(token_ids=golden["seq.tokens"], spec=tokenizer.token_spec())
    decoded = tokenizer.decode(ImageTokens.from_bytes(exact.to_bytes())).images
    expected = (golden["tok.reconst"] * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, expected, atol=tolerance, rtol=0)


def assert_loads(manifest: dict[str, Any]) -> KLVAE:
    """Check that a published checkpoint fits the preset, key by key."""
    published = {k: torch.empty(shape, dtype=getattr(torch, dtype)) for k, (shape, dtype) in manifest.items()}
    vae = KLVAE.from_original(published, "kl16")
    assert len(vae.state_dict()) == len(manifest)
    assert {str(v.dtype).removeprefix("torch.") for v in vae.state_dict().values()} == {d for _, d in manifest.values()}
    return vae


@pytest.mark.parametrize("variant", golden_manifests(SYSTEM, ""))
def test_manifest(variant: str) -> None:
    with torch.device("meta"):
        vae = assert_loads(load_json(SYSTEM, f"state_dict_{variant}.json"))
        preset = TokenBridge.preset(variant)
    (path,) = GOLDEN.joinpath(SYSTEM).glob(f"config_{variant}_*.json")
    config = load_json(SYSTEM, path.name)
    expected = vae_settings(config["vae"], scaling_factor=config["scale"], norm_num_groups=32)
    assert {k: v if isinstance(v, int | float) else list(v) for k, v in vae.config.items() if k[0] != "_"} == expected
    assert (preset.config.bits, preset.quantize.codebook_size) == (
        config["quantiser"]["bits"],
        config["quantiser"]["levels"],
    )
    assert preset.config.value_range == config["quantiser"]["max"] == -config["quantiser"]["min"]
    assert list(preset.channel_order) == config["channel_order"]
    assert preset.config.image_size == config["preprocessing"]["size"]
