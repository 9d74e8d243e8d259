"""What the recipes of generators begin with, and the settings that ship with what they made."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from generators.mar import MAR
from mmsdk.data.emoji import EmojiRecord
from mmsdk.errors import CheckpointError
from mmsdk.loading import WEIGHTS_FOLDER
from mmsdk.training import generator_recipes
from mmsdk.training.embed import MODELS, EmbeddedModel
from mmsdk.training.generator_recipes import MARRecipe, load_fitting
from tests.tiny import tiny_latent_pipeline, tiny_mar, tiny_tokenbridge_ar, tiny_vae


def test_weights_of_another_model_with_the_same_backbone() -> None:
    model, source = tiny_tokenbridge_ar(seed=0), tiny_mar(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_fitting(model, source.state_dict())
    for name, tensor in model.state_dict().items():
        other = source.state_dict().get(name)
        is_taken = other is not None and other.shape == tensor.shape
        assert torch.equal(tensor, other if is_taken else before[name]), name
    assert torch.equal(model.encoder_blocks[0].mlp.fc1.weight, source.encoder_blocks[0].mlp.fc1.weight)


def test_weights_of_which_none_fits() -> None:
    with pytest.raises(CheckpointError, match="No weight has the name and shape of one of MAR"):
        load_fitting(tiny_mar(), {"z_proj.weight": torch.zeros(1, 1)})


def test_a_recipe_goes_on_from_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny_latent_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    tiny_vae().save_pretrained(tmp_path / "vae")
    records = [EmojiRecord(name, name, name, (), "x", "noto", "train") for name in ("red heart", "pizza")]
    data = SimpleNamespace(records=records, images=np.zeros((2, 16, 16, 3), np.uint8))
    monkeypatch.setattr(generator_recipes, "EmojiDataset", lambda split, styles: data)
    config = dict(pipeline.transformer.config)
    monkeypatch.setattr(MARRecipe, "build", lambda self, caption_dim: MAR.from_config(config))
    recipe = MARRecipe(tokenizer_source=tmp_path / "vae", start_from=tmp_path / "pipeline")
    module = recipe.setup()
    for name, part in (("transformer", pipeline.transformer), ("text_encoder", pipeline.text_encoder)):
        for one, other in zip(getattr(module, name).parameters(), part.parameters(), strict=True):
            assert torch.equal(one, other), name
    assert recipe.caption_tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()


@pytest.mark.parametrize("model", [m for m in MODELS if "presets" in m.settings], ids=lambda model: model.folder)
def test_presets_that_ship(model: EmbeddedModel) -> None:
    saved = json.loads((WEIGHTS_FOLDER / model.folder / "model_index.json").read_text())["presets"]
    assert saved == model.settings["presets"]
    assert {"default", "diverse"} <= saved.keys()
