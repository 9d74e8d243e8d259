"""What models of transformers call their cache: `cache` since 5.24, `past_key_values` before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Cache
from transformers.generation import GenerateDecoderOnlyOutput

OLD_NAME = "past_key_values"
# The name of the argument and of the field of outputs in the installed version; all models were renamed at once.
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else OLD_NAME


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """Return the `Cache` among the arguments or outputs of a model under either name, None where there is none."""
    cache = inputs.get(CACHE)
    return inputs.get(OLD_NAME) if cache is None else cache


def with_cache(inputs: Mapping[str, Any], cache: Cache) -> dict[str, Any]:
    """Return the arguments of a model with this cache, and no other."""
    return {**{name: value for name, value in inputs.items() if name != OLD_NAME}, CACHE: cache}
