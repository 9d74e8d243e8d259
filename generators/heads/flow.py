"""The flow head of FlowAR, and what flow-matching generators share: adaptive blocks, their cache, times and noise.

Time runs from 1, noise, to 0, data: `x_t = (1 - t) x + t noise`, with the velocity `noise - x`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from generators.annealing import StepAnnealing
from generators.base import Trace
from generators.guidance import Guidance, LinearGuidance, combine
from generators.heads.diffusion import TimestepEmbedder
from generators.llamagen import LayerCache
from mmsdk.errors import CheckpointError
from mmsdk.loading import load_original

NORM_EPS = 1e-6
_OUTPUTS = ("pred", "flownet.final_layer.linear")
HEAD_DIM = 64


# ---------------------------------------------------------------------------------------------------- layers


def rms_norm(x: Tensor) -> Tensor:
    """Divide `x` `(..., dim)` by its root mean square; no weight."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn neighbouring pairs of `x` `(..., length, head_dim)` by complex `rotary` `(length, head_dim / 2)`."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)


class RotaryTable:
    """Rotations that follow a model from device to device and keep their precision when the model is cast.

    Args:
        table: complex64 `(length, head_dim / 2)`.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def on(self, device: torch.device) -> Tensor:
        """Return the table on a device."""
        if self._table.device != device:
            # A tensor made in inference mode could not be used in training later.
            with torch.inference_mode(False):
                self._table = self._table.to(device)
        return self._table


class TimeEmbedder(TimestepEmbedder):
    """Times from 0 to 1 as timesteps: thousandths, rounded down, as published."""

    def forward(self, times: Tensor) -> Tensor:
        """Map times in [0, 1] `(...)` to `(..., width)`."""
        return super().forward((1000 * times).long().flatten()).view(*times.shape, -1)


class GatedMLP(nn.Module):
    """`fc2(gelu(fc1_g(x)) * fc1_x(x))`; by default `8 / 3` as wide inside, rounded down."""

    def __init__(self, hidden_size: int, intermediate_size: int | None = None) -> None:
        super().__init__()
        width = 8 * hidden_size // 3 if intermediate_size is None else intermediate_size
        self.fc1_g = nn.Linear(hidden_size, width)
        self.fc1_x = nn.Linear(hidden_size, width)
        self.fc2 = nn.Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., hidden_size)` to the same shape."""
        return self.fc2(F.gelu(self.fc1_g(x)) * self.fc1_x(x))


def _split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Return `parts` tensors `(rows, num_heads, length, head_dim)` of `(rows, length, parts * width)`."""
    return x.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """Attend from `x` `(rows, length, hidden_size)` to itself and to what `cache` holds before it.

        Args:
            x: rows beyond those of `x` in the cache are left alone.
            rotary: complex `(length, head_dim / 2)`.
            mask: bool `(length, length)`, true where a row attends to a column.
            cache: written from its start on.
        """
        query, key, value = _split_heads(self.qkv(x), 3, self.num_heads)
        query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            rows, end = len(x), cache.start + x.shape[1]
            cache.keys[:rows, :, cache.start : end] = key
            cache.values[:rows, :, cache.start : end] = value
            key, value = cache.keys[:rows, :, :end], cache.values[:rows, :, :end]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(attended.transpose(1, 2).flatten(2))


class AdaptiveBlock(nn.Module):
    """Attention and gated MLP, each scaled, shifted and gated by the condition."""

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int | None = None) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = GatedMLP(hidden_size, intermediate_size)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rotary: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map `(rows, length, hidden_size)` to the same shape.

        Args:
            x: hidden states.
            modulation: `ada_lin` of the condition, `(rows, length or 1, 6 * hidden_size)`.
            rotary: see `Attention.forward`.
            mask: see `Attention.forward`.
            cache: see `Attention.forward`.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, -1)
        x = x + gate1 * self.attn(rms_norm(x) * (1 + scale1) + shift1, rotary, mask, cache)
        return x + gate2 * self.mlp(rms_norm(x) * (1 + scale2) + shift2)


class BlockState:
    """Keys and values of the finished blocks (cells or scales) of a batch, preallocated; changed in place.

    The block in work is written behind them, again and again, until `append` counts it as finished.

    Args:
        cache: `(num_layers, 2, rows, num_heads, capacity, head_dim)`, not initialised.

    Attributes:
        length: number of finished positions, the same for every row.
    """

    def __init__(self, cache: Tensor) -> None:
        self._cache = cache
        self.length = 0

    @property
    def num_rows(self) -> int:
        """Number of sequences, unconditional ones included."""
        return self._cache.shape[2]

    def layer(self, index: int) -> LayerCache:
        """Return the cache of one layer, to be written from the current length on."""
        return LayerCache(self._cache[index, 0], self._cache[index, 1], self.length)

    def append(self, size: int) -> None:
        """Count `size` positions, which the layers have written, as finished."""
        self.length += size

    def rollback(self, length: int) -> None:
        """Forget everything from position `length` on.

        Raises:
            ValueError: `length` is not 0 to the current length.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"Can roll back to lengths from 0 to {self.length}, got {length}.")
        self.length = length

    def select_rows(self, rows: slice | Sequence[int] | Tensor) -> None:
        """Keep only these rows, in that order; a slice copies nothing."""
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows, device=self._cache.device)
        self._cache = self._cache[:, :, index]


