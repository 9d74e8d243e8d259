"""A language model that is asked about one prefix after the other, most of which begin alike."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from mmsdk.caching import CACHE

# A cache of these layers can be cut back to any earlier length; states that sum up the past cannot.
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def check_model(model: PreTrainedModel) -> int:
    """Return the vocabulary size of a model that can draft.

    Raises:
        TypeError: it is no Hugging Face model that generates.
        ValueError: its state cannot be rolled back.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(f"The draft model must be a causal language model of transformers, got {type(model).__name__}.")
    config = model.config.get_text_config(decoder=True)
    unsupported = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if unsupported:
        raise ValueError(
            f"{type(model).__name__} has layers whose state cannot be rolled back after a rejection: "
            f"{', '.join(sorted(unsupported))}; accepted are {', '.join(sorted(_LAYER_TYPES))}."
        )
    return config.vocab_size


class CachedModel:
    """What a causal language model says after a prefix, with the keys and values of the last prefix kept.

    Of a new prefix only what differs from the last one is computed: after a rejection, the cache is cut back to what is
    common. Equals the model without a cache up to rounding.

    Args:
        model: as `check_model` accepts it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._ids: list[int] = []
        self._cache = DynamicCache()  # without the config: layers with a window keep all, so that any cut is possible

    @torch.no_grad()
    def __call__(self, ids: list[int]) -> Tensor:
        """Return the logits `(vocab,)` float32 of the token that follows `ids`."""
        differing = (i for i, (old, new) in enumerate(zip(self._ids, ids, strict=False)) if old != new)
        common = min(next(differing, len(self._ids)), len(ids) - 1)
        cache, cached = self._cache, len(self._ids)
        # Only a forward that succeeds leaves its cache behind.
        self._cache, self._ids = DynamicCache(), []
        if cached > common:
            cache.crop(common - cached)
        output = self.model(
            input_ids=torch.tensor([ids[common:]], device=self.model.device),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
        )
        self._cache, self._ids = cache, list(ids)
        return output.logits[0, -1].float()
