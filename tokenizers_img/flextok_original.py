"""The published format of FlexTok: its nested configuration, checked and translated into constructor arguments.

The published code builds whatever class a configuration names. Here nothing is imported by name: every class and entry
that may change the result has to be known, with a value that is supported.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mmsdk.errors import CheckpointError

# What an entry must be: a positive integer, a list of them, a positive number, or a name.
_LARGEST = 2**16


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST


def _are_sizes(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0 and all(map(_is_size, value))


def _is_position_kind(value: Any) -> bool:
    return value in ("sincos", "learnable_sum")


def _is_factor(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


@dataclass(frozen=True)
class _Published:
    """One class of the published configurations: what it is called, and what its entries mean.

    Attributes:
        target: name of the class.
        wiring: entries that name the tensors which a module reads and writes, and what these tensors are. The
            published code passes them on in a dict; their names are free, but must lead where they lead here.
        read: entries that become constructor arguments, and what they must be.
        fixed: entries with the one value that is supported.
        ignored: entries of training, of speed and of the memory layout.
    """

    target: str
    wiring: Mapping[str, tuple[str, ...]]
    read: Mapping[str, Callable[[Any], bool]]
    fixed: Mapping[str, Any]
    ignored: frozenset[str]


def _published(
    target: str,
    wiring: Mapping[str, str | tuple[str, ...]],
    read: Mapping[str, Callable[[Any], bool]] | None = None,
    ignored: str = "",
    **fixed: Any,
) -> _Published:
    tensors = {key: (of,) if isinstance(of, str) else of for key, of in wiring.items()}
    return _Published(f"flextok.{target}", tensors, read or {}, fixed, frozenset(ignored.split()))


def _moved_channels(to: str, before: str, after: str) -> _Published:
    operation = {"_target_": f"flextok.model.utils.dict_ops.channels_{to}", "_partial_": True}
    wiring = {"read_key": before, "write_key": after}
    return _published("model.utils.dict_ops.PerSampleOp", wiring, per_sample_op=operation)


def _positions(of: str) -> _Published:
    return _published(
        "model.utils.posembs.PositionalEmbeddingAdder",
        {"read_key": of, "write_key": f"placed {of}"},
        {"dim": _is_size, "max_sizes": _are_sizes, "posemb_type": _is_position_kind},
        posemb_scaling="absolute",
    )


def _packer(wiring: Mapping[str, str], **fixed: Any) -> _Published:
    return _published(
        "model.preprocessors.flex_seq_packing.BlockWiseSequencePacker",
        {
            **wiring,
            "input_list_read_keys": ("placed patches", "placed registers"),
            "packed_seq_write_key": "sequence",
            "block_mask_write_key": "mask",
            "inner_packed_shapes_write_key": "inner shapes",
            "outer_packed_shapes_write_key": "outer shapes",
        },
        ignored="pad_to_multiple compile_block_mask return_materialized_mask",
        **fixed,
    )


def _transformer(wiring: Mapping[str, str], **fixed: Any) -> _Published:
    sequence = {"input_seq_read_key": "sequence", "output_seq_write_key": "result", "block_mask_read_key": "mask"}
    return _published(
        "model.trunks.transformers.FlexTransformer",
        {**sequence, **wiring},
        {"dim": _is_size, "depth": _is_size, "head_dim": _is_size},
        ignored="use_act_checkpoint intermediate_layers",
        **fixed,
    )


_PATCHES = _published(
    "model.preprocessors.patching.PatchEmbedder",
    {"input_tensor_list_read_key": "channels last", "patches_list_write_key": "patches"},
    {"channels_in": _is_size, "dim": _is_size, "patch_sizes": _are_sizes},
    flatten_patches=False,
)
_UNPACKER = _published(
    "model.postprocessors.seq_unpacking.SequenceUnpacker",
    {
        "packed_seq_read_key": "result",
        "inner_seq_write_keys": ("final patches", "final registers"),
        "inner_packed_shapes_read_key": "inner shapes",
        "outer_packed_shapes_read_key": "outer shapes",
    },
)
_WRAPPER = "flextok.model.utils.wrappers.SequentialModuleDictWrapper"
_ENCODER: dict[str, _Published] = {
    "enc_channels_to_last": _moved_channels("first_to_last", "latents", "channels last"),
    "enc_patch_emb": _PATCHES,
    "enc_posemb_module": _positions("patches"),
    "enc_register_module": _published(
        "model.preprocessors.registers.Registers1D",
        {"input_tensor_list_read_key": "placed patches", "registers_write_key": "placed registers"},
        {"dim": _is_size, "n_max": _is_size},
        ignored="n_min size_sampling_mode register_sizes_read_write_key",
        ordering_mode="nested",
    ),
    "enc_seq_packer": _packer({}, mask_mode="causal_last"),
    "enc_transformer": _transformer({}),
    "enc_unpacker": _UNPACKER,
    "enc_to_latents": _published(
        "model.postprocessors.heads.LinearHead",
        {"read_key": "final registers", "write_key": "vectors"},
        {"dim": _is_size, "dim_out": _is_size},
        ignored="weight_init_style dtype_override",
        use_mup_readout=False,
    ),
}
_DECODER: dict[str, _Published] = {
    "dec_from_latents": _published(
        "model.preprocessors.linear.LinearLayer",
        {"read_key": "codes", "write_key": "registers"},
        {"dim_in": _is_size, "dim": _is_size},
    ),
    "dec_registers_posemb_module": _positions("registers"),
    "dec_nested_dropout": _published(
        "model.preprocessors.token_dropout.MaskedNestedDropout",
        {"read_write_key": "placed registers"},
        {"dim": _is_size},
        ignored="size_sampling_mode",
    ),
    "dec_latent_dropout": _published(
        "model.preprocessors.nullcond.LearnedNullCond",
        {"read_write_key": "placed registers"},
        {"dim": _is_size},
        ignored="dropout_prob",
    ),
    "dec_noise_channels_to_last": _moved_channels("first_to_last", "noised latents", "channels last"),
    "dec_noise_patch_emb": _PATCHES,
    "dec_patches_posemb_module": _positions("patches"),
    "dec_seq_packer": _packer({"emb_packing_fn_write_key": "time packing"}, mask_mode="full", per_subseq_embs=True),
    "dec_time_embedder": _published(
        "model.preprocessors.time_embedding.TimestepEmbedder",
        {"timesteps_read_key": "timesteps", "time_embedding_write_key": "time"},
        {"dim": _is_size, "max_timestep": _is_factor},
        frequency_embedding_size=256,
    ),
    "dec_transformer": _transformer(
        {"adaLN_emb_read_key": "time", "adaLN_packing_fn_read_key": "time packing"}, adaLN_expansion=2
    ),
    "dec_unpacker": _UNPACKER,
    "dec_to_patches": _published(
        "model.postprocessors.heads.ToPatchesLinearHead",
        {"read_key": "final patches", "adaLN_emb_read_key": "time", "write_key": "velocity, channels last"},
        {"dim": _is_size, "channels_out": _is_size, "patch_sizes": _are_sizes},
        ignored="weight_init_style",
        use_mup_readout=False,
    ),
    "dec_channels_to_first": _moved_channels("last_to_first", "velocity, channels last", "velocity"),
}
_VAE = _published(
    "vae_wrapper.StableDiffusionVAE",
    {"vae_latents_write_key": "latents"},
    {"latent_channels": _is_size, "scaling_factor": _is_factor},
    ignored="sample_posterior frozen hf_hub_path images_read_key vae_latents_read_key",
)
_REGULARIZER = _published(
    "regularizers.quantize_fsq.FSQ",
    {"latents_read_key": "vectors", "quants_write_key": "codes"},
    {"levels": _are_sizes},
    ignored="drop_quant_p packed_call",
)
_NOISE = _published(
    "flow_matching.noise_modules.MinRFNoiseModule",
    {},
    ignored="ln stratisfied mode_scale clean_images_read_key",
)
_PIPELINE = _published(
    "flow_matching.pipelines.MinRFPipeline",
    {"latents_read_key": "codes"},
    {"out_channels": _is_size},
    ignored="timesteps_read_key noised_images_read_key reconst_write_key",
    _partial_=True,
    target_sizes_read_key=None,
)
_PARTS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")


def _mapping(config: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(config, Mapping):
        raise CheckpointError(f"The published configuration must have an object at {where!r}, got {config!r}.")
    return config


def _names(value: Any, where: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where} must name a tensor, or several, got {value!r}.")
    return tuple(names)


def _is_written(key: str) -> bool:
    return re.search("(?<!read_)write_keys?$", key) is not None


def _written(config: Mapping[str, Any], where: str, wiring: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return what a class writes: name -> what it is, by `wiring` or else by the path of the entry."""
    written: dict[str, str] = {}
    for key, value in config.items():
        if _is_written(key):
            names = _names(value, f"{where}.{key}")
            written |= dict(zip(names, wiring.get(key) or [f"{where}.{key}"] * len(names), strict=False))
    return written


