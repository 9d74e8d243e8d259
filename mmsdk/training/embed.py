"""Turn finished runs into the models that ship with the package: float16 safetensors, configuration, model card, index.

`python -m mmsdk.training.embed ~/runs` reads the folders that `mmsdk train` wrote below `~/runs`; names of models
behind it embed these alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from generators.pipelines import SHARED_FILE
from mmsdk.data.emoji import EmojiDataset
from mmsdk.data.emoji_vqa import write_scenes
from mmsdk.errors import DataError, unknown_name
from mmsdk.loading import WEIGHTS_FOLDER, load_vlm, resolve
from mmsdk.tokens import write_atomically

_CARD = """---
license: apache-2.0
library_name: mmsdk
---
# {title}

{text}

- Data: `emoji-64` (`mmsdk data`), {data}. The image sets and their licences are listed in NOTICE.
- Made by: `mmsdk train {recipe}` ({steps} steps of {batch_size} images{start}).
- Last evaluation of the training: {evaluation}.
- Limits: {limits}
"""

# Settings of a generation by name: "default" draws the best pictures, "diverse" follows what the model has learned.
_CAUSAL_PRESETS = {
    "default": {"guidance_scale": 1.5, "temperature": 0.4, "top_k": 50},
    "diverse": {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 0},
}
# "full" takes as many steps, of the generation and of the head, as there is anything to gain from, and more.
_MAR_PRESETS: dict[str, dict[str, Any]] = {
    "default": {"num_iter": 8, "guidance_scale": 2.0, "temperature": 0.5, "annealing": {}},
    "fast": {"num_iter": 4, "guidance_scale": 2.0, "temperature": 0.5, "annealing": {}},
    "full": {
        "num_iter": 16,
        "guidance_scale": 2.0,
        "temperature": 0.5,
        "annealing": {"upper": 100, "lower": 100, "strategy": "constant"},
    },
    "diverse": {"num_iter": 8, "guidance_scale": 2.0, "temperature": 1.0, "annealing": {}},
}
_TOKENBRIDGE_PRESETS = {
    "default": {"num_iter": 16, "guidance_scale": 2.0, "temperature": 0.4},
    "fast": {"num_iter": 8, "guidance_scale": 2.0, "temperature": 0.4},
    "diverse": {"num_iter": 16, "guidance_scale": 2.0, "temperature": 1.0},
}


@dataclass(frozen=True)
class EmbeddedModel:
    """One folder below `weights/`.

    Attributes:
        folder: its name.
        recipe: what made it.
        component: registered class.
        title: of its card.
        text: what the card says of the model.
        data: what it says of the data.
        limits: what it says of the limits.
        settings: configuration values to add.
        shared: components of a pipeline that ship with another model, with their class and its name.
    """

    folder: str
    recipe: str
    component: str
    title: str
    text: str
    data: str
    limits: str = "64 x 64 pixels; emoji and flat illustrations only. Not for photographs."
    settings: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, dict[str, Any]] = field(default_factory=dict)


MODELS = (
    EmbeddedModel(
        "emoji-64",
        "llamagen",
        "ar_image_pipeline",
        "emoji-64: text to image over grid tokens",
        "LlamaGen over an 8 x 8 grid of VQ tokens (codebook 4096), with a small T5 encoder trained along.",
        "the noto, twemoji and fluent flat sets for the generator, all seven sets for the tokenizer",
        settings={"presets": _CAUSAL_PRESETS},
    ),
    EmbeddedModel(
        "emoji-64-1d",
        "llamagen_1d",
        "ar_image_pipeline",
        "emoji-64-1d: text to image over One-D-Piece tokens",
        "LlamaGen over the tokens of a One-D-Piece tokenizer (64, codebook 4096): it can stop after any of them.",
        "the noto, twemoji and fluent flat sets for the generator, all seven sets for the tokenizer",
        settings={"presets": _CAUSAL_PRESETS},
    ),
    EmbeddedModel(
        "emoji-64-vae",
        "vae",
        "vae",
        "emoji-64: KL autoencoder",
        "A convolutional KL autoencoder of 64 x 64 images: 8 x 8 latents of 8 channels. FlexTok and TokenBridge work "
        "on its latents.",
        "all seven sets",
    ),
    EmbeddedModel(
        "emoji-64-tokenbridge",
        "vae",
        "tokenbridge",
        "emoji-64: TokenBridge",
        "The KL autoencoder of `emoji-64` with its latents quantized channel by channel, 1 to 8 bits each, without "
        "any training of its own.",
        "all seven sets",
    ),
    EmbeddedModel(
        "emoji-64-flextok",
        "flextok",
        "flextok",
        "emoji-64: FlexTok",
        "1 to 32 ordered tokens (codebook 4096) for an image, and a rectified-flow decoder that draws a plausible "
        "image from any number of them.",
        "all seven sets",
        settings={"guidance_scale": 1.0},
    ),
    EmbeddedModel(
        "emoji-64-mar",
        "mar",
        "ar_image_pipeline",
        "emoji-64-mar: text to image over continuous latents",
        "A text-conditional MAR over the latents of the embedded KL autoencoder, 2 x 2 of them to a token, with a "
        "small T5 encoder trained along.",
        "the noto, twemoji and fluent flat sets",
        settings={"presets": _MAR_PRESETS},
        shared={"image_tokenizer": {"component": "vae", "source": "emoji-64"}},
    ),
    EmbeddedModel(
        "emoji-64-mar-draft",
        "mar_draft",
        "mar",
        "emoji-64-mar-draft: a small MAR that drafts for emoji-64-mar",
        "A MAR with a third of the layers, which reads the text features of `emoji-64-mar`.",
        "the noto, twemoji and fluent flat sets",
    ),
    EmbeddedModel(
        "emoji-64-draft",
        "llamagen_draft",
        "llamagen",
        "emoji-64-draft: a small LlamaGen that drafts for emoji-64",
        "A LlamaGen of two narrow layers, which reads the text features of `emoji-64`.",
        "the noto, twemoji and fluent flat sets",
    ),
    EmbeddedModel(
        "emoji-64-head",
        "feature_head",
        "feature_head",
        "emoji-64-head: a draft head over the states of emoji-64",
        "One layer that predicts the next hidden state of `emoji-64`, as EAGLE and LANTERN draft.",
        "the noto, twemoji and fluent flat sets",
    ),
    EmbeddedModel(
        "emoji-64-token-shuffle",
        "token_shuffle",
        "ar_image_pipeline",
        "emoji-64-token-shuffle: text to image over a finer grid",
        "Token-Shuffle over a 16 x 16 grid of VQ tokens (codebook 1024), 2 x 2 of them at a step, with a small T5 "
        "encoder trained along.",
        "the noto, twemoji and fluent flat sets for the generator, all seven sets for the tokenizer",
        settings={"presets": _CAUSAL_PRESETS},
    ),
    EmbeddedModel(
        "emoji-64-tokenbridge-ar",
        "tokenbridge_ar",
        "ar_image_pipeline",
        "emoji-64-tokenbridge-ar: text to image over the indices of TokenBridge",
        "A text-conditional TokenBridge-AR over the embedded TokenBridge with 4 bits to an index, 2 x 2 positions to a "
        "token, with a small T5 encoder trained along.",
        "the noto, twemoji and fluent flat sets",
        settings={"presets": _TOKENBRIDGE_PRESETS},
        shared={"image_tokenizer": {"component": "tokenbridge", "source": "emoji-64", "options": {"bits": 4}}},
    ),
    EmbeddedModel(
        "emoji-64-flextok-ar",
        "flextok_ar",
        "ar_image_pipeline",
        "emoji-64-flextok-ar: text to image over FlexTok tokens",
        "FlexTok-AR over the embedded FlexTok, with a small T5 encoder trained along: it can stop after any of 32 "
        "tokens, and the decoder draws the rest.",
        "the noto, twemoji and fluent flat sets",
        settings={"presets": _CAUSAL_PRESETS},
        shared={"image_tokenizer": {"component": "flextok", "source": "emoji-64"}},
    ),
    EmbeddedModel(
        "emoji-vqa",
        "emoji_vqa",
        "vlm",
        "emoji-vqa: questions about grids of emoji",
        "A LLaVA-NeXT (AnyRes: a base view and up to four crops of 128 pixels, 336 visual tokens for 256 x 256 pixels) "
        "that answers `what is at b3?`, `where is the cat?`, `is there any cat?` and `how many cat?` with one word. "
        "Columns are a to d from the left, rows 1 to 4 from the top. `examples` holds scenes it has not seen, with "
        "questions.",
        "scenes of 48 emoji in five sets",
        limits="these four questions about 4 x 4 grids of these 48 emoji, and nothing else.",
    ),
    EmbeddedModel(
        "emoji-64-evaluator",
        "evaluator",
        "evaluator",
        "emoji-64 evaluator: captions against frozen image features",
        "A text tower and a projection of frozen EfficientNet-Lite0 features (extra `bench`), trained contrastively. "
        "It measures retrieval and Frechet distances; its figures are comparable with each other only.",
        "all seven sets",
    ),
)

# Name -> registered class -> folder. One tokenizer serves its pipeline and users alike.
INDEX = {
    "emoji-64": {
        "ar_image_pipeline": "emoji-64",
        "llamagen": "emoji-64/transformer",
        "vq": "emoji-64/image_tokenizer",
        "one_d_piece": "emoji-64-1d/image_tokenizer",
        "vae": "emoji-64-vae",
        "tokenbridge": "emoji-64-tokenbridge",
        "flextok": "emoji-64-flextok",
        "evaluator": "emoji-64-evaluator",
    },
    "emoji-vqa": {"vlm": "emoji-vqa"},
    "emoji-64-draft": {"llamagen": "emoji-64-draft"},
    "emoji-64-head": {"feature_head": "emoji-64-head"},
    "emoji-64-mar": {"ar_image_pipeline": "emoji-64-mar", "mar": "emoji-64-mar/transformer"},
    "emoji-64-mar-draft": {"mar": "emoji-64-mar-draft"},
    "emoji-64-token-shuffle": {
        "ar_image_pipeline": "emoji-64-token-shuffle",
        "token_shuffle": "emoji-64-token-shuffle/transformer",
        "vq": "emoji-64-token-shuffle/image_tokenizer",
    },
    "emoji-64-tokenbridge-ar": {
        "ar_image_pipeline": "emoji-64-tokenbridge-ar",
        "tokenbridge_ar": "emoji-64-tokenbridge-ar/transformer",
    },
    "emoji-64-flextok-ar": {
        "ar_image_pipeline": "emoji-64-flextok-ar",
        "flextok_ar": "emoji-64-flextok-ar/transformer",
    },
    "emoji-64-1d": {
        "ar_image_pipeline": "emoji-64-1d",
        "llamagen": "emoji-64-1d/transformer",
        "one_d_piece": "emoji-64-1d/image_tokenizer",
    },
}


def _last_evaluation(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "evaluation" in line]
    if not found:
        raise DataError(f"{run} has no evaluation yet: let `mmsdk train` finish.")
    return found[-1]


def _forget_paths(folder: Path) -> None:
    """Remove what diffusers notes of the machine: the path that a model was loaded from."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if content.pop("_name_or_path", None) is not None:
            write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _halve(folder: Path) -> None:
    """Store in float16 what models keep in float32 when they are cast; they compute in float32 once loaded."""
    for path in folder.rglob("*.safetensors"):
        tensors = load_file(path)
        if any(tensor.dtype == torch.float32 for tensor in tensors.values()):
            halved = {k: v.half() if v.dtype == torch.float32 else v for k, v in tensors.items()}
            save_file(halved, path, metadata={"format": "pt"})


