"""Recipes of the embedded tokenizers."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsdk.data.emoji import EmojiDataset
from mmsdk.images import image_grid, tensor_to_pil
from mmsdk.training.alignment import FeatureAlignment
from mmsdk.training.loop import Recipe, TrainingConfig
from tokenizers_img.flextok import EncoderBlock, FlexTok, draw_num_tokens, draw_sigmas
from tokenizers_img.one_d_piece import OneDPiece
from tokenizers_img.perturbation import LatentPerturbation
from tokenizers_img.quantizers import VectorQuantizer
from tokenizers_img.titok import Block
from tokenizers_img.vae import KLVAE, vae_config
from tokenizers_img.vq import VQ


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Return the PSNR in dB of each image `(batch, 3, H, W)` in [0, 1]; `images` are clamped and rounded to 8 bits."""
    rounded = (images.float().clamp(0, 1) * 255).round() / 255
    return -10 * torch.log10((rounded - references).square().flatten(1).mean(1).clamp(min=1e-10))


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 `(batch, H, W, 3)` into float `(batch, 3, H, W)` in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255.0


class CodeReviver:
    """Re-seats codes that a window of training batches left unused on encoder outputs of the last batch.

    Without it most of a codebook is never used: a code far from all data gets no gradient.
    """

    def __init__(self, quantizer: VectorQuantizer, every: int, until: int) -> None:
        self.quantizer = quantizer
        self.every = every
        self.until = until
        self.counts = torch.zeros(quantizer.codebook_size, dtype=torch.long)

    def observe(self, token_ids: Tensor) -> None:
        """Count the codes of one batch."""
        self.counts += torch.bincount(token_ids.flatten(), minlength=self.quantizer.codebook_size)

    def step(self, step: int, latents: Tensor) -> int:
        """Revive unused codes at the end of each window; return how many."""
        if (step + 1) % self.every or step >= self.until:
            return 0
        unused = (self.counts == 0).nonzero().flatten()
        rows = latents.detach().float().reshape(-1, self.quantizer.dim)
        if self.quantizer.l2_norm:
            rows = F.normalize(rows, dim=-1)
        unused = unused[: len(rows)]
        chosen = torch.randperm(len(rows))[: len(unused)]
        with torch.no_grad():
            self.quantizer.embedding.weight[unused] = rows[chosen]
        self.counts.zero_()
        return len(unused)


