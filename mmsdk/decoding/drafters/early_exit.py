"""Early exit: some of the target's own layers draft for all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mmsdk.decoding.drafters.cached_model import CachedModel
from mmsdk.decoding.drafters.draft_model import DraftModel, _ModelRow


@dataclass(eq=False)
class EarlyExit(DraftModel):
    """Lets the first layers of the target, or some of them, with its last norm and head, say the next tokens.

    Papers: "Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding" (Zhang et al.
    2023, arXiv 2309.08168) skips layers; "LayerSkip" (Elhoushi et al. 2024, arXiv 2404.16710) leaves out the last ones,
    and trains models for it: others say little that is right before their last layers. No weight is copied, and the
    model is not changed. Otherwise as `DraftModel`, with a cache of its own.

    Attributes:
        model: the target, a Llama-like causal language model: layers in `model.model.layers`, which follow each other.
        num_layers: how many of the first layers draft.
        layers: which layers draft, ascending, the first one (0) among them; instead of `num_layers`.

    Raises:
        TypeError: the model is no causal language model of transformers.
        ValueError: it is not Llama-like, or its state cannot be rolled back, or a setting is out of its range.
    """

    num_layers: int | None = None
    layers: Sequence[int] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        stack = getattr(getattr(self.model, "model", None), "layers", None)
        if not isinstance(stack, nn.ModuleList) or not hasattr(self.model, "lm_head"):
            raise ValueError(
                f"{type(self.model).__name__} has no layers in model.model.layers with a head in model.lm_head; early "
                "exit knows Llama-like models only."
            )
        if (self.num_layers is None) == (self.layers is None):
            raise ValueError("Pass either num_layers or layers.")
        kept = list(range(self.num_layers) if self.num_layers is not None else self.layers or ())
        if not kept or kept != sorted({*kept, 0}) or kept[-1] >= len(stack):
            raise ValueError(
                f"The drafting layers must be ascending, from 0 to at most {len(stack) - 1}, with 0 among them; got "
                f"{kept}."
            )
        self._shallow = _with_layers(self.model, kept)

    def start_row(self, ids: list[int]) -> _ModelRow:
        """Return a new sequence, with an empty cache."""
        return _ModelRow(ids, CachedModel(self._shallow))


def _with_layers(model: Any, kept: list[int]) -> PreTrainedModel:
    """Return a model of these layers that shares all its parts with `model`."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    with torch.device("meta"):
        shallow = type(model)(config)
    shallow.train(model.training)
    for name, part in model.named_children():
        if name != "model":
            setattr(shallow, name, part)
    for name, part in model.model.named_children():
        setattr(shallow.model, name, part)
    shallow.model.layers = nn.ModuleList([model.model.layers[i] for i in kept])
    if any(tensor.is_meta for tensor in [*shallow.parameters(), *shallow.buffers()]):
        raise ValueError(
            f"{type(model).__name__} has weights outside its parts; early exit knows Llama-like models only."
        )
    return shallow
