"""One-D-Piece: a 1D tokenizer whose every prefix is an image (Miwa et al., 2025)."""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for it when it loads a pipeline
from torch import Tensor

from tokenizers_img.quantizers import QuantizerOutput
from tokenizers_img.titok import MODEL_SIZES, PUBLISHED_PIXEL_DECODER, TiTok


class OneDPiece(TiTok):
    """TiTok trained with tail token drop: the first k tokens, for any k, decode to the whole image. Lossy.

    The arguments are those of `TiTok`. Images of one batch may have different numbers of tokens.
    """

    registry_name = "one_d_piece"
    ordered = True

    def forward(self, images: Tensor, num_tokens: int | None = None) -> tuple[Tensor, QuantizerOutput]:
        """Reconstruct `images` `(batch, 3, H, W)` in [0, 1] from their first `num_tokens` tokens, for training."""
        quantized = self._quantized(images)
        return self.decode_latents(quantized.latents[:, :num_tokens]), quantized


def _published(size: str) -> dict[str, Any]:
    return {
        "num_latent_tokens": 256,
        "encoder_shape": MODEL_SIZES[size],
        "decoder_shape": MODEL_SIZES[size],
        "pixel_decoder_config": PUBLISHED_PIXEL_DECODER,
    }


OneDPiece.presets = {"s256": _published("small"), "b256": _published("base"), "l256": _published("large")}
