"""A causal generator as the probability model of entropy coding."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable

import torch
from torch import Tensor

from generators.llamagen import LlamaGen

# Dropped captions keep their mask in training, so a model knows the usual lengths only.
_CAPTION_LENGTH = 4


class LlamaGenEntropyModel:
    """What an unconditional `LlamaGen` expects next, for `ImageTokens.to_bytes(entropy_model=...)`.

    Args:
        model: generator over the tokens to be coded; put in evaluation mode.
        temperature: probabilities are softened by this: a generator that has learned its training images by heart is
            too sure of others. The embedded models code unseen images best at about 1.6.

    Raises:
        ValueError: the temperature is not a positive number, or the model writes several tokens at once.
    """

    def __init__(self, model: LlamaGen, temperature: float = 1.6) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a positive number, received {temperature!r}.")
        if model.tokens_per_step > 1:
            raise ValueError(
                f"An entropy model tells of one token after the other, but {type(model).__name__} writes "
                f"{model.tokens_per_step} at once; pass a LlamaGen."
            )
        self.model = model.eval()
        self.temperature = temperature
        self.codebook_size: int = model.config.codebook_size
        self.max_tokens: int = model.config.max_tokens
        self.fingerprint = _fingerprint(model, temperature)

    def start(self, batch_size: int, num_tokens: int) -> Callable[[Tensor | None], Tensor]:
        """Begin `batch_size` images; see `mmsdk.entropy.EntropyModel`."""
        config, device = self.model.config, self.model.tok_embeddings.weight.device
        condition: dict[str, Tensor]
        if config.condition == "class":
            condition = {"class_labels": torch.zeros(batch_size, dtype=torch.long, device=device)}
        else:
            shape = (batch_size, config.num_condition_tokens, config.caption_dim)
            mask = torch.zeros(shape[:2], dtype=torch.long, device=device)
            mask[:, -min(_CAPTION_LENGTH, config.num_condition_tokens) :] = 1
            condition = {"caption_features": torch.zeros(shape, device=device), "caption_mask": mask}
        state = self.model.prefill(**condition, max_new_tokens=num_tokens, guided=True)
        state.select_rows(slice(batch_size, None))
        hidden = state.condition_hidden

        def predict(token_ids: Tensor | None) -> Tensor:
            with torch.no_grad():
                logits = (
                    self.model.predict(hidden) if token_ids is None else self.model.step(token_ids.to(device), state)
                )
                return (logits.float() / self.temperature).softmax(-1)

        return predict


def _fingerprint(model: LlamaGen, temperature: float) -> str:
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    settings = [config, float(temperature), _CAPTION_LENGTH]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=list).encode())
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]
