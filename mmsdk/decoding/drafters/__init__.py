"""Drafters, one file each: where the candidates that a target model verifies come from."""

from __future__ import annotations

from importlib import import_module
from typing import Any

DRAFTERS: dict[str, str] = {
    "prompt_lookup": "mmsdk.decoding.drafters.prompt_lookup:PromptLookup",
    "token_recycling": "mmsdk.decoding.drafters.token_recycling:TokenRecycling",
    "aded": "mmsdk.decoding.drafters.aded:ADED",
    "dyspec": "mmsdk.decoding.drafters.dyspec:DySpec",
    "draft_model": "mmsdk.decoding.drafters.draft_model:DraftModel",
    "early_exit": "mmsdk.decoding.drafters.early_exit:EarlyExit",
}
_CLASSES = {name: module for module, _, name in (target.partition(":") for target in DRAFTERS.values())}


def __getattr__(name: str) -> Any:
    # Lazy, so that a drafter without a model does not load transformers.
    if name in _CLASSES:
        return getattr(import_module(_CLASSES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
