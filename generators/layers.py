"""Layers that the generators share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW_ROWS = 4
_LARGE_MATRIX = 2**19  # below, the saving is lost to the additional operations


class Linear(nn.Linear):
    """`nn.Linear`, faster without bias for the few rows of a decoding step on a CPU.

    The usual product `x W^T` takes about as long there for 2 rows as for 16; `W x^T` takes a fraction of that for up to
    4 rows and a large matrix. Results differ by float32 rounding. In all other cases it is `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the base class
        """Map `(..., in_features)` to `(..., out_features)`."""
        rows = input.numel() // self.in_features
        if (
            rows > _FEW_ROWS
            or self.weight.numel() < _LARGE_MATRIX
            or self.bias is not None
            or self.weight.device.type != "cpu"
            or self.weight.dtype != torch.float32
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        columns = input.reshape(rows, self.in_features).t()
        # One column would become a matrix-vector product, which is slow again.
        output = (self.weight @ (columns.expand(-1, 2) if rows == 1 else columns))[:, :rows].t().contiguous()
        return output.reshape(*input.shape[:-1], self.out_features)


class MLP(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., width)` to the same shape."""
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)