class PixelRecipe(Recipe):
    """What the convolutional tokenizers of `emoji-64` share: they learn pixels, from images and their mirror images.

    Args:
        config: shared hyper-parameters.
    """

    def __init__(self, config: TrainingConfig | None = None) -> None:
        self.config = config or TrainingConfig(
            steps=3800,
            batch_size=16,
            learning_rate=2e-3,
            weight_decay=1e-4,
            warmup_steps=100,
            decay_fraction=0.4,
            ema_decay=0.998,
            mixed_precision="bf16",
            checkpoint_every=400,
            evaluate_every=400,
        )

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the model, not trained."""

    @abstractmethod
    def reconstruct(self, module: Any, images: Tensor) -> Tensor:
        """Encode and decode `images` `(batch, 3, H, W)` as users will."""

    def setup(self) -> nn.Module:
        """Load the images and build the model."""
        self.images = torch.from_numpy(EmojiDataset("train").images)
        self.held_out = torch.from_numpy(EmojiDataset("test").images)
        return self.build()

    def batch(self, step: int, rng: random.Random) -> Tensor:
        """Return uint8 images, half of them mirrored."""
        rows = torch.tensor([rng.randrange(len(self.images)) for _ in range(self.config.batch_size)])
        flips = torch.tensor([rng.random() < 0.5 for _ in rows])
        images = self.images[rows]
        return torch.where(flips[:, None, None, None], images.flip(2), images)

    def evaluate(self, module: Any, folder: Path) -> dict[str, float]:
        """PSNR on held-out emoji."""
        held_out = [to_float(rows) for rows in self.held_out.split(64)]
        return {"psnr": float(torch.cat([psnr(self.reconstruct(module, x), x) for x in held_out]).mean())}

    def save(self, module: Any, folder: Path) -> None:
        """Write a `from_pretrained` folder."""
        module.save_pretrained(folder)


class VQRecipe(PixelRecipe):
    """The 8 x 8 grid tokenizer of `emoji-64`.

    Args:
        config: shared hyper-parameters.
        perturbation: fields of a `LatentPerturbation` that falls to nothing in the course of the training, `{}` for its
            defaults; None for none, as the embedded model was trained.

    Attributes:
        channel_mult: widths of the resolutions, as multiples of 16; each but the last is halved.
        codebook_size: number of codes.
    """

    name = "vq"
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    codebook_size = 4096

    def __init__(self, config: TrainingConfig | None = None, perturbation: Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        self.perturbation = None if perturbation is None else LatentPerturbation(**perturbation)

    def build(self) -> nn.Module:
        """Return the model, and watch its codes."""
        model = VQ(
            channels=16,
            channel_mult=self.channel_mult,
            num_res_blocks=1,
            z_channels=64,
            codebook_size=self.codebook_size,
            codebook_dim=8,
            image_size=64,
            norm_num_groups=8,
        )
        self.reviver = CodeReviver(model.quantize, every=50, until=int(0.6 * self.config.steps))
        return model

    def loss(self, module: Any, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared plus absolute error, and the quantizer's losses."""
        images = to_float(batch)
        latents = module.encode_latents(images)
        quantized = module.quantize(latents)
        shown = quantized.latents
        if self.perturbation is not None:
            generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + step)
            current = self.perturbation.annealed(step / self.config.steps)
            shown = current.apply(module.quantize, latents, quantized, generator)
        decoded = module.decode_latents(shown)
        self.latents = quantized.latents
        self.reviver.observe(quantized.token_ids)
        mse = F.mse_loss(decoded.float(), images)
        loss = 4 * mse + 0.4 * F.l1_loss(decoded.float(), images) + quantized.loss
        return loss, {"mse": mse.detach(), "quantizer": quantized.loss.detach()}

    def after_step(self, module: Any, step: int) -> None:
        """Revive unused codes."""
        self.reviver.step(step, self.latents)

    def reconstruct(self, module: Any, images: Tensor) -> Tensor:
        """Decode the nearest codes."""
        ids = module.quantize.quantize(module.encode_latents(images))
        self.used |= set(ids.flatten().tolist())
        return module.decode_latents(module.quantize.dequantize(ids))

    def evaluate(self, module: Any, folder: Path) -> dict[str, float]:
        """PSNR and codebook use on held-out emoji."""
        self.used: set[int] = set()
        return super().evaluate(module, folder) | {"codes_used": len(self.used)}


class FineVQRecipe(VQRecipe):
    """A 16 x 16 grid tokenizer with fewer codes, whose long sequences Token-Shuffle shortens."""

    name = "vq_fine"
    channel_mult = (1, 3, 6)
    codebook_size = 1024


