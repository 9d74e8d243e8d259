"""KL autoencoders: images to continuous latents on a grid and back.

`KLVAE` is the family of the KL-16 autoencoder behind MAR (Li et al., 2024, "Autoregressive Image Generation without
Vector Quantization") and TokenBridge. Models over latents also take diffusers' `AutoencoderKL`; see `as_vae`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    ModelMixin,  # noqa: F401 - diffusers looks here for it when it loads a pipeline
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Generator, Tensor, nn

from mmsdk.errors import unknown_name
from mmsdk.loading import load_into, load_original
from mmsdk.tokens import ImageTokens
from tokenizers_img.base import ImageTokenizer
from tokenizers_img.vq import Decoder, Encoder

_LOGVAR_RANGE = (-30.0, 20.0)
# What decides on the latents. It stays in float32 whatever the model is cast to, so that they are those of the float32
# model, and tokens made of them, too.
_FLOAT32_MODULES = ("encoder", "quant_conv")


@dataclass
class PosteriorOutput(BaseOutput):
    """The distribution of an image's latents.

    Attributes:
        mean: `(batch, channels, h, w)`, not yet multiplied by the scaling factor.
        logvar: log-variance, of the same shape.
        loss: KL divergence from the standard normal distribution, summed over an image's latents, mean over the batch.
    """

    mean: Tensor
    logvar: Tensor
    loss: Tensor


def _draw(mean: Tensor, logvar: Tensor, generator: Generator | None, sample: bool | None) -> Tensor:
    if sample is None:
        sample = generator is not None
    if not sample:
        return mean
    if generator is None:
        raise ValueError("sample=True needs a generator to sample with; got None.")
    noise = torch.randn(mean.shape, generator=generator, device=generator.device)
    return mean + (0.5 * logvar).exp() * noise.to(mean.device)


def _apply_but_keep_float32(vae: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
    """Do the work of `nn.Module._apply` (moves and casts), but do not narrow the encoder."""

    def keep_precision(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        narrowed = moved.dtype in (torch.bfloat16, torch.float16)
        return tensor.to(moved.device) if narrowed else moved

    for name, child in vae.named_children():
        child._apply(keep_precision if name in _FLOAT32_MODULES else fn, recurse)


class KLVAE(ImageTokenizer):
    """Convolutional KL autoencoder: a grid of continuous tokens, in raster order. Lossy.

    Tokens are the posterior's mean, or with a generator a sample of it, times `scaling_factor`, which brings the
    latents of a trained model to about unit variance. Images are mapped to [-1, 1] inside.

    The encoder stays in float32 whatever the model is cast to, so that the latents are those of the float32 model.

    Args:
        channels: width at full resolution.
        channel_mult: width of each resolution, as a multiple of `channels`; the last is the grid's.
        num_res_blocks: residual blocks at each resolution (one more in the decoder).
        attention_levels: resolutions of the encoder, as indices of `channel_mult`, with attention after each block.
        decoder_attention_levels: the same of the decoder. Both have attention in the middle, at the grid's resolution.
        latent_channels: numbers in a token.
        image_size: height and width of the images.
        scaling_factor: what latents are multiplied by.
        norm_num_groups: groups of every GroupNorm.

    Raises:
        ValueError: sizes do not fit each other, a level does not exist, or the factor is not positive.
    """

    registry_name = "vae"
    resize = "adm_crop"
    _keep_in_fp32_modules: list[str] | None = list(_FLOAT32_MODULES)  # noqa: RUF012 - diffusers reads this name

    @register_to_config
    def __init__(
        self,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attention_levels: Sequence[int] = (4,),
        decoder_attention_levels: Sequence[int] = (),
        latent_channels: int = 16,
        image_size: int = 256,
        scaling_factor: float = 1.0,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        # Read from the class when loading. Here it would only make `to` warn of a cast that `_apply` prevents.
        self._keep_in_fp32_modules = None
        levels = len(channel_mult)
        if image_size < 2 ** (levels - 1) or image_size % 2 ** (levels - 1):
            raise ValueError(
                f"image_size must be a multiple of {2 ** (levels - 1)}, the pixels per token of {levels} resolutions; "
                f"got {image_size}."
            )
        for name, chosen in (
            ("attention_levels", attention_levels),
            ("decoder_attention_levels", decoder_attention_levels),
        ):
            if not set(chosen) <= set(range(levels)):
                raise ValueError(f"{name} must lie in 0..{levels - 1}, indices of channel_mult; got {tuple(chosen)}.")
        if not 0 < scaling_factor < math.inf:
            raise ValueError(f"scaling_factor must be positive and finite, got {scaling_factor!r}.")
        shape = (channels, channel_mult, num_res_blocks)
        self.encoder = Encoder(*shape, 2 * latent_channels, norm_num_groups, attention_levels)
        self.decoder = Decoder(*shape, latent_channels, norm_num_groups, decoder_attention_levels)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KLVAE:
        _apply_but_keep_float32(self, fn, recurse)
        return self

    # ------------------------------------------------------------ what a tokenizer is

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoder; the encoder's is float32."""
        return self.post_quant_conv.weight.dtype

    @property
    def downsample(self) -> int:
        """Pixels per token along each axis."""
        return 2 ** (len(self.config.channel_mult) - 1)

    @property
    def latent_channels(self) -> int:
        """Numbers in a token."""
        return self.config.latent_channels

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return self.config.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        side = self.config.image_size // self.downsample
        return side, side

    @property
    def max_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def codebook_sizes(self) -> None:
        """None: the tokens are continuous."""
        return None

    # ------------------------------------------------------------ images to latents and back

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance `(batch, channels, h, w)`, not scaled, of `images` `(batch, 3, H, W)` in [0, 1].

        Both are float32.
        """
        moments = self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype) * 2 - 1))
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(*_LOGVAR_RANGE)

    def encode_latents(self, images: Tensor, generator: Generator | None = None, sample: bool | None = None) -> Tensor:
        """Return scaled latents `(batch, channels, h, w)` of `images` `(batch, 3, H, W)` in [0, 1], in float32.

        Args:
            images: of any height and width that `downsample` divides.
            generator: draws the noise of a sample, `(batch, channels, h, w)` at once, as the published code does.
            sample: return a sample of the posterior instead of its mode; where it is None, if there is a generator.

        Raises:
            ValueError: `sample` has no generator.
        """
        return _draw(*self.posterior(images), generator, sample) * self.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return images `(batch, 3, H, W)`, about [0, 1], not clamped, of scaled latents `(batch, channels, h, w)`."""
        hidden = self.post_quant_conv((latents / self.config.scaling_factor).to(self.dtype))
        return self.decoder(hidden) * 0.5 + 0.5

    def forward(self, images: Tensor, generator: Generator | None = None) -> tuple[Tensor, PosteriorOutput]:
        """Reconstruct `images` `(batch, 3, H, W)` in [0, 1] for training: images, and the posterior with its KL loss.

        The decoder sees a sample where there is a generator, else the mode.
        """
        mean, logvar = self.posterior(images)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        decoded = self.decode_latents(_draw(mean, logvar, generator, None) * self.config.scaling_factor)
        return decoded, PosteriorOutput(mean, logvar, divergence.flatten(1).sum(1).mean())

    def _encode(self, images: Tensor, num_tokens: int, generator: Generator | None) -> ImageTokens:
        with torch.autocast(self.device.type, enabled=False):
            latents = self.encode_latents(images, generator)
        return ImageTokens(latents=latents.flatten(2).mT, spec=self.token_spec())

    def _decode(self, tokens: ImageTokens, generator: Generator | None) -> Tensor:
        return self.decode_latents(cast(Tensor, tokens.latents).mT.unflatten(2, self.grid))

    # ------------------------------------------------------------ published checkpoints

    @classmethod
    def preset(cls, name: str, image_size: int = 256) -> KLVAE:
        """Build a published model by its name, `kl16`, with random weights.

        Raises:
            UnknownNameError: the name is not a preset.
        """
        if name not in cls.presets:
            raise unknown_name("KLVAE preset", name, list(cls.presets))
        return cls(**cls.presets[name], image_size=image_size)

    @classmethod
    def from_original(
        cls,
        checkpoint: str | PathLike[str] | Mapping[str, Tensor],
        config: Mapping[str, Any] | str = "kl16",
        image_size: int = 256,
    ) -> KLVAE:
        """Load a published checkpoint, `kl16.ckpt`.

        Args:
            checkpoint: path of the published file (read with `weights_only=True`), or a state dict.
            config: `kl16`, or constructor arguments: the published file holds weights only.
            image_size: height and width of the images, where `config` is a name.

        Raises:
            CheckpointError: the file cannot be read, or keys or shapes do not fit the configuration.
        """
        model = cls.preset(config, image_size) if isinstance(config, str) else cls(**config)
        levels = len(model.config.channel_mult)
        state = {_renamed(key, levels): value for key, value in load_original(checkpoint).items()}
        # The discriminator and the perceptual network of the training, which checkpoints of this family may hold.
        load_into(model, state, allow_unexpected=("loss.",))
        return model.eval()


