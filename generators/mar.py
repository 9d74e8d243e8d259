"""MAR: predicts the continuous tokens of an image in random order, several at once, each with a diffusion head.

Li et al., 2024, "Autoregressive Image Generation without Vector Quantization" (arXiv 2406.11838).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for it when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Generator, Tensor, nn

from generators.annealing import StepAnnealing
from generators.base import LatentGenerator, Trace
from generators.continuous import ContinuousSpeculation, SharedNoise, Side
from generators.guidance import Guidance, LinearGuidance
from generators.heads.diffusion import SAMPLERS, DiffusionHead, DiffusionPlan, respaced_timesteps
from generators.heads.flow import NoiseStream, check_labels, check_noise
from generators.layers import MLP
from generators.llamagen import CaptionProjection
from generators.orders import OrderStep, RandomCosineMask
from mmsdk.errors import CheckpointError, unknown_name
from mmsdk.loading import load_into, load_original
from mmsdk.modeling import PretrainedModel

PRESETS: dict[str, dict[str, Any]] = {
    "B": {"encoder_shape": (768, 12, 12), "decoder_shape": (768, 12, 12), "head_shape": (1024, 6)},
    "L": {"encoder_shape": (1024, 16, 16), "decoder_shape": (1024, 16, 16), "head_shape": (1280, 8)},
    "H": {"encoder_shape": (1280, 20, 16), "decoder_shape": (1280, 20, 16), "head_shape": (1536, 12)},
}
# What the published figures were made with.
GENERATION_PRESETS: dict[str, dict[str, Any]] = {
    "B": {"num_iter": 256, "num_steps": 100, "guidance_scale": 2.9, "temperature": 1.0},
    "L": {"num_iter": 256, "num_steps": 100, "guidance_scale": 3.0, "temperature": 1.0},
    "H": {"num_iter": 256, "num_steps": 100, "guidance_scale": 3.2, "temperature": 1.0},
}
DEFAULT_ITERATIONS = 64
_NORM_EPS = 1e-6
_INIT_STD = 0.02
_MASK_RATIO_STD = 0.25


@dataclass
class MARForwardOutput(BaseOutput):
    """What `MAR.forward` returns.

    Attributes:
        loss: scalar, mean over the masked tokens.
        mask: `(batch, num_tokens)` bool, the tokens that were masked.
        hidden_states: `(batch, num_masked, decoder_width)`, what the head was given of each, in raster order.
    """

    loss: Tensor
    mask: Tensor
    hidden_states: Tensor


@dataclass
class MAROutput(BaseOutput):
    """What `MAR.generate` returns.

    Attributes:
        latents: `(batch, latent_channels, h, w)`, float32, scaled as those in training.
        trace: what was executed.
    """

    latents: Tensor
    trace: Trace


# ---------------------------------------------------------------------------------------------------- layers


def gather_positions(x: Tensor, positions: Tensor) -> Tensor:
    """Return `(batch, k, dim)`, rows of `x` `(batch, length, dim)` at `positions` `(batch, k)`."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def scatter_positions(x: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """Return `x` `(batch, length, dim)` with `rows` `(batch, k, dim)` at `positions` `(batch, k)`."""
    return x.scatter(1, positions[..., None].expand(-1, -1, x.shape[-1]), rows)


class Attention(nn.Module):
    """Multi-head attention of all positions to all."""

    def __init__(self, width: int, num_heads: int, dropout: float, projection_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout, self.projection_dropout = dropout, projection_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """Map `(batch, length, width)` to the same shape, or to that of `queries`, rows of `x` that alone attend."""
        width = x.shape[-1]
        if queries is None:
            query, key, value = self.qkv(x).chunk(3, -1)
        else:
            query = F.linear(queries, self.qkv.weight[:width], self.qkv.bias[:width])
            key, value = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:]).chunk(2, -1)
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return F.dropout(self.proj(attended.transpose(1, 2).flatten(2)), self.projection_dropout, self.training)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, dropouts: tuple[float, float]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.attn = Attention(width, num_heads, *dropouts)
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = MLP(width, int(width * mlp_ratio), dropouts[1])

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Map `(batch, length, width)` to the same shape, or to `(batch, k, width)` of `positions` `(batch, k)`."""
        normed = self.norm1(x)
        if positions is None:
            x = x + self.attn(normed)
        else:
            x = gather_positions(x, positions) + self.attn(normed, gather_positions(normed, positions))
        return x + self.mlp(self.norm2(x))


# ---------------------------------------------------------------------------------------------------- backbone


class Walk(NamedTuple):
    """What the steps of a generation predict; made by `MaskedTransformer.plan_generation`.

    Attributes:
        tokens: `(batch, num_tokens, token_dim)`, zero where not known.
        condition: `(rows, buffer_size, width)`, unconditional rows behind the others where any step is guided.
        steps: the steps that predict something.
        scales: guidance scale of each of them.
    """

    tokens: Tensor
    condition: Tensor
    steps: list[OrderStep]
    scales: list[float]

    @property
    def is_guided(self) -> bool:
        """Whether any step is."""
        return len(self.condition) > len(self.tokens)