# ---------------------------------------------------------------------------------------------------- random numbers


class NoiseStream:
    """Normal numbers for the rows of a batch.

    Args:
        generators: one for all rows; or one per row, whose numbers then depend on nothing but that row's generator; or
            none: a new one with a seed from the system.
        batch: number of rows.

    Raises:
        ValueError: the number of generators is not that of the rows.
        TypeError: something else than a generator was given.
    """

    def __init__(self, generators: Generator | Sequence[Generator] | None, batch: int) -> None:
        if generators is None:
            generators = Generator()
            generators.seed()
        if not isinstance(generators, Generator):
            if len(generators) != batch:
                raise ValueError(f"Expected one generator, or one for each of {batch} rows, got {len(generators)}.")
            for i, generator in enumerate(generators):
                if not isinstance(generator, Generator):
                    raise TypeError(f"Generator {i} must be a torch.Generator, got {type(generator).__name__}.")
        self.generators = generators
        self.batch = batch

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32, unused_rows: int = 0) -> Tensor:
        """Draw `(batch, *shape)`, and `unused_rows` behind them, which are dropped; several generators share those.

        One generator for a batch of one, and a list of it, give the same numbers.
        """
        if isinstance(self.generators, Generator):
            device = self.generators.device
            rows = self.batch + unused_rows
            return torch.randn(rows, *shape, generator=self.generators, dtype=dtype, device=device)[: self.batch]
        rows = 1 + unused_rows // self.batch
        drawn = [torch.randn(rows, *shape, generator=g, dtype=dtype, device=g.device)[0] for g in self.generators]
        return torch.stack([row.to(drawn[0].device) for row in drawn])


def training_times(times: Tensor | None, stream: NoiseStream, num_blocks: int) -> Tensor:
    """Return `times` `(batch, num_blocks)` checked, or drawn: sigmoids of normal numbers (Esser et al., 2024).

    Raises:
        ValueError: the shape is wrong, or a time is not in [0, 1].
    """
    if times is None:
        return stream.draw(num_blocks).sigmoid()
    if tuple(times.shape) != (stream.batch, num_blocks):
        raise ValueError(f"times must be ({stream.batch}, {num_blocks}), got {tuple(times.shape)}.")
    if not bool(((times >= 0) & (times <= 1)).all()):
        raise ValueError("times must be in [0, 1].")
    return times


def training_noise(noise: Tensor | None, stream: NoiseStream, shape: Sequence[int]) -> Tensor:
    """Return `noise` `(batch, *shape)` checked, or drawn.

    Raises:
        ValueError: the shape is wrong.
    """
    if noise is None:
        return stream.draw(*shape)
    if tuple(noise.shape) != (stream.batch, *shape):
        raise ValueError(f"noise must be {(stream.batch, *shape)}, got {tuple(noise.shape)}.")
    return noise.float()


