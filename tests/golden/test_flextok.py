"""FlexTok against recorded outputs of the published code, stage by stage."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmsdk.errors import CheckpointError
from mmsdk.tokens import ImageTokens
from tests.golden.util import (
    GOLDEN,
    assert_manifest,
    golden_index,
    golden_manifests,
    golden_path,
    load_json,
    load_tensors,
)
from tokenizers_img.flextok import FlexTok, mode_sigmas, projected_guidance, register_mask
from tokenizers_img.quantizers import FSQ

SYSTEM = "flextok"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}")


def file_ending(ending: str) -> str:
    """Return the recorded file whose name ends so, among those that golden.json lists."""
    (found,) = (name for name in golden_index(SYSTEM)["files"] if name.endswith(ending))
    return found


def hub_folder() -> Path:
    return (golden_path(SYSTEM) / file_ending("config.json")).parent


def published_config() -> dict[str, Any]:
    return load_json(SYSTEM, file_ending("config.json"))


def published_weights() -> dict[str, Tensor]:
    return load_tensors(SYSTEM, file_ending("model.safetensors"))


def pixels(images: Tensor) -> Tensor:
    """Turn the recorded images in [-1, 1] into ours, in [0, 1]."""
    return (images + 1) / 2


def number(pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    assert match, f"no {pattern!r} in {text!r}"
    return float(match[1])


class Golden:
    """The recorded tensors and what golden.json says about each; `done` ends with a check that all were compared."""

    def __init__(self) -> None:
        self.index = golden_index(SYSTEM)
        self.tensors = load_tensors(SYSTEM, file_ending("golden.safetensors"))
        self.atol = self.index["tolerance"]["float32_atol"]
        self.unchecked = set(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def text(self, name: str) -> str:
        return self.index["tensors"][name]["description"]

    def used(self, *names: str) -> None:
        self.unchecked -= set(names)

    def check(self, name: str, value: Tensor) -> None:
        torch.testing.assert_close(value, self[name].to(value.dtype), atol=self.atol, rtol=0)
        self.used(name)

    def same(self, name: str, value: Tensor) -> None:
        assert torch.equal(value, self[name].to(value.dtype)), name
        self.used(name)

    def names(self, pattern: str) -> list[str]:
        found = [name for name in self.tensors if re.fullmatch(pattern, name)]
        assert found, f"no tensor {pattern!r}"
        return found


def check_encoder(golden: Golden, model: FlexTok) -> None:
    latents = model.encode_latents(pixels(golden["images"]))
    moments = model.vae.vae.encode(golden["images"]).latent_dist.parameters
    golden.check("vae.moments", moments)
    golden.check("vae.latents", latents)
    seed = int(number(r"manual_seed\((\d+)\)", golden.text("vae.latents_sampled")))
    sampled = model.encode_latents(pixels(golden["images"]), torch.Generator().manual_seed(seed))
    golden.check("vae.latents_sampled", sampled)
    golden.check("vae.reconst", model.decode_latents(golden["vae.latents"]) * 2 - 1)
    golden.used("images")

    encoder, latents = model.register_encoder, golden["vae.latents"]
    recorded: dict[str, Tensor] = {}
    depth = len(encoder.enc_transformer["blocks"])

    def record(name: str) -> Any:
        return lambda module, inputs, output: recorded.__setitem__(name, output)

    handles = [encoder.enc_patch_emb.register_forward_hook(record("patch_emb"))]
    handles += [
        block.register_forward_hook(record(f"block{i}")) for i, block in enumerate(encoder.enc_transformer["blocks"])
    ]
    vectors = model.encode_features(latents)
    for handle in handles:
        handle.remove()
    batch, height, width, dim = golden["encoder.patch_emb"].shape
    count = height * width
    golden.check("encoder.patch_emb", recorded["patch_emb"].view(batch, height, width, dim))
    positions = encoder.enc_posemb_module["posembs"].permute(0, 2, 3, 1)
    golden.check("encoder.patches", golden["encoder.patch_emb"] + positions)
    registers = model.max_tokens
    golden.same("encoder.attn_mask", register_mask(count, registers))
    for i in range(depth - 1):
        golden.check(f"encoder.block{i}", recorded[f"block{i}"])
    # Of the last block only the registers are computed.
    last = recorded[f"block{depth - 1}"]
    torch.testing.assert_close(last, golden[f"encoder.block{depth - 1}"][:, count:], atol=golden.atol, rtol=0)
    golden.used(f"encoder.block{depth - 1}")
    golden.check("encoder.registers", last)
    golden.check("encoder.latents", vectors)


def check_quantizer(golden: Golden, model: FlexTok) -> None:
    output = model.quantize(golden["encoder.latents"])
    golden.check("fsq.bounded", model.quantize._bound(golden["encoder.latents"]))
    golden.check("fsq.quant", output.latents)
    golden.same("tokens", output.token_ids)
    golden.same("fsq.quant", model.quantize.dequantize(output.token_ids))
    golden.same("tokens", model.quantize.quantize(model.encode_features(golden["vae.latents"])))
    rectangle = model.encode_latents(pixels(golden["rect.images"]))
    golden.same("rect.tokens", model.quantize.quantize(model.encode_features(rectangle)))
    golden.used("rect.images")
    for name in golden.names(r"fsq\.[\d_]+\.index"):
        prefix = name.removesuffix(".index")
        table = FSQ([int(level) for level in prefix.removeprefix("fsq.").split("_")])
        golden.same(f"{prefix}.code", table.dequantize(golden[name]))
        assert torch.equal(golden[name], torch.arange(len(golden[name]))) or len(golden[name]) < table.codebook_size
        golden.same(f"{prefix}.tokens", table.quantize(golden[f"{prefix}.z"]))
        golden.check(f"{prefix}.quant", table(golden[f"{prefix}.z"]).latents)
        golden.used(name, f"{prefix}.z")


def check_velocity(golden: Golden, model: FlexTok) -> None:
    network = model.flow_decoder
    noised, times, lengths = (golden[f"decoder.{name}"] for name in ("noised", "timesteps", "keep_k"))
    golden.used("decoder.noised", "decoder.timesteps", "decoder.keep_k")
    recorded: dict[str, Tensor] = {}
    mlp = network.dec_time_embedder["mlp"]
    handle = mlp.register_forward_pre_hook(lambda module, inputs: recorded.__setitem__("sinusoid", inputs[0]))
    golden.check("decoder.t_emb", network.time_embedding(times))
    handle.remove()
    golden.check("decoder.t_sinusoid", recorded["sinusoid"])
    codes, modulations = model.quantize.dequantize(golden["tokens"]), network.modulations(times)
    registers, bias = network.registers(codes, lengths)
    present = registers.shape[1]
    recorded_registers = golden["decoder.registers_in"]
    torch.testing.assert_close(registers, recorded_registers[:, :present], atol=golden.atol, rtol=0)
    # The registers that are left out are copies of the last one.
    for row, length in zip(recorded_registers, lengths.tolist(), strict=True):
        assert torch.equal(row[length:], row[-1:].expand_as(row[length:]))
    golden.used("decoder.registers_in")
    handles = [
        block.register_forward_hook(lambda m, i, out, name=f"block{i}": recorded.__setitem__(name, out))
        for i, block in enumerate(network.blocks)
    ]
    first = network.blocks[0].register_forward_pre_hook(lambda m, inputs: recorded.__setitem__("input", inputs[0]))
    velocity, _ = network(noised, registers, bias, modulations)
    for handle in (*handles, first):
        handle.remove()
    golden.check("decoder.velocity", velocity)
    batch, height, width, dim = golden["decoder.patches_in"].shape
    count = height * width
    golden.check("decoder.patches_in", recorded["input"][:, :count].reshape(batch, height, width, dim))
    for i in range(len(network.blocks)):
        value = golden[f"decoder.block{i}"]
        torch.testing.assert_close(recorded[f"block{i}"], value[:, : count + present], atol=golden.atol, rtol=0)
        golden.used(f"decoder.block{i}")
    every = torch.ones(batch, dtype=torch.bool)
    second = torch.arange(batch) == 1
    for name, drop in (("velocity_uncond", every), ("velocity_mixed", second)):
        golden.check(f"decoder.{name}", network(noised, *network.registers(codes, lengths, drop), modulations)[0])


def check_guidance(golden: Golden) -> None:
    cond, uncond = golden["decoder.velocity"], golden["decoder.velocity_uncond"]
    scale = number(r"uncond \+ ([\d.]+)\*", golden.text("guidance.cfg"))
    golden.check("guidance.cfg", uncond + scale * (cond - uncond))
    running: Tensor | float = 0.0
    for step in range(len(golden.names(r"guidance\.apg_step\d+"))):
        name = f"guidance.apg_step{step}"
        text = golden.text(name)
        a, b = number(r"cond=velocity\*([\d.]+)", text), number(r"uncond=velocity_uncond\*([\d.]+)", text)
        scale = number(r"scale ([\d.]+)", text)
        assert (number(r"eta ([\d.]+)", text), number(r"threshold ([\d.]+)", text)) == (0, 2.5)
        guided, running = projected_guidance(cond * a, uncond * b, scale, running)
        golden.check(name, guided)
    text = golden.text("guidance.apg_eta")
    scale, eta = number(r"scale ([\d.]+)", text), number(r"eta ([\d.]+)", text)
    guided, _ = projected_guidance(cond, uncond, scale, momentum=0, norm_threshold=math.inf, eta=eta)
    golden.check("guidance.apg_eta", guided)


def check_sampling(golden: Golden, model: FlexTok) -> None:
    codes, noise = model.quantize.dequantize(golden["tokens"]), golden["detok.noise"]
    seed = int(number(r"manual_seed\((\d+)\)", golden.text("detok.noise")))
    golden.same("detok.noise", model.draw_noise(len(noise), torch.Generator().manual_seed(seed)))
    steps = int(number(r"(\d+) steps", golden.text(golden.names(r"detok\.k\d+\.images")[0])))
    for name in golden.names(r"detok\.k\d+\.images"):
        count = int(number(r"k(\d+)", name))
        lengths = torch.full((len(noise),), count)
        latents = model.sample_latents(codes, lengths, noise, steps, guidance_scale=1)
        golden.check(name.replace("images", "latents"), latents)
        golden.check(name, model.decode_latents(latents) * 2 - 1)
    for kind, guidance in (("cfg", "cfg"), ("apg", "apg"), ("callable", "cfg")):
        name = f"detok.{kind}.images"
        text = golden.text(name)
        lengths = torch.tensor([int(n) for n in re.search(r"\[([\d,]+)\]", text)[1].split(",")])
        if kind == "callable":
            base, slope = number(r"scale\(t\)=([\d.]+)\+", text), number(r"\+([\d.]+)t", text)
            scale: Any = lambda t, base=base, slope=slope: base + slope * t  # noqa: E731
        else:
            scale = number(r"(?:CFG|APG) ([\d.]+)", text)
        latents = model.sample_latents(codes, lengths, noise, steps, scale, guidance)
        golden.check(name, model.decode_latents(latents) * 2 - 1)


def check_training_noise(golden: Golden) -> None:
    mode_scale = published_config()["flow_matching_noise_module"]["mode_scale"]
    golden.check("noise.mode.sigmas", mode_sigmas(golden["noise.mode.base"], mode_scale))
    golden.check("noise.logitnormal.sigmas", golden["noise.logitnormal.base"].sigmoid())
    level, clean = golden["noise.mode.sigmas"].view(-1, 1, 1, 1), golden["vae.latents"]
    clean = clean.repeat(len(level) // len(clean), 1, 1, 1)
    golden.check("noise.mode.noised", level * golden["noise.mode.noise"] + (1 - level) * clean)
    golden.used("noise.mode.noise", *golden.names(r"noise\.\w+\.base"))
    # Ways of drawing levels that neither the published recipe nor ours uses.
    golden.used("noise.uniform.sigmas", "noise.stratified.sigmas")


def test_every_recorded_stage() -> None:
    golden, model = Golden(), FlexTok.from_pretrained(hub_folder())
    check_encoder(golden, model)
    check_quantizer(golden, model)
    check_velocity(golden, model)
    check_guidance(golden)
    check_sampling(golden, model)
    check_training_noise(golden)
    assert not golden.unchecked, f"recorded but not checked: {sorted(golden.unchecked)}"


def test_public_round_trip() -> None:
    """`encode` and `decode` give the recorded tokens and images (clamped), for prefixes, too."""
    golden, model = Golden(), FlexTok.from_pretrained(hub_folder())
    tokens = model.encode(pixels(golden["images"]))
    assert torch.equal(tokens.token_ids, golden["tokens"])
    for name in golden.names(r"detok\.k\d+\.images"):
        count, steps = int(number(r"k(\d+)", name)), int(number(r"(\d+) steps", golden.text(name)))
        prefix = model.encode(pixels(golden["images"]), num_tokens=count)
        assert torch.equal(prefix.token_ids, golden["tokens"][:, :count])
        prefix = ImageTokens.from_bytes(prefix.to_bytes())
        settings = {"num_inference_steps": steps, "guidance_scale": 1.0}
        images = model.decode(prefix, noise=golden["detok.noise"], **settings).images
        expected = pixels(golden[name]).clamp(0, 1)
        torch.testing.assert_close(images, expected, atol=golden.atol, rtol=0)
        seed = int(number(r"manual_seed\((\d+)\)", golden.text("detok.noise")))
        assert torch.equal(model.decode(prefix, torch.Generator().manual_seed(seed), **settings).images, images)


def test_the_training_loss_is_that_of_the_recorded_velocity() -> None:
    golden, model = Golden(), FlexTok.from_pretrained(hub_folder())
    sigmas, lengths, clean = golden["decoder.timesteps"], golden["decoder.keep_k"], golden["vae.latents"]
    level = sigmas.view(-1, 1, 1, 1)
    # The noise with which the recorded input is what the flow makes of the latents.
    noise = (golden["decoder.noised"] - (1 - level) * clean) / level
    last = len(model.flow_decoder.blocks) - 1
    output = model(clean, lengths, sigmas, noise, hidden_block=last)
    torch.testing.assert_close(output.velocity, golden["decoder.velocity"], atol=golden.atol, rtol=0)
    loss = (golden["decoder.velocity"] - (noise - clean)).square().mean()
    torch.testing.assert_close(output.loss, loss, atol=golden.atol, rtol=0)
    count = output.hidden_states.shape[1]
    expected = golden[f"decoder.block{last}"][:, :count]
    torch.testing.assert_close(output.hidden_states, expected, atol=golden.atol, rtol=0)


def test_the_vae_is_read_from_the_weights() -> None:
    expected, model = golden_index(SYSTEM)["vae_config"], FlexTok.from_pretrained(hub_folder())
    for key, value in expected.items():
        if key not in ("sample_size", "scaling_factor") and not key.startswith("_"):
            found = getattr(model.vae.vae.config, key)
            assert (list(found) if isinstance(found, (list, tuple)) else found) == value, key
    assert model.vae.vae.config.scaling_factor == expected["scaling_factor"]


def test_the_metadata_of_the_weights_holds_the_configuration() -> None:
    config, weights = published_config(), published_weights()
    loaded = FlexTok.from_pretrained(hub_folder())
    for other in (
        FlexTok.from_original(hub_folder() / "model.safetensors"),
        FlexTok.from_original(weights, config),
        FlexTok.from_original({"model": weights}, {"config": config}),
    ):
        assert other.fingerprint() == loaded.fingerprint()


def test_the_state_dict_is_the_published_one() -> None:
    assert_manifest(FlexTok.from_pretrained(hub_folder()), golden_index(SYSTEM)["state_dict"])


def test_saved_in_our_own_format(tmp_path: Path) -> None:
    golden, model = Golden(), FlexTok.from_pretrained(hub_folder())
    model.save_pretrained(tmp_path)
    loaded = FlexTok.from_pretrained(tmp_path)
    assert loaded.fingerprint() == model.fingerprint()
    assert torch.equal(loaded.encode(pixels(golden["images"])).token_ids, golden["tokens"])


@pytest.mark.parametrize("variant", golden_manifests(SYSTEM, ""))
def test_manifest(variant: str) -> None:
    manifest, config = load_json(SYSTEM, f"state_dict_{variant}.json"), load_json(SYSTEM, f"config_{variant}.json")
    if config["config"]["vae"]["scaling_factor"] is None:  # reconstructed, and not known
        config["config"]["vae"]["scaling_factor"] = 1.0
    with torch.device("meta"):
        preset = FlexTok.preset(variant)
        configured = FlexTok(**FlexTok.config_from_original(config))
    assert_manifest(preset, manifest)
    assert_manifest(configured, manifest)
    assert {k: v for k, v in preset.config.items() if k[0] != "_"} == {
        k: v for k, v in configured.config.items() if k[0] != "_"
    }


# ---------------------------------------------------------------- published folders and their configurations


def objects(config: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of all objects that have a class, but for those of feature alignment."""
    found = [path] if "_target_" in config and "repa" not in str(path) else []
    return found + [p for k, v in config.items() if isinstance(v, dict) for p in objects(v, (*path, k))]


