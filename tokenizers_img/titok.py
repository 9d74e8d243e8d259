"""TiTok: an image as a short 1D sequence of tokens (Yu et al., 2024, "An Image is Worth 32 Tokens").

All published generations: *legacy* (VQ, proxy codes and a MaskGIT-VQGAN pixel decoder), the single-stage VQ and VAE
models that predict pixels directly, and the text-aware TA-TiTok.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for it when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from mmsdk.errors import unknown_name
from mmsdk.loading import load_into, load_original
from mmsdk.tokens import ImageTokens
from tokenizers_img.base import ImageTokenizer
from tokenizers_img.quantizers import FSQ, QuantizerOutput, VectorQuantizer
from tokenizers_img.vq import VQ

# Width, layers and heads behind the published size names.
MODEL_SIZES: dict[str, tuple[int, int, int]] = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
# CLIP ViT-L/14 text features, as the text-aware decoders take them.
TEXT_LENGTH, TEXT_DIM = 77, 768
_LOGVAR_RANGE = (-30.0, 20.0)


def _shape(name: str, shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1 or shape[0] % shape[2]:
        raise ValueError(f"{name} must be (width, layers, heads), heads a divisor of width; got {tuple(shape)}.")
    return shape[0], shape[1], shape[2]


def _published_shape(size: str | Sequence[int]) -> tuple[int, ...]:
    if isinstance(size, str) and size not in MODEL_SIZES:
        raise unknown_name("model size", size, list(MODEL_SIZES))
    return MODEL_SIZES[size] if isinstance(size, str) else tuple(size)


class Block(nn.Module):
    """Pre-norm transformer block with an exact GELU (`x + attn(ln_1(x))`, `x + mlp(ln_2(x))`)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Map `(batch, length, width)` to the same shape; `padding` `(batch, length)` is True where not to attend."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, key_padding_mask=padding, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def _positions(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(width**-0.5 * torch.randn(count, width))


