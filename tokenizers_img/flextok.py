"""FlexTok: an image as 1 to N ordered tokens, decoded by a rectified flow (Bachmann et al., 2025).

A register encoder over the latents of a VAE, finite scalar quantization, and a flow transformer that draws the latents
from any prefix of the tokens.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for it when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from einops import rearrange
from huggingface_hub import hf_hub_download
from torch import Generator, Tensor, nn

from mmsdk.errors import CheckpointError, unknown_name
from mmsdk.loading import load_into, load_original, resolve_pretrained
from mmsdk.tokens import ImageTokens
from tokenizers_img.base import Fit, ImageTokenizer, ImageTokenizerOutput
from tokenizers_img.flextok_original import config_of_file, translate, vae_shape
from tokenizers_img.quantizers import FSQ
from tokenizers_img.vae import as_vae

logger = logging.getLogger(__name__)

GUIDANCE_KINDS = ("apg", "cfg")
POSITION_KINDS = ("sincos", "learnable_sum")
# Sinusoids of the time embedding, as published; also the longest period, in thousandths of the time range.
_TIME_DIM = 256
# Sets of adaLN parameters in a block: one for the patches, one for the registers.
_GROUPS = 2


# ---------------------------------------------------------------- transformer


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class Attention(nn.Module):
    """Multi-head attention without biases; queries and keys are layer-normalised per head, without parameters."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = 8 * num_heads / width  # as published; the usual 1 / sqrt(head_dim) only where that is 64
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return `(batch, length, width)` like `queries`.

        `mask` broadcasts to `(batch, heads, length, context length)`: True where to attend, or what is added to the
        logits.
        """
        q, k, v = (
            rearrange(linear(x), "b l (h d) -> b h l d", h=self.num_heads)
            for linear, x in ((self.wq, queries), (self.wk, context), (self.wv, context))
        )
        attended = F.scaled_dot_product_attention(_norm(q), _norm(k), v, attn_mask=mask, scale=self.scale)
        return self.proj(rearrange(attended, "b h l d -> b l (h d)"))


class SwiGLU(nn.Module):
    """`fc2(silu(fc1(x)) * fc3(x))` without biases, 8/3 as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)
        self.fc3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block; norms have no parameters."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, mask: Tensor | None, start: int = 0) -> Tensor:
        """Map `(batch, length, width)` to its positions from `start` on; `mask` has a row for each of those."""
        normed = _norm(x)
        x = x[:, start:] + self.attn(normed[:, start:], normed, mask)
        return x + self.mlp(_norm(x))


class DecoderBlock(EncoderBlock):
    """Transformer block that the time modulates (adaLN), patches and registers each by their own parameters."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, _GROUPS * 6 * width))

    def modulation(self, time: Tensor) -> Tensor:
        """Return the parameters `(batch, 2, 6, 1, width)` for time embeddings `(batch, width)`."""
        return rearrange(self.adaLN_modulation(time), "b (g n d) -> b g n 1 d", g=_GROUPS, n=6)

    def forward(self, x: Tensor, mask: Tensor | None, start: int = 0, modulation: Tensor | None = None) -> Tensor:
        """Map `(batch, length, width)` to the same shape; the registers begin at `start`."""
        groups = [group.unbind(1) for group in cast(Tensor, modulation).unbind(1)]
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = zip(*groups, strict=True)

        def modulated(shift: Sequence[Tensor], scale: Sequence[Tensor]) -> Tensor:
            parts = _norm(x).tensor_split((start,), 1)
            return torch.cat([torch.addcmul(b, part, 1 + a) for part, a, b in zip(parts, scale, shift, strict=True)], 1)

        def gated(update: Tensor, gate: Sequence[Tensor]) -> Tensor:
            parts, updates = x.tensor_split((start,), 1), update.tensor_split((start,), 1)
            return torch.cat([torch.addcmul(p, u, g) for p, u, g in zip(parts, updates, gate, strict=True)], 1)

        normed = modulated(shift_attn, scale_attn)
        x = gated(self.attn(normed, normed, mask), gate_attn)
        return gated(self.mlp(modulated(shift_mlp, scale_mlp)), gate_mlp)


def _positions(kind: str, width: int, sizes: Sequence[int]) -> nn.ParameterDict:
    """Make positional embeddings: fixed sinusoids `(1, width, h, w)`, or learned, `(axes, 1, width, size)`."""
    if kind == "learnable_sum":
        table = nn.Parameter(width**-0.5 * torch.randn(len(sizes), 1, width, max(sizes)))
        return nn.ParameterDict({"posembs": table})
    frequencies = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = (frequencies[:, None] * torch.arange(size) for size in sizes)
    by_row = torch.cat([rows.sin(), rows.cos()])[:, :, None].expand(-1, -1, sizes[1])
    by_column = torch.cat([columns.sin(), columns.cos()])[:, None, :].expand(-1, sizes[0], -1)
    return nn.ParameterDict({"posembs": nn.Parameter(torch.cat([by_row, by_column])[None], requires_grad=False)})


class PatchEmbedder(nn.Module):
    """Latents `(batch, channels, h, w)` to patches `(batch, (h / p) * (w / p), width)`, without positions."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_proj = nn.Linear(patch_size**2 * channels, width)

    def forward(self, latents: Tensor) -> Tensor:
        """Return the patches, row by row."""
        size = self.patch_size
        return self.patch_proj(rearrange(latents, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=size, p2=size))