class MaskedTransformer(LatentGenerator, PretrainedModel):
    """Encoder of the known tokens, and decoder that knows of every position (He et al., 2022, with condition tokens).

    The base of models with this backbone; they add a token head. See `MAR` for the arguments.
    """

    def _build(
        self,
        grid_size: int,
        patch_size: int,
        latent_channels: int,
        encoder_shape: Sequence[int],
        decoder_shape: Sequence[int],
        mlp_ratio: float,
        condition: str,
        num_classes: int | None,
        caption_dim: int | None,
        buffer_size: int,
        dropouts: tuple[float, float],
        mask_ratio_min: float,
    ) -> None:
        for name, shape in (("encoder_shape", encoder_shape), ("decoder_shape", decoder_shape)):
            if len(shape) != 3 or min(shape) < 1 or shape[0] % shape[2]:
                raise ValueError(
                    f"{name} must be width, layers and heads, at least 1, with heads that divide the width; "
                    f"got {tuple(shape)}."
                )
        for name, size in (("latent_channels", latent_channels), ("buffer_size", buffer_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if not 0 < mask_ratio_min <= 1:
            raise ValueError(f"mask_ratio_min must be above 0 and at most 1, got {mask_ratio_min}.")
        if patch_size < 1 or grid_size < patch_size or grid_size % patch_size:
            raise ValueError(f"patch_size must divide grid_size, got {patch_size} and {grid_size}.")
        self.token_dim = latent_channels * patch_size**2
        self.num_tokens = (grid_size // patch_size) ** 2
        (width, layers, heads), (decoder_width, decoder_layers, decoder_heads) = encoder_shape, decoder_shape

        if condition == "class":
            if num_classes is None or num_classes < 1:
                raise ValueError(f"A class condition needs num_classes of at least 1, got {num_classes}.")
            self.class_emb = nn.Embedding(num_classes, width)
        elif condition == "text":
            if caption_dim is None or caption_dim < 1:
                raise ValueError(
                    f"A text condition needs caption_dim, the width of the text features, got {caption_dim}."
                )
            self.cap_proj = CaptionProjection(caption_dim, width)
        else:
            raise ValueError(f"condition must be 'class' or 'text', got {condition!r}.")
        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.z_proj = nn.Linear(self.token_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=_NORM_EPS)
        length = buffer_size + self.num_tokens
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, width))
        self.encoder_blocks = nn.ModuleList(Block(width, heads, mlp_ratio, dropouts) for _ in range(layers))
        self.encoder_norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads, mlp_ratio, dropouts) for _ in range(decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=_NORM_EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, self.num_tokens, decoder_width))

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=_INIT_STD)
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=_INIT_STD)

    @classmethod
    def _infer_head(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read from the shapes what they tell of the head; errors of the lookup mean that it is another model's."""
        raise NotImplementedError

    @classmethod
    def _from_published(cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Any:
        """Build the model of a state dict with this class's keys; `config` goes before what the shapes tell."""
        given = dict(config or {})
        try:
            values = _infer_backbone(state_dict, given.get("patch_size", 1)) | cls._infer_head(state_dict) | given
        except (KeyError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"This is no {cls.__name__} checkpoint: {error} is missing or has no fitting shape."
            ) from error
        for name in ("encoder_shape", "decoder_shape", "head_shape"):
            if name not in values:
                raise CheckpointError(
                    f"The checkpoint does not tell the number of heads; pass it: config={{'{name}': "
                    "(width, layers, heads)}."
                )
        model = cls(**values)
        load_into(model, state_dict)
        return model.eval()

    # ------------------------------------------------------------------------------------------------ tokens

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image."""
        return self.config.latent_channels, self.config.grid_size, self.config.grid_size

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Cut `(batch, latent_channels, h, w)` into tokens `(batch, num_tokens, token_dim)`, in raster order.

        Raises:
            ValueError: the latents are those of other images.
        """
        if latents.ndim != 4 or tuple(latents.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"latents must be (batch, {', '.join(map(str, self.latent_shape))}), got {tuple(latents.shape)}."
            )
        size = self.config.patch_size
        patches = latents.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # n, c, h, p, w, q
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def to_latents(self, tokens: Tensor) -> Tensor:
        """Put tokens `(batch, num_tokens, token_dim)` together to `(batch, latent_channels, h, w)`."""
        size, side = self.config.patch_size, self.config.grid_size // self.config.patch_size
        patches = tokens.unflatten(2, (-1, size, size)).unflatten(1, (side, side))  # n, h, w, c, p, q
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    # ------------------------------------------------------------------------------------------------ pipeline

    @property
    def prompt_length(self) -> int:
        """Most tokens of a prompt."""
        return self.config.buffer_size

    def count_steps(self, num_iter: int = DEFAULT_ITERATIONS, **settings: Any) -> int:
        """Return how many steps a generation takes at most; other settings do not matter."""
        return min(num_iter, self.num_tokens)

    def inpainting(self, latents: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the arguments of a generation that regenerates the tokens with masked latents.

        Args:
            latents: `(batch, latent_channels, h, w)`.
            mask: bool `(batch, h * w)`.
        """
        cells = mask.view(len(mask), 1, *self.latent_shape[1:])
        return {"latents": latents, "mask": self.to_tokens(cells.expand(-1, self.latent_shape[0], -1, -1)).any(-1)}

    # ------------------------------------------------------------------------------------------------ condition

    def unconditional(self, batch: int) -> Tensor:
        """Return the condition tokens of no condition, `(batch, buffer_size, width)`."""
        return self.fake_latent.expand(batch, self.config.buffer_size, -1)

    def embed_condition(
        self,
        class_labels: Tensor | Sequence[int] | None = None,
        caption_features: Tensor | None = None,
        caption_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
    ) -> Tensor:
        """Return the condition tokens `(batch, buffer_size, width)`.

        Args:
            class_labels: `(batch,)`, for class-conditional models.
            caption_features: `(batch, buffer_size, caption_dim)`, for text-conditional models.
            caption_mask: `(batch, buffer_size)`, nonzero for real tokens; features elsewhere count as 0.
            drop_condition: `(batch,)` bool; rows that become unconditional.

        Raises:
            TypeError: labels are no integers.
            ValueError: a shape or a label is wrong, or this is the condition of another kind of model.
        """
        size = self.config.buffer_size
        if self.config.condition == "class":
            if class_labels is None or caption_features is not None or caption_mask is not None:
                raise ValueError("This model is class-conditional: pass class_labels and no caption.")
            labels = check_labels(class_labels, self.config.num_classes, self.fake_latent.device)
            embedded = self.class_emb(labels)[:, None].expand(-1, size, -1)
        else:
            if caption_features is None or class_labels is not None:
                raise ValueError("This model is text-conditional: pass caption_features and no class_labels.")
            shape = (size, self.config.caption_dim)
            if caption_features.ndim != 3 or tuple(caption_features.shape[1:]) != shape or not len(caption_features):
                raise ValueError(
                    f"caption_features must be (batch, {size}, {shape[1]}), got {tuple(caption_features.shape)}."
                )
            if caption_mask is not None:
                if caption_mask.shape != caption_features.shape[:2]:
                    raise ValueError(
                        f"caption_mask must be {tuple(caption_features.shape[:2])}, as the features, "
                        f"got {tuple(caption_mask.shape)}."
                    )
                caption_features = caption_features.masked_fill(~caption_mask.bool()[..., None], 0)
            embedded = self.cap_proj(caption_features.to(self.fake_latent.dtype))
        if drop_condition is None:
            return embedded
        if drop_condition.shape != embedded.shape[:1]:
            raise ValueError(
                f"drop_condition must be ({len(embedded)},), one per row, got {tuple(drop_condition.shape)}."
            )
        dropped = drop_condition.to(embedded.device).bool()[:, None, None]
        return torch.where(dropped, self.unconditional(1).to(embedded.dtype), embedded)

    # ------------------------------------------------------------------------------------------------ network

    def encode(self, tokens: Tensor, known: Tensor, condition: Tensor) -> Tensor:
        """Return `(batch, buffer_size + k, width)` of the condition and the known tokens.

        Args:
            tokens: known tokens `(batch, k, token_dim)`.
            known: their positions `(batch, k)`.
            condition: `(batch, buffer_size, width)`.
        """
        position = self.encoder_pos_embed_learned[0]
        size = condition.shape[1]
        projected = self.z_proj(tokens.to(self.z_proj.weight.dtype))
        hidden = torch.cat([condition + position[:size], projected + position[size:][known]], 1)
        hidden = self.z_proj_ln(hidden)
        for block in self.encoder_blocks:
            hidden = block(hidden)
        return self.encoder_norm(hidden)

    def decode(self, encoded: Tensor, known: Tensor, positions: Tensor) -> Tensor:
        """Return `z`, what the head needs of `positions`, `(batch, n, decoder_width)`.

        The last block attends from these positions only.

        Args:
            encoded: of `encode`.
            known: positions of the known tokens, `(batch, k)`.
            positions: `(batch, n)`.
        """
        hidden = self.decoder_embed(encoded)
        batch, _, width = hidden.shape
        size = self.config.buffer_size
        masked = self.mask_token.to(hidden.dtype).expand(batch, self.num_tokens, width)
        grid = scatter_positions(masked, known, hidden[:, size:])
        hidden = torch.cat([hidden[:, :size], grid], 1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks[:-1]:
            hidden = block(hidden)
        hidden = self.decoder_blocks[-1](hidden, size + positions)
        return self.decoder_norm(hidden) + self.diffusion_pos_embed_learned[0][positions]

    # ------------------------------------------------------------------------------------------------ training

    def draw_mask(self, batch: int, generator: Generator) -> Tensor:
        """Draw which tokens to mask in training, bool `(batch, num_tokens)`, as many in every row.

        Their share is 1 at most, normally distributed around it with standard deviation 0.25, and not below
        `mask_ratio_min`.
        """
        least = torch.tensor((self.config.mask_ratio_min - 1) / _MASK_RATIO_STD, dtype=torch.float64)
        low = float(torch.special.ndtr(least))
        uniform = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).cpu()
        ratio = 1 + _MASK_RATIO_STD * float(torch.special.ndtri(low + (0.5 - low) * uniform))
        count = min(self.num_tokens, math.ceil(self.num_tokens * ratio))
        ranks = torch.rand(batch, self.num_tokens, generator=generator, device=generator.device).argsort(-1)
        return ranks < count

    def masked_features(
        self, tokens: Tensor, condition: Tensor, mask: Tensor | None, generator: Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mask `(batch, num_tokens)`, masked positions `(batch, n)`, and `z` of these.

        Args:
            tokens: `(batch, num_tokens, token_dim)`.
            condition: `(batch, buffer_size, width)`.
            mask: bool `(num_tokens,)` or `(batch, num_tokens)`, as many in every row; drawn by default.
            generator: draws the mask.

        Raises:
            TypeError: the mask is not bool.
            ValueError: a shape is wrong, or the mask masks nothing or not as many in every row.
        """
        _check_batch(len(condition), len(tokens))
        if mask is None:
            mask = self.draw_mask(len(tokens), generator).to(tokens.device)
        positions = masked_positions(mask, len(tokens), self.num_tokens).to(tokens.device)
        mask = mask.expand(len(tokens), -1)
        known = (~mask).nonzero()[:, 1].view(len(tokens), -1)
        z = self.decode(self.encode(gather_positions(tokens, known), known, condition), known, positions)
        return mask, positions, z

    # ------------------------------------------------------------------------------------------------ generation

    def generation_condition(
        self,
        class_labels: Tensor | Sequence[int] | None,
        caption_features: Tensor | None,
        caption_mask: Tensor | None,
        batch_size: int | None,
    ) -> Tensor:
        """Return the condition tokens of `embed_condition`, or of `batch_size` images without a condition.

        Raises:
            ValueError: both were given, or see `embed_condition`.
        """
        with torch.no_grad():
            if batch_size is None:
                return self.embed_condition(class_labels, caption_features, caption_mask)
            if class_labels is not None or caption_features is not None:
                raise ValueError(
                    f"batch_size is for images without a condition, got {batch_size!r} and a condition; pass one."
                )
            if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
                raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
            return self.unconditional(batch_size)

    def plan_generation(
        self,
        condition: Tensor,
        num_iter: int,
        guidance_scale: float | Guidance,
        stream: NoiseStream,
        latents: Tensor | None,
        mask: Tensor | None,
        orders: Tensor | None,
    ) -> Walk:
        """Fix what every step of a generation predicts, and how it is guided.

        Args:
            condition: `(batch, buffer_size, width)`.
            num_iter: number of steps.
            guidance_scale: a number is reached linearly with the tokens that are done.
            stream: draws the orders.
            latents: see `MAR.generate`.
            mask: see `MAR.generate`.
            orders: see `MAR.generate`.

        Raises:
            ValueError: a shape is wrong or a value is out of its range.
        """
        batch, device = len(condition), condition.device
        if (latents is None) != (mask is None):
            raise ValueError("Pass latents and mask together: what is known, and which tokens to regenerate.")
        if latents is None or mask is None:
            tokens = torch.zeros(batch, self.num_tokens, self.token_dim, device=device)
            masked = torch.arange(self.num_tokens, device=device).expand(batch, -1)
        else:
            known = self.to_tokens(latents).to(device, torch.float32)
            _check_batch(batch, len(known))
            masked = masked_positions(mask, batch, self.num_tokens).to(device)
            tokens = scatter_positions(known, masked, known.new_zeros(*masked.shape, self.token_dim))
        if orders is None:
            orders = masked.gather(1, stream.draw(masked.shape[1]).argsort(-1).to(device))
        elif orders.shape != masked.shape or not torch.equal(orders.to(device).sort(-1).values, masked):
            raise ValueError(
                f"orders must be {tuple(masked.shape)}, in each row all masked positions; got {tuple(orders.shape)}, "
                f"the first row {orders[0].tolist() if len(orders) else []}."
            )
        steps = list(RandomCosineMask(num_iter).steps(orders.to(device), self.num_tokens))
        guidance = guidance_scale if isinstance(guidance_scale, Guidance) else LinearGuidance(guidance_scale)
        scales = [guidance.scale(s.step, num_iter, s.progress) for s in steps]
        for s, scale in zip(steps, scales, strict=True):
            if not (math.isfinite(scale) and scale >= 0):
                raise ValueError(f"Guidance scales must be finite and at least 0, got {scale} at step {s.step}.")
        if any(scale != 1.0 for scale in scales):
            condition = torch.cat([condition, self.unconditional(batch).to(condition.dtype)])
        return Walk(tokens, condition, steps, scales)

    def features(self, walk: Walk, index: int, tokens: Tensor, trace: Trace) -> Tensor:
        """Return `z` of the positions that a step predicts, `(rows, n, decoder_width)`.

        Rows are the images, and as many unconditional ones behind them where the step is guided.

        Args:
            walk: of `plan_generation`.
            index: of the step in the walk.
            tokens: `(batch, num_tokens, token_dim)`, where known.
            trace: counts the forward.
        """
        step = walk.steps[index]
        return self.features_at(walk.condition, walk.scales[index], tokens, step.known, step.positions, trace)

    def features_at(
        self, condition: Tensor, scale: float, tokens: Tensor, known: Tensor, positions: Tensor, trace: Trace
    ) -> Tensor:
        """Return `z` of positions `(batch, n)`, from the tokens that are known; see `features`.

        Args:
            condition: `(rows, buffer_size, width)`, unconditional rows behind the others.
            scale: of the guidance; 1 needs no unconditional rows.
            tokens: `(batch, num_tokens, token_dim)`.
            known: positions of the tokens that are known, `(batch, k)`.
            positions: positions to predict.
            trace: counts the forward.
        """
        copies = 1 if scale == 1.0 else 2
        seen, condition = known.repeat(copies, 1), condition[: copies * len(tokens)]
        encoded = self.encode(gather_positions(tokens, known).repeat(copies, 1, 1), seen, condition)
        trace.record_forward(len(condition), self.config.buffer_size + self.num_tokens)
        return self.decode(encoded, seen, positions.repeat(copies, 1))


class MAR(MaskedTransformer):
    """Predicts masked latents, whatever the order, with a diffusion head per token (Li et al., 2024).

    Args:
        grid_size: latents along each side of an image.
        patch_size: latents along each side of a token.
        latent_channels: numbers in a latent.
        encoder_shape: width, layers and heads of the encoder.
        decoder_shape: the same of the decoder.
        head_shape: width and depth of the diffusion head.
        mlp_ratio: width of the MLPs in encoder and decoder, as a multiple of theirs.
        condition: `"class"` or `"text"`.
        num_classes: number of classes, for `"class"`.
        caption_dim: width of the text features, for `"text"`.
        buffer_size: condition tokens before the image: that many copies of the class's, or the tokens of the text.
        attention_dropout: dropout on the attention, in training.
        projection_dropout: dropout after attention and in the MLPs, in training.
        condition_dropout: how often a trainer should drop the condition; the model itself never does.
        mask_ratio_min: smallest share of tokens that is masked in training.
        diffusion_batch_mul: noisy copies of each masked token in training.

    Raises:
        ValueError: sizes are not positive or do not fit each other.
    """

    registry_name = "mar"

    @register_to_config
    def __init__(
        self,
        grid_size: int = 16,
        patch_size: int = 1,
        latent_channels: int = 16,
        encoder_shape: Sequence[int] = (768, 12, 12),
        decoder_shape: Sequence[int] = (768, 12, 12),
        head_shape: Sequence[int] = (1024, 6),
        mlp_ratio: float = 4.0,
        condition: str = "class",
        num_classes: int | None = 1000,
        caption_dim: int | None = None,
        buffer_size: int = 64,
        attention_dropout: float = 0.1,
        projection_dropout: float = 0.1,
        condition_dropout: float = 0.1,
        mask_ratio_min: float = 0.7,
        diffusion_batch_mul: int = 4,
    ) -> None:
        super().__init__()
        if diffusion_batch_mul < 1:
            raise ValueError(f"diffusion_batch_mul must be at least 1, got {diffusion_batch_mul}.")
        if len(head_shape) != 2:
            raise ValueError(f"head_shape must be width and depth, got {tuple(head_shape)}.")
        self._build(
            grid_size, patch_size, latent_channels, encoder_shape, decoder_shape, mlp_ratio, condition, num_classes,
            caption_dim, buffer_size, (attention_dropout, projection_dropout), mask_ratio_min,
        )  # fmt: skip
        self.diffloss = DiffusionHead(self.token_dim, decoder_shape[0], *head_shape)

    # ------------------------------------------------------------------------------------------------ construction

    @classmethod
    def preset(cls, name: str, image_size: int = 256, **overrides: Any) -> MAR:
        """Build a published model, `"B"`, `"L"` or `"H"`, with new weights.

        Args:
            name: one of these.
            image_size: side of the images in pixels; 16 of them to a latent.
            **overrides: configuration values to change.

        Raises:
            UnknownNameError: the name is not a preset.
        """
        if name not in PRESETS:
            raise unknown_name("MAR preset", name, list(PRESETS))
        return cls(**({"grid_size": image_size // 16} | PRESETS[name] | overrides))

    @classmethod
    def from_original(cls, checkpoint: Any, config: Mapping[str, Any] | None = None) -> MAR:
        """Load a checkpoint in the published format.

        Args:
            checkpoint: path, or state dict; nested under `model_ema` or `model`, or plain.
            config: configuration values, which go before what the shapes tell. They do not tell the numbers of heads,
                so that sizes other than the published ones need `encoder_shape` and `decoder_shape`, nor `patch_size`.

        Raises:
            CheckpointError: keys or shapes do not fit, or a value is neither given nor told.
        """
        return cls._from_published(load_original(checkpoint), config)

    @classmethod
    def _infer_head(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        depth = count_blocks(state_dict, "diffloss.net.res_blocks.")
        return {"head_shape": (state_dict["diffloss.net.input_proj.weight"].shape[0], depth)}

    # ------------------------------------------------------------------------------------------------ training

    def forward(
        self,
        latents: Tensor,
        class_labels: Tensor | Sequence[int] | None = None,
        caption_features: Tensor | None = None,
        caption_mask: Tensor | None = None,
        drop_condition: Tensor | None = None,
        mask: Tensor | None = None,
        generator: Generator | None = None,
        return_dict: bool = True,
    ) -> MARForwardOutput | tuple[Tensor, Tensor, Tensor]:
        """Compute the loss of masked tokens.

        Args:
            latents: `(batch, latent_channels, h, w)`.
            class_labels: see `embed_condition`.
            caption_features: see `embed_condition`.
            caption_mask: see `embed_condition`.
            drop_condition: `(batch,)` bool; rows trained without their condition, for guidance.
            mask: `(batch, num_tokens)` bool, true where masked, as many in every row; drawn by default.
            generator: draws the mask, then timesteps and noise of the head; none draws with a new seed.
            return_dict: False returns `(loss, mask, hidden_states)`.

        Raises:
            ValueError: a shape is wrong or a value is out of its range.
        """
        tokens = self.to_tokens(latents)
        if generator is None:
            generator = Generator()
            generator.seed()
        condition = self.embed_condition(class_labels, caption_features, caption_mask, drop_condition)
        mask, positions, z = self.masked_features(tokens, condition, mask, generator)
        copies = (self.config.diffusion_batch_mul, 1)
        target = gather_positions(tokens, positions).flatten(0, 1)
        loss = self.diffloss.loss(z.flatten(0, 1).repeat(copies), target.repeat(copies), generator).mean()
        output = MARForwardOutput(loss=loss, mask=mask, hidden_states=z)
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
        num_steps: int | None = None,
        annealing: StepAnnealing | None = None,
        temperature: float = 1.0,
        sampler: str = "ddpm",
        speculation: ContinuousSpeculation | None = None,
        latents: Tensor | None = None,
        mask: Tensor | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        orders: Tensor | None = None,
        noise: Sequence[Tensor] | None = None,
        trace: Trace | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Generate step by step: yields the step and the latents so far, zero where still masked; see `generate`.

        Arguments are checked at once, not at the first step.
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be finite and at least 0, got {temperature}.")
        if sampler not in SAMPLERS:
            raise unknown_name("sampler", sampler, list(SAMPLERS))
        if num_steps is not None and annealing is not None:
            raise ValueError(f"Pass num_steps or annealing, not both; got num_steps={num_steps!r} and {annealing!r}.")
        if speculation is None and None not in (noise, orders, generator):
            raise ValueError("A generator has nothing to draw where orders and noise are given; leave it out.")
        if not isinstance(annealing, StepAnnealing | None):
            raise TypeError(f"annealing must be a StepAnnealing, got {annealing!r}.")
        if speculation is not None:
            self._check_speculation(speculation, sampler, temperature, orders, noise)
        timesteps = respaced_timesteps(100 if num_steps is None else num_steps)
        condition = self.generation_condition(class_labels, caption_features, caption_mask, batch_size)
        stream = NoiseStream(generator, len(condition))
        walk = self.plan_generation(condition, num_iter, guidance_scale, stream, latents, mask, orders)

        schedules = [annealing.timesteps(s.step, num_iter) if annealing else timesteps for s in walk.steps]
        plans = {t: self.diffloss.plan(t) for t in dict.fromkeys(schedules)}
        trace = Trace() if trace is None else trace
        if speculation is not None:
            target = Side(self, walk.condition, [plans[t] for t in schedules], trace)
            small = speculation.draft
            drafts = small.generation_condition(class_labels, caption_features, caption_mask, batch_size)
            if walk.is_guided:
                drafts = torch.cat([drafts, small.unconditional(len(drafts)).to(drafts.dtype)])
            plans = {t: small.diffloss.plan(t) for t in plans}
            draft = Side(small, drafts, [plans[t] for t in schedules], Trace())
            if noise is None:
                start = stream.draw(self.num_tokens, self.token_dim)
                noise = start, stream.draw(self.num_tokens, max(map(len, schedules)), self.token_dim)
            shared = SharedNoise(*(part.to(walk.tokens) for part in noise))
            results = speculation.generate(walk, target, draft, num_iter, temperature, shared, stream)
            return ((step, self.to_latents(tokens)) for step, tokens in results)
        if noise is not None:
            sizes = [(1 + len(t), *s.positions.shape) for t, s in zip(schedules, walk.steps, strict=True)]
            check_noise(noise, [(*size, self.token_dim) for size in sizes])
        return self._iterate(
            walk,
            [plans[t] for t in schedules],
            temperature,
            sampler,
            stream,
            noise,
            trace,
        )

    def _check_speculation(
        self,
        speculation: ContinuousSpeculation,
        sampler: str,
        temperature: float,
        orders: Tensor | None,
        noise: Sequence[Tensor] | None,
    ) -> None:
        if not isinstance(speculation, ContinuousSpeculation):
            raise TypeError(
                f"{type(self).__name__} writes continuous tokens: speculation must be a ContinuousSpeculation, got "
                f"{type(speculation).__name__}."
            )
        speculation.check_target(self)
        if sampler != "ddpm" or not temperature:
            raise ValueError(
                "Drafts are verified by the densities of sampling, which needs sampler='ddpm' and a temperature above "
                f"0; got {sampler!r} and {temperature}."
            )
        if noise is not None and orders is None:
            raise ValueError("With speculation, noise is that of positions, and needs orders.")

    @torch.no_grad()
    def _iterate(
        self,
        walk: Walk,
        plans: list[DiffusionPlan],
        temperature: float,
        sampler: str,
        stream: NoiseStream,
        noise: Sequence[Tensor] | None,
        trace: Trace,
    ) -> Iterator[tuple[int, Tensor]]:
        tokens = walk.tokens
        # The published code computes unconditional rows at every step or never, and draws noise for them, too.
        unused_rows = len(tokens) if walk.is_guided else 0
        for i, (step, plan) in enumerate(zip(walk.steps, plans, strict=True)):
            shape = (step.positions.shape[1], self.token_dim)
            if noise is not None:
                drawn = noise[i]
            else:
                start = stream.draw(*shape)
                drawn = torch.stack([start, *(stream.draw(*shape, unused_rows=unused_rows) for _ in range(len(plan)))])
            drawn = drawn.to(tokens.device, torch.float32).flatten(1, 2)
            z = self.features(walk, i, tokens, trace).flatten(0, 1)
            sampled = self.diffloss.sample(z, drawn, plan, temperature, walk.scales[i], sampler)
            trace.record_head(len(z), len(plan))
            trace.guidance.append(walk.scales[i])
            tokens = scatter_positions(tokens, step.positions, sampled.view(-1, *shape))
            yield step.step, self.to_latents(tokens)

    def generate(
        self,
        class_labels: Tensor | Sequence[int] | None = None,
        caption_features: Tensor | None = None,
        caption_mask: Tensor | None = None,
        batch_size: int | None = None,
        num_iter: int = DEFAULT_ITERATIONS,
        guidance_scale: float | Guidance = 1.0,
        num_steps: int | None = None,
        annealing: StepAnnealing | None = None,
        temperature: float = 1.0,
        sampler: str = "ddpm",
        speculation: ContinuousSpeculation | None = None,
        latents: Tensor | None = None,
        mask: Tensor | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        orders: Tensor | None = None,
        noise: Sequence[Tensor] | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
        trace: Trace | None = None,
        return_dict: bool = True,
    ) -> MAROutput | tuple[Tensor, Trace]:
        """Generate the latents of a batch of images, or regenerate some of their tokens.

        The encoder sees known tokens only, the last decoder block and the head those that are predicted, and
        unconditional rows are computed in guided steps. With one generator per image, an image does not depend on the
        rest of the batch, as far as floating point allows.

        Args:
            class_labels: `(batch,)`, for class-conditional models.
            caption_features: `(batch, buffer_size, caption_dim)`, for text-conditional models.
            caption_mask: `(batch, buffer_size)`, nonzero for real tokens.
            batch_size: number of images without a condition, in place of the above.
            num_iter: steps of the generation, each of which predicts some tokens.
            guidance_scale: 1 is none. A number is reached linearly with the tokens that are done, as published; a
                `Guidance` gives the scale of every step.
            num_steps: diffusion steps of each token, at least 2; 100 by default.
            annealing: in place of `num_steps`: fewer steps as the generation goes on.
            temperature: factor of the noise of the diffusion steps.
            sampler: of the head, `"ddpm"` or `"ddim"`.
            speculation: lets a smaller model draft several steps; whether the result follows this one, it says.
            latents: `(batch, latent_channels, h, w)`, images to regenerate in part; not changed where not masked.
            mask: the tokens of `latents` to regenerate, true where masked: bool `(num_tokens,)`, or
                `(batch, num_tokens)` with as many in every row.
            generator: one, or one per image; none draws with a new seed. The global one is never used. One generator
                for all gives the draws of the published code, but for the orders: for each step the noise of its
                tokens, then that of every diffusion step.
            orders: `(batch, num_masked)`, for each image its masked positions; those that stand first come last. Drawn
                by default.
            noise: for every step that predicts tokens `(1 + diffusion steps, batch, tokens, token_dim)` in place of a
                generator's: what the tokens start from, then that of each diffusion step. With `speculation`, what the
                token of each position starts from, `(batch, num_tokens, token_dim)`, and its noise at each diffusion
                index, `(batch, num_tokens, most, token_dim)`; a generator then draws for the verification alone.
            callback: called as `callback(step, latents)` after every step; tokens to come are zero.
            trace: filled with what is executed.
            return_dict: False returns `(latents, trace)`.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of its range, or two exclude each other.
        """
        trace = Trace() if trace is None else trace
        steps = self.iter_generate(
            class_labels, caption_features, caption_mask, batch_size, num_iter, guidance_scale, num_steps, annealing,
            temperature, sampler, speculation, latents, mask, generator, orders, noise, trace,
        )  # fmt: skip
        for step, result in steps:
            if callback is not None:
                callback(step, result)
        return MAROutput(latents=result, trace=trace) if return_dict else (result, trace)


def masked_positions(mask: Tensor, batch: int, num_tokens: int) -> Tensor:
    """Return the masked positions `(batch, num_masked)`, ascending, of a mask `(num_tokens,)` or `(batch, num_tokens)`.

    Raises:
        TypeError: the mask is not bool.
        ValueError: its shape is wrong, it masks nothing, or not as many tokens in every row.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, true for tokens to predict, got {mask.dtype}.")
    if mask.shape not in ((num_tokens,), (batch, num_tokens)):
        raise ValueError(f"mask must be ({num_tokens},) or ({batch}, {num_tokens}), got {tuple(mask.shape)}.")
    counts = mask.expand(batch, -1).sum(-1).tolist()
    if min(counts) == 0:
        raise ValueError(f"mask must mask at least 1 token of every image, got {counts}.")
    if len(set(counts)) > 1:
        raise ValueError(
            f"mask must mask as many tokens in every image of a batch, got {counts}; pass the images one by one."
        )
    return mask.expand(batch, -1).nonzero()[:, 1].view(batch, -1)


def _check_batch(conditions: int, latents: int) -> None:
    if conditions != latents:
        raise ValueError(f"Got {conditions} conditions for {latents} latents.")


def count_blocks(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """Return how many blocks have keys `<prefix><index>...`.

    Raises:
        KeyError: none has.
    """
    indices = [int(key.removeprefix(prefix).split(".")[0]) for key in state_dict if key.startswith(prefix)]
    if not indices:
        raise KeyError(prefix)
    return 1 + max(indices)


def _infer_backbone(state_dict: Mapping[str, Tensor], patch_size: int) -> dict[str, Any]:
    """Read from the shapes what they tell; numbers of heads are those of the published model of the same width."""
    heads = {shape[0]: shape[2] for shape in (preset["encoder_shape"] for preset in PRESETS.values())}
    width, token_dim = state_dict["z_proj.weight"].shape
    num_tokens = state_dict["diffusion_pos_embed_learned"].shape[1]
    config: dict[str, Any] = {
        "grid_size": math.isqrt(num_tokens) * patch_size,
        "latent_channels": token_dim // patch_size**2,
        "buffer_size": state_dict["encoder_pos_embed_learned"].shape[1] - num_tokens,
        "mlp_ratio": state_dict["encoder_blocks.0.mlp.fc1.weight"].shape[0] / width,
        "num_classes": state_dict["class_emb.weight"].shape[0],
    }
    for part, size in (("encoder", width), ("decoder", state_dict["decoder_embed.weight"].shape[0])):
        depth = count_blocks(state_dict, f"{part}_blocks.")
        if size in heads:
            config[f"{part}_shape"] = (size, depth, heads[size])
    return config