def at(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = config[key]
    return config


def refused(config: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        FlexTok.config_from_original(config)


def test_unknown_classes_are_refused_by_name() -> None:
    paths = objects(published_config())
    assert len(paths) > 25
    for path in paths:
        config = published_config()
        at(config, path)["_target_"] = "os.system"
        refused(config, "os.system")


def test_unknown_entries_are_refused_by_name() -> None:
    for path in objects(published_config()):
        config = published_config()
        at(config, path)["surprise"] = 1
        refused(config, "surprise")


def test_wiring_that_leads_elsewhere_is_refused() -> None:
    without_effect = ("images_read_key", "clean_images_read_key", "register_sizes_read_write_key")
    entries = [(*path, key) for path in objects(published_config()) for key in at(published_config(), path)]
    read = [p for p in entries if re.search("read(_write)?_keys?$", p[-1]) and p[-1] not in without_effect]
    assert len(read) > 25
    for path in read:
        config = published_config()
        at(config, path[:-1])[path[-1]] = "rgb"
        refused(config, "read(_write)?_keys?")
    for value in (3, {"a": 1}, [1]):
        config = published_config()
        config["encoder"]["module_dict"]["enc_to_latents"]["read_key"] = value
        refused(config, "enc_to_latents.read_key must name")
    config = published_config()
    alignment = {"_target_": "anything", "write_key": config["pipeline"]["latents_read_key"]}
    config["decoder"]["module_dict"] = {"repa": alignment} | config["decoder"]["module_dict"]
    refused(config, "dec_from_latents.read_key must name")


def test_names_of_tensors_are_free() -> None:
    text = json.dumps(published_config())
    renamed = text
    for group in re.findall(r'"\w*write_keys?": (?:"(\w+)"|\["(\w+)", "(\w+)"\])', text):
        for name in filter(None, group):
            renamed = re.sub(rf'"(new )*{name}"', f'"new {name}"', renamed)
    assert renamed.count("new ") > 40
    assert FlexTok.config_from_original(json.loads(renamed)) == FlexTok.config_from_original(json.loads(text))


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("vae.scaling_factor", None, r"vae\.scaling_factor: None"),
        ("vae.scaling_factor", math.nan, r"vae\.scaling_factor: nan"),
        ("vae.latent_channels", 99, "contradicts itself: vae.latent_channels is 99"),
        ("encoder.module_dict.enc_posemb_module.posemb_scaling", "relative", "posemb_scaling must be 'absolute'"),
        ("encoder.module_dict.enc_posemb_module.posemb_type", "rope", "posemb_type: 'rope'"),
        ("encoder.module_dict.enc_posemb_module.max_sizes", [8, 4], "max_sizes is"),
        ("encoder.module_dict.enc_seq_packer.mask_mode", "full", "mask_mode must be 'causal_last', got 'full'"),
        ("encoder.module_dict.enc_transformer.head_dim", 7, "head_dim of the published encoder"),
        ("encoder.module_dict.enc_transformer.depth", True, "enc_transformer.depth: True"),
        ("encoder.module_dict.enc_transformer.dim", 24, "enc_transformer.dim is 24"),
        ("decoder.module_dict.dec_time_embedder.max_timestep", "1", "dec_time_embedder.max_timestep: '1'"),
        ("regularizer.levels", [8, 8], "number of regularizer.levels is 2"),
        ("regularizer", None, "an object at 'regularizer', got None"),
        ("encoder.module_dict", [], "an object at 'encoder.module_dict'"),
        ("pipeline.reconst_write_key", "rgb", "pipeline.reconst_write_key must name the decoder's result"),
        ("pipeline.timesteps_read_key", 1, "pipeline.timesteps_read_key must name a tensor, got 1"),
    ],
)
def test_values_that_are_not_supported(path: str, value: Any, match: str) -> None:
    config = published_config()
    *parents, key = path.split(".")
    at(config, tuple(parents))[key] = value
    refused(config, match)


