"""TokenBridge-AR: predicts the indices of TokenBridge's tokens in random order, several at once, channel by channel.

Wang et al., 2025, "Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv 2503.16430).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for it when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Generator, Tensor

from generators.base import Trace
from generators.guidance import Guidance, combine
from generators.heads.channel import ChannelHead
from generators.heads.flow import NoiseStream
from generators.mar import (
    DEFAULT_ITERATIONS,
    MaskedTransformer,
    Walk,
    count_blocks,
    gather_positions,
    scatter_positions,
)
from mmsdk.decoding.sampling import check_sampling, draw_uniforms
from mmsdk.errors import CheckpointError, unknown_name
from mmsdk.loading import load_original
from tokenizers_img.base import ImageTokenizer
from tokenizers_img.quantizers import GaussianQuantizer
from tokenizers_img.tokenbridge import TokenBridge

_CHANNEL_ORDER = TokenBridge.presets["kl16"]["channel_order"]
PRESETS: dict[str, dict[str, Any]] = {
    "B": {"encoder_shape": (768, 12, 12), "decoder_shape": (768, 12, 12), "head_shape": (768, 4, 8)},
    "L": {"encoder_shape": (1024, 16, 16), "decoder_shape": (1024, 16, 16), "head_shape": (1024, 4, 8)},
    "H": {"encoder_shape": (1280, 20, 16), "decoder_shape": (1280, 20, 16), "head_shape": (1024, 6, 8)},
}
# What the published figures were made with; for B, nothing else is published.
GENERATION_PRESETS: dict[str, dict[str, Any]] = {
    "B": {"num_iter": 256},
    "L": {"num_iter": 256, "guidance_scale": 3.1, "temperature": 0.96},
    "H": {"num_iter": 256, "guidance_scale": 3.45, "temperature": 0.91},
}
# Published names that are neither the head's nor MAR's, and tables that follow from the configuration.
_RENAMED = {"output_pos_embed": "diffusion_pos_embed_learned"}
_TABLES = ("boundaries", "reconstruction_values")
_CAUSAL_MASK = "channel_mask"
_HEAD_KEYS = ("channel_", "condition_proj.", "timesteps_embeddings", "token_embeddings.")
_UNKNOWN = -1


@dataclass
class TokenBridgeARForwardOutput(BaseOutput):
    """What `TokenBridgeAR.forward` returns.

    Attributes:
        loss: scalar, mean over the masked tokens and their channels.
        mask: `(batch, num_tokens)` bool, the tokens that were masked.
        hidden_states: `(batch, num_masked, decoder_width)`, what the head was given of each, in raster order.
    """

    loss: Tensor
    mask: Tensor
    hidden_states: Tensor


@dataclass
class TokenBridgeAROutput(BaseOutput):
    """What `TokenBridgeAR.generate` returns.

    Attributes:
        token_ids: `(batch, h * w, latent_channels)` int64, as a `TokenBridge` tokenizer decodes them.
        trace: what was executed.
    """

    token_ids: Tensor
    trace: Trace


class TokenBridgeAR(MaskedTransformer):
    """Predicts masked tokens, whatever the order, with a head that goes through their channels (Wang et al., 2025).

    The backbone is that of `MAR` and sees the levels that indices stand for. Latents here are those that the quantizer
    sees: the VAE's, scaled, and normalised where the tokenizer does so.

    Args:
        grid_size: latents along each side of an image.
        patch_size: latents along each side of a token.
        latent_channels: numbers in a latent, and indices.
        encoder_shape: width, layers and heads of the encoder.
        decoder_shape: the same of the decoder.
        head_shape: the same of the channel head.
        bits: bits of an index, 1 to 8.
        value_range: latents from minus to plus this number are covered.
        channel_order: the order in which the numbers of a token are predicted (default: 0, 1, 2, ...); with patches,
            `latent_channels * patch_size**2` of them, the latent's channel first, then row and column in the patch.
        mlp_ratio: width of all MLPs, as a multiple of that of their layers.
        condition: `"class"` or `"text"`.
        num_classes: number of classes, for `"class"`.
        caption_dim: width of the text features, for `"text"`.
        buffer_size: condition tokens before the image: that many copies of the class's, or the tokens of the text.
        attention_dropout: dropout on the attention, in training.
        projection_dropout: dropout after attention and in the MLPs, in training.
        condition_dropout: how often a trainer should drop the condition; the model itself never does.
        mask_ratio_min: smallest share of tokens that is masked in training.

    Raises:
        ValueError: sizes are not positive or do not fit each other, or the order is no permutation.
    """

    registry_name = "tokenbridge_ar"
    generates = "token_ids"

    @register_to_config
    def __init__(
        self,
        grid_size: int = 16,
        patch_size: int = 1,
        latent_channels: int = 16,
        encoder_shape: Sequence[int] = (768, 12, 12),
        decoder_shape: Sequence[int] = (768, 12, 12),
        head_shape: Sequence[int] = (768, 4, 8),
        bits: int = 6,
        value_range: float = 5.0,
        channel_order: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        condition: str = "class",
        num_classes: int | None = 1000,
        caption_dim: int | None = None,
        buffer_size: int = 64,
        attention_dropout: float = 0.1,
        projection_dropout: float = 0.1,
        condition_dropout: float = 0.1,
        mask_ratio_min: float = 0.7,
    ) -> None:
        super().__init__()
        if len(head_shape) != 3:
            raise ValueError(f"head_shape must be width, layers and heads, got {tuple(head_shape)}.")
        dropouts = (attention_dropout, projection_dropout)
        self._build(
            grid_size, patch_size, latent_channels, encoder_shape, decoder_shape, mlp_ratio, condition, num_classes,
            caption_dim, buffer_size, dropouts, mask_ratio_min,
        )  # fmt: skip
        self.quantize = GaussianQuantizer(bits, value_range)
        width, depth, heads = head_shape
        self.head = ChannelHead(
            self.token_dim, self.quantize.codebook_size, decoder_shape[0], width, depth, heads, channel_order,
            mlp_ratio, dropouts,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------ construction

    @classmethod
    def preset(cls, name: str, image_size: int = 256, **overrides: Any) -> TokenBridgeAR:
        """Build a published model, `"B"`, `"L"` or `"H"`, with new weights.

        Args:
            name: one of these.
            image_size: side of the images in pixels; 16 of them to a latent.
            **overrides: configuration values to change.

        Raises:
            UnknownNameError: the name is not a preset.
        """
        if name not in PRESETS:
            raise unknown_name("TokenBridge-AR preset", name, list(PRESETS))
        published = {"grid_size": image_size // 16, "channel_order": _CHANNEL_ORDER} | PRESETS[name]
        return cls(**(published | overrides))

    @classmethod
    def from_original(cls, checkpoint: Any, config: Mapping[str, Any] | None = None) -> TokenBridgeAR:
        """Load a checkpoint in the published format.

        Its tables follow from the configuration and are only checked.

        Args:
            checkpoint: path, or state dict; nested under `model_ema` or `model`, or plain.
            config: configuration values, which go before what the shapes tell. They do not tell the numbers of heads,
                so that sizes other than the published ones need `encoder_shape`, `decoder_shape` and `head_shape`; nor
                `patch_size`, `value_range`, nor a `channel_order` other than the published one of 16 channels.

        Raises:
            CheckpointError: keys or shapes do not fit, or a value is neither given nor told.
        """
        published = load_original(checkpoint)
        state_dict = {_our_key(key): value for key, value in published.items() if key not in (*_TABLES, _CAUSAL_MASK)}
        model: TokenBridgeAR = cls._from_published(state_dict, config)
        if "channel_order" not in (config or {}) and model.token_dim != len(_CHANNEL_ORDER):
            raise CheckpointError(
                f"The published order is that of {len(_CHANNEL_ORDER)} channels and this checkpoint has "
                f"{model.token_dim}; pass theirs: config={{'channel_order': (...)}}."
            )
        for key, expected in zip(_TABLES, (model.quantize.boundaries, model.quantize.centroids), strict=True):
            table = published.get(key, expected)
            fits = table.shape == expected.shape
            if not fits or table.device.type != "meta" and not torch.allclose(table.float().cpu(), expected, atol=1e-5):
                raise CheckpointError(f"The checkpoint's {key!r} are not those of {model.config.bits} bits.")
        return model

    @classmethod
    def _infer_head(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        heads = {width: count for width, _, count in (preset["head_shape"] for preset in PRESETS.values())}
        levels, width = state_dict["head.channel_heads.0.weight"].shape
        config: dict[str, Any] = {"bits": (levels - 1).bit_length()}
        if count_blocks(state_dict, "head.channel_heads.") == len(_CHANNEL_ORDER):
            config["channel_order"] = _CHANNEL_ORDER
        if width in heads:
            config["head_shape"] = (width, count_blocks(state_dict, "head.channel_blocks."), heads[width])
        return config

    # ------------------------------------------------------------------------------------------------ tokens

    def check_tokenizer(self, image_tokenizer: ImageTokenizer) -> None:
        """Check that this generator writes the tokens of an image tokenizer.

        Raises:
            ValueError: it does not.
        """
        channels, *grid = self.latent_shape
        sizes = (self.quantize.codebook_size,) * channels
        if image_tokenizer.codebook_sizes != sizes or image_tokenizer.grid != tuple(grid):
            raise ValueError(
                f"The generator writes {channels} indices of {self.config.bits} bits at {grid[0]} x {grid[1]} "
                f"positions, but {type(image_tokenizer).__name__} has codebooks {image_tokenizer.codebook_sizes} on "
                f"the grid {image_tokenizer.grid}; pass a TokenBridge that fits."
            )

    def quantize_latents(self, latents: Tensor) -> Tensor:
        """Return ids `(batch, h * w, latent_channels)` of latents `(batch, latent_channels, h, w)`.

        Raises:
            ValueError: the latents are those of other images.
        """
        return self._to_ids(self._indices(latents, None))

    def dequantize_ids(self, token_ids: Tensor) -> Tensor:
        """Return latents `(batch, latent_channels, h, w)`, float32, of ids `(batch, h * w, latent_channels)`.

        Raises:
            TypeError: the ids are no integers.
            ValueError: their shape is wrong, or one is out of range.
        """
        return self.to_latents(self.quantize.dequantize(self._indices(None, token_ids)))

    def inpainting(self, token_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the arguments of a generation that regenerates the tokens with masked ids.

        Args:
            token_ids: `(batch, h * w, latent_channels)`.
            mask: bool `(batch, h * w)`.
        """
        return super().inpainting(self.dequantize_ids(token_ids), mask)

    def _indices(self, latents: Tensor | None, token_ids: Tensor | None) -> Tensor:
        """Return the indices of tokens, `(batch, num_tokens, token_dim)`, of one of the two."""
        if latents is not None and token_ids is None:
            return self.quantize.quantize(self.to_tokens(latents))
        if token_ids is None or latents is not None:
            raise ValueError("Pass either latents or token_ids.")
        channels, *grid = self.latent_shape
        if token_ids.dtype != torch.int64:
            raise TypeError(f"token_ids must be int64, got {token_ids.dtype}.")
        if token_ids.ndim != 3 or tuple(token_ids.shape[1:]) != (math.prod(grid), channels):
            raise ValueError(f"token_ids must be (batch, {math.prod(grid)}, {channels}), got {tuple(token_ids.shape)}.")
        if bool(((token_ids < 0) | (token_ids >= self.quantize.codebook_size)).any()):
            raise ValueError(
                f"token_ids must be 0 to {self.quantize.codebook_size - 1}, got {int(token_ids.min())} to "
                f"{int(token_ids.max())}."
            )
        return self.to_tokens(token_ids.mT.unflatten(2, grid))

    def _to_ids(self, indices: Tensor) -> Tensor:
        """Return `(batch, h * w, latent_channels)` of the indices of tokens."""
        return self.to_latents(indices).flatten(2).mT

    # ------------------------------------------------------------------------------------------------ training

    def forward(
        self,
        latents: Tensor | None = None,
        class_labels: Tensor | Sequence[int] | None = None,
        caption_features: Tensor | None = None,
        caption_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
        mask: Tensor | None = None,
        generator: Generator | None = None,
        token_ids: Tensor | None = None,
        return_dict: bool = True,
    ) -> TokenBridgeARForwardOutput | tuple[Tensor, Tensor, Tensor]:
        """Compute the loss of masked tokens.

        Args:
            latents: `(batch, latent_channels, h, w)`.
            class_labels: see `embed_condition`.
            caption_features: see `embed_condition`.
            caption_mask: see `embed_condition`.
            drop_condition: `(batch,)` bool; rows trained without their condition, for guidance.
            mask: `(batch, num_tokens)` bool, true where masked, as many in every row; drawn by default.
            generator: draws the mask; none draws with a new seed.
            token_ids: `(batch, h * w, latent_channels)`, in place of the latents.
            return_dict: False returns `(loss, mask, hidden_states)`.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: a shape is wrong or a value is out of its range.
        """
        indices = self._indices(latents, token_ids)
        if generator is None:
            generator = Generator()
            generator.seed()
        condition = self.embed_condition(class_labels, caption_features, caption_mask, drop_condition)
        mask, positions, z = self.masked_features(self.quantize.dequantize(indices), condition, mask, generator)
        loss = self.head.loss(z.flatten(0, 1), gather_positions(indices, positions).flatten(0, 1)).mean()
        output = TokenBridgeARForwardOutput(loss=loss, mask=mask, hidden_states=z)
        return output if return_dict else output.to_tuple()

    # ------------------------------------------------------------------------------------------------ generation

    def iter_generate(
        self,
        class_labels: Tensor | Sequence[int] | None = None,
        caption_features: Tensor | None = None,
        caption_mask: Tensor | None = None,
        batch_size: int | None = None,
        num_iter: int = DEFAULT_ITERATIONS,
        guidance_scale: float | Guidance = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        use_cache: bool = True,
        latents: Tensor | None = None,
        mask: Tensor | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        orders: Tensor | None = None,
        uniforms: Sequence[Tensor] | None = None,
        trace: Trace | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Generate step by step: yields the step and the ids so far, -1 where still masked; see `generate`.

        Arguments are checked at once, not at the first step.
        """
        check_sampling(temperature if temperature != 0 else 1.0, top_k)
        if temperature == 0 and uniforms is not None:
            raise ValueError("Nothing is drawn at temperature 0; leave uniforms out.")
        if None not in (orders, generator) and (temperature == 0 or uniforms is not None):
            raise ValueError("A generator has nothing to draw here, where orders are given; leave it out.")
        condition = self.generation_condition(class_labels, caption_features, caption_mask, batch_size)
        stream = NoiseStream(generator, len(condition))
        known = None
        if latents is not None:
            known = self._indices(latents.to(condition.device), None)
            latents = self.to_latents(self.quantize.dequantize(known))
        walk = self.plan_generation(condition, num_iter, guidance_scale, stream, latents, mask, orders)
        if known is None:
            indices = torch.full(walk.tokens.shape, _UNKNOWN, device=condition.device)
        else:
            masked = torch.cat([step.positions for step in walk.steps], 1)
            indices = scatter_positions(known, masked, known.new_full((*masked.shape, self.token_dim), _UNKNOWN))
        if uniforms is not None:
            shapes = [(*step.positions.shape, self.token_dim) for step in walk.steps]
            _check_uniforms(uniforms, shapes)
        return self._iterate(
            walk, indices, temperature, top_k, use_cache, stream, uniforms, Trace() if trace is None else trace
        )

    @torch.no_grad()
    def _iterate(
        self,
        walk: Walk,
        indices: Tensor,
        temperature: float,
        top_k: int,
        use_cache: bool,
        stream: NoiseStream,
        uniforms: Sequence[Tensor] | None,
        trace: Trace,
    ) -> Iterator[tuple[int, Tensor]]:
        tokens, drawn = walk.tokens, None
        for i, (step, scale) in enumerate(zip(walk.steps, walk.scales, strict=True)):
            shape = (*step.positions.shape, self.token_dim)
            if uniforms is not None:
                drawn = uniforms[i].flatten(0, 1)
            elif temperature != 0:
                drawn = draw_uniforms(stream.generators, len(tokens), math.prod(shape[1:])).reshape(-1, self.token_dim)
            z = self.features(walk, i, tokens, trace)
            if len(z) > len(tokens):
                z = combine(z[: len(tokens)], z[len(tokens) :], scale)
            sampled = self.head.sample(z.flatten(0, 1), drawn, temperature, top_k, use_cache).view(shape)
            trace.record_head(shape[0] * shape[1], self.token_dim)
            trace.guidance.append(scale)
            indices = scatter_positions(indices, step.positions, sampled)
            tokens = scatter_positions(tokens, step.positions, self.quantize.dequantize(sampled))
            yield step.step, self._to_ids(indices)

    def generate(
        self,
        class_labels: Tensor | Sequence[int] | None = None,
        caption_features: Tensor | None = None,
        caption_mask: Tensor | None = None,
        batch_size: int | None = None,
        num_iter: int = DEFAULT_ITERATIONS,
        guidance_scale: float | Guidance = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        use_cache: bool = True,
        latents: Tensor | None = None,
        mask: Tensor | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        orders: Tensor | None = None,
        uniforms: Sequence[Tensor] | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
        trace: Trace | None = None,
        return_dict: bool = True,
    ) -> TokenBridgeAROutput | tuple[Tensor, Trace]:
        """Generate the tokens of a batch of images, or regenerate some of them.

        The encoder sees known tokens only, the last decoder block and the head those that are predicted, and
        unconditional rows are computed in guided steps; guidance combines what the head is given, so that the head has
        no such rows. With one generator per image, an image does not depend on the rest of the batch, as far as
        floating point allows.

        Args:
            class_labels: `(batch,)`, for class-conditional models.
            caption_features: `(batch, buffer_size, caption_dim)`, for text-conditional models.
            caption_mask: `(batch, buffer_size)`, nonzero for real tokens.
            batch_size: number of images without a condition, in place of the above.
            num_iter: steps of the generation, each of which predicts some tokens.
            guidance_scale: 1 is none. A number is reached linearly with the tokens that are done, as published; a
                `Guidance` gives the scale of every step.
            temperature: divides the logits of an index; 0 takes the most probable one.
            top_k: draw from so many of the most probable indices only; 0 is all.
            use_cache: False computes all channels so far for each channel, as published, with the same result.
            latents: `(batch, latent_channels, h, w)`, images to regenerate in part; quantized where not masked.
            mask: the tokens of `latents` to regenerate, true where masked: bool `(num_tokens,)`, or
                `(batch, num_tokens)` with as many in every row.
            generator: one, or one per image; none draws with a new seed. The global one is never used. It draws the
                orders, then for each step a number for every channel of its tokens.
            orders: `(batch, num_masked)`, for each image its masked positions; those that stand first come last. Drawn
                by default.
            uniforms: for every step that predicts tokens `(batch, tokens, token_dim)` in [0, 1), in place of a
                generator's: an index is the smallest whose cumulative probability exceeds its number. The numbers of a
                token are in the order of prediction.
            callback: called as `callback(step, token_ids)` after every step; ids to come are -1.
            trace: filled with what is executed.
            return_dict: False returns `(token_ids, trace)`.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of its range, or two exclude each other.
        """
        trace = Trace() if trace is None else trace
        steps = self.iter_generate(
            class_labels, caption_features, caption_mask, batch_size, num_iter, guidance_scale, temperature, top_k,
            use_cache, latents, mask, generator, orders, uniforms, trace,
        )  # fmt: skip
        for step, result in steps:
            if callback is not None:
                callback(step, result)
        return TokenBridgeAROutput(token_ids=result, trace=trace) if return_dict else (result, trace)


def _our_key(key: str) -> str:
    return _RENAMED.get(key, f"head.{key}" if key.startswith(_HEAD_KEYS) else key)


def _check_uniforms(uniforms: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    found = [tuple(block.shape) for block in uniforms]
    if found != list(shapes):
        raise ValueError(f"uniforms must hold tensors of the shapes {list(shapes)}, got {found}.")
    if not all(bool(((block >= 0) & (block < 1)).all()) for block in uniforms):
        raise ValueError("uniforms must be in [0, 1).")