def _one_name(config: Mapping[str, Any], where: str) -> str:
    name = config.get(where.split(".")[-1])
    if not isinstance(name, str):
        raise CheckpointError(f"{where} must name a tensor, got {name!r}.")
    return name


def _check_target(config: Mapping[str, Any], where: str, target: str) -> None:
    if config.get("_target_") != target:
        raise CheckpointError(
            f"The published configuration names the class {config.get('_target_')!r} at {where!r}; only {target!r} is "
            "supported."
        )


def _check_names(config: Mapping[str, Any], where: str, expected: Sequence[str]) -> None:
    names = [name for name in config if name != "_target_"]
    if sorted(names) != sorted(expected) or (where.endswith("module_dict") and names != list(expected)):
        strange = [n for n in names if n not in expected] + [n for n in expected if n not in names]
        raise CheckpointError(
            f"The published configuration must have exactly {list(expected)} at {where!r}"
            + (f"; unknown or missing: {strange}." if strange else f" in this order, got {names}.")
        )


def _read(config: Any, where: str, published: _Published, tensors: dict[str, str]) -> dict[str, Any]:
    """Check one class of the configuration.

    Args:
        config: its entries.
        where: its path.
        published: what it must be.
        tensors: what the tensors that are named so far are; those that this class writes are added.

    Returns:
        The entries that `published.read` names, under their full paths.
    """
    config = _mapping(config, where)
    _check_target(config, where, published.target)
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == "_target_" or key in published.ignored or _is_written(key):
            continue
        if key in published.fixed:
            if value != published.fixed[key]:
                raise CheckpointError(f"{where}.{key} must be {published.fixed[key]!r}, got {value!r}.")
        elif key in published.wiring:
            if tuple(tensors.get(name, "") for name in _names(value, f"{where}.{key}")) != published.wiring[key]:
                raise CheckpointError(
                    f"{where}.{key} must name what the published design has there, the "
                    f"{' and the '.join(published.wiring[key])}; got {value!r}."
                )
        elif key not in published.read:
            raise CheckpointError(f"The published configuration has the unknown entry {where}.{key} = {value!r}.")
        elif not published.read[key](value):
            raise CheckpointError(f"The published configuration has an unusable value at {where}.{key}: {value!r}.")
        else:
            found[f"{where}.{key}"] = value
    if missing := [key for key in (*published.wiring, *published.read) if key not in config]:
        raise CheckpointError(f"The published configuration lacks {where}.{missing[0]}.")
    tensors |= _written(config, where, published.wiring)
    return found