KLVAE.presets = {"kl16": {"scaling_factor": 0.2325}}


def _renamed(key: str, levels: int) -> str:
    """Translate a published key; there, the decoder's levels count from full resolution."""
    key = re.sub(
        r"^((?:en|de)coder\.mid)\.(block_1|attn_1|block_2)\.",
        lambda m: f"{m[1]}.{('block_1', 'attn_1', 'block_2').index(m[2])}.",
        key,
    )
    key = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.conv_blocks.\1.", key)
    key = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.conv_blocks.{levels - 1 - int(m[1])}.", key)
    return re.sub(r"(\.conv_blocks\.-?\d+)\.block\.", r"\1.res.", key)


# ---------------------------------------------------------------- any VAE


class DiffusersVAE(nn.Module):
    """A diffusers `AutoencoderKL` with the latent interface of `KLVAE`.

    Latents are scaled and shifted as the autoencoder's configuration says.

    Args:
        vae: the autoencoder. It is used as it is, not copied.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        self.latent_channels: int = vae.config.latent_channels
        self.downsample: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_size: int = vae.config.sample_size
        self._scale = vae.config.scaling_factor
        self._shift = vae.config.shift_factor or 0.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiffusersVAE:
        _apply_but_keep_float32(self.vae, fn, recurse)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the decoder; the encoder's is float32."""
        return self.vae.decoder.conv_in.weight.dtype

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance as `KLVAE.posterior` does."""
        distribution = self.vae.encode(images.to(self.vae.encoder.conv_in.weight.dtype) * 2 - 1).latent_dist
        return distribution.mean.float(), distribution.logvar.float()

    def encode_latents(self, images: Tensor, generator: Generator | None = None, sample: bool | None = None) -> Tensor:
        """Return scaled latents `(batch, channels, h, w)` as `KLVAE.encode_latents` does."""
        return (_draw(*self.posterior(images), generator, sample) - self._shift) * self._scale

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return images `(batch, 3, H, W)`, about [0, 1], not clamped, of scaled latents `(batch, channels, h, w)`."""
        return self.vae.decode((latents / self._scale + self._shift).to(self.dtype)).sample * 0.5 + 0.5


