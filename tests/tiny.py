"""Tiny real models, built in milliseconds, that the tests share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import PreTrainedTokenizerFast

from generators.flowar import FlowAR
from generators.llamagen import LlamaGen
from generators.mar import MAR
from generators.pipelines import ARImagePipeline
from generators.token_shuffle import TokenShuffle
from generators.tokenbridge_ar import TokenBridgeAR
from generators.xar import XAR
from mmsdk.data.captions import train_caption_tokenizer
from mmsdk.training.generator_recipes import tiny_text_encoder
from tokenizers_img.base import ImageTokenizer
from tokenizers_img.flextok import FlexTok
from tokenizers_img.one_d_piece import OneDPiece
from tokenizers_img.tokenbridge import TokenBridge
from tokenizers_img.vae import KLVAE
from tokenizers_img.vq import VQ

CONDITION_TOKENS = 6


def tiny_vq(seed: int = 0) -> VQ:
    """4 x 4 tokens of a codebook of 32 for 16 x 16 images."""
    torch.manual_seed(seed)
    return VQ(
        channels=8,
        channel_mult=(1, 1, 2),
        num_res_blocks=1,
        z_channels=8,
        codebook_size=32,
        codebook_dim=4,
        image_size=16,
        norm_num_groups=4,
    ).eval()


def tiny_one_d_piece(seed: int = 0) -> OneDPiece:
    """8 tokens of a codebook of 32 for 16 x 16 images, any prefix of which decodes."""
    torch.manual_seed(seed)
    return OneDPiece(
        image_size=16,
        patch_size=4,
        num_latent_tokens=8,
        encoder_shape=(16, 1, 2),
        decoder_shape=(16, 1, 2),
        codebook_size=32,
        token_size=4,
        is_legacy=False,
    ).eval()


def tiny_flextok(seed: int = 0) -> FlexTok:
    """8 ordered tokens of a codebook of 40 for 16 x 16 images; no layer is zero, as some are before training."""
    torch.manual_seed(seed)
    vae = {"kind": "autoencoder_kl", "scaling_factor": 0.5, "latent_channels": 4, "norm_num_groups": 4}
    model = FlexTok(
        image_size=16,
        vae_config=vae | {"block_out_channels": (8, 8), "layers_per_block": 1},
        num_registers=8,
        encoder_shape=(16, 2, 2),
        decoder_shape=(16, 2, 2),
        fsq_levels=(8, 5),
    )
    for parameter in model.parameters():
        if parameter.ndim == 2 and not bool(parameter.any()):
            torch.nn.init.xavier_uniform_(parameter)
    return model.eval()


def tiny_vae(seed: int = 0) -> KLVAE:
    """8 x 8 tokens of 4 numbers for 16 x 16 images."""
    torch.manual_seed(seed)
    return KLVAE(
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(1,),
        latent_channels=4,
        image_size=16,
        scaling_factor=0.5,
        norm_num_groups=4,
    ).eval()


def tiny_autoencoder_kl(seed: int = 0) -> AutoencoderKL:
    """8 x 8 latents of 4 numbers for 16 x 16 images."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.1,
    ).eval()