class TiTokEncoder(nn.Module):
    """Images or latents `(batch, channels, H, W)` and latent tokens `(num_tokens, width)` to vectors, one per token."""

    def __init__(
        self,
        channels: int,
        size: int,
        patch: int,
        num_tokens: int,
        out_dim: int,
        shape: tuple[int, int, int],
        legacy: bool,
    ) -> None:
        super().__init__()
        width, num_layers, num_heads = shape
        self.legacy = legacy
        self.num_patches = (size // patch) ** 2
        self.patch_embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_embedding = _positions(1, width)
        self.positional_embedding = _positions(self.num_patches + 1, width)
        self.latent_token_positional_embedding = _positions(num_tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, out_dim, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """Return the vectors `(batch, num_tokens, out_dim)` of all tokens."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        batch = patches.shape[0]
        class_token = self.class_embedding.to(patches.dtype).expand(batch, 1, -1)
        x = torch.cat([class_token, patches], 1) + self.positional_embedding
        x = torch.cat([x, (latent_tokens + self.latent_token_positional_embedding).expand(batch, -1, -1)], 1)
        x = self.ln_pre(x)
        for block in self.transformer:
            x = block(x)
        latents = self.ln_post(x[:, 1 + self.num_patches :])
        # The legacy code reshapes (batch, tokens, width) to (batch, width, tokens), where a transpose was meant:
        # checkpoints need it.
        columns = latents.reshape(batch, -1, latents.shape[1]) if self.legacy else latents.transpose(1, 2)
        return self.conv_out(columns.unsqueeze(-1)).squeeze(-1).transpose(1, 2)


class TiTokDecoder(nn.Module):
    """Quantized vectors `(batch, k, in_dim)` of the first k tokens to one vector per patch, `(batch, width, h, w)`."""

    # What `TiTok` makes of the features: checkpoints keep it here.
    ffn: nn.Sequential
    conv_out: nn.Conv2d

    def __init__(
        self, size: int, patch: int, num_tokens: int, in_dim: int, shape: tuple[int, int, int], text_aware: bool
    ) -> None:
        super().__init__()
        width, num_layers, num_heads = shape
        self.grid = size // patch
        self.decoder_embed = nn.Linear(in_dim, width)
        self.class_embedding = _positions(1, width)
        self.positional_embedding = _positions(self.grid**2 + 1, width)
        self.mask_token = nn.Parameter(width**-0.5 * torch.randn(1, 1, width))
        self.latent_token_positional_embedding = _positions(num_tokens, width)
        if text_aware:
            self.text_guidance_proj = nn.Linear(TEXT_DIM, width)
            self.text_guidance_positional_embedding = _positions(TEXT_LENGTH, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, latents: Tensor, mask: Tensor | None = None, text_features: Tensor | None = None) -> Tensor:
        """Return features `(batch, width, h, w)`; `mask` `(batch, k)` is True at the tokens that an image has."""
        batch, count = latents.shape[:2]
        tokens = self.decoder_embed(latents) + self.latent_token_positional_embedding[:count]
        masks = self.mask_token.expand(batch, self.grid**2, -1)
        start = torch.cat([self.class_embedding.expand(batch, 1, -1), masks], 1) + self.positional_embedding
        parts = [start.to(tokens.dtype), tokens]
        if text_features is not None:
            parts.append(self.text_guidance_proj(text_features) + self.text_guidance_positional_embedding)
        x = self.ln_pre(torch.cat(parts, 1))
        padding = None
        if mask is not None and not bool(mask.all()):
            # Tokens past an image's length are hidden from attention: the same as not feeding them at all.
            padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            padding[:, start.shape[1] : start.shape[1] + count] = ~mask
        for block in self.transformer:
            x = block(x, padding)
        x = self.ln_post(x[:, 1 : 1 + self.grid**2])
        return rearrange(x, "b (h w) d -> b d h w", h=self.grid)


class _PixelResnetBlock(nn.Module):
    """Residual block of the MaskGIT-VQGAN decoder.

    Where the width changes, the published block adds the shortcut of its own output and drops its input: checkpoints
    need it.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(hidden) if hasattr(self, "nin_shortcut") else x)


class _PixelLevel(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, upsample: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            _PixelResnetBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(num_res_blocks)
        )
        if upsample:
            self.upsample_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "upsample_conv"):
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class PixelDecoder(nn.Module):
    """The MaskGIT-VQGAN decoder: proxy codes `(batch, z_channels, h, w)` to images `(batch, 3, h * f, w * f)`."""

    def __init__(self, channels: int, channel_mult: Sequence[int], num_res_blocks: int, z_channels: int) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(_PixelResnetBlock(widths[-1], widths[-1]) for _ in range(num_res_blocks))
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            _PixelLevel(inputs[i], widths[i], num_res_blocks, upsample=i > 0) for i in range(len(widths))
        )
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """Return images `(batch, 3, H, W)`, about [0, 1]."""
        hidden = self.conv_in(codes)
        for block in (*self.mid, *reversed(self.up)):
            hidden = block(hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class TiTok(ImageTokenizer):
    """1D tokenizer with a fixed number of tokens. Lossy. Images in [0, 1] without further normalisation.

    Args:
        image_size: height and width of the images.
        patch_size: height and width of a patch, in pixels, or in latents where `codec_config` is given.
        num_latent_tokens: tokens of an image.
        encoder_shape: width, layers and heads of the encoder.
        decoder_shape: width, layers and heads of the decoder.
        quantize_mode: `vq`, `fsq` or `vae` (continuous tokens).
        codebook_size: number of codes (`vq`).
        token_size: length of a code, or of a continuous token.
        use_l2_norm: compare codes on the unit sphere (`vq`).
        commitment_cost: weight of the commitment loss in training (`vq`).
        fsq_levels: values of each dimension (`fsq`).
        is_legacy: the first generation, which predicts 1024 proxy codes instead of pixels.
        pixel_decoder_config: shape of the legacy pixel decoder (`channels`, `channel_mult`, `num_res_blocks`,
            `z_channels`), or None for a stage-1 checkpoint, which can encode but not decode to pixels.
        text_aware: the decoder also takes CLIP text features (TA-TiTok).
        codec_config: configuration of a `VQ` grid tokenizer. The transformer then reads and predicts that tokenizer's
            latents instead of pixels, which makes small models much cheaper to train.
    """

    registry_name = "titok"

    codec: VQ
    quantize: VectorQuantizer | FSQ
    pixel_quantize: VectorQuantizer
    pixel_decoder: PixelDecoder

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 32,
        encoder_shape: Sequence[int] = (1024, 24, 16),
        decoder_shape: Sequence[int] = (1024, 24, 16),
        quantize_mode: str = "vq",
        codebook_size: int = 4096,
        token_size: int = 12,
        use_l2_norm: bool = True,
        commitment_cost: float = 0.25,
        fsq_levels: Sequence[int] | None = None,
        is_legacy: bool = True,
        pixel_decoder_config: Mapping[str, Any] | None = None,
        text_aware: bool = False,
        codec_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if quantize_mode not in ("vq", "fsq", "vae"):
            raise unknown_name("quantize_mode", quantize_mode, ["vq", "fsq", "vae"])
        if is_legacy and codec_config is not None:
            raise ValueError("A legacy model predicts proxy codes, not a codec's latents: set is_legacy=False.")
        if pixel_decoder_config is not None and not is_legacy:
            raise ValueError("Only a legacy model has a pixel decoder: set pixel_decoder_config=None.")
        if quantize_mode == "fsq" and fsq_levels and len(fsq_levels) != token_size:
            raise ValueError(
                f"token_size must be the number of fsq_levels, {len(fsq_levels)}; got {token_size}: every level "
                "quantizes one dimension."
            )
        channels, size = 3, image_size
        if codec_config is not None:
            self.codec = VQ(**codec_config)
            if image_size != self.codec.config.image_size:
                raise ValueError(
                    f"image_size must be that of the codec, {self.codec.config.image_size}; got {image_size}."
                )
            channels, size = self.codec.config.codebook_dim, self.codec.grid[0]
        if size % patch_size:
            raise ValueError(f"patch_size must divide {size}, the size of what is cut into patches; got {patch_size}.")
        encoding, decoding = _shape("encoder_shape", encoder_shape), _shape("decoder_shape", decoder_shape)
        decoder_width = decoding[0]
        encoder_dim = 2 * token_size if quantize_mode == "vae" else token_size
        self.latent_tokens = _positions(num_latent_tokens, encoding[0])
        self.encoder = TiTokEncoder(channels, size, patch_size, num_latent_tokens, encoder_dim, encoding, is_legacy)
        self.decoder = TiTokDecoder(size, patch_size, num_latent_tokens, token_size, decoding, text_aware)
        if is_legacy:
            self.decoder.ffn = nn.Sequential(
                nn.Conv2d(decoder_width, 2 * decoder_width, 1), nn.Tanh(), nn.Conv2d(2 * decoder_width, 1024, 1)
            )
        else:
            self.decoder.ffn = nn.Sequential(nn.Conv2d(decoder_width, patch_size**2 * channels, 1))
            self.decoder.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        if quantize_mode == "vq":
            self.quantize = VectorQuantizer(codebook_size, token_size, use_l2_norm, commitment_cost)
        elif quantize_mode == "fsq":
            self.quantize = FSQ(fsq_levels or ())
        if pixel_decoder_config is not None:
            self.pixel_quantize = VectorQuantizer(1024, pixel_decoder_config["z_channels"])
            self.pixel_decoder = PixelDecoder(**pixel_decoder_config)

    # ------------------------------------------------------------ what a tokenizer is

    @property
    def max_tokens(self) -> int:
        """Tokens of a full image."""
        return self.config.num_latent_tokens

    @property
    def codebook_sizes(self) -> tuple[int, ...] | None:
        """Entries of the codebook, or None for continuous tokens."""
        return None if self.config.quantize_mode == "vae" else (self.quantize.codebook_size,)

    def encode_latents(self, images: Tensor) -> Tensor:
        """Return what is quantized, `(batch, num_tokens, token_size)` (a VAE: twice as wide), for images in [0, 1]."""
        return self.encode_features(self._to_input(images))

    def encode_features(self, features: Tensor) -> Tensor:
        """Encode what the transformer reads: images, or the codec's latents `(batch, channels, h, w)`."""
        return self.encoder(features, self.latent_tokens)

    def _to_input(self, images: Tensor) -> Tensor:
        if self.config.codec_config is None:
            return images
        latents = self.codec.encode_latents(images)
        return (F.normalize(latents, dim=-1) if self.codec.config.l2_norm else latents).permute(0, 3, 1, 2)

    def posterior(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Split the output of `encode_latents` into mean and log-variance (`vae`), each `(batch, num_tokens, dim)`."""
        mean, logvar = latents.chunk(2, dim=-1)
        return mean, logvar.clamp(*_LOGVAR_RANGE)

    def decode_features(
        self, latents: Tensor, mask: Tensor | None = None, text_features: Tensor | None = None
    ) -> Tensor:
        """Return what the transformer predicts from `latents` `(batch, k, token_size)`.

        Proxy-code logits `(batch, 1024, h, w)` for legacy models, else pixels or codec latents `(batch, channels, H,
        W)`. `mask` `(batch, k)` is True at the tokens that an image has.
        """
        features = self.decoder.ffn(self.decoder(latents.to(self.dtype), mask, text_features))
        if self.config.is_legacy:
            return features
        patch = self.config.patch_size
        pixels = rearrange(features, "b (p1 p2 c) h w -> b c (h p1) (w p2)", p1=patch, p2=patch)
        return self.decoder.conv_out(pixels)

    def decode_latents(
        self, latents: Tensor, mask: Tensor | None = None, text_features: Tensor | None = None
    ) -> Tensor:
        """Return images `(batch, 3, H, W)`, about [0, 1] and not clamped, of `latents` `(batch, k, token_size)`."""
        features = self.decode_features(latents, mask, text_features)
        if self.config.codec_config is not None:
            return self.codec.decode_latents(features.permute(0, 2, 3, 1))
        if not self.config.is_legacy:
            return features
        if self.config.pixel_decoder_config is None:
            raise ValueError(
                "This is a stage-1 checkpoint: it predicts proxy codes and has no pixel decoder, so it cannot decode "
                "to images. Load a stage-2 checkpoint (`finetune_decoder: true`), or use `decode_features` for the "
                "logits of the proxy codes."
            )
        codes = self.pixel_quantize.expectation(features.float().softmax(1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.pixel_decoder(codes.to(self.dtype))

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Reconstruct `images` `(batch, 3, H, W)` in [0, 1] for training: images and the quantizer's output."""
        quantized = self._quantized(images)
        return self.decode_latents(quantized.latents), quantized

    def _quantized(self, images: Tensor) -> QuantizerOutput:
        if self.config.quantize_mode == "vae":
            raise ValueError(
                "Continuous tokens (quantize_mode 'vae') have no quantizer to train through: use `encode_latents`, "
                "`posterior` and `decode_latents`."
            )
        return self.quantize(self.encode_latents(images))

    def _encode(self, images: Tensor, num_tokens: int, generator: torch.Generator | None) -> ImageTokens:
        latents = self.encode_latents(images.to(self.dtype))
        if self.config.quantize_mode != "vae":
            return ImageTokens(token_ids=self.quantize.quantize(latents)[:, :num_tokens], spec=self.token_spec())
        mean, logvar = self.posterior(latents.float())
        if generator is not None:
            # Drawn as (batch, dim, tokens), like the published code, so that a seed gives the same sample.
            noise = torch.randn(mean.mT.shape, generator=generator, device=generator.device).mT
            mean = mean + (0.5 * logvar).exp() * noise.to(mean.device)
        return ImageTokens(latents=mean[:, :num_tokens], spec=self.token_spec())

    def _decode(
        self, tokens: ImageTokens, generator: torch.Generator | None, text_features: Tensor | None = None
    ) -> Tensor:
        if text_features is not None and not self.config.text_aware:
            raise ValueError("This decoder takes no `text_features`: it is not text-aware.")
        if self.config.text_aware:
            expected = (len(tokens), TEXT_LENGTH, TEXT_DIM)
            if text_features is None or text_features.shape != expected:
                received = "none" if text_features is None else f"the shape {tuple(text_features.shape)}"
                raise ValueError(
                    f"This text-aware decoder needs `text_features`, CLIP text features of shape {expected}; received "
                    f"{received}."
                )
            text_features = text_features.to(self.device, self.dtype)
        if self.config.quantize_mode == "vae":
            latents = cast(Tensor, tokens.latents)
        else:
            latents = self.quantize.dequantize(cast(Tensor, tokens.token_ids))
        return self.decode_latents(latents, tokens.mask, text_features)

    # ------------------------------------------------------------ published checkpoints

    @classmethod
    def preset(cls, name: str) -> TiTok:
        """Build a published model by its name, with random weights.

        `l32`, `b64`, `s128` (legacy), `bl64_vq8k`, `bl128_vq8k`, `sl256_vq8k`, `bl64_vae_c16`, `bl128_vae_c16`,
        `ll32_vae_c16`, and the text-aware `ta_bl32_vq`, `ta_bl64_vq`, `ta_bl128_vq`, `ta_bl32_vae`, `ta_bl64_vae`,
        `ta_sl128_vae`.

        Raises:
            UnknownNameError: the name is not a preset.
        """
        if name not in cls.presets:
            raise unknown_name(f"{cls.__name__} preset", name, list(cls.presets))
        return cls(**cls.presets[name])

    @classmethod
    def config_from_original(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Translate a published yaml configuration into constructor arguments.

        Besides the published size names, `vit_enc_model_size` and `vit_dec_model_size` may be `(width, layers, heads)`.

        Raises:
            UnknownNameError: a size name is not a published one.
            ValueError: an entry is missing, or encoder and decoder have different patch sizes.
        """
        try:
            return cls._translate(config)
        except KeyError as error:
            raise ValueError(f"The published configuration lacks the entry {error}.") from None

    @classmethod
    def _translate(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        model = config["model"]["vq_model"]
        encoder, decoder = (_published_shape(model[f"vit_{part}_model_size"]) for part in ("enc", "dec"))
        if model["vit_enc_patch_size"] != model["vit_dec_patch_size"]:
            raise ValueError(
                "Encoder and decoder must have one patch size, got "
                f"{model['vit_enc_patch_size']} and {model['vit_dec_patch_size']}."
            )
        legacy = model.get("is_legacy", True)
        pixel_decoder = None
        if legacy and model.get("finetune_decoder", True):
            pixel_decoder = dict(config.get("pixel_decoder") or PUBLISHED_PIXEL_DECODER)
        mode = model.get("quantize_mode", "vq")
        return {
            "image_size": config["dataset"]["preprocessing"]["crop_size"],
            "patch_size": model["vit_enc_patch_size"],
            "num_latent_tokens": model["num_latent_tokens"],
            "encoder_shape": encoder,
            "decoder_shape": decoder,
            "quantize_mode": mode,
            "codebook_size": model.get("codebook_size", 4096),
            "token_size": model["token_size"],
            "use_l2_norm": model.get("use_l2_norm", False),
            "commitment_cost": model.get("commitment_cost", 0.25),
            "is_legacy": legacy,
            "pixel_decoder_config": pixel_decoder,
            "text_aware": bool(config.get("text_aware", False)),
        }

    @classmethod
    def from_original(
        cls, checkpoint: str | PathLike[str] | Mapping[str, Tensor], config: Mapping[str, Any] | str
    ) -> TiTok:
        """Load a published checkpoint.

        Args:
            checkpoint: path of a `.safetensors`, `.bin` or `.pt` file (read with `weights_only=True`), or a state dict.
            config: the published configuration as a dict, or the name of a preset: the published files hold weights
                only.

        Raises:
            CheckpointError: the file cannot be read, or keys or shapes do not fit the configuration.
        """
        model = cls.preset(config) if isinstance(config, str) else cls(**cls.config_from_original(config))
        load_into(model, load_original(checkpoint))
        return model.eval()


PUBLISHED_PIXEL_DECODER: dict[str, Any] = {
    "channels": 128,
    "channel_mult": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
    "z_channels": 256,
}


def _legacy(size: str, num_tokens: int) -> dict[str, Any]:
    return {
        "encoder_shape": MODEL_SIZES[size],
        "decoder_shape": MODEL_SIZES[size],
        "num_latent_tokens": num_tokens,
        "pixel_decoder_config": PUBLISHED_PIXEL_DECODER,
    }


def _single_stage(encoder: str, num_tokens: int, mode: str, text_aware: bool = False) -> dict[str, Any]:
    vq = {"codebook_size": 8192, "token_size": 64, "use_l2_norm": False}
    return {
        "encoder_shape": MODEL_SIZES[encoder],
        "decoder_shape": MODEL_SIZES["large"],
        "num_latent_tokens": num_tokens,
        "quantize_mode": mode,
        "is_legacy": False,
        "text_aware": text_aware,
        **(vq if mode == "vq" else {"token_size": 16, "use_l2_norm": False}),
    }


TiTok.presets = {
    "l32": _legacy("large", 32),
    "b64": _legacy("base", 64),
    "s128": _legacy("small", 128),
    "bl64_vq8k": _single_stage("base", 64, "vq"),
    "bl128_vq8k": _single_stage("base", 128, "vq"),
    "sl256_vq8k": _single_stage("small", 256, "vq"),
    "bl64_vae_c16": _single_stage("base", 64, "vae"),
    "bl128_vae_c16": _single_stage("base", 128, "vae"),
    "ll32_vae_c16": _single_stage("large", 32, "vae"),
    "ta_bl32_vq": _single_stage("base", 32, "vq", text_aware=True),
    "ta_bl64_vq": _single_stage("base", 64, "vq", text_aware=True),
    "ta_bl128_vq": _single_stage("base", 128, "vq", text_aware=True),
    "ta_bl32_vae": _single_stage("base", 32, "vae", text_aware=True),
    "ta_bl64_vae": _single_stage("base", 64, "vae", text_aware=True),
    "ta_sl128_vae": _single_stage("small", 128, "vae", text_aware=True),
}