class KLVAERecipe(PixelRecipe):
    """The continuous tokenizer of `emoji-64`: 8 x 8 tokens of 8 numbers, which TokenBridge, FlexTok and MAR work on.

    Attributes:
        kl_weight: weight of the KL divergence of one number of a latent.
    """

    name = "vae"
    kl_weight = 2e-4

    def build(self) -> nn.Module:
        """Return the model, with the resolutions of the grid tokenizer."""
        return KLVAE(
            channels=16,
            channel_mult=(1, 2, 4, 8),
            num_res_blocks=1,
            attention_levels=(3,),
            latent_channels=8,
            image_size=64,
            norm_num_groups=8,
        )

    def loss(self, module: Any, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared plus absolute error of a sample, and the divergence from the standard normal distribution."""
        images = to_float(batch)
        decoded, posterior = module(images, torch.Generator().manual_seed(step))
        mse = F.mse_loss(decoded.float(), images)
        divergence = posterior.loss / posterior.mean[0].numel()
        loss = 4 * mse + 0.4 * F.l1_loss(decoded.float(), images) + self.kl_weight * divergence
        return loss, {"mse": mse.detach(), "kl": divergence.detach()}

    def reconstruct(self, module: Any, images: Tensor) -> Tensor:
        """Decode the mode of the posterior."""
        return module.decode_latents(module.encode_latents(images))

    def save(self, module: Any, folder: Path) -> None:
        """Write a `from_pretrained` folder whose scaled latents have variance 1."""
        latents = torch.cat([module.posterior(to_float(rows))[0] for rows in self.held_out.split(64)])
        module.register_to_config(scaling_factor=1 / float(latents.std()))
        module.save_pretrained(folder)


def initialise_registers(model: OneDPiece) -> None:
    """Start the 1D tokenizer where small budgets suffice.

    Queries and keys start equal, so that attention begins at what is alike; the second half of the tokens starts at
    the positions of the patches, in encoder and decoder, while the first half stays free for what is global; and the
    projection to the quantizer starts at a scale that uses all levels without saturating them.
    """
    count = model.max_tokens // 2
    for part in (model.encoder, model.decoder):
        width = part.positional_embedding.shape[1]
        for block in part.transformer.children():
            query_key_value: Tensor = cast(Block, block).attn.in_proj_weight.data
            query_key_value[:width].normal_(std=width**-0.5)
            query_key_value[width : 2 * width] = query_key_value[:width]
        nn.init.normal_(part.positional_embedding, std=0.3)
        nn.init.normal_(part.latent_token_positional_embedding, std=0.3)
        patches = part.positional_embedding.data[1:]
        part.latent_token_positional_embedding.data[count:] = patches[
            torch.arange(model.max_tokens - count) % len(patches)
        ]
    nn.init.normal_(model.encoder.conv_out.weight, std=1.25 * model.latent_tokens.shape[1] ** -0.5)


class OneDPieceRecipe(Recipe):
    """The 64-token One-D-Piece tokenizer of `emoji-64`, over the latents of the grid tokenizer.

    Most of the training predicts latents that are computed once; the last part trains through the grid tokenizer's
    decoder on pixels.

    Args:
        config: shared hyper-parameters.
        codec_source: folder or embedded name of the trained grid tokenizer.
    """

    name = "one_d_piece"
    pixel_fraction = 0.25

    def __init__(self, config: TrainingConfig | None = None, codec_source: str | Path = "emoji-64") -> None:
        self.codec_source = codec_source
        self.config = config or TrainingConfig(
            steps=2900,
            batch_size=16,
            learning_rate=1e-3,
            muon_learning_rate=2e-3,
            weight_decay=1e-3,
            warmup_steps=200,
            decay_fraction=0.4,
            ema_decay=0.998,
            mixed_precision="no",
            checkpoint_every=500,
            evaluate_every=1000,
        )

    def setup(self) -> nn.Module:
        """Compute the latents of all images and their mirror images, and build the model around the trained codec."""
        codec = VQ.from_pretrained(self.codec_source)
        settings = {k: v for k, v in codec.config.items() if not k.startswith("_")}
        model = OneDPiece(
            image_size=64,
            patch_size=2,
            num_latent_tokens=64,
            encoder_shape=(192, 2, 3),
            decoder_shape=(192, 4, 3),
            quantize_mode="fsq",
            fsq_levels=(8, 8, 8, 8),
            token_size=4,
            is_legacy=False,
            codec_config=settings,
        )
        initialise_registers(model)
        model.codec.load_state_dict(codec.state_dict())
        model.codec.encoder.requires_grad_(False)
        model.codec.quant_conv.requires_grad_(False)
        model.codec.quantize.requires_grad_(False)
        images = torch.from_numpy(EmojiDataset("train").images)
        self.images = torch.cat([images, images.flip(2)])
        self.held_out = torch.from_numpy(EmojiDataset("test").images)
        with torch.no_grad():
            self.latents = torch.cat([model._to_input(to_float(rows)) for rows in self.images.split(64)])
        return model

    def muon_parameters(self, module: Any) -> list[nn.Parameter]:
        """Return the matrices of the transformer blocks."""
        blocks = [*module.encoder.transformer, *module.decoder.transformer]
        return [p for block in blocks for p in block.parameters() if p.ndim == 2]

    def batch(self, step: int, rng: random.Random) -> tuple[Tensor, Tensor, int]:
        """Return latents, uint8 images, and how many tokens to keep: all (one batch in four) or any number."""
        rows = torch.tensor([rng.randrange(len(self.images)) for _ in range(self.config.batch_size)])
        keep = 64 if rng.random() < 0.25 else rng.randint(1, 64)
        return self.latents[rows], self.images[rows], keep

    def loss(self, module: Any, batch: tuple[Tensor, Tensor, int], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the latents; towards the end, of the pixels."""
        latents, images, keep = batch
        quantized = module.quantize(module.encode_features(latents))
        predicted = module.decode_features(quantized.latents[:, :keep]).float()
        latent_loss = F.mse_loss(predicted, latents)
        if step < (1 - self.pixel_fraction) * self.config.steps:
            return 8 * latent_loss, {"latent_mse": latent_loss.detach()}
        decoded = module.codec.decode_latents(predicted.permute(0, 2, 3, 1)).float()
        target = to_float(images)
        mse = F.mse_loss(decoded, target)
        loss = 0.5 * latent_loss + 16 * mse + F.l1_loss(decoded, target)
        return loss, {"latent_mse": latent_loss.detach(), "mse": mse.detach()}

    def evaluate(self, module: Any, folder: Path) -> dict[str, float]:
        """PSNR of prefixes on held-out emoji, and codebook use."""
        scores: dict[int, list[Tensor]] = {k: [] for k in (1, 2, 4, 8, 16, 32, 64)}
        used: set[int] = set()
        for rows in self.held_out.split(64):
            images = to_float(rows)
            ids = module.quantize.quantize(module.encode_latents(images))
            used |= set(ids.flatten().tolist())
            for k, values in scores.items():
                values.append(psnr(module.decode_latents(module.quantize.dequantize(ids[:, :k])), images))
        return {f"psnr_{k}": float(torch.cat(v).mean()) for k, v in scores.items()} | {"codes_used": len(used)}

    def save(self, module: Any, folder: Path) -> None:
        """Write a `from_pretrained` folder."""
        module.save_pretrained(folder)


def initialise_flextok(model: FlexTok) -> None:
    """Start where small budgets suffice, as `initialise_registers` does for One-D-Piece."""
    encoder, decoder = model.register_encoder, model.flow_decoder
    for network in (encoder.enc_transformer, decoder.dec_transformer):
        for block in cast(nn.ModuleList, network["blocks"]):
            attention = cast(EncoderBlock, block).attn
            nn.init.normal_(attention.wq.weight, std=attention.wq.in_features**-0.5)
            attention.wk.weight.data.copy_(attention.wq.weight)
    registers = encoder.enc_register_module["registers"].data
    count = model.max_tokens // 2
    for table, target in (
        (encoder.enc_posemb_module["posembs"], registers),
        (decoder.dec_patches_posemb_module["posembs"], decoder.dec_registers_posemb_module["posembs"].data[0, 0].mT),
    ):
        patches = table.flatten(2)[0].mT
        target.normal_(std=0.3)
        target[count:] = patches[torch.arange(model.max_tokens - count) % len(patches)]
    nn.init.normal_(encoder.enc_to_latents["proj"].weight, std=1.25 * registers.shape[1] ** -0.5)


class AlignedFlexTok(nn.Module):
    """A FlexTok in training, with what aligns its decoder to a pretrained vision model (None: nothing)."""

    def __init__(self, model: FlexTok, alignment: FeatureAlignment | None) -> None:
        super().__init__()
        self.model = model
        self.alignment = alignment


class FlexTokRecipe(Recipe):
    """The 32-token FlexTok of `emoji-64`, over the latents of the embedded KL VAE.

    It learns in two stages. First the decoder predicts the latents from the tokens alone, without noise, which teaches
    the encoder in a few thousand steps what to say; the flow loss takes many times as long, for noised latents
    tell the decoder much of what tokens could. Then the encoder is frozen, and the decoder learns the flow.

    Args:
        config: shared hyper-parameters.
        vae_source: folder or embedded name of the trained VAE.
        align_with: timm ViT whose features the decoder's patches should resemble (REPA), a name or a model; its
            weights are fetched. None for no alignment, as the embedded model was trained.
        align_weight: weight of that loss.

    Attributes:
        token_steps: steps of the first stage.
        condition_dropout: share of images that are denoised without their tokens, for guidance.
        align_block: index of the decoder block whose patches are aligned, as published.
    """

    name = "flextok"
    token_steps = 2600
    condition_dropout = 0.1
    align_block = 1

    def __init__(
        self,
        config: TrainingConfig | None = None,
        vae_source: str | Path = "emoji-64",
        align_with: str | nn.Module | None = None,
        align_weight: float = 0.5,
    ) -> None:
        self.vae_source = vae_source
        self.align_with = align_with
        self.align_weight = align_weight
        self.config = config or TrainingConfig(
            steps=13000,
            batch_size=32,
            learning_rate=1e-3,
            muon_learning_rate=2e-3,
            weight_decay=1e-3,
            warmup_steps=200,
            decay_fraction=0.35,
            ema_decay=0.999,
            mixed_precision="bf16",
            checkpoint_every=200,
            evaluate_every=13000,
        )

    def _learns_tokens(self, step: int) -> bool:
        return step < self.token_steps

    def setup(self) -> nn.Module:
        """Compute the latents of all images and their mirror images, and build the model around the trained VAE."""
        vae = KLVAE.from_pretrained(self.vae_source)
        model = FlexTok(
            image_size=64,
            vae_config=vae_config(vae),
            patch_size=2,
            num_registers=32,
            encoder_shape=(192, 3, 3),
            decoder_shape=(192, 6, 3),
            fsq_levels=(8, 8, 8, 8),
        )
        initialise_flextok(model)
        model.vae.load_state_dict(vae.state_dict())
        model.vae.requires_grad_(False)
        images = torch.from_numpy(EmojiDataset("train").images)
        self.images = torch.cat([images, images.flip(2)])
        self.held_out = torch.from_numpy(EmojiDataset("test").images)[:96]
        with torch.no_grad():
            self.latents = torch.cat([model.encode_latents(to_float(rows)) for rows in self.images.split(64)])
        alignment = None
        if self.align_with is not None:
            alignment = FeatureAlignment(self.align_with, model.config.decoder_shape[0])
        return AlignedFlexTok(model, alignment)

    def muon_parameters(self, module: Any) -> list[nn.Parameter]:
        """Return the matrices of attention and feed-forward layers."""
        networks = (module.model.register_encoder.enc_transformer, module.model.flow_decoder.dec_transformer)
        return [
            p
            for network in networks
            for name, p in network.named_parameters()
            if p.ndim == 2 and "adaLN_modulation" not in name
        ]

    def batch(self, step: int, rng: random.Random) -> dict[str, Tensor]:
        """Return latents and everything random: tokens to keep, noise levels, noise, and conditions to drop."""
        size = self.config.batch_size
        rows = [rng.randrange(len(self.latents)) for _ in range(size)]
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        latents = self.latents[rows]
        batch = {
            "latents": latents,
            "num_tokens": torch.tensor(draw_num_tokens(size, 32, rng)),
            "sigmas": draw_sigmas(size, generator),
            "noise": torch.randn(latents.shape, generator=generator),
            "drop_condition": torch.rand(size, generator=generator) < self.condition_dropout,
        }
        if self._learns_tokens(step):
            batch |= {"sigmas": torch.ones(size), "noise": torch.zeros_like(latents)}
            batch |= {"drop_condition": torch.zeros(size, dtype=torch.bool)}
        return batch if self.align_with is None else batch | {"images": self.images[rows]}

    def loss(self, module: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared error of the velocity, and the alignment's loss where there is one."""
        module.model.register_encoder.requires_grad_(self._learns_tokens(step))
        images = batch.pop("images", None)
        if images is None:
            return module.model(**batch).loss, {}
        output = module.model(**batch, hidden_block=self.align_block)
        alignment = module.alignment(output.hidden_states, to_float(images))
        return output.loss + self.align_weight * alignment, {"cosine": -alignment.detach()}

    def evaluate(self, module: Any, folder: Path) -> dict[str, float]:
        """PSNR of prefixes on held-out emoji, and a sheet of what they are decoded to."""
        images = to_float(self.held_out)
        model = module.model
        tokens = model.encode(images)
        scores, rows = {}, [images[:12]]
        for count in (1, 2, 4, 8, 16, 32):
            decoded = model.decode(tokens.truncate(count), num_inference_steps=10, guidance_scale=2.0).images
            scores[f"psnr_{count}"] = float(psnr(decoded, images).mean())
            rows.append(decoded[:12])
        image_grid(tensor_to_pil(F.interpolate(torch.cat(rows), scale_factor=2)), columns=12).save(
            folder / "samples.png"
        )
        return scores | {"codes_used": float(tokens.token_ids.unique().numel())}

    def save(self, module: Any, folder: Path) -> None:
        """Write a `from_pretrained` folder."""
        module.model.save_pretrained(folder)