def test_modules_that_are_missing_or_moved() -> None:
    config = published_config()
    modules = config["decoder"]["module_dict"]
    config["decoder"]["module_dict"] = dict(reversed(modules.items()))
    refused(config, "in this order")
    del modules["dec_nested_dropout"]
    config["decoder"]["module_dict"] = modules
    refused(config, "unknown or missing: .'dec_nested_dropout'")
    del config["regularizer"]
    refused(config, "unknown or missing: .'regularizer'")
    config = published_config()
    del config["decoder"]["module_dict"]["dec_time_embedder"]["max_timestep"]
    refused(config, "lacks decoder.module_dict.dec_time_embedder.max_timestep")
    config = published_config()
    config["decoder"]["module_dict"]["dec_patches_posemb_module"]["max_sizes"] = [8, 4]
    config["encoder"]["module_dict"]["enc_posemb_module"]["max_sizes"] = [8, 4]
    refused(config, "must be square")
    refused({}, "names the class None")
    refused("flextok", "an object at 'the top'")


def test_time_and_scale_come_from_the_configuration() -> None:
    """They change results, but no shape, so nothing else would notice."""
    config = published_config()
    plain = FlexTok.from_original(published_weights(), config)
    config["vae"]["scaling_factor"] *= 2
    config["decoder"]["module_dict"]["dec_time_embedder"]["max_timestep"] *= 1000
    changed = FlexTok.from_original(published_weights(), config)
    images = pixels(Golden()["images"])
    torch.testing.assert_close(changed.encode_latents(images), 2 * plain.encode_latents(images))
    time = torch.tensor([0.5])
    expected = plain.flow_decoder.time_embedding(time)
    torch.testing.assert_close(changed.flow_decoder.time_embedding(1000 * time), expected)