# ---------------------------------------------------------------------------------------------------- checks


def check_labels(class_labels: Tensor | Sequence[int], num_classes: int, device: torch.device) -> Tensor:
    """Return the labels `(batch,)` on a device.

    Raises:
        TypeError: they are no integers.
        ValueError: their shape is wrong, or one is not 0 to `num_classes - 1`.
    """
    labels = torch.as_tensor(class_labels, device=device)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"class_labels must be (batch,), got {tuple(labels.shape)}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"Class labels must be integers, got {labels.dtype}.")
    wrong = (labels < 0) | (labels >= num_classes)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(f"Class labels must be 0 to {num_classes - 1}, got {int(labels[first])} at position {first}.")
    return labels


def check_training_batch(
    latents: Tensor,
    shape: tuple[int, int, int],
    class_labels: Tensor | Sequence[int],
    drop_condition: Tensor | None,
    num_classes: int,
) -> Tensor:
    """Return the labels `(batch,)` of `latents` `(batch, *shape)`; dropped ones are `num_classes`.

    Raises:
        TypeError: labels are no integers.
        ValueError: a shape or a label is wrong.
    """
    if latents.ndim != 4 or tuple(latents.shape[1:]) != shape:
        raise ValueError(f"latents must be (batch, {', '.join(map(str, shape))}), got {tuple(latents.shape)}.")
    labels = check_labels(class_labels, num_classes, latents.device)
    if len(labels) != len(latents):
        raise ValueError(f"Got {len(labels)} class_labels for {len(latents)} latents.")
    if drop_condition is None:
        return labels
    if drop_condition.shape != labels.shape:
        raise ValueError(f"drop_condition must be ({len(labels)},), one per row, got {tuple(drop_condition.shape)}.")
    return labels.masked_fill(drop_condition.bool(), num_classes)


def check_backbone(hidden_size: int, num_heads: int, **sizes: int) -> None:
    """Refuse sizes that no backbone can have.

    Raises:
        ValueError: a size is below 1, or the head dimension is no multiple of 4.
    """
    for name, value in ({"hidden_size": hidden_size, "num_heads": num_heads} | sizes).items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if hidden_size % (4 * num_heads):
        raise ValueError(f"hidden_size must divide by 4 * num_heads, got {hidden_size} and {num_heads} heads.")


def check_noise(noise: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse recorded noise that has not these shapes.

    Raises:
        ValueError: the number of tensors or a shape is wrong.
    """
    found = [tuple(block.shape) for block in noise]
    if found != list(shapes):
        raise ValueError(f"noise must hold tensors of the shapes {list(shapes)}, got {found}.")


def check_steps(num_steps: int, least: int) -> None:
    """Refuse a number of flow steps that is no integer of at least `least`.

    Raises:
        ValueError: it is not.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < least:
        raise ValueError(f"The number of flow steps must be an integer of at least {least}, got {num_steps!r}.")


def plan_steps(
    num_steps: int | None, annealing: StepAnnealing | None, num_blocks: int, default: int, least: int
) -> list[int]:
    """Return the flow steps of every block (cell or scale).

    Args:
        num_steps: the same for every block; `default` where there is no annealing either.
        annealing: fewer steps from block to block.
        num_blocks: number of blocks.
        default: see `num_steps`.
        least: the fewest steps that the sampler can make.

    Raises:
        TypeError: `annealing` is no `StepAnnealing`.
        ValueError: both were given, or a number of steps is below `least`.
    """
    if num_steps is not None and annealing is not None:
        raise ValueError(f"Pass num_steps or annealing, not both; got num_steps={num_steps!r} and {annealing!r}.")
    if annealing is not None:
        if not isinstance(annealing, StepAnnealing):
            raise TypeError(f"annealing must be a StepAnnealing, got {annealing!r}.")
        steps = [annealing.steps(block, num_blocks) for block in range(num_blocks)]
    else:
        steps = [default if num_steps is None else num_steps] * num_blocks
    for count in steps:
        check_steps(count, least)
    return steps


def plan_guidance(guidance_scale: float | Guidance, num_blocks: int) -> list[float]:
    """Return the guidance scale of every block; a number is reached linearly from 1, as published.

    Raises:
        TypeError: it is neither a number nor a `Guidance`.
        ValueError: a scale is negative or not finite.
    """
    guidance = guidance_scale if isinstance(guidance_scale, Guidance) else LinearGuidance(guidance_scale)
    scales = guidance.scales(num_blocks)
    for block, scale in enumerate(scales):
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"Guidance scales must be finite and at least 0, got {scale} at block {block}.")
    return scales


