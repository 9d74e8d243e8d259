"""TokenBridge: discrete tokens from any KL VAE, without training (Wang et al., 2025).

"Bridging Continuous and Discrete Tokens for Autoregressive Visual Generation": every number of a latent is quantized by
itself, after the VAE was trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    ModelMixin,  # noqa: F401 - diffusers looks here for it when it loads a pipeline
)
from diffusers.configuration_utils import register_to_config
from torch import Generator, Tensor

from mmsdk.errors import unknown_name
from mmsdk.tokens import ImageTokens
from tokenizers_img.base import Fit, ImageTokenizer
from tokenizers_img.quantizers import GaussianQuantizer, QuantizerOutput
from tokenizers_img.vae import KLVAE, DiffusersVAE, as_vae, vae_config


class TokenBridge(ImageTokenizer):
    """Grid tokenizer with one index for each channel of a VAE's latents: ids `(batch, positions, channels)`. Lossy.

    The quantizer expects about normally distributed latents of mean 0 and variance 1. Those of the published VAE are so
    when scaled; for others, `fit_scale` measures what to normalise by. Every bit more halves the step between levels,
    about; 6 are close to the VAE itself. Deterministic unless asked to sample.

    Args:
        vae: a `KLVAE` or a diffusers `AutoencoderKL`, which is used as it is, or the configuration of one (see
            `as_vae`), which is what the saved configuration holds.
        bits: bits of an index, 1 to 8: the quality knob.
        value_range: normalised latents from minus to plus this number are covered.
        latent_mean: what is subtracted from each channel of the scaled latents (default: nothing).
        latent_std: what each channel is divided by then (default: nothing).
        channel_order: the order in which an autoregressive generator predicts the channels (default: 0, 1, 2, ...). The
            tokens themselves are in the VAE's order.
        image_size: height and width of the images (default: the VAE's).

    Raises:
        TypeError: `vae` is no VAE.
        ValueError: a setting does not fit the VAE, or is outside its range.
    """

    registry_name = "tokenbridge"
    quality_knob = "bits"
    resize = "adm_crop"
    # Read from the class when loading, as in `KLVAE`.
    _keep_in_fp32_modules: list[str] | None = KLVAE._keep_in_fp32_modules

    @register_to_config
    def __init__(
        self,
        vae: KLVAE | AutoencoderKL | Mapping[str, Any],
        bits: int = 6,
        value_range: float = 5.0,
        latent_mean: Sequence[float] | None = None,
        latent_std: Sequence[float] | None = None,
        channel_order: Sequence[int] | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self._keep_in_fp32_modules = None
        # diffusers would take the name `vae` for the configuration's entry.
        self.autoencoder = as_vae(vae)
        self.quantize = GaussianQuantizer(bits, value_range)
        channels, pixels = self.vae.latent_channels, self.vae.downsample
        if image_size is None:
            image_size = self.vae.image_size
        if image_size < pixels or image_size % pixels:
            raise ValueError(f"image_size must be a multiple of {pixels}, the pixels per token; got {image_size}.")
        for name, values in (("latent_mean", latent_mean), ("latent_std", latent_std)):
            if values is not None and (len(values) != channels or not all(map(math.isfinite, values))):
                raise ValueError(f"{name} must have {channels} finite entries, one per channel; got {list(values)}.")
        if latent_std is not None and min(latent_std) <= 0:
            raise ValueError(f"latent_std must be positive, got {list(latent_std)}.")
        if channel_order is not None and sorted(channel_order) != list(range(channels)):
            raise ValueError(f"channel_order must be a permutation of 0..{channels - 1}, got {list(channel_order)}.")
        # In place of the model, what builds it; and no entry is one that `from_config` may take for a mere default.
        self.register_to_config(vae=vae_config(self.vae), image_size=image_size, _use_default_values=[])

    # ------------------------------------------------------------ what a tokenizer is

    @property
    def vae(self) -> KLVAE | DiffusersVAE:
        """The VAE, with the latent interface of `KLVAE`."""
        return self.autoencoder

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the VAE's decoder; its encoder's is float32."""
        return self.vae.dtype

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        side = self.config.image_size // self.vae.downsample
        return side, side

    @property
    def max_tokens(self) -> int:
        """Positions of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of levels, once for each channel."""
        return (self.quantize.codebook_size,) * self.vae.latent_channels

    @property
    def channel_order(self) -> tuple[int, ...]:
        """The order in which an autoregressive generator predicts the channels of a position."""
        return tuple(self.config.channel_order or range(self.vae.latent_channels))

    @torch.no_grad()
    def fit_scale(self, images: Any, batch_size: int = 16) -> None:
        """Measure mean and standard deviation of each channel, and normalise by them from now on.

        Changes `latent_mean` and `latent_std` of the configuration, and with them the fingerprint.

        Args:
            images: whatever `preprocess` takes; some hundred are enough.
            batch_size: images that are encoded together.
        """
        encoded = [self.vae.encode_latents(part) for part in self.preprocess(images).split(batch_size)]
        std, mean = torch.std_mean(torch.cat(encoded).double(), (0, 2, 3), correction=0)
        # A channel that never changes needs no more than one level.
        self.register_to_config(latent_mean=mean.tolist(), latent_std=std.clamp(min=1e-6).tolist())

    # ------------------------------------------------------------ images to tokens

    def encode(
        self,
        images: Any,
        num_tokens: int | Sequence[int] | Tensor | None = None,
        generator: Generator | None = None,
        sample: bool = False,
        *,
        fit: Fit = "crop",
    ) -> ImageTokens:
        """Turn images into tokens.

        Args:
            images: whatever `preprocess` takes.
            num_tokens: all of them or None: these tokens are not ordered.
            generator: samples the VAE's posterior where `sample`; without effect otherwise.
            sample: quantize a sample of the VAE's posterior, as the published code does, instead of its mode.
            fit: what becomes of images that are not square, `"crop"` or `"letterbox"`, as in the base class.

        Raises:
            ImageError: as `preprocess` does.
            UnknownNameError: `fit` is neither `"crop"` nor `"letterbox"`.
            TypeError: `num_tokens` holds something else than integers.
            ValueError: fewer than all tokens are asked for, or `sample` has no generator.
        """
        if sample and generator is None:
            raise ValueError("sample=True needs a generator to sample with; got None.")
        return super().encode(images, num_tokens, generator if sample else None, fit=fit)

    def _encode(self, images: Tensor, num_tokens: int, generator: Generator | None) -> ImageTokens:
        with torch.autocast(self.device.type, enabled=False):
            latents = self.vae.encode_latents(images, generator)
        return ImageTokens(token_ids=self.quantize_latents(latents), spec=self.token_spec())

    def quantize_latents(self, latents: Tensor) -> Tensor:
        """Return ids `(batch, h * w, channels)` of the VAE's scaled latents `(batch, channels, h, w)`."""
        return self.quantize.quantize(self._normalised(latents))

    def _normalised(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents.device)
        return (latents.float().flatten(2).mT - mean) / std

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = self.config.latent_mean, self.config.latent_std
        return torch.tensor(mean or 0.0, device=device), torch.tensor(std or 1.0, device=device)

    # ------------------------------------------------------------ tokens to images

    def dequantize_ids(self, token_ids: Tensor) -> Tensor:
        """Return the VAE's scaled latents `(batch, channels, h, w)`, float32, of ids `(batch, h * w, channels)`."""
        return self._to_grid(self.quantize.dequantize(token_ids))

    def _to_grid(self, values: Tensor) -> Tensor:
        mean, std = self._statistics(values.device)
        return (values * std + mean).mT.unflatten(2, self.grid)

    def _decode(self, tokens: ImageTokens, generator: Generator | None) -> Tensor:
        return self.vae.decode_latents(self.dequantize_ids(cast(Tensor, tokens.token_ids)))

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Reconstruct `images` `(batch, 3, H, W)` in [0, 1] to fine-tune the VAE: images and the quantizer's output."""
        quantized = self.quantize(self._normalised(self.vae.encode_latents(images)))
        return self.vae.decode_latents(self._to_grid(quantized.latents)), quantized

    # ------------------------------------------------------------ published checkpoints

    @classmethod
    def preset(cls, name: str, image_size: int = 256, bits: int = 6) -> TokenBridge:
        """Build the published tokenizer by the name of its VAE, `kl16`, with random weights.

        Raises:
            UnknownNameError: the name is not a preset.
        """
        if name not in cls.presets:
            raise unknown_name("TokenBridge preset", name, list(cls.presets))
        return cls(KLVAE.preset(name, image_size), bits, **cls.presets[name])

    @classmethod
    def from_original(
        cls,
        checkpoint: str | PathLike[str] | Mapping[str, Tensor],
        config: Mapping[str, Any] | str = "kl16",
        image_size: int = 256,
        bits: int = 6,
    ) -> TokenBridge:
        """Load the published VAE, `kl16.ckpt`: the tokenizer has no weights of its own.

        Args:
            checkpoint: path of the published file (read with `weights_only=True`), or a state dict.
            config: `kl16`, or constructor arguments of a `KLVAE`.
            image_size: height and width of the images, where `config` is a name.
            bits: bits of an index.

        Raises:
            CheckpointError: the file cannot be read, or keys or shapes do not fit the configuration.
        """
        vae = KLVAE.from_original(checkpoint, config, image_size)
        return cls(vae, bits, **(cls.presets[config] if isinstance(config, str) else {})).eval()


TokenBridge.presets = {"kl16": {"channel_order": (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)}}
