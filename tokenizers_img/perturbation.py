"""Latent perturbation: train a tokenizer's decoder on slightly wrong codes, as generators will sample them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizers_img.quantizers import QuantizerOutput, VectorQuantizer


@dataclass(frozen=True)
class LatentPerturbation:
    """Replace some codes of some images of a batch by one of their nearest codes.

    Paper: Qiu et al., "Image Tokenizer Needs Post-Training" (RobusTok), 2025, https://arxiv.org/abs/2509.12474; there
    annealed from the defaults. Lossy by design: it is for training, and for measuring how robust a decoder is.

    Attributes:
        alpha: probability that a code of a perturbed image is replaced, in [0, 1].
        beta: share of the images of a batch that are perturbed, the first ones, rounded down, in [0, 1].
        delta: how many of the codes nearest to what the encoder said are drawn from, the nearest included.

    Raises:
        ValueError: a field is outside its range.
    """

    alpha: float = 1.0
    beta: float = 0.1
    delta: int = 100

    lossless = False

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"{name} must lie in [0, 1], received {value!r}.")
        if isinstance(self.delta, bool) or not isinstance(self.delta, int) or self.delta < 1:
            raise ValueError(f"delta must be a positive integer, received {self.delta!r}.")

    def annealed(self, progress: float) -> LatentPerturbation:
        """Return what is left at `progress` of the training, in [0, 1]: `alpha` and `delta` fall linearly to nothing.

        Raises:
            ValueError: `progress` is outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie in [0, 1], received {progress!r}.")
        left = 1 - progress
        return LatentPerturbation(self.alpha * left, self.beta, max(1, round(self.delta * left)))

    def draw(self, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw what `perturb` needs for vectors of this leading `shape`: uniforms in [0, 1) and ranks below `delta`."""
        uniforms = torch.rand(shape, generator=generator, device=generator.device)
        return uniforms, torch.randint(self.delta, shape, generator=generator, device=generator.device)

    def perturb(
        self, quantizer: VectorQuantizer, latents: Tensor, token_ids: Tensor, uniforms: Tensor, ranks: Tensor
    ) -> Tensor:
        """Return ids like `token_ids` `(batch, ...)`, some replaced.

        Args:
            quantizer: whose codebook the ids belong to.
            latents: what was quantized, `(batch, ..., dim)`; its nearest codes are drawn from.
            token_ids: `(batch, ...)` int64.
            uniforms: like `token_ids`, in [0, 1): a code is replaced where this is at most `alpha`.
            ranks: like `token_ids`, int64: which of the nearest codes replaces it, 0 for the nearest.

        Raises:
            ValueError: `delta` exceeds the codebook.
        """
        if self.delta > quantizer.codebook_size:
            raise ValueError(f"delta={self.delta} codes were asked for; the codebook has {quantizer.codebook_size}.")
        chosen = uniforms <= self.alpha
        chosen[int(len(token_ids) * self.beta) :] = False
        if self.alpha == 0 or not bool(chosen.any()):
            return token_ids
        flat = latents.detach().float()[chosen]
        codebook = quantizer.codebook.detach()
        if quantizer.l2_norm:
            flat = torch.nn.functional.normalize(flat, dim=-1)
        distances = torch.addmm(codebook.square().sum(-1), flat, codebook.t(), alpha=-2.0)
        nearest = distances.topk(self.delta, dim=-1, largest=False).indices
        replaced = token_ids.clone()
        replaced[chosen] = nearest.gather(1, ranks[chosen][:, None])[:, 0]
        return replaced

    def apply(
        self, quantizer: VectorQuantizer, latents: Tensor, quantized: QuantizerOutput, generator: torch.Generator
    ) -> Tensor:
        """Return the straight-through vectors `(batch, ..., dim)` of perturbed codes, for the decoder in training.

        Args:
            quantizer: which made `quantized`.
            latents: what it quantized, `(batch, ..., dim)`.
            quantized: its output; the losses in it stay those of the right codes.
            generator: source of the perturbation.
        """
        uniforms, ranks = (draw.to(latents.device) for draw in self.draw(quantized.token_ids.shape, generator))
        replaced = self.perturb(quantizer, latents, quantized.token_ids, uniforms, ranks)
        wrong = quantizer.dequantize(replaced) - quantizer.dequantize(quantized.token_ids)
        return quantized.latents + wrong.detach()