def test_weights_of_feature_alignment_are_left_out() -> None:
    weights, config = published_weights(), published_config()
    alignment = {"decoder.module_dict.dec_repa_head.proj.weight": torch.ones(2, 2)}
    expected = FlexTok.from_original(weights, config).fingerprint()
    assert FlexTok.from_original(weights | alignment, config).fingerprint() == expected
    for stranger in ("decoder.module_dict.dec_head.weight", "encoder.module_dict.repa.weight"):
        with pytest.raises(CheckpointError, match=stranger):
            FlexTok.from_original(weights | {stranger: torch.ones(1)}, config)
    with pytest.raises(CheckpointError, match="missing 'vae.vae.encoder"):
        FlexTok.from_original({"decoder.a": torch.ones(1)}, config)
    with pytest.raises(CheckpointError, match="pass it as `config`"):
        FlexTok.from_original(weights)


def test_the_licence_of_the_weights_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        FlexTok.from_pretrained(hub_folder())
    assert [r.getMessage() for r in caplog.records if "research only" in r.getMessage()] == [
        "The published FlexTok weights may be used for research only (licence apple-amlr)."
    ]


def test_keywords_for_published_folders(tmp_path: Path) -> None:
    half = FlexTok.from_pretrained(hub_folder(), torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    golden = Golden()
    assert torch.equal(half.encode(pixels(golden["images"])).token_ids, golden["tokens"])
    with pytest.raises(TypeError, match=r"do not take the keywords \['device_map'\]"):
        FlexTok.from_pretrained(hub_folder(), device_map="auto")
    shutil.copy(hub_folder() / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="No checkpoint file at .*model.safetensors"):
        FlexTok.from_pretrained(tmp_path)
    content = (hub_folder() / "model.safetensors").read_bytes()
    for length in (0, 8, len(content) // 2, len(content) - 1):
        (tmp_path / "model.safetensors").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="Cannot read the checkpoint"):
            FlexTok.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="Cannot load FlexTok"):
        FlexTok.from_pretrained(tmp_path)