def _build_diffusers(**settings: Any) -> DiffusersVAE:
    levels = len(settings.get("block_out_channels", (64,)))
    types = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    return DiffusersVAE(AutoencoderKL(**(types | settings)))


VAE_KINDS: dict[str, Callable[..., KLVAE | DiffusersVAE]] = {"kl_vae": KLVAE, "autoencoder_kl": _build_diffusers}


def as_vae(vae: KLVAE | AutoencoderKL | Mapping[str, Any]) -> KLVAE | DiffusersVAE:
    """Give any VAE the latent interface of `KLVAE`.

    Args:
        vae: the model, which is used as it is, or a configuration: its `kind`, `kl_vae` or `autoencoder_kl`, and the
            constructor's arguments.

    Raises:
        UnknownNameError: there is no such kind.
        TypeError: `vae` is none of these.
    """
    if isinstance(vae, Mapping):
        settings = dict(vae)
        kind = str(settings.pop("kind", None))
        if kind not in VAE_KINDS:
            raise unknown_name("kind of VAE", kind, list(VAE_KINDS))
        return VAE_KINDS[kind](**settings)
    if isinstance(vae, AutoencoderKL):
        return DiffusersVAE(vae)
    if not isinstance(vae, KLVAE):
        raise TypeError(
            f"vae must be a KLVAE, a diffusers AutoencoderKL or the configuration of one, got {type(vae).__name__}."
        )
    return vae


def vae_config(vae: KLVAE | DiffusersVAE) -> dict[str, Any]:
    """Return the configuration from which `as_vae` builds `vae`, with random weights."""
    kind, model = ("kl_vae", vae) if isinstance(vae, KLVAE) else ("autoencoder_kl", vae.vae)
    return {"kind": kind, **{k: v for k, v in model.config.items() if not k.startswith("_")}}
