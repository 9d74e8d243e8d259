"""Quantizers: small public modules that turn vectors into indices and back.

All compute in float32 whatever the model's dtype: rounding in bfloat16 changes indices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch import Tensor, nn


@dataclass
class QuantizerOutput(BaseOutput):
    """What a quantizer's `forward` returns.

    Attributes:
        latents: quantized vectors `(..., dim)`, straight-through in training.
        token_ids: indices `(...)`, int64.
        loss: scalar; zero for quantizers without parameters.
    """

    latents: Tensor
    token_ids: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """Nearest row of a learned codebook (van den Oord et al., 2017; with l2 norm: Yu et al., 2022).

    Args:
        codebook_size: number of rows.
        dim: length of a row.
        l2_norm: compare and return rows and inputs on the unit sphere.
        commitment_cost: weight of the loss that pulls the encoder towards the codebook; the other direction has weight
            1.

    Cost of `quantize`: one `(vectors, codebook_size)` matrix product. Ties go to the lowest index.
    """

    def __init__(self, codebook_size: int, dim: int, l2_norm: bool = False, commitment_cost: float = 0.25) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.dim = dim
        self.l2_norm = l2_norm
        self.commitment_cost = commitment_cost
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    @property
    def codebook(self) -> Tensor:
        """The rows that `dequantize` returns, `(codebook_size, dim)` in float32, normalised where `l2_norm`."""
        rows = self.embedding.weight.float()
        return F.normalize(rows, dim=-1) if self.l2_norm else rows

    def quantize(self, latents: Tensor) -> Tensor:
        """Return the index `(...)` of the row nearest to each vector of `latents` `(..., dim)`."""
        flat = latents.detach().float().reshape(-1, self.dim)
        if self.l2_norm:
            flat = F.normalize(flat, dim=-1)
        rows = self.codebook.detach()
        # |x - e|^2 without |x|^2, which does not change the argmin.
        distances = torch.addmm(rows.square().sum(-1), flat, rows.t(), alpha=-2.0)
        return distances.argmin(-1).view(latents.shape[:-1])

    def dequantize(self, token_ids: Tensor) -> Tensor:
        """Return the rows `(..., dim)` of `token_ids` `(...)` in float32."""
        rows = F.embedding(token_ids, self.embedding.weight).float()
        return F.normalize(rows, dim=-1) if self.l2_norm else rows

    def expectation(self, probs: Tensor) -> Tensor:
        """Return the mean row `(..., dim)` under `probs` `(..., codebook_size)`, normalised where `l2_norm`."""
        mean = probs.float() @ self.embedding.weight.float()
        return F.normalize(mean, dim=-1) if self.l2_norm else mean

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize `latents` `(..., dim)`: straight-through vectors, indices, and commitment plus codebook loss."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            token_ids = self.quantize(latents)
            rows = self.dequantize(token_ids)
            if self.l2_norm:
                latents = F.normalize(latents, dim=-1)
            commitment = F.mse_loss(latents, rows.detach())
            codebook = F.mse_loss(rows, latents.detach())
            straight_through = latents + (rows - latents).detach()
            return QuantizerOutput(straight_through, token_ids, self.commitment_cost * commitment + codebook)


class FSQ(nn.Module):
    """Finite scalar quantization: each dimension is bounded and rounded (Mentzer et al., 2023). No parameters.

    Args:
        levels: number of values of each dimension; the first dimension varies fastest in the index.

    Values lie in [-1, 1]. The rounding of an even number of levels is asymmetric (an offset of half a step), as
    published.
    """

    levels: Tensor
    strides: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if len(levels) == 0 or any(int(level) != level or level < 2 for level in levels):
            raise ValueError(f"FSQ levels must be integers >= 2, got {list(levels)}.")
        sizes = [int(level) for level in levels]
        strides = [math.prod(sizes[:i]) for i in range(len(sizes))]
        self.dim = len(sizes)
        self.codebook_size = math.prod(sizes)
        for name, values in (("levels", sizes), ("strides", strides)):
            buffer = torch.tensor(values)
            if buffer.is_meta:  # no checkpoint holds these, so a model built on the meta device must have their values
                buffer = torch.tensor(values, device="cpu")
            self.register_buffer(name, buffer, persistent=False)

    def _bound(self, latents: Tensor) -> Tensor:
        half = (self.levels - 1) * 1.001 / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        return torch.tanh(latents + shift) * half - offset

    def quantize(self, latents: Tensor) -> Tensor:
        """Return the index `(...)` of `latents` `(..., len(levels))`."""
        digits = self._bound(latents.detach().float()).round().long() + self.levels // 2
        return (digits * self.strides).sum(-1)

    def dequantize(self, token_ids: Tensor) -> Tensor:
        """Return the values `(..., len(levels))` of `token_ids` `(...)` in float32."""
        half = self.levels // 2
        digits = token_ids.unsqueeze(-1) // self.strides % self.levels
        return (digits - half).float() / half

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize `latents` `(..., len(levels))` straight-through; the loss is zero."""
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self._bound(latents.float())
            half = self.levels // 2
            values = (bounded + (bounded.round() - bounded).detach()) / half
            digits = bounded.detach().round().long() + half
            return QuantizerOutput(values, (digits * self.strides).sum(-1), values.new_zeros(()))