# ---------------------------------------------------------------------------------------------------- checkpoints


def read_published(checkpoint: Any, name: str) -> tuple[dict[str, Tensor], dict[str, Any], list[int]]:
    """Read a checkpoint of xAR or FlowAR, which share their backbone.

    Args:
        checkpoint: path or state dict.
        name: of the model, for messages.

    Returns:
        The parameters, without the tables that follow from the configuration; the configuration values that they tell,
        and the number of `positions`; where each block of the sequence ends, which the mask tells, empty without one.

    Raises:
        CheckpointError: it cannot be read, or a parameter that tells the configuration is absent.
    """
    state_dict = load_original(checkpoint)
    try:
        hidden_size, latent_channels = state_dict["z_proj.weight"].shape
        config: dict[str, Any] = {
            "hidden_size": hidden_size,
            "latent_channels": latent_channels,
            "intermediate_size": state_dict["encoder_blocks.0.mlp.fc1_g.weight"].shape[0],
            "num_classes": state_dict["class_emb.weight"].shape[0] - 1,
            "positions": state_dict["encoder_pos_embed_learned"].shape[1],
        }
        for part in ("encoder", "decoder"):
            prefix = f"{part}_blocks."
            config[f"{part}_layers"] = 1 + max(int(k.split(".")[1]) for k in state_dict if k.startswith(prefix))
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"This is no {name} checkpoint: {error} is missing or has no fitting shape.") from error
    frequencies = state_dict.get("encoder_blocks.0.attn.rope.freqs")
    if frequencies is not None:  # two axes, pairs of numbers
        config["num_heads"] = hidden_size // (4 * len(frequencies))
    ends = []
    if "mask" in state_dict:
        ends = (state_dict["mask"][0, 0] == 0).sum(-1).unique().tolist()
    parameters = {k: v for k, v in state_dict.items() if k != "mask" and ".rope." not in k}
    return parameters, config, ends


# ---------------------------------------------------------------------------------------------------- training


