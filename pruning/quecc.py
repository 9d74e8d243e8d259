"""QueCC: few visual tokens that depend on the question, by a trained layer.

Li et al., 2024, "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters" (arXiv 2411.03312): query-based
convolutional cross-attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from mmsdk.errors import CheckpointError
from mmsdk.loading import load_into, load_original
from mmsdk.modeling import PretrainedModel

_EPS = 1e-6
# Where published LLaVA checkpoints keep the projector.
_PREFIXES = ("model.mm_projector.", "mm_projector.")


def _mlp(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.LayerNorm(dim, eps=_EPS))


class QueCC(PretrainedModel):
    """Compresses a grid of visual tokens by `kernel_size` squared, guided by the text of the question.

    The features plus the projected question give queries, which a depthwise convolution reduces to one per cell of
    `kernel_size` x `kernel_size` tokens. Each query attends to its own cell, in features of several vision layers.

    Lossy. Deterministic. Costs two MLPs over all tokens; attention is linear in their number. It has to be trained with
    the VLM: see `QueCCProjector`.

    Args:
        dim: width of the features and of the output.
        text_dim: width of the language model, whose last hidden state is the question.
        multi_level_dim: width of the concatenated vision layers (published: four of 1024).
        kernel_size: edge of a cell, in tokens.
        num_heads: heads of the attention.

    Raises:
        ValueError: a size is below 1, or `dim` is no multiple of `num_heads`.
    """

    registry_name = "quecc"
    # It changes what the language model sees.
    lossless = False

    @register_to_config
    def __init__(
        self,
        dim: int = 1024,
        text_dim: int = 4096,
        multi_level_dim: int = 4096,
        kernel_size: int = 4,
        num_heads: int = 8,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "text_dim": text_dim, "multi_level_dim": multi_level_dim, "kernel_size": kernel_size}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got num_heads={num_heads} and dim={dim}.")
        self.text_projection = nn.Sequential(nn.Linear(text_dim, dim), nn.LayerNorm(dim, eps=_EPS))
        self.q_proj = _mlp(dim, dim)
        self.q_downsample = nn.Conv2d(dim, dim, kernel_size, stride=kernel_size, groups=dim)
        self.k_proj = _mlp(multi_level_dim, dim)
        self.v_proj = _mlp(multi_level_dim, dim)
        self.clip_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def num_tokens(self, num_tokens: int) -> int:
        """Return how many tokens are left of `num_tokens`.

        Raises:
            ValueError: they are no square grid that cells of `kernel_size` fill.
        """
        edge = math.isqrt(num_tokens)
        if edge**2 != num_tokens or num_tokens == 0 or edge % self.config.kernel_size:
            raise ValueError(
                f"The tokens must be a square grid whose edge is a multiple of {self.config.kernel_size}, got "
                f"{num_tokens} tokens."
            )
        return (edge // self.config.kernel_size) ** 2

    def forward(self, features: Tensor, multi_level_features: Tensor, text_query: Tensor) -> Tensor:
        """Compress the tokens of each image.

        Args:
            features: the vision features, `(batch, num_tokens, dim)`, row by row.
            multi_level_features: several vision layers side by side, `(batch, num_tokens, multi_level_dim)`.
            text_query: what `question_embedding` returns, `(batch, 1, text_dim)`.

        Returns:
            `(batch, num_tokens / kernel_size^2, dim)`, row by row.

        Raises:
            ValueError: a shape does not fit.
        """
        batch, count, _ = features.shape
        config, left = self.config, self.num_tokens(count)
        for name, value, expected in (
            ("features", features, (batch, count, config.dim)),
            ("multi_level_features", multi_level_features, (batch, count, config.multi_level_dim)),
            ("text_query", text_query, (batch, 1, config.text_dim)),
        ):
            if value.shape != expected:
                raise ValueError(f"{name} must have the shape {expected}, got {tuple(value.shape)}.")
        edge, kernel = math.isqrt(count), config.kernel_size
        queries = self.q_proj(features + self.text_projection(text_query))
        queries = self.q_downsample(rearrange(queries, "b (h w) d -> b d h w", h=edge))
        cells = "b (h p w q) d -> (b h w) (p q) d"
        sizes = {"h": edge // kernel, "p": kernel, "q": kernel}
        keys, values = (
            rearrange(projection(multi_level_features), cells, **sizes) for projection in (self.k_proj, self.v_proj)
        )
        queries = rearrange(queries, "b d h w -> (b h w) 1 d")
        output = self.clip_attn(queries, keys, values, need_weights=False)[0]
        return output.reshape(batch, left, config.dim)

    @classmethod
    def from_original(cls, checkpoint: str | PathLike[str] | Mapping[str, Any], num_heads: int = 8) -> QueCC:
        """Load a published module, or the projector out of a published LLaVA checkpoint; all sizes come from it.

        Args:
            checkpoint: path or state dict; keys as published, with or without `model.mm_projector.` before them.
            num_heads: heads of the attention, which the weights do not tell (published: 8).

        Raises:
            CheckpointError: it cannot be read, or holds no such module.
        """
        state_dict = load_original(checkpoint)
        for prefix in _PREFIXES:
            inner = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            state_dict = inner or state_dict
        try:
            model = cls(
                dim=len(state_dict["clip_attn.out_proj.weight"]),
                text_dim=state_dict["text_projection.0.weight"].shape[1],
                multi_level_dim=state_dict["k_proj.0.weight"].shape[1],
                kernel_size=state_dict["q_downsample.weight"].shape[-1],
                num_heads=num_heads,
            )
        except (KeyError, IndexError) as error:
            raise CheckpointError(f"The checkpoint holds no QueCC module: {error}.") from error
        load_into(model, state_dict)
        return model


class QueCCProjector(nn.Module):
    """A QueCC module where a LLaVA-like model keeps its `multi_modal_projector`; trains with the model's own loss.

    Let the model take several vision layers, the last of them the usual one, so that they arrive here side by side;
    give prompts `compressor.num_tokens(...)` image tokens per image; and set the question before each forward:

        model.config.vision_feature_layer = [12, 16, 22, 23]
        model.model.multi_modal_projector = QueCCProjector(QueCC(...), mlp)
        model.model.multi_modal_projector.text_query = question_embedding(model, **question)
        model(**inputs, labels=labels).loss.backward()

    Args:
        compressor: the QueCC module.
        projector: maps its output `(batch, tokens, dim)` to the width of the language model.

    Attributes:
        text_query: the questions, `(batch, 1, text_dim)`, one per image, or one for all.
    """

    def __init__(self, compressor: QueCC, projector: nn.Module) -> None:
        super().__init__()
        self.compressor, self.projector = compressor, projector
        self.text_query: Tensor | None = None

    def forward(self, image_features: Tensor) -> Tensor:
        """Compress and project `(batch, num_tokens, multi_level_dim)`, whose last `dim` columns are the usual features.

        Raises:
            ValueError: no question is set, or there are more than one and not one per image, or a shape does not fit.
        """
        if self.text_query is None:
            raise ValueError("No question is set: assign `text_query`, see `question_embedding`, before the forward.")
        images, queries = len(image_features), len(self.text_query)
        if queries not in (1, images):
            raise ValueError(f"text_query must hold one question or one per image, got {queries} for {images} images.")
        text_query = self.text_query.to(image_features).expand(images, -1, -1)
        features = image_features[..., -self.compressor.config.dim :]
        return self.projector(self.compressor(features, image_features, text_query))


@torch.no_grad()
def question_embedding(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the language model's last hidden state of the last token of each question, `(batch, 1, text_dim)`.

    Costs one forward of the language model over the text.

    Args:
        model: a transformers model with `get_decoder()`; its language model reads the text without images.
        input_ids: the questions, `(batch, length)`; image placeholders in them are skipped.
        attention_mask: 1 where there is a token, of the same shape; default: everywhere.

    Raises:
        ValueError: a question is empty.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    image_token = getattr(model.config, "image_token_id", None)
    is_image = torch.zeros_like(mask, dtype=torch.bool) if image_token is None else input_ids.eq(image_token)
    mask = mask.bool() & ~is_image
    if not bool(mask.any(-1).all()):
        raise ValueError("Every question must have a token besides image placeholders and padding.")
    # Placeholders may lie outside the vocabulary of the embedding.
    hidden = model.get_decoder()(
        input_ids=input_ids.masked_fill(is_image, 0),
        attention_mask=mask.long(),
        position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last].unsqueeze(1)
