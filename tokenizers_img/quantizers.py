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

from mmsdk.decoding.rules.lantern import nearest_codes


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
        self._nearest: tuple[object, Tensor] | None = None

    @property
    def codebook(self) -> Tensor:
        """The rows that `dequantize` returns, `(codebook_size, dim)` in float32, normalised where `l2_norm`."""
        rows = self.embedding.weight.float()
        return F.normalize(rows, dim=-1) if self.l2_norm else rows

    def nearest_codes(self, k: int) -> Tensor:
        """Return the `k` codes nearest to each, without itself, `(codebook_size, k)` int64; see `nearest_codes`.

        Computed once, and again where `k` is larger or the codebook has changed.

        Raises:
            ValueError: `k` is not 1 to `codebook_size - 1`.
        """
        weight = self.embedding.weight
        state = (weight.data_ptr(), weight._version, weight.device)
        if self._nearest is None or self._nearest[0] != state or not 1 <= k <= self._nearest[1].shape[1]:
            self._nearest = (state, nearest_codes(self.codebook.detach(), k))
        return self._nearest[1][:, :k]

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


class GaussianQuantizer(nn.Module):
    """Scalar quantization of normally distributed values (TokenBridge; Wang et al., 2025). No parameters.

    Each number becomes the index of the nearest level. The levels are the means of the parts between the quantiles
    `k / 2 ** bits` of the standard normal distribution, which is cut off at 3 standard deviations and stretched to
    `value_range`. What lies beyond the range goes to the outermost levels.

    Cost: a binary search for each number. Ties go to the lowest index. The tables are those of the published code, bit
    for bit: quantiles in float64, all else in float32.

    Args:
        bits: bits of an index, 1 to 8.
        value_range: values from minus to plus this number cover the distribution.

    Raises:
        ValueError: `bits` or `value_range` is outside its range.
    """

    _STD_RANGE = 3.0

    def __init__(self, bits: int = 6, value_range: float = 5.0) -> None:
        super().__init__()
        if not isinstance(bits, int) or not 1 <= bits <= 8:
            raise ValueError(
                f"bits must be an integer from 1 to 8, got {bits!r}: with more, the outermost parts of the cut off "
                "distribution become too narrow for float32."
            )
        if not 0 < value_range < math.inf:
            raise ValueError(f"value_range must be positive and finite, got {value_range!r}.")
        self.codebook_size = 2**bits
        self.value_range = value_range
        quantiles = torch.linspace(0, 1, self.codebook_size + 1, dtype=torch.float64, device="cpu")
        bounds = torch.special.ndtri(quantiles).float().clamp(-self._STD_RANGE, self._STD_RANGE)
        density = torch.exp(-bounds * bounds / 2) / math.sqrt(2 * math.pi)
        cumulative = 0.5 * (1 + torch.erf(bounds / math.sqrt(2)))
        # Plain attributes, not buffers: casting the model must not round them, and building it on the meta device must
        # not lose them.
        self.boundaries = bounds
        self.centroids = (density[:-1] - density[1:]) / (cumulative[1:] - cumulative[:-1])
        self.levels = (self.centroids + self._STD_RANGE) / (2 * self._STD_RANGE) * (2 * value_range) - value_range

    def quantize(self, latents: Tensor) -> Tensor:
        """Return the index of the level nearest to each number of `latents`, int64 of the same shape."""
        values, limit = latents.detach().float().contiguous(), self.value_range
        scaled = (values + limit) / (2 * limit) * (2 * self._STD_RANGE) - self._STD_RANGE
        scaled = scaled.clamp(-self._STD_RANGE, self._STD_RANGE)
        centroids = self.centroids.to(values.device)
        above = torch.bucketize(scaled, centroids).clamp(1, self.codebook_size - 1)
        return above - (scaled - centroids[above - 1] <= centroids[above] - scaled).long()

    def dequantize(self, token_ids: Tensor) -> Tensor:
        """Return the levels of `token_ids`, float32 of the same shape."""
        return self.levels.to(token_ids.device)[token_ids]

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize `latents` straight-through, one index for each number; the loss is zero."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            token_ids = self.quantize(latents)
            values = latents + (self.dequantize(token_ids) - latents).detach()
            return QuantizerOutput(values, token_ids, values.new_zeros(()))