def initialise(model: nn.Module, std: float) -> None:
    """Draw the weights of a new model; modulations and outputs start at 0, so that every block starts as identity."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            if "ada" in name or name in _OUTPUTS:
                nn.init.zeros_(module.weight)
            else:
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("_pos_embed_learned"):
            nn.init.normal_(parameter, std=std)


# ---------------------------------------------------------------------------------------------------- FlowAR's head


class HeadContext(NamedTuple):
    """What a head needs of `z` at every step; rows may be cut off behind.

    Attributes:
        condition: `(rows, length, width)`.
        memory: keys and values of each block's cross-attention; None for blocks without one.
    """

    condition: Tensor
    memory: list[tuple[Tensor, Tensor] | None]

    def first(self, rows: int) -> HeadContext:
        """Return the first rows."""
        return HeadContext(self.condition[:rows], [m and (m[0][:rows], m[1][:rows]) for m in self.memory])


class FlowBlock(nn.Module):
    """Self-attention and gated MLP, modulated position by position by time and `z`."""

    def __init__(self, width: int, condition_dim: int) -> None:
        super().__init__()
        self.attn = Attention(width, width // HEAD_DIM, qkv_bias=False)
        self.mlp = GatedMLP(width)
        self.ada_lin = nn.Linear(width, 6 * width)

    def remember(self, z: Tensor, rotary: Tensor) -> None:
        """Return None: there is no cross-attention."""
        return None

    def forward(
        self, x: Tensor, clock: Tensor, condition: Tensor, rotary: Tensor, memory: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Map `(rows, length, width)` to the same shape; see `CrossFlowBlock.forward`."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(F.silu(clock + condition)).chunk(6, -1)
        x = x + gate1 * self.attn(rms_norm(x) * (1 + scale1) + shift1, rotary)
        return x + gate2 * self.mlp(rms_norm(x) * (1 + scale2) + shift2)


class CrossAttention(nn.Module):
    """Attention from the positions of a scale to `z` of the same positions."""

    def __init__(self, width: int, condition_dim: int) -> None:
        super().__init__()
        self.num_heads = width // HEAD_DIM
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(condition_dim, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def remember(self, z: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values `(rows, num_heads, length, head_dim)` of `z` `(rows, length, condition_dim)`."""
        key, value = _split_heads(self.kv(z), 2, self.num_heads)
        return rotate(key, rotary), value

    def forward(self, x: Tensor, rotary: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        """Map `(rows, length, width)` to the same shape."""
        (query,) = _split_heads(self.q(x), 1, self.num_heads)
        attended = F.scaled_dot_product_attention(rotate(query, rotary), *memory)
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossFlowBlock(nn.Module):
    """Self-attention modulated by time, cross-attention to `z`, and a gated MLP modulated by both."""

    def __init__(self, width: int, condition_dim: int) -> None:
        super().__init__()
        self.attn = Attention(width, width // HEAD_DIM, qkv_bias=False)
        self.crossattn = CrossAttention(width, condition_dim)
        self.norm2_1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.norm2_2 = nn.RMSNorm(condition_dim, eps=NORM_EPS)
        self.mlp = GatedMLP(width)
        self.ada_lin_attn = nn.Linear(width, 3 * width)
        self.ada_lin_mlp = nn.Linear(width, 3 * width)

    def remember(self, z: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Return what cross-attention needs of `z` `(rows, length, condition_dim)` at every step."""
        return self.crossattn.remember(self.norm2_2(z), rotary)

    def forward(
        self, x: Tensor, clock: Tensor, condition: Tensor, rotary: Tensor, memory: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Map `(rows, length, width)` to the same shape.

        Args:
            x: hidden states.
            clock: embedded times, `(rows or 1, length or 1, width)`.
            condition: embedded `z`, `(rows, length, width)`.
            rotary: complex `(length, head_dim / 2)`.
            memory: what `remember` returned.
        """
        gate, scale, shift = self.ada_lin_attn(F.silu(clock)).chunk(3, -1)
        x = x + gate * self.attn(rms_norm(x) * (1 + scale) + shift, rotary)
        x = x + self.crossattn(self.norm2_1(x), rotary, memory)
        gate, scale, shift = self.ada_lin_mlp(F.silu(clock + condition)).chunk(3, -1)
        return x + gate * self.mlp(rms_norm(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Modulated norm and projection to velocities."""

    def __init__(self, width: int, latent_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, latent_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map `(rows, length, width)` to `(rows, length, latent_channels)`."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        return self.linear(rms_norm(x) * (1 + scale) + shift)


def flow_times(num_steps: int) -> Tensor:
    """Return the times of the published sampler, float32: `num_steps // 2` from 1 to 0.3, then from 0.25 to 0.

    An odd number of steps makes one step less, as published.

    Raises:
        ValueError: `num_steps` is below 2.
    """
    check_steps(num_steps, 2)
    half = num_steps // 2
    return torch.cat([torch.linspace(1, 0.3, half), torch.linspace(0.25, 0, half + 1)])


class FlowHead(nn.Module):
    """A transformer over the positions of one scale that turns noise into latents, given `z` for every position.

    Ren et al., 2024, "FlowAR: Scale-wise Autoregressive Image Generation Meets Flow Matching" (arXiv 2412.15205).

    Args:
        condition_dim: width of `z`.
        width: width of the head, a multiple of 64.
        depth: number of blocks.
        latent_channels: numbers in a token.
        cross_attention: also attend to `z`, as the larger published models do.

    Raises:
        ValueError: `width` is no multiple of 64.
    """

    def __init__(self, condition_dim: int, width: int, depth: int, latent_channels: int, cross_attention: bool) -> None:
        super().__init__()
        if width < 1 or width % HEAD_DIM:
            raise ValueError(f"The width of the flow head must be a multiple of {HEAD_DIM}, got {width}.")
        self.time_embed = TimeEmbedder(width)
        self.cond_embed = nn.Linear(condition_dim, width)
        self.input_proj = nn.Linear(latent_channels, width)
        block = CrossFlowBlock if cross_attention else FlowBlock
        self.res_blocks = nn.ModuleList(block(width, condition_dim) for _ in range(depth))
        self.final_layer = FinalLayer(width, latent_channels)

    def prepare(self, z: Tensor, rotary: Tensor) -> HeadContext:
        """Compute what does not change from step to step of `z` `(rows, length, condition_dim)`."""
        blocks = cast(list[FlowBlock | CrossFlowBlock], self.res_blocks)
        return HeadContext(self.cond_embed(z), [block.remember(z, rotary) for block in blocks])

    def velocity(self, x: Tensor, clock: Tensor, context: HeadContext, rotary: Tensor) -> Tensor:
        """Predict velocities, float32 `(rows, length, latent_channels)`.

        Args:
            x: noisy latents, of the same shape.
            clock: embedded times, `(rows or 1, length or 1, width)`.
            context: of `prepare`.
            rotary: rotations of the scale's positions, complex `(length, 32)`.
        """
        hidden = self.input_proj(x.to(self.input_proj.weight.dtype))
        for block, memory in zip(self.res_blocks, context.memory, strict=True):
            hidden = block(hidden, clock, context.condition, rotary, memory)
        return self.final_layer(hidden, clock + context.condition).float()

    def loss(self, z: Tensor, target: Tensor, times: Tensor, noise: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Return the squared error of the velocities, and the velocities, both `(batch, length, latent_channels)`.

        Args:
            z: `(batch, length, condition_dim)`.
            target: latents `(batch, length, latent_channels)`.
            times: `(batch,)` in [0, 1].
            noise: like `target`.
            rotary: see `velocity`.
        """
        t = times[:, None, None]
        noisy = (1 - t) * target + t * noise
        velocity = self.velocity(noisy, self.time_embed(times)[:, None], self.prepare(z, rotary), rotary)
        return (velocity - (noise - target)).square(), velocity

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        rotary: Tensor,
        num_steps: int = 25,
        guidance_scale: float = 1.0,
        guidance_high: float = math.inf,
        trace: Trace | None = None,
    ) -> Tensor:
        """Integrate from noise to latents `(batch, length, latent_channels)` with Euler's method; deterministic.

        Unconditional rows are computed only in guided steps.

        Args:
            z: `(batch, length, condition_dim)`, or twice the rows, the unconditional ones last, where guided.
            noise: `(batch, length, latent_channels)`.
            rotary: see `velocity`.
            num_steps: see `flow_times`.
            guidance_scale: 1 is none.
            guidance_high: steps from this time on, close to the noise, are not guided.
            trace: counts the steps.
        """
        batch, x = len(noise), noise.float()
        times = flow_times(num_steps)
        clock = self.time_embed(times[:-1].to(x.device))
        context = self.prepare(z if guidance_scale != 1 else z[:batch], rotary)
        conditional = context.first(batch)
        for step, (start, end) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
            if guidance_scale != 1 and start < guidance_high:
                velocity = self.velocity(x.repeat(2, 1, 1), clock[step], context, rotary)
                velocity = combine(velocity[:batch], velocity[batch:], guidance_scale)
                rows = 2 * batch
            else:
                velocity, rows = self.velocity(x, clock[step], conditional, rotary), batch
            x = x + (end - start) * velocity
            if trace is not None:
                trace.record_forward(rows, x.shape[1])
        return x