def _read_sequence(
    config: Any, where: str, modules: Mapping[str, _Published], tensors: dict[str, str]
) -> dict[str, Any]:
    config = _mapping(config, where)
    _check_target(config, where, _WRAPPER)
    _check_names(config, where, ["module_dict"])
    where = f"{where}.module_dict"
    members = _mapping(config["module_dict"], where)
    _check_names({name: None for name in members if "repa" not in name}, where, list(modules))
    found: dict[str, Any] = {}
    for name, member in members.items():
        path = f"{where}.{name}"
        if "repa" in name:  # feature alignment, in training only; it may not overwrite what the others need
            tensors |= _written(_mapping(member, path), path, {})
        else:
            found |= _read(member, path, modules[name], tensors)
    return found


def translate(config: Any, vae_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments of `FlexTok` for a published configuration, or a dict that has it as `config`.

    `vae_config` has what the configuration does not say about the VAE.

    Raises:
        CheckpointError: something is unknown, missing or not supported; the message names it.
    """
    config = _mapping(config, "the top")
    config = _mapping(config.get("config", config), "config")
    _check_target(config, "the top", "flextok.flextok_wrapper.FlexTok")
    _check_names(config, "the top", _PARTS)
    tensors: dict[str, str] = {}
    values = _read(config["vae"], "vae", _VAE, tensors)
    values |= _read_sequence(config["encoder"], "encoder", _ENCODER, tensors)
    values |= _read(config["regularizer"], "regularizer", _REGULARIZER, tensors)
    values |= _read(config["flow_matching_noise_module"], "flow_matching_noise_module", _NOISE, tensors)
    pipeline = config["pipeline"]
    values |= _read(pipeline, "pipeline", _PIPELINE, tensors)
    # All that the decoder gets.
    tensors = {name: of for name, of in tensors.items() if of == "codes"}
    tensors[_one_name(pipeline, "pipeline.timesteps_read_key")] = "timesteps"
    tensors[_one_name(pipeline, "pipeline.noised_images_read_key")] = "noised latents"
    values |= _read_sequence(config["decoder"], "decoder", _DECODER, tensors)
    for where in ("pipeline.reconst_write_key", "vae.vae_latents_read_key"):
        name = _one_name(config[where.split(".")[0]], where)
        if tensors.get(name) != "velocity":
            raise CheckpointError(f"{where} must name the decoder's result, got {name!r}.")

    def agreed(found: Mapping[str, Any]) -> Any:
        (first, expected), *others = found.items()
        for key, value in others:
            if value != expected:
                raise CheckpointError(
                    f"The published configuration contradicts itself: {first} is {expected!r}, {key} is {value!r}."
                )
        return expected

    def ending(*suffixes: str, part: str = "") -> dict[str, Any]:
        return {k: v for k, v in values.items() if k.endswith(suffixes) and k.startswith(part)}

    def shape(part: str) -> tuple[int, int, int]:
        width = agreed(ending(".dim", part=part))
        (depth,), (head_dim,) = ending(".depth", part=part).values(), ending(".head_dim", part=part).values()
        if width % head_dim:
            raise CheckpointError(f"head_dim of the published {part} must divide its width, {width}; got {head_dim}.")
        return width, depth, width // head_dim

    encoder, decoder = "encoder.module_dict.", "decoder.module_dict."
    patch_sizes = agreed(ending(".patch_sizes"))
    grid_sizes = agreed(ending("enc_posemb_module.max_sizes", "patches_posemb_module.max_sizes"))
    for found in (patch_sizes, grid_sizes):
        if len(found) != 2 or found[0] != found[1]:
            raise CheckpointError(f"Patches and their grid must be square in the published configuration, got {found}.")
    patch_size, grid = patch_sizes[0], grid_sizes[0]
    registers = agreed(
        {
            f"{encoder}enc_register_module.n_max": values[f"{encoder}enc_register_module.n_max"],
            f"{decoder}dec_registers_posemb_module.max_sizes": math.prod(
                values[f"{decoder}dec_registers_posemb_module.max_sizes"]
            ),
        }
    )
    levels = values["regularizer.levels"]
    agreed({"the number of regularizer.levels": len(levels)} | ending(".dim_in", ".dim_out"))
    channels = agreed(ending(".channels_in", ".channels_out", ".out_channels", ".latent_channels"))
    vae = {**vae_config, "latent_channels": channels, "scaling_factor": values["vae.scaling_factor"]}
    return {
        "image_size": grid * patch_size * 2 ** (len(vae["block_out_channels"]) - 1),
        "vae_config": vae,
        "patch_size": patch_size,
        "num_registers": registers,
        "encoder_shape": shape(encoder),
        "decoder_shape": shape(decoder),
        "fsq_levels": tuple(levels),
        "encoder_positions": values[f"{encoder}enc_posemb_module.posemb_type"],
        "decoder_positions": values[f"{decoder}dec_patches_posemb_module.posemb_type"],
        "max_timestep": values[f"{decoder}dec_time_embedder.max_timestep"],
    }


def vae_shape(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the published configuration does not say about the VAE, read from the names and shapes of weights."""
    widths: list[int] = []
    while (name := f"vae.vae.encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in state:
        widths.append(state[name].shape[0])
    if not widths:
        raise CheckpointError(f"The checkpoint does not fit FlexTok: missing {name!r}.")
    layers = {k.split(".")[6] for k in state if k.startswith("vae.vae.encoder.down_blocks.0.resnets.")}
    return {"block_out_channels": tuple(widths), "layers_per_block": len(layers)}


def config_of_file(checkpoint: str | PathLike[str] | Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the configuration that the metadata of a published `.safetensors` file repeats, as Python literals."""
    metadata: dict[str, str] = {}
    if not isinstance(checkpoint, Mapping) and Path(checkpoint).suffix == ".safetensors":
        with safe_open(checkpoint, framework="pt") as file:
            metadata = file.metadata() or {}
    if "_target_" not in metadata:
        raise CheckpointError("The checkpoint does not hold its configuration: pass it as `config`.")
    try:
        return {k: v if k == "_target_" else ast.literal_eval(v) for k, v in metadata.items() if k != "format"}
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise CheckpointError(f"Cannot read the configuration in the checkpoint's metadata: {error}") from error
