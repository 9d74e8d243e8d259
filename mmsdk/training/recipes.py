"""The recipes that `mmsdk train` knows by name. Importing this module imports none of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mmsdk.errors import unknown_name

if TYPE_CHECKING:
    from mmsdk.training.loop import Recipe

RECIPES: dict[str, str] = {
    "vq": "mmsdk.training.tokenizer_recipes:VQRecipe",
    "vq_fine": "mmsdk.training.tokenizer_recipes:FineVQRecipe",
    "vae": "mmsdk.training.tokenizer_recipes:KLVAERecipe",
    "one_d_piece": "mmsdk.training.tokenizer_recipes:OneDPieceRecipe",
    "flextok": "mmsdk.training.tokenizer_recipes:FlexTokRecipe",
    "llamagen": "mmsdk.training.generator_recipes:LlamaGenRecipe",
    "llamagen_draft": "mmsdk.training.generator_recipes:DraftLlamaGenRecipe",
    "llamagen_1d": "mmsdk.training.generator_recipes:LlamaGen1DRecipe",
    "flextok_ar": "mmsdk.training.generator_recipes:FlexTokARRecipe",
    "feature_head": "mmsdk.training.feature_head_recipe:FeatureHeadRecipe",
    "token_shuffle": "mmsdk.training.generator_recipes:TokenShuffleRecipe",
    "mar": "mmsdk.training.generator_recipes:MARRecipe",
    "mar_draft": "mmsdk.training.generator_recipes:DraftMARRecipe",
    "tokenbridge_ar": "mmsdk.training.generator_recipes:TokenBridgeARRecipe",
    "evaluator": "mmsdk.training.evaluator_recipe:EvaluatorRecipe",
    "emoji_vqa": "mmsdk.training.vqa_recipe:EmojiVQARecipe",
}


def resolve_recipe(name: str) -> type[Recipe]:
    """Import and return the recipe class called `name`.

    Raises:
        UnknownNameError: no recipe has this name.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, list(RECIPES))
    module, attribute = RECIPES[name].split(":")
    return getattr(importlib.import_module(module), attribute)