def _finished(run: Path, model: EmbeddedModel) -> Any:
    """Load what a run made; TokenBridge is the VAE's run with the scale of its latents measured."""
    if model.component == "vlm":
        return load_vlm(run / "model")
    if model.component != "tokenbridge":
        return resolve(model.component).from_pretrained(run / "model")
    loaded = resolve("tokenbridge")(resolve("vae").from_pretrained(run / "model"), bits=6)
    images = EmojiDataset("train").images
    loaded.fit_scale(torch.from_numpy(images[:: len(images) // 1024]).permute(0, 3, 1, 2))
    return loaded


def embed(run: Path, model: EmbeddedModel, weights: Path = WEIGHTS_FOLDER) -> Path:
    """Write one model below `weights` and return its folder.

    Raises:
        DataError: the run has not been evaluated and saved yet.
    """
    last = _last_evaluation(run)
    config = json.loads((run / "config.json").read_text())
    target = weights / model.folder
    loaded = _finished(run, model)
    shutil.rmtree(target, ignore_errors=True)
    if model.settings:
        loaded.register_to_config(**model.settings)
    if model.component == "vlm":
        loaded, processor = loaded
        processor.save_pretrained(target)
        write_scenes(target / "examples", count=12)
    loaded.to(dtype=torch.float16).save_pretrained(target)
    _halve(target)
    for name in model.shared:
        shutil.rmtree(target / name)
    if model.shared:
        write_atomically(target / SHARED_FILE, (json.dumps(model.shared, indent=2) + "\n").encode())
    _forget_paths(target)
    scores = ", ".join(f"{k} {v:.4g}" for k, v in last["evaluation"].items())
    start = config.get("extra", {}).get("start_from")
    card = _CARD.format(
        start=f", going on from {'an earlier ' * (start == model.folder)}{start}" if start else "",
        title=model.title,
        text=model.text,
        data=model.data,
        recipe=model.recipe,
        steps=last["step"],
        batch_size=config["batch_size"],
        evaluation=scores,
        limits=model.limits,
    )
    write_atomically(target / "README.md", card.encode())
    return target


def main(runs: str, names: Sequence[str] = ()) -> None:
    """Embed every model whose run exists below `runs` (or those called `names`), and write the index.

    Raises:
        UnknownNameError: no model has one of the names.
    """
    known = [model.folder for model in MODELS]
    for name in names:
        if name not in known:
            raise unknown_name("embedded model", name, known)
    for model in MODELS:
        if model.folder in (names or known) and (Path(runs) / model.recipe / "model").exists():
            embed(Path(runs) / model.recipe, model)
    present = {name: {k: v for k, v in parts.items() if (WEIGHTS_FOLDER / v).exists()} for name, parts in INDEX.items()}
    index = {name: parts for name, parts in present.items() if parts}
    write_atomically(WEIGHTS_FOLDER / "index.json", (json.dumps(index, indent=2) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
