"""The exceptions users meet."""

from __future__ import annotations


class MMSDKError(Exception):
    """Base class of the errors that only this package raises."""


class ImageError(MMSDKError, ValueError):
    """An image cannot be read or is outside the accepted sizes or formats."""


class TokenStreamError(MMSDKError, ValueError):
    """A token stream is damaged, truncated, of an unknown version or made by another tokenizer."""


class CheckpointError(MMSDKError, ValueError):
    """A checkpoint cannot be read, or its keys or shapes do not fit the model."""


class UnknownNameError(MMSDKError, ValueError):
    """A name is not among the known ones; the message lists near matches."""


class DataError(MMSDKError, RuntimeError):
    """A data set cannot be fetched, verified or built."""


def unknown_name(kind: str, name: str, available: list[str]) -> UnknownNameError:
    """Build the error for an unknown name, with near matches first."""
    import difflib

    near = difflib.get_close_matches(name, available, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return UnknownNameError(f"Unknown {kind} {name!r}.{hint} Available: {', '.join(sorted(available))}.")
