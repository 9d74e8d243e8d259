"""Names to models: embedded weights, local folders, hub ids, and published checkpoints.

Importing this module imports no model: the registry holds `module:object` targets that are resolved when asked for.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmsdk.errors import CheckpointError, UnknownNameError, unknown_name

# What users may name, and where it lives. The only place where the core knows the other packages, by name alone.
REGISTRY: dict[str, str] = {
    "vq": "tokenizers_img.vq:VQ",
    "titok": "tokenizers_img.titok:TiTok",
    "one_d_piece": "tokenizers_img.one_d_piece:OneDPiece",
    "flextok": "tokenizers_img.flextok:FlexTok",
    "tokenbridge": "tokenizers_img.tokenbridge:TokenBridge",
    "vae": "tokenizers_img.vae:KLVAE",
    "llamagen": "generators.llamagen:LlamaGen",
    "token_shuffle": "generators.token_shuffle:TokenShuffle",
    "flextok_ar": "generators.flextok_ar:FlexTokAR",
    "feature_head": "generators.feature_head:FeatureHead",
    "mar": "generators.mar:MAR",
    "tokenbridge_ar": "generators.tokenbridge_ar:TokenBridgeAR",
    "xar": "generators.xar:XAR",
    "flowar": "generators.flowar:FlowAR",
    "llamagen_entropy": "generators.entropy:LlamaGenEntropyModel",
    "ar_image_pipeline": "generators.pipelines:ARImagePipeline",
    "divprune": "pruning.divprune:DivPrune",
    "hired": "pruning.hired:HiRED",
    "globalcom2": "pruning.globalcom2:GlobalCom2",
    "visionzip": "pruning.visionzip:VisionZip",
    "random": "pruning.random:RandomPruner",
    "uniform": "pruning.uniform:UniformPruner",
    "fastv": "pruning.fastv:FastV",
    "draw_kept": "pruning.picture:draw_kept",
    "prune_plan": "pruning.planner:plan",
    "diffrate": "pruning.diffrate:DiffRate",
    "prefixkv": "pruning.prefixkv:PrefixKV",
    "quecc": "pruning.quecc:QueCC",
    "evaluator": "mmsdk.bench.evaluator:Evaluator",
}
TOKENIZERS = ("vq", "titok", "one_d_piece", "flextok", "tokenbridge", "vae")
PRUNERS = ("divprune", "hired", "globalcom2", "visionzip", "random", "uniform")

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
_WRAPPERS = ("model_ema", "model", "module", "state_dict")


def resolve(name: str) -> Any:
    """Import and return the class registered as `name`.

    Raises:
        UnknownNameError: nothing has this name.
    """
    if name not in REGISTRY:
        raise unknown_name("name", name, list(REGISTRY))
    module, attribute = REGISTRY[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def embedded_models() -> dict[str, dict[str, str]]:
    """Return the models that ship with the package: name -> registered class -> folder below `weights/`."""
    index = WEIGHTS_FOLDER / "index.json"
    return json.loads(index.read_text()) if index.exists() else {}


def resolve_pretrained(component: str, name: str | PathLike[str]) -> str:
    """Return the folder or hub id that `from_pretrained` of the registered class `component` should read for `name`.

    An embedded name wins over a folder of the same name in the working directory; write `./name` for the latter.

    Raises:
        UnknownNameError: `name` is no embedded model, no folder and no hub id (`owner/repository`).
    """
    index = embedded_models()
    text = str(name)
    if text in index:
        if component not in index[text]:
            having = sorted(k for k, v in index.items() if component in v)
            raise UnknownNameError(
                f"The embedded model {text!r} has no {component!r}; it has {sorted(index[text])}. Models with one: "
                f"{having}."
            )
        return str(WEIGHTS_FOLDER / index[text][component])
    if Path(text).is_dir():
        return text
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return text
    raise unknown_name("model (no embedded model, local folder or hub id `owner/name`)", text, list(index))


def load_vlm(name: str | PathLike[str] = "emoji-vqa", **kwargs: Any) -> tuple[Any, Any]:
    """Load a vision-language model of transformers with its processor.

    Args:
        name: embedded name, local folder or hub id.
        **kwargs: of `AutoModelForImageTextToText.from_pretrained`, for example `dtype`; by default embedded models come
            in float32, all others in the dtype that they were saved in.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        UnknownNameError: `name` is no embedded model, no folder and no hub id.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source = resolve_pretrained("vlm", name)
    if str(name) in embedded_models():
        kwargs.setdefault("dtype", torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(source, **kwargs)
    return model.eval(), AutoProcessor.from_pretrained(source)


def load_original(source: str | PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a published checkpoint and unwrap it to its state dict.

    Args:
        source: path of a `.safetensors` file or of a pickle (`.bin`, `.pt`, `.pth`, `.ckpt`; read with
            `weights_only=True`, so it can hold tensors and plain containers only), or an already loaded mapping. The
            state dict may lie under `model_ema`, `model`, `module` or `state_dict`, tried in this order, or be the
            mapping itself.

    Raises:
        CheckpointError: the file is absent, damaged, holds other objects than tensors, or holds no state dict.
    """
    content: Any = source
    if not isinstance(source, Mapping):
        path = Path(source)
        if not path.is_file():
            raise CheckpointError(f"No checkpoint file at {str(path)!r}.")
        try:
            if path.suffix == ".safetensors":
                content = load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged pickles raise whatever their last bytes happen to mean
            raise CheckpointError(f"Cannot read the checkpoint {str(path)!r}: {error}") from error
    for _ in _WRAPPERS:  # a mapping may contain itself, so the depth is bounded
        if isinstance(content, Mapping):
            content = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"The checkpoint holds no state dict, but {type(content).__name__}.")
    strangers = [k for k, v in content.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if strangers:
        raise CheckpointError(
            f"The checkpoint's state dict holds other things than named tensors, for example under {strangers[0]!r}."
        )
    return dict(content)


def _listed(keys: Collection[str]) -> str:
    shown = sorted(keys)[:5]
    return ", ".join(map(repr, shown)) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def load_into(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    allow_missing: Collection[str] = (),
    allow_unexpected: Collection[str] = (),
) -> None:
    """Load `state_dict` into `model` strictly, but for the keys (or prefixes ending in `.`) of two allow-lists.

    A model on the meta device takes the tensors themselves (`assign`); any other copies them.

    Raises:
        CheckpointError: keys are missing or unexpected, a shape is wrong, or a tensor is not finite; the message names
            the key.
    """

    def allowed(key: str, names: Collection[str]) -> bool:
        return any(key == n or (n.endswith(".") and key.startswith(n)) for n in names)

    expected = model.state_dict()
    missing = [k for k in expected if k not in state_dict and not allowed(k, allow_missing)]
    unexpected = [k for k in state_dict if k not in expected and not allowed(k, allow_unexpected)]
    if missing or unexpected:
        parts = [f"missing {_listed(missing)}"] * bool(missing) + [f"unexpected {_listed(unexpected)}"] * bool(
            unexpected
        )
        raise CheckpointError(f"The checkpoint does not fit {type(model).__name__}: {'; '.join(parts)}.")
    for key, value in state_dict.items():
        if key in expected and value.shape != expected[key].shape:
            raise CheckpointError(
                f"The checkpoint does not fit {type(model).__name__}: {key!r} has shape {tuple(value.shape)}, "
                f"expected {tuple(expected[key].shape)}."
            )
        if value.is_floating_point() and value.device.type != "meta" and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"The checkpoint's {key!r} holds NaN or infinite values.")
    fitting = {k: v for k, v in state_dict.items() if k in expected}
    on_meta = any(v.device.type == "meta" for v in expected.values())
    model.load_state_dict(fitting, strict=False, assign=on_meta)