def _grid_positions(positions: nn.ParameterDict, latents: Tensor, patch_size: int) -> Tensor:
    """Return the embeddings `(1, patches, width)` of the top left part of the grid that `latents` cover."""
    table = positions["posembs"]
    height, width = (size // patch_size for size in latents.shape[-2:])
    if table.shape[0] == 2:
        grid = table[0, ..., :height, None] + table[1, ..., None, :width]
    else:
        grid = table[..., :height, :width]
    return grid.flatten(2).mT


def _blocks(block: type[EncoderBlock], shape: tuple[int, int, int]) -> nn.ModuleDict:
    width, num_layers, num_heads = shape
    return nn.ModuleDict({"blocks": nn.ModuleList(block(width, num_heads) for _ in range(num_layers))})


class FlexTokEncoder(nn.Module):
    """Latents of the VAE to one vector per register. Attributes are named as in the checkpoints.

    Patches see patches; register i sees all patches and the registers up to i. So the first k vectors take k registers
    only.
    """

    def __init__(
        self,
        channels: int,
        patch_size: int,
        grid: int,
        num_registers: int,
        out_dim: int,
        shape: tuple[int, int, int],
        positions: str,
    ) -> None:
        super().__init__()
        width = shape[0]
        self.enc_patch_emb = PatchEmbedder(channels, patch_size, width)
        self.enc_posemb_module = _positions(positions, width, (grid, grid))
        registers = nn.Parameter(width**-0.5 * torch.randn(num_registers, width))
        self.enc_register_module = nn.ParameterDict({"registers": registers})
        self.enc_transformer = _blocks(EncoderBlock, shape)
        self.enc_to_latents = nn.ModuleDict({"proj": nn.Linear(width, out_dim)})
        _initialise(self, zeros=[self.enc_to_latents["proj"]])

    def forward(self, latents: Tensor, num_tokens: int) -> Tensor:
        """Return the vectors `(batch, num_tokens, out_dim)` of the first `num_tokens` registers."""
        patches = self.enc_patch_emb(latents)
        patches = patches + _grid_positions(self.enc_posemb_module, latents, self.enc_patch_emb.patch_size)
        registers = self.enc_register_module["registers"][:num_tokens].expand(len(patches), -1, -1)
        x = torch.cat([patches, registers], 1)
        mask = register_mask(patches.shape[1], num_tokens, x.device)
        *blocks, last = cast(nn.ModuleList, self.enc_transformer["blocks"])
        for block in blocks:
            x = block(x, mask)
        # Nothing reads the patches of the last block.
        x = last(x, mask[patches.shape[1] :], start=patches.shape[1])
        return self.enc_to_latents["proj"](_norm(x))


def register_mask(num_patches: int, num_registers: int, device: torch.device | None = None) -> Tensor:
    """Return the encoder's mask `(length, length)`, patches first: True where a row may attend."""
    mask = torch.ones(num_patches + num_registers, num_patches + num_registers, dtype=torch.bool, device=device).tril()
    mask[:num_patches, :num_patches] = True
    return mask


@dataclass
class Modulations:
    """What the time tells the decoder, for one or more timesteps.

    Attributes:
        blocks: for each block `(timesteps, 2, 6, 1, width)`.
        head: `(timesteps, 2, 1, width)`.
    """

    blocks: list[Tensor]
    head: Tensor

    def __getitem__(self, step: int) -> Modulations:
        """Return those of one timestep, which serve a whole batch."""
        return Modulations([block[step : step + 1] for block in self.blocks], self.head[step : step + 1])


class PatchHead(nn.Module):
    """Patches `(batch, patches, width)` to what each patch holds, modulated by the time."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.proj = nn.Linear(width, out_dim)

    def modulation(self, time: Tensor) -> Tensor:
        """Return the parameters `(batch, 2, 1, width)` for time embeddings `(batch, width)`."""
        return rearrange(self.adaLN_modulation(time), "b (n d) -> b n 1 d", n=2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Return `(batch, patches, out_dim)`."""
        shift, scale = modulation.unbind(1)
        return self.proj(torch.addcmul(shift, _norm(x), 1 + scale))


class FlexTokDecoder(nn.Module):
    """Velocity of noised latents, given registers. Attributes are named as in the checkpoints.

    Registers without a token are all the same vector, at every layer. So one of them stands for many: its key counts
    `log(many)` more in every softmax, which is exact and makes the cost that of the tokens there are.
    """

    def __init__(
        self,
        channels: int,
        patch_size: int,
        grid: int,
        num_registers: int,
        in_dim: int,
        shape: tuple[int, int, int],
        positions: str,
        max_timestep: float,
    ) -> None:
        super().__init__()
        width = shape[0]
        self.num_registers = num_registers
        self.max_timestep = max_timestep
        self.dec_from_latents = nn.ModuleDict({"proj": nn.Linear(in_dim, width)})
        self.dec_registers_posemb_module = _positions("learnable_sum", width, (num_registers,))
        self.dec_nested_dropout = nn.ParameterDict({"dropout_mask_token": _vector(width)})
        self.dec_latent_dropout = nn.ParameterDict({"nullcond": _vector(width)})
        self.dec_noise_patch_emb = PatchEmbedder(channels, patch_size, width)
        self.dec_patches_posemb_module = _positions(positions, width, (grid, grid))
        layers = nn.Linear(_TIME_DIM, width), nn.SiLU(), nn.Linear(width, width)
        self.dec_time_embedder = nn.ModuleDict({"mlp": nn.Sequential(*layers)})
        self.dec_transformer = _blocks(DecoderBlock, shape)
        self.dec_to_patches = PatchHead(width, patch_size**2 * channels)
        modulations = [m.adaLN_modulation[1] for m in self.modules() if isinstance(m, (DecoderBlock, PatchHead))]
        _initialise(self, zeros=[*modulations, self.dec_to_patches.proj])

    @property
    def blocks(self) -> list[DecoderBlock]:
        """The transformer blocks in order."""
        return list(cast(Any, self.dec_transformer["blocks"]))

    def time_embedding(self, timesteps: Tensor) -> Tensor:
        """Return embeddings `(batch, width)` of `timesteps` `(batch,)` in [0, 1]."""
        half = _TIME_DIM // 2
        frequencies = torch.exp(-math.log(_TIME_DIM) * torch.arange(half, device=timesteps.device) / half)
        angles = timesteps.float()[:, None] * (1000 / self.max_timestep * frequencies)
        sinusoids = torch.cat([angles.cos(), angles.sin()], 1)
        return self.dec_time_embedder["mlp"](sinusoids.to(self.dec_to_patches.proj.weight.dtype))

    def modulations(self, timesteps: Tensor) -> Modulations:
        """Return what depends on `timesteps` `(batch,)` alone; one per sampling step serves every image and pass."""
        time = self.time_embedding(timesteps)
        return Modulations([block.modulation(time) for block in self.blocks], self.dec_to_patches.modulation(time))

    def registers(self, codes: Tensor, lengths: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Embed the tokens that there are, and as few registers without one as possible.

        Args:
            codes: `(batch, k, in_dim)`, k at least the largest length.
            lengths: `(batch,)`, tokens of each image.
            drop: `(batch,)`, True for images without condition (all their registers are the null condition).

        Returns:
            The registers `(batch, s, width)`, and `(batch, s)` to add to their attention logits, or None for zeros.
        """
        if drop is not None:
            lengths = lengths.masked_fill(drop, 0)
        total, longest = self.num_registers, int(lengths.max())
        count = min(longest + 1, total)
        projected = self.dec_from_latents["proj"](codes[:, :longest])
        embedded = projected + self.dec_registers_posemb_module["posembs"][0, ..., :longest].mT
        embedded = F.pad(embedded, (0, 0, 0, count - longest))
        filler = self.dec_nested_dropout["dropout_mask_token"].expand(len(codes), 1, -1)
        if drop is not None:
            filler = torch.where(drop[:, None, None], self.dec_latent_dropout["nullcond"], filler)
        present = torch.arange(count, device=codes.device) < lengths[:, None]
        registers = torch.where(present[..., None], embedded, filler)
        if count == total:
            return registers, None
        represented = (total - lengths).float() / (count - lengths)
        return registers, represented.log()[:, None].masked_fill(present, 0).to(registers.dtype)

    def forward(
        self,
        latents: Tensor,
        registers: Tensor,
        bias: Tensor | None,
        modulations: Modulations,
        hidden_block: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the velocity (noise minus data).

        Args:
            latents: noised latents `(batch, channels, h, w)`.
            registers: what `registers` returned, as is `bias`.
            bias: see there.
            modulations: for one timestep, or one per image.
            hidden_block: index of a block whose output patches are returned, too.

        Returns:
            The velocity `(batch, channels, h, w)`, and `(batch, patches, width)` or None.
        """
        size = self.dec_noise_patch_emb.patch_size
        patches = self.dec_noise_patch_emb(latents) + _grid_positions(self.dec_patches_posemb_module, latents, size)
        count = patches.shape[1]
        mask = None if bias is None else F.pad(bias, (count, 0))[:, None, None]
        x, hidden = torch.cat([patches, registers], 1), None
        for i, (block, modulation) in enumerate(zip(self.blocks, modulations.blocks, strict=True)):
            x = block(x, mask, count, modulation)
            if i == hidden_block:
                hidden = x[:, :count]
        velocity = self.dec_to_patches(x[:, :count], modulations.head)
        height = latents.shape[-2] // size
        return rearrange(velocity, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=height, p1=size, p2=size), hidden


def _vector(width: int) -> nn.Parameter:
    return nn.Parameter(width**-0.5 * torch.randn(width))


def _initialise(module: nn.Module, zeros: Sequence[nn.Module]) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.weight) if layer in zeros else nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------- guidance


def projected_guidance(
    cond: Tensor,
    uncond: Tensor,
    scale: float,
    running: Tensor | float = 0.0,
    momentum: float = -0.5,
    norm_threshold: float = 2.5,
    eta: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Guide by what is orthogonal to the conditional prediction (Sadat et al., 2024, adaptive projected guidance).

    Args:
        cond: conditional velocity `(batch, channels, h, w)`.
        uncond: unconditional velocity.
        scale: guidance scale; 1 returns `cond`.
        running: what the previous step returned second, 0 at the first.
        momentum: weight of `running`.
        norm_threshold: longest update of an image.
        eta: share of the update parallel to `cond` that is kept.

    Returns:
        The guided velocity, and the running difference for the next step.
    """
    running = cond - uncond + momentum * running
    norms = running.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    update = (running * (norm_threshold / norms).clamp(max=1)).double()
    direction = F.normalize(cond.double().flatten(1), dim=1).view_as(cond)
    parallel = (update * direction).sum((1, 2, 3), keepdim=True) * direction
    return cond + (scale - 1) * (update - parallel + eta * parallel).to(cond.dtype), running


# ---------------------------------------------------------------- what training draws


def draw_num_tokens(count: int, max_tokens: int, rng: random.Random, mode: str = "uniform") -> list[int]:
    """Draw how many tokens nested dropout keeps of each of `count` images.

    Args:
        count: number of images.
        max_tokens: tokens of a full image.
        rng: source of randomness.
        mode: `uniform` over 1 to `max_tokens`; `pow2`, uniform over the powers of two; `uniform_pow2`, uniform and
            rounded up to a power of two.

    Raises:
        UnknownNameError: the mode is none of these.
    """
    powers = [2**i for i in range(max_tokens.bit_length())]
    if mode == "uniform":
        return [rng.randint(1, max_tokens) for _ in range(count)]
    if mode == "pow2":
        return [rng.choice(powers) for _ in range(count)]
    if mode == "uniform_pow2":
        uniform = (rng.randint(1, max_tokens) for _ in range(count))
        return [min(1 << (number - 1).bit_length(), max_tokens) for number in uniform]
    raise unknown_name("nested dropout mode", mode, ["uniform", "pow2", "uniform_pow2"])


def mode_sigmas(uniform: Tensor, mode_scale: float) -> Tensor:
    """Map uniform numbers in [0, 1] to noise levels with more weight on the middle (Esser et al., 2024).

    `1 - u - m (cos^2(pi u / 2) - 1 + u)` with `m = mode_scale`.
    """
    return 1 - uniform - mode_scale * (torch.cos(math.pi / 2 * uniform).square() - 1 + uniform)


def draw_sigmas(count: int, generator: Generator, mode_scale: float | None = None) -> Tensor:
    """Draw noise levels `(count,)` in (0, 1): the sigmoid of a normal number, or `mode_sigmas` of a uniform one."""
    if mode_scale is None:
        return torch.randn(count, generator=generator, device=generator.device).sigmoid()
    return mode_sigmas(torch.rand(count, generator=generator, device=generator.device), mode_scale)


@dataclass
class FlowOutput(BaseOutput):
    """What `FlexTok.forward` returns.

    Attributes:
        loss: scalar, the mean squared error of the velocity.
        velocity: predicted velocity `(batch, channels, h, w)`.
        token_ids: `(batch, k)`, k the most tokens that an image keeps.
        hidden_states: patches `(batch, patches, width)` after the asked-for decoder block, for feature alignment.
    """

    loss: Tensor
    velocity: Tensor
    token_ids: Tensor
    hidden_states: Tensor | None = None


# ---------------------------------------------------------------- the tokenizer


def _shape(name: str, shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1 or shape[0] % 4 or shape[0] % shape[2]:
        raise ValueError(
            f"{name} must be (width, layers, heads), the width a multiple of 4 and of the heads; got {tuple(shape)}."
        )
    return shape[0], shape[1], shape[2]


class FlexTok(ImageTokenizer):
    """Ordered 1D tokens: any prefix decodes to a plausible image, and each further token makes it more faithful.

    Bachmann et al., 2025, "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length". Lossy. Encoding is
    deterministic unless asked to sample; `decode` draws from a distribution. k tokens cost k registers of the encoder
    and k + 1 of the decoder.

    The encoder and the VAE's stay in float32 whatever the model is cast to, so that the ids are those of the float32
    model. The decoders, most of the weights and of the work, take the model's dtype.

    Args:
        image_size: height and width of the images.
        vae_config: the VAE: its `kind`, `autoencoder_kl` (diffusers' `AutoencoderKL`) or `kl_vae` (`KLVAE`), and the
            constructor's arguments, as `tokenizers_img.vae.vae_config` gives them (default: the published VAE).
        patch_size: height and width of a patch, in latents.
        num_registers: tokens of a full image.
        encoder_shape: width, layers and heads of the encoder.
        decoder_shape: width, layers and heads of the flow decoder.
        fsq_levels: values of each dimension of a code.
        encoder_positions: positional embeddings of the encoder's patches, `sincos` or `learnable_sum`.
        decoder_positions: the same of the decoder's.
        max_timestep: the time embedding multiplies the time, from 0 to 1, by `1000 / max_timestep`.
        guidance_scale: default of `decode`.

    Raises:
        ValueError: sizes do not fit each other.
        UnknownNameError: there is no such VAE or positional embedding.
    """

    registry_name = "flextok"
    ordered = True
    resample = "bilinear"  # as published
    _keep_in_fp32_modules: list[str] | None = ["encoder", "quant_conv"]  # noqa: RUF012 - diffusers reads this name

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        vae_config: Mapping[str, Any] | None = None,
        patch_size: int = 2,
        num_registers: int = 256,
        encoder_shape: Sequence[int] = (1152, 18, 18),
        decoder_shape: Sequence[int] = (1152, 18, 18),
        fsq_levels: Sequence[int] = (8, 8, 8, 5, 5, 5),
        encoder_positions: str = "sincos",
        decoder_positions: str = "sincos",
        max_timestep: float = 1.0,
        guidance_scale: float = 7.5,
    ) -> None:
        super().__init__()
        # Read from the class when loading. Here it would only make `to` warn of a cast that `_apply` prevents.
        self._keep_in_fp32_modules = None
        for positions in (encoder_positions, decoder_positions):
            if positions not in POSITION_KINDS:
                raise unknown_name("positional embedding", positions, list(POSITION_KINDS))
        if num_registers < 1:
            raise ValueError(f"num_registers must be at least 1, got {num_registers}.")
        if not 0 < max_timestep < math.inf:
            raise ValueError(f"max_timestep must be a positive number, got {max_timestep}.")
        _checked_scale(guidance_scale)
        encoding, decoding = _shape("encoder_shape", encoder_shape), _shape("decoder_shape", decoder_shape)
        self.quantize = FSQ(fsq_levels)
        vae = as_vae(PUBLISHED_VAE if vae_config is None else vae_config)
        pixels = vae.downsample * patch_size
        if image_size < pixels or image_size % pixels:
            raise ValueError(f"image_size must be a multiple of {pixels}, the pixels per patch; got {image_size}.")
        grid, channels, dim = image_size // pixels, vae.latent_channels, self.quantize.dim
        decoder = FlexTokDecoder(
            channels, patch_size, grid, num_registers, dim, decoding, decoder_positions, max_timestep
        )
        encoder = FlexTokEncoder(channels, patch_size, grid, num_registers, dim, encoding, encoder_positions)
        # Checkpoints have this level. The decoder comes first: the first parameter's dtype is the model's.
        self.decoder = nn.ModuleDict({"module_dict": decoder})
        self.encoder = nn.ModuleDict({"module_dict": encoder})
        self.vae = vae

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlexTok:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device) if narrowed else moved

        self.encoder._apply(keep_precision, recurse)
        for module in (self.decoder, self.quantize, self.vae):
            module._apply(fn, recurse)
        return self

    # ------------------------------------------------------------ what a tokenizer is

    @property
    def max_tokens(self) -> int:
        """Tokens of a full image."""
        return self.config.num_registers

    @property
    def codebook_sizes(self) -> tuple[int, ...] | None:
        """Number of codes."""
        return (self.quantize.codebook_size,)

    @property
    def register_encoder(self) -> FlexTokEncoder:
        """The network from latents to what is quantized."""
        return cast(FlexTokEncoder, self.encoder["module_dict"])

    @property
    def flow_decoder(self) -> FlexTokDecoder:
        """The network that predicts velocities."""
        return cast(FlexTokDecoder, self.decoder["module_dict"])

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
            num_tokens: tokens to keep, one number or one per image (default: all). Fewer are cheaper.
            generator: samples the VAE's posterior where `sample`; without effect otherwise.
            sample: encode a sample of the VAE's posterior, as the published code does, instead of its mode.
            fit: what becomes of images that are not square, `"crop"` or `"letterbox"`, as in the base class.

        Raises:
            ImageError: as `preprocess` does.
            UnknownNameError: `fit` is neither `"crop"` nor `"letterbox"`.
            TypeError: `num_tokens` holds something else than integers.
            ValueError: `num_tokens` is outside 1 to `max_tokens`, or has not one entry per image, or `sample` has no
                generator.
        """
        if sample and generator is None:
            raise ValueError("sample=True needs a generator to sample with; got None.")
        return super().encode(images, num_tokens, generator if sample else None, fit=fit)

    def _encode(self, images: Tensor, num_tokens: int, generator: Generator | None) -> ImageTokens:
        with torch.autocast(self.device.type, enabled=False):
            latents = self.encode_latents(images, generator)
            token_ids = self.quantize.quantize(self.encode_features(latents, num_tokens))
        return ImageTokens(token_ids=token_ids, spec=self.token_spec())

    def encode_latents(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the VAE's latents `(batch, channels, h, w)` of float32 images in [0, 1]; a sample with a generator."""
        return self.vae.encode_latents(images, generator)

    def encode_features(self, latents: Tensor, num_tokens: int | None = None) -> Tensor:
        """Return what is quantized, `(batch, num_tokens, len(fsq_levels))`, for the latents of the VAE."""
        return self.register_encoder(latents, self.max_tokens if num_tokens is None else num_tokens)

    # ------------------------------------------------------------ tokens to images

    def decode(  # type: ignore[override] # the base class leaves the sampler's keywords open
        self,
        tokens: ImageTokens,
        generator: Generator | Sequence[Generator] | None = None,
        *,
        noise: Tensor | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float | Callable[[float], float] | None = None,
        guidance: str = "apg",
    ) -> ImageTokenizerOutput:
        """Draw images `(batch, 3, image_size, image_size)` in [0, 1] that the tokens describe.

        Args:
            tokens: what `encode` returned, or a generator's ids in an `ImageTokens` with this tokenizer's `token_spec`.
                Images may have different numbers of tokens.
            generator: draws the noise, image by image, or one for each image; then an image does not depend on its
                batch. Without it, every image starts from the same fixed noise, so that the result is determined.
            noise: the noise itself, `(batch, channels, h, w)` in latents.
            num_inference_steps: Euler steps.
            guidance_scale: how much to follow the tokens, a number or a function of the time, which runs from 1 (noise)
                towards 0; that of the configuration by default. Where it is 1, the unconditional pass is left out.
            guidance: `apg` (adaptive projected guidance, without the oversaturation of large scales) or `cfg`
                (classifier-free guidance).

        Raises:
            TokenStreamError: the tokens were made by another tokenizer.
            TypeError: `noise` is no tensor.
            UnknownNameError: `guidance` is none of the two.
            ValueError: a scale is negative or not finite, the steps are not a positive integer, `noise` has another
                shape or is not finite, `noise` and `generator` are both given, there are not as many generators as
                images, or the decoder's output is not finite.
        """
        return super().decode(
            tokens,
            generator,  # type: ignore[arg-type] # handed on to `_decode` as it is
            noise=noise,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance=guidance,
        )

    def _decode(
        self,
        tokens: ImageTokens,
        generator: Generator | Sequence[Generator] | None,
        noise: Tensor | None = None,
        **sampler: Any,
    ) -> Tensor:
        if noise is None:
            noise = self.draw_noise(len(tokens), generator)
        elif not isinstance(noise, Tensor):
            raise TypeError(f"noise must be a tensor, got {type(noise).__name__}.")
        elif generator is not None:
            raise ValueError("Give either `noise` or `generator`, not both.")
        elif noise.shape != (shape := self._noise_shape(len(tokens))) or not bool(torch.isfinite(noise).all()):
            raise ValueError(f"noise must be finite and of shape {shape}, got the shape {tuple(noise.shape)}.")
        codes = self.quantize.dequantize(cast(Tensor, tokens.token_ids))
        return self.decode_latents(self.sample_latents(codes, tokens.lengths, noise, **sampler))

    def draw_noise(self, count: int, generator: Generator | Sequence[Generator] | None = None) -> Tensor:
        """Draw the noise `(count, channels, h, w)` that `decode` starts from, as it does.

        Raises:
            ValueError: there are not as many generators as images.
        """
        if generator is None:
            generators = [torch.Generator().manual_seed(0) for _ in range(count)]
        else:
            generators = [generator] * count if isinstance(generator, Generator) else list(generator)
        if len(generators) != count:
            raise ValueError(f"Got {len(generators)} generators for {count} images; pass one, or one for each image.")
        shape = self._noise_shape(1)
        return torch.cat([torch.randn(shape, generator=g, device=g.device).to(self.device) for g in generators])

    def _noise_shape(self, count: int) -> tuple[int, int, int, int]:
        size = self.config.image_size // self.vae.downsample
        return count, self.vae.latent_channels, size, size

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return the VAE's images `(batch, 3, H, W)`, about [0, 1] and not clamped, of latents."""
        return self.vae.decode_latents(latents)

    @torch.no_grad()
    def sample_latents(
        self,
        codes: Tensor,
        lengths: Tensor,
        noise: Tensor,
        num_inference_steps: int = 20,
        guidance_scale: float | Callable[[float], float] | None = None,
        guidance: str = "apg",
    ) -> Tensor:
        """Integrate the flow from noise to latents, with Euler steps in float32.

        Args:
            codes: `(batch, k, len(fsq_levels))`, k at least the largest length; further ones are without effect.
            lengths: `(batch,)`, tokens of each image.
            noise: `(batch, channels, h, w)`.
            num_inference_steps: see `decode`, as are the others.
            guidance_scale: see there.
            guidance: see there.

        Returns:
            Latents `(batch, channels, h, w)` in float32.

        Raises:
            UnknownNameError: see there.
            ValueError: see there.
        """
        if guidance not in GUIDANCE_KINDS:
            raise unknown_name("guidance", str(guidance), list(GUIDANCE_KINDS))
        if not isinstance(num_inference_steps, int) or isinstance(num_inference_steps, bool) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be an integer of at least 1, got {num_inference_steps!r}.")
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
        times = [i / num_inference_steps for i in range(num_inference_steps, 0, -1)]
        scales = [_checked_scale(guidance_scale(t) if callable(guidance_scale) else guidance_scale) for t in times]
        network, dtype = self.flow_decoder, self.dtype
        codes, lengths = codes.to(dtype), lengths.to(codes.device)
        modulations = network.modulations(torch.tensor(times, device=codes.device))
        conditional = network.registers(codes, lengths)
        dropped = torch.ones_like(lengths, dtype=torch.bool)
        unconditional = network.registers(codes, lengths, dropped) if any(s != 1 for s in scales) else None
        x, running = noise.to(codes.device, torch.float32), torch.zeros((), device=codes.device)
        for step, scale in enumerate(scales):
            velocity = network(x.to(dtype), *conditional, modulations[step])[0].float()
            if unconditional is not None and scale != 1:
                uncond = network(x.to(dtype), *unconditional, modulations[step])[0].float()
                if guidance == "apg":
                    velocity, running = projected_guidance(velocity, uncond, scale, running)
                else:
                    velocity = uncond + scale * (velocity - uncond)
            x = x - velocity / num_inference_steps
        return x

    # ------------------------------------------------------------ training

    def forward(
        self,
        latents: Tensor,
        num_tokens: Tensor,
        sigmas: Tensor,
        noise: Tensor,
        drop_condition: Tensor | None = None,
        hidden_block: int | None = None,
    ) -> FlowOutput:
        """Compute the rectified-flow loss with nested dropout. Everything random is passed in.

        Args:
            latents: of the VAE, `(batch, channels, h, w)`.
            num_tokens: `(batch,)`, tokens that nested dropout keeps of each image (`draw_num_tokens`).
            sigmas: `(batch,)`, noise levels in [0, 1] (`draw_sigmas`).
            noise: like `latents`.
            drop_condition: `(batch,)`, True for images that are denoised without their tokens.
            hidden_block: index of the decoder block whose patches are returned for feature alignment (REPA, Yu et al.,
                2024; published: 1).

        Raises:
            ValueError: the decoder has no block `hidden_block`.
        """
        depth = len(self.flow_decoder.blocks)
        if hidden_block is not None and not 0 <= hidden_block < depth:
            raise ValueError(f"hidden_block must lie in 0..{depth - 1}, got {hidden_block}.")
        quantized = self.quantize(self.encode_features(latents, int(num_tokens.max())))
        network = self.flow_decoder
        registers, bias = network.registers(quantized.latents, num_tokens, drop_condition)
        level = sigmas.view(-1, 1, 1, 1)
        noised = level * noise + (1 - level) * latents
        velocity, hidden = network(noised, registers, bias, network.modulations(sigmas), hidden_block)
        loss = F.mse_loss(velocity.float(), noise - latents)
        return FlowOutput(loss=loss, velocity=velocity, token_ids=quantized.token_ids, hidden_states=hidden)

    # ------------------------------------------------------------ published checkpoints

    @classmethod
    def preset(cls, name: str) -> FlexTok:
        """Build a published model by its name, with random weights: `d12_d12`, `d18_d18` or `d18_d28`.

        The sizes are the published ones. The factor of the latents is 1: checkpoints bring their own.

        Raises:
            UnknownNameError: the name is not a preset.
        """
        if name not in cls.presets:
            raise unknown_name(f"{cls.__name__} preset", name, list(cls.presets))
        return cls(**cls.presets[name])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Load an embedded model by name, a local folder or a hub repository; published repositories, too.

        Args:
            pretrained_model_name_or_path: a folder or repository in the layout of this package or in the published
                one.
            **kwargs: keywords as in diffusers; `torch_dtype`, `revision`, `cache_dir`, `token` and `local_files_only`
                for published repositories.

        Raises:
            UnknownNameError: the name is none of the three.
            CheckpointError: the configuration or the weights are absent or damaged, or do not fit each other.
            TypeError: a keyword is not one of these.
        """
        source = resolve_pretrained(cls.registry_name, pretrained_model_name_or_path)
        hub = {k: kwargs[k] for k in ("revision", "cache_dir", "token", "local_files_only") if k in kwargs}
        try:
            config = cls.load_config(source, **hub)
        except OSError:  # reported by the base class
            config = {}
        if not isinstance(config, dict) or not config.keys() & {"_target_", "config"}:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        dtype = kwargs.pop("torch_dtype", None)
        if unknown := sorted(kwargs.keys() - hub.keys()):
            raise TypeError(f"Published FlexTok repositories do not take the keywords {unknown}.")
        folder = Path(source)
        weights = folder / "model.safetensors"
        if not folder.is_dir():
            try:
                weights = Path(hf_hub_download(source, "model.safetensors", **hub))
            except OSError as error:
                raise CheckpointError(f"Cannot load {cls.__name__} from {source!r}: {error}") from error
        model = cls.from_original(weights, config)
        return model if dtype is None else model.to(dtype)

    @classmethod
    def from_original(
        cls, checkpoint: str | PathLike[str] | Mapping[str, Tensor], config: Mapping[str, Any] | None = None
    ) -> FlexTok:
        """Load a published checkpoint. Its weights may be used for research only, which is logged.

        Args:
            checkpoint: path of a `.safetensors` or pickled file (read with `weights_only=True`), or a state dict.
            config: the published configuration, a nested dict, or a dict that has it under `config`. A `.safetensors`
                file has it in its metadata, too.

        Raises:
            CheckpointError: the file cannot be read, the configuration holds something unknown that might change the
                result, or the keys or shapes do not fit it.
        """
        state = load_original(checkpoint)
        if config is None:
            config = config_of_file(checkpoint)
        # A projection for feature alignment in training.
        state = {k: v for k, v in state.items() if not (k.startswith("decoder.module_dict.") and "repa" in k)}
        settings = cls.config_from_original(config, {**PUBLISHED_VAE, **vae_shape(state)})
        with torch.device("meta"):
            model = cls(**settings)
        load_into(model, {k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        logger.warning("The published FlexTok weights may be used for research only (licence apple-amlr).")
        return model.eval()

    @classmethod
    def config_from_original(
        cls, config: Mapping[str, Any], vae_config: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Translate a published configuration into constructor arguments, without importing what it names.

        Args:
            config: the nested dict, or a dict that has it under `config`.
            vae_config: what the configuration does not say about the VAE (default: the published sizes).

        Raises:
            CheckpointError: a class or an entry is unknown, missing, or has a value that is not supported; the message
                names it.
        """
        return translate(config, PUBLISHED_VAE if vae_config is None else vae_config)


def _checked_scale(scale: Any) -> float:
    try:
        value = float(scale)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"guidance_scale must be finite and at least 0, got {scale!r}.")
    return value


PUBLISHED_VAE: dict[str, Any] = {
    "kind": "autoencoder_kl",
    "scaling_factor": 1.0,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
}

FlexTok.presets = {
    name: {
        "vae_config": PUBLISHED_VAE,
        "encoder_shape": (64 * encoder, encoder, encoder),
        "decoder_shape": (64 * decoder, decoder, decoder),
    }
    for name, encoder, decoder in (("d12_d12", 12, 12), ("d18_d18", 18, 18), ("d18_d28", 18, 28))
}
