"""The decoding core: drafts that a target model verifies, and the sampling that all generators share."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "AcceptanceRule": "mmsdk.decoding.base",
    "CostModel": "mmsdk.decoding.cost",
    "Decision": "mmsdk.decoding.base",
    "DecodingStats": "mmsdk.decoding.decoder",
    "DraftTree": "mmsdk.decoding.tree",
    "Drafter": "mmsdk.decoding.base",
    "HFTarget": "mmsdk.decoding.target",
    "Prefill": "mmsdk.decoding.base",
    "Round": "mmsdk.decoding.decoder",
    "SpeculativeDecoder": "mmsdk.decoding.decoder",
    "TargetModel": "mmsdk.decoding.target",
    "Verified": "mmsdk.decoding.base",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    # Lazy, so that importing a part does not load transformers.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
