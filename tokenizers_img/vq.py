"""LlamaGen's grid tokenizer: a convolutional VQ autoencoder.

Sun et al., 2024, "Autoregressive Model Beats Diffusion" (arXiv 2406.06525).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for it when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from mmsdk.errors import unknown_name
from mmsdk.loading import load_into, load_original
from mmsdk.tokens import ImageTokens
from tokenizers_img.base import ImageTokenizer
from tokenizers_img.quantizers import QuantizerOutput, VectorQuantizer


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`, with a 1 x 1 convolution on `x` where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, in_channels, h, w)` to `(batch, out_channels, h, w)`."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, channels, h, w)` to the same shape."""
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Stride-2 convolution, padded on the right and below only, as published."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, channels, h, w)` to half the height and width."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(batch, channels, h, w)` to twice the height and width."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Residual blocks of one resolution, attention after each where there is any, then the change of resolution."""

    def __init__(self, widths: Sequence[tuple[int, int]], attention: bool, groups: int) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in widths)
        self.attn = nn.ModuleList(AttnBlock(b, groups) for _, b in widths if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


def _middle(channels: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResnetBlock(channels, channels, groups), AttnBlock(channels, groups), ResnetBlock(channels, channels, groups)]
    )


class Encoder(nn.Module):
    """Images `(batch, 3, H, W)` to features `(batch, z_channels, H / f, W / f)`, f = 2 ** (levels - 1).

    `attention` holds the levels, counted from full resolution, that have attention after each residual block.
    """

    def __init__(
        self,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        groups: int,
        attention: Collection[int],
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        width = channels
        for i, mult in enumerate(channel_mult):
            widths = [(width if j == 0 else channels * mult, channels * mult) for j in range(num_res_blocks)]
            width = channels * mult
            level = _Level(widths, attention=i in attention, groups=groups)
            if i < len(channel_mult) - 1:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = _middle(width, groups)
        self.norm_out = _norm(width, groups)
        self.conv_out = nn.Conv2d(width, z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(batch, 3, H, W)` in [-1, 1] to features."""
        hidden = self.conv_in(images)
        for block in (*self.conv_blocks, *self.mid):
            hidden = block(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Decoder(nn.Module):
    """Features `(batch, z_channels, h, w)` to images `(batch, 3, h * f, w * f)`; `attention` as in the encoder."""

    def __init__(
        self,
        channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        groups: int,
        attention: Collection[int],
    ) -> None:
        super().__init__()
        width = channels * channel_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = _middle(width, groups)
        self.conv_blocks = nn.ModuleList()
        for i, mult in reversed(list(enumerate(channel_mult))):
            widths = [(width if j == 0 else channels * mult, channels * mult) for j in range(num_res_blocks + 1)]
            width = channels * mult
            level = _Level(widths, attention=i in attention, groups=groups)
            if i > 0:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = _norm(width, groups)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Map features to images `(batch, 3, H, W)`, about [-1, 1]."""
        hidden = self.conv_in(features)
        for block in (*self.mid, *self.conv_blocks):
            hidden = block(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class VQ(ImageTokenizer):
    """Grid tokenizer: one token for each cell of an `(H / f, W / f)` grid, in raster order. Lossy.

    Images are mapped to [-1, 1] inside. Grid tokens are not ordered by importance: they cannot be truncated.

    Args:
        channels: width at full resolution.
        channel_mult: width of each resolution, as a multiple of `channels`; the last is the grid's.
        num_res_blocks: residual blocks at each resolution (one more in the decoder).
        z_channels: width between the convolutions and the projection to the codebook.
        codebook_size: number of codes.
        codebook_dim: length of a code.
        l2_norm: compare codes on the unit sphere.
        commitment_cost: weight of the commitment loss in training.
        image_size: height and width of the images.
        norm_num_groups: groups of every GroupNorm.
    """

    registry_name = "vq"

    @register_to_config
    def __init__(
        self,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        l2_norm: bool = True,
        commitment_cost: float = 0.25,
        image_size: int = 256,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        downsampling = 2 ** (len(channel_mult) - 1)
        if image_size < downsampling or image_size % downsampling:
            raise ValueError(
                f"image_size must be a multiple of {downsampling}, the pixels per token of {len(channel_mult)} "
                f"resolutions; got {image_size}."
            )
        lowest = (len(channel_mult) - 1,)
        self.encoder = Encoder(channels, channel_mult, num_res_blocks, z_channels, norm_num_groups, lowest)
        self.decoder = Decoder(channels, channel_mult, num_res_blocks, z_channels, norm_num_groups, lowest)
        self.quantize = VectorQuantizer(codebook_size, codebook_dim, l2_norm, commitment_cost)
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)

    @property
    def downsampling(self) -> int:
        """Pixels per token along each axis."""
        return 2 ** (len(self.config.channel_mult) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        side = self.config.image_size // self.downsampling
        return side, side

    @property
    def max_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Entries of the codebook."""
        return (self.config.codebook_size,)

    def encode_latents(self, images: Tensor) -> Tensor:
        """Return what is quantized, `(batch, h, w, codebook_dim)`, for `images` `(batch, 3, H, W)` in [0, 1]."""
        return self.quant_conv(self.encoder(images * 2.0 - 1.0)).permute(0, 2, 3, 1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return images `(batch, 3, H, W)`, about [0, 1], not clamped, of `latents` `(batch, h, w, codebook_dim)`."""
        return self.decoder(self.post_quant_conv(latents.permute(0, 3, 1, 2))) * 0.5 + 0.5

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Reconstruct `images` `(batch, 3, H, W)` in [0, 1] for training: images and the quantizer's output."""
        quantized = self.quantize(self.encode_latents(images))
        return self.decode_latents(quantized.latents), quantized

    def _encode(self, images: Tensor, num_tokens: int, generator: torch.Generator | None) -> ImageTokens:
        token_ids = self.quantize.quantize(self.encode_latents(images.to(self.dtype)))
        return ImageTokens(token_ids=token_ids.flatten(1), spec=self.token_spec())

    def _decode(self, tokens: ImageTokens, generator: torch.Generator | None) -> Tensor:
        latents = self.quantize.dequantize(cast(Tensor, tokens.token_ids)).unflatten(1, self.grid)
        return self.decode_latents(latents.to(self.dtype))

    @classmethod
    def preset(cls, name: str, image_size: int = 256) -> VQ:
        """Build a published model by its name, `vq8` or `vq16` (pixels per token), with random weights.

        Raises:
            UnknownNameError: the name is not a preset.
        """
        if name not in cls.presets:
            raise unknown_name("VQ preset", name, list(cls.presets))
        return cls(**cls.presets[name], image_size=image_size)

    @classmethod
    def from_original(
        cls,
        checkpoint: str | PathLike[str] | Mapping[str, Tensor],
        config: Mapping[str, Any] | str,
        image_size: int = 256,
    ) -> VQ:
        """Load a published checkpoint.

        Args:
            checkpoint: path of the published file (read with `weights_only=True`), or a state dict.
            config: `vq8` or `vq16`, or constructor arguments: the published files hold weights only.
            image_size: height and width of the images.

        Raises:
            CheckpointError: the file cannot be read, or keys or shapes do not fit the configuration.
        """
        model = cls.preset(config, image_size) if isinstance(config, str) else cls(**config)
        # A buffer of recent codes that training kept for its usage statistics.
        load_into(model, load_original(checkpoint), allow_unexpected=("quantize.codebook_used",))
        return model.eval()


VQ.presets = {"vq8": {"channel_mult": (1, 2, 2, 4)}, "vq16": {"channel_mult": (1, 1, 2, 2, 4)}}
