"""mmsdk: multimodal generation and compression with image tokens."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {"ImageTokens": "mmsdk.tokens", "TokenSpec": "mmsdk.tokens"}
__all__ = ["ImageTokens", "TokenSpec", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import mmsdk` stays cheap.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
