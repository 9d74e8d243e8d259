"""The channel head: predicts the indices of a position one channel after the other, given what the backbone knows.

Wang et al., 2025, "Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation" (arXiv 2503.16430).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.layers import MLP
from mmsdk.decoding.sampling import process_logits, sample_inverse_cdf

NORM_EPS = 1e-6
_INIT_STD = 0.02
# Rows of modulations to compute at once: enough to use the weights well, few enough to stay small.
_MODULATION_ROWS = 512


# ---------------------------------------------------------------------------------------------------- network


class ChannelAttention(nn.Module):
    """Multi-head attention of each channel to itself and those before it, with normalised queries and keys."""

    def __init__(self, width: int, num_heads: int, dropouts: tuple[float, float]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout, self.projection_dropout = dropouts
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // num_heads, eps=NORM_EPS)
        self.k_norm = nn.LayerNorm(width // num_heads, eps=NORM_EPS)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: Tensor | None = None, begin: int = 0) -> Tensor:
        """Map `(n, length, width)` to the same shape.

        Args:
            x: all channels of a sequence; with a cache only channel `begin`.
            cache: keys and values of the channels before, `(2, n, num_heads, capacity, head_dim)`; is added to.
            begin: channels that the cache holds.
        """
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)) for part in self.qkv(x).chunk(3, -1))
        query, key, value = (part.transpose(1, 2) for part in (self.q_norm(query), self.k_norm(key), value))
        if cache is not None:
            end = begin + x.shape[1]
            cache[0, :, :, begin:end], cache[1, :, :, begin:end] = key, value
            key, value = cache[:, :, :, :end]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=cache is None)
        return F.dropout(self.proj(attended.transpose(1, 2).flatten(2)), self.projection_dropout, self.training)


class ChannelBlock(nn.Module):
    """Pre-norm attention and MLP, each scaled and shifted before and gated after by the condition."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, dropouts: tuple[float, float]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = ChannelAttention(width, num_heads, dropouts)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, int(width * mlp_ratio), dropouts[1])
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Map `(..., width)` to shift, scale and gate of the attention, then of the MLP, each of the same shape."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition).chunk(6, -1)
        return shift, scale + 1, gate, mlp_shift, mlp_scale + 1, mlp_gate

    def forward(self, x: Tensor, modulation: Sequence[Tensor], cache: Tensor | None = None, begin: int = 0) -> Tensor:
        """Map `(n, length, width)` to the same shape; see `ChannelAttention`."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = torch.addcmul(x, gate, self.attn(torch.addcmul(shift, self.norm1(x), scale), cache, begin))
        return torch.addcmul(x, mlp_gate, self.mlp(torch.addcmul(mlp_shift, self.norm2(x), mlp_scale)))


class FinalLayer(nn.Module):
    """Modulated norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Map `(..., width)` to shift and scale, each of the same shape."""
        scale, shift = self.adaLN_modulation(condition).chunk(2, -1)  # in the blocks, shifts come first
        return shift, scale + 1

    def forward(self, x: Tensor, modulation: Sequence[Tensor]) -> Tensor:
        """Map `(n, length, width)` to the same shape."""
        shift, scale = modulation
        return torch.addcmul(shift, self.norm_final(x), scale)


# ---------------------------------------------------------------------------------------------------- head


class ChannelHead(nn.Module):
    """Turns `z` of a position into one index per channel, each drawn from a softmax that knows those before it.

    Indices are in the order of the channels wherever they go in or come out; `channel_order` says which is predicted
    first. Positions are independent of each other.

    Args:
        num_channels: indices of a position.
        num_levels: values that an index can have.
        condition_dim: width of `z`.
        width: width of the network.
        depth: number of its blocks.
        num_heads: heads of their attention.
        channel_order: the channels in the order of their prediction (default: 0, 1, 2, ...).
        mlp_ratio: width of the MLPs, as a multiple of `width`.
        dropouts: on the attention, and after attention and in the MLPs, in training.

    Raises:
        ValueError: a size is below its least, the heads do not divide the width, or the order is no permutation.
    """

    def __init__(
        self,
        num_channels: int,
        num_levels: int,
        condition_dim: int,
        width: int,
        depth: int,
        num_heads: int,
        channel_order: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        dropouts: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        sizes = {"num_channels": num_channels, "condition_dim": condition_dim, "width": width, "depth": depth}
        for name, size in (sizes | {"num_heads": num_heads}).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if num_levels < 2:
            raise ValueError(f"num_levels must be at least 2, got {num_levels}.")
        if width % num_heads:
            raise ValueError(f"num_heads must divide width, got {num_heads} and {width}.")
        order = list(range(num_channels)) if channel_order is None else list(channel_order)
        if sorted(order) != list(range(num_channels)):
            raise ValueError(f"channel_order must be a permutation of 0..{num_channels - 1}, got {order}.")
        self.num_channels, self.num_levels = num_channels, num_levels
        self.channel_order = tuple(order)
        self.inverse_order = tuple(order.index(channel) for channel in range(num_channels))

        # The keys are the published ones: lists are in the order of prediction.
        self.condition_proj = nn.Linear(condition_dim, width)
        self.channel_embed = nn.Parameter(torch.empty(1, num_channels, width))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, num_channels, width))
        self.token_embeddings = nn.ModuleList(nn.Embedding(num_levels, width) for _ in range(num_channels - 1))
        self.channel_blocks = nn.ModuleList(ChannelBlock(width, num_heads, mlp_ratio, dropouts) for _ in range(depth))
        self.channel_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.channel_final = FinalLayer(width)
        self.channel_heads = nn.ModuleList(nn.Linear(width, num_levels) for _ in range(num_channels))

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=_INIT_STD)
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=_INIT_STD)
        # Every block begins as the identity, and every index as likely as any other.
        for layer in (*(layer.adaLN_modulation[1] for layer in self._layers()), *self.channel_heads):
            nn.init.zeros_(cast(nn.Linear, layer).weight)

    def _layers(self) -> list[ChannelBlock | FinalLayer]:
        return cast(list[ChannelBlock | FinalLayer], [*self.channel_blocks, self.channel_final])

    # ------------------------------------------------------------------------------------------------ network

    def _modulations(self, condition: Tensor, channels: slice = slice(None)) -> list[tuple[Tensor, ...]]:
        """Return what every layer needs of the condition `(n, width)` for some places in the order of prediction."""
        clock = condition[:, None] + self.timesteps_embeddings[:, channels]
        return [layer.modulation(clock) for layer in self._layers()]

    def _run(
        self, x: Tensor, modulations: Sequence[Sequence[Tensor]], cache: Tensor | None = None, begin: int = 0
    ) -> Tensor:
        """Map embedded indices `(n, length, width)` to hidden states of the same shape, normed and modulated."""
        for i, block in enumerate(self.channel_blocks):
            x = block(x, modulations[i], None if cache is None else cache[i], begin)
        return self.channel_final(self.channel_norm(x), modulations[-1])

    def _first(self, condition: Tensor, as_sampled: bool) -> Tensor:
        # The published model is trained without this embedding in its input, and sampled with it.
        clock = self.timesteps_embeddings[:, 0] if as_sampled else 0
        return (condition + clock + self.channel_embed[:, 0])[:, None]

    def _embed(self, index: Tensor, place: int) -> Tensor:
        """Return `(n, 1, width)`, the input that follows the index `(n,)` of the channel at a place in the order."""
        return (self.token_embeddings[place](index) + self.channel_embed[:, place + 1])[:, None]

    # ------------------------------------------------------------------------------------------------ training

    def logits(self, z: Tensor, target: Tensor, as_sampled: bool = False) -> Tensor:
        """Return logits, float32 `(n, num_channels, num_levels)`, of every channel given those before it in the order.

        Args:
            z: `(n, condition_dim)`.
            target: indices `(n, num_channels)`.
            as_sampled: begin the sequence as in sampling; as published, training begins it otherwise.

        Raises:
            ValueError: the shape of the target is wrong.
        """
        if target.shape != (len(z), self.num_channels):
            raise ValueError(f"target must be ({len(z)}, {self.num_channels}), got {tuple(target.shape)}.")
        condition = self.condition_proj(z)
        inputs = [self._first(condition, as_sampled)]
        inputs += [self._embed(target[:, channel], i) for i, channel in enumerate(self.channel_order[:-1])]
        hidden = self._run(torch.cat(inputs, 1), self._modulations(condition))
        return torch.stack([self.channel_heads[i](hidden[:, i]).float() for i in self.inverse_order], 1)

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of each position, `(n,)` in nats, mean over its channels; see `logits`."""
        logits = self.logits(z, target)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape).mean(-1)

    # ------------------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        uniforms: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        use_cache: bool = True,
    ) -> Tensor:
        """Draw indices, int64 `(n, num_channels)`.

        Costs one pass of the network per channel, over that channel only: keys and values of those before it are kept.

        Args:
            z: `(n, condition_dim)`, guided already.
            uniforms: numbers in [0, 1), `(n, num_channels)` in the order of prediction; None where `temperature` is 0.
            temperature: divides the logits; 0 takes the most probable index.
            top_k: draw from so many of the most probable indices only; 0 is all.
            use_cache: False computes all channels so far in each pass, as published, with the same result.

        Raises:
            ValueError: a value is out of its range, a shape is wrong, or uniforms are missing.
        """
        if temperature != 0 and (uniforms is None or uniforms.shape != (len(z), self.num_channels)):
            given = None if uniforms is None else tuple(uniforms.shape)
            raise ValueError(f"uniforms must be ({len(z)}, {self.num_channels}) unless temperature is 0, got {given}.")
        if uniforms is not None and z.device.type != "mps":  # which has no float64; the sampler works on the CPU there
            uniforms = uniforms.to(z.device)
        condition = self.condition_proj(z)
        block = cast(ChannelBlock, self.channel_blocks[0])
        heads, capacity = block.attn.num_heads, self.num_channels
        cache = (
            condition.new_empty(len(self.channel_blocks), 2, len(z), heads, capacity, condition.shape[1] // heads)
            if use_cache
            else None
        )
        inputs = self._first(condition, as_sampled=True)
        # Modulations do not depend on the indices, so that those of several channels come at once.
        group = max(1, _MODULATION_ROWS // len(z))
        indices: list[Tensor] = []
        for place in range(self.num_channels):
            if cache is None:
                hidden = self._run(inputs, self._modulations(condition, slice(place + 1)))
            else:
                if place % group == 0:
                    modulations = self._modulations(condition, slice(place, place + group))
                at = place % group
                current = [tuple(part[:, at : at + 1] for part in layer) for layer in modulations]
                hidden = self._run(inputs, current, cache, place)
            logits = self.channel_heads[place](hidden[:, -1]).float()
            if temperature == 0 or uniforms is None:
                index = logits.argmax(-1)
            else:
                probs = process_logits(logits, temperature, top_k).softmax(-1)
                index = sample_inverse_cdf(probs, uniforms[:, place])
            indices.append(index)
            if place + 1 < self.num_channels:
                following = self._embed(index, place)
                inputs = following if use_cache else torch.cat([inputs, following], 1)
        return torch.stack([indices[i] for i in self.inverse_order], 1)