def tiny_tokenbridge(vae: KLVAE | AutoencoderKL | None = None, bits: int = 4) -> TokenBridge:
    """8 x 8 tokens of 4 channels for 16 x 16 images, over `tiny_vae` (default) or another VAE, all levels in use."""
    model = TokenBridge(vae or tiny_vae(), bits=bits)
    model.fit_scale(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def caption_tokenizer() -> PreTrainedTokenizerFast:
    """Knows a few words, and every letter."""
    return train_caption_tokenizer(["red heart", "green apple", "cat face", "pizza"] * 3, 120, CONDITION_TOKENS)


def randomised(transformer: LlamaGen, seed: int = 0) -> LlamaGen:
    """Give the output layer, which starts at zero, weights that make every token depend on what came before."""
    torch.manual_seed(seed)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return transformer.eval()


def tiny_pipeline(image_tokenizer: ImageTokenizer | None = None, condition: str = "text") -> ARImagePipeline:
    """A pipeline with random weights over `tiny_vq` (default) or another tokenizer."""
    image_tokenizer = image_tokenizer or tiny_vq()
    torch.manual_seed(1)
    captions = caption_tokenizer() if condition == "text" else None
    text_encoder = tiny_text_encoder(len(captions), dim=16, num_layers=1).eval() if captions else None
    transformer = LlamaGen(
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        multiple_of=8,
        codebook_size=32,
        max_tokens=image_tokenizer.max_tokens,
        condition=condition,
        num_classes=None if condition == "text" else 5,
        caption_dim=16 if condition == "text" else None,
        num_condition_tokens=CONDITION_TOKENS if condition == "text" else 1,
        positions="learned",
    )
    presets = {"default": {"guidance_scale": 2.0}}
    pipeline = ARImagePipeline(randomised(transformer), image_tokenizer, text_encoder, captions, presets)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_latent_pipeline(transformer: Any = None, image_tokenizer: ImageTokenizer | None = None) -> ARImagePipeline:
    """A pipeline with random weights over `tiny_vae` or another tokenizer: a text-conditional MAR or another generator.

    Args:
        transformer: the generator.
        image_tokenizer: decodes what it writes.
    """
    captions = caption_tokenizer()
    torch.manual_seed(1)
    text_encoder = tiny_text_encoder(len(captions), dim=16, num_layers=1).eval()
    if transformer is None:
        sizes = {"grid_size": 8, "patch_size": 2, "latent_channels": 4, "buffer_size": CONDITION_TOKENS}
        transformer = tiny_mar(**sizes, condition="text", num_classes=None, caption_dim=16)
    # Without timesteps near pure noise, where a random head divides by almost nothing.
    calm = {"upper": 4, "lower": 4, "strategy": "constant"}
    presets = {"default": {"annealing": calm, "guidance_scale": 2.0}} if isinstance(transformer, MAR) else None
    pipeline = ARImagePipeline(transformer.eval(), image_tokenizer or tiny_vae(), text_encoder, captions, presets)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_xar(seed: int = 0, std: float = 0.3, **overrides: Any) -> XAR:
    """2 x 2 cells of 2 x 2 latents of 3 numbers, 5 classes; no layer is zero, as some are before training."""
    sizes: dict[str, Any] = {"hidden_size": 16, "encoder_layers": 1, "decoder_layers": 2, "num_heads": 2}
    sizes |= {"grid_size": 4, "cell_size": 2, "latent_channels": 3, "num_classes": 5}
    return _scattered(XAR(**(sizes | overrides)), seed, std)


def tiny_flowar(seed: int = 0, std: float = 0.1, **overrides: Any) -> FlowAR:
    """Scales of 1, 2 and 4 latents along each side, of 3 numbers, 5 classes; no layer is zero."""
    sizes: dict[str, Any] = {"hidden_size": 16, "encoder_layers": 1, "decoder_layers": 2, "num_heads": 2}
    sizes |= {"head_width": 64, "head_depth": 2, "scales": (1, 2, 4), "latent_channels": 3, "num_classes": 5}
    return _scattered(FlowAR(**(sizes | overrides)), seed, std)


def tiny_mar(seed: int = 0, std: float = 0.2, **overrides: Any) -> MAR:
    """4 x 4 tokens of 3 numbers, 5 classes or captions of 6 features, 3 condition tokens; no layer is zero."""
    sizes: dict[str, Any] = {"grid_size": 4, "latent_channels": 3, "encoder_shape": (16, 1, 2)}
    sizes |= {"decoder_shape": (24, 2, 2), "head_shape": (20, 2), "num_classes": 5, "buffer_size": 3}
    if overrides.get("condition") == "text":
        sizes |= {"num_classes": None, "caption_dim": 6}
    return _scattered(MAR(**(sizes | overrides)), seed, std)


def tiny_token_shuffle(seed: int = 0, **overrides: Any) -> TokenShuffle:
    """4 x 4 tokens of 32 ids in windows of 2 x 2, 5 classes or captions of 16 features."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "multiple_of": 8, "max_tokens": 16}
    sizes |= {"codebook_size": 32, "num_classes": 5}
    if overrides.get("condition") == "text":
        sizes |= {"num_classes": None, "caption_dim": 16, "num_condition_tokens": CONDITION_TOKENS}
    torch.manual_seed(seed)
    return randomised(TokenShuffle(**(sizes | overrides)), seed)


def tiny_tokenbridge_ar(seed: int = 0, std: float = 0.3, **overrides: Any) -> TokenBridgeAR:
    """4 x 4 tokens of 3 indices of 3 bits, 5 classes or captions of 6 features, which matter; no layer is zero."""
    sizes: dict[str, Any] = {"grid_size": 4, "latent_channels": 3, "encoder_shape": (16, 1, 2), "bits": 3}
    sizes |= {"decoder_shape": (24, 2, 2), "head_shape": (16, 2, 2), "channel_order": (2, 0, 1), "buffer_size": 3}
    kinds = {"class": {"num_classes": 5}, "text": {"num_classes": None, "caption_dim": 6}}
    sizes |= kinds[overrides.get("condition", "class")]
    model = _scattered(TokenBridgeAR(**(sizes | overrides)), seed, std)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm) and module.elementwise_affine:
            torch.nn.init.normal_(module.weight, mean=1.0, std=std)  # around 0, they would hide the condition
    return model


def _scattered(model: Any, seed: int, std: float) -> Any:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()
