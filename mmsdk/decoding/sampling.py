"""From logits to token ids: temperature, top-k, top-p and draws that do not depend on the rest of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def check_sampling(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None:
    """Raise `ValueError` where a sampling parameter is out of its range."""
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature must be positive and finite, got {temperature!r}; for greedy decoding: do_sample=False."
        )
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k must be an integer of at least 0 (0 keeps all), got {top_k!r}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (1 keeps all), got {top_p!r}.")


def process_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Apply temperature, then top-k, then top-p to `logits` `(..., codebook_size)`; what is left out becomes -inf.

    Logits equal to the k-th largest stay. Top-p keeps the most probable ids up to and including the one that brings
    their sum above `top_p`, so at least one. The input is not changed; without any setting it is returned as it is.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature != 1.0:
        logits = logits / max(temperature, 1e-5)  # as published; smaller ones would overflow
    if 0 < top_k < logits.shape[-1]:
        smallest = torch.topk(logits, top_k, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1.0:
        ordered, order = torch.sort(logits, dim=-1, descending=True)
        before = torch.softmax(ordered, -1).cumsum(-1)[..., :-1] > top_p
        removed = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order[..., 1:], before)
        logits = logits.masked_fill(removed, float("-inf"))
    return logits


def sample_inverse_cdf(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Return ids `(...)`: the smallest index whose cumulative probability exceeds the uniform number.

    Sums in float64 and scales by the total, so that an id of probability 0 is never drawn, whatever the number.

    Args:
        probs: `(..., codebook_size)`, at least 0; they need not sum to exactly 1.
        uniforms: `(...)`, in [0, 1).
    """
    if probs.device.type == "mps":  # has no float64
        return sample_inverse_cdf(probs.cpu(), uniforms.cpu()).to(probs.device)
    cumulative = probs.double().cumsum(-1)
    total = cumulative[..., -1]
    if not bool((total > 0).logical_and_(total < float("inf")).all()):
        raise ValueError("The logits contain NaN or infinity (or leave nothing to draw from); cannot sample from them.")
    return torch.searchsorted(cumulative, (uniforms.double() * total).unsqueeze(-1), right=True).squeeze(-1)


def sample_ids(logits: Tensor, sampling: tuple[float, int, float], uniforms: Tensor | None) -> Tensor:
    """Return ids `(...)`: the most probable ones, or drawn where there are numbers to draw with.

    Args:
        logits: `(..., codebook_size)`.
        sampling: temperature, top-k and top-p; of no use without numbers.
        uniforms: `(...)` in [0, 1), or None.

    Raises:
        ValueError: the logits are not finite.
    """
    if uniforms is not None:
        return sample_inverse_cdf(torch.softmax(process_logits(logits, *sampling), -1), uniforms)
    values, ids = logits.max(-1)
    if not bool(values.isfinite().all()):
        raise ValueError("The logits contain NaN or infinity.")
    return ids


def draw_uniforms(generators: Generator | Sequence[Generator] | None, batch: int, num_draws: int = 1) -> Tensor:
    """Draw numbers in [0, 1) as `(batch, num_draws)` float64, on the device of the (first) generator.

    Args:
        generators: one per row, whose draws then depend on nothing but that row's generator; or one for all rows, which
            gives the first draw of every row, then the second; or none: a new one with a seed from the system.
        batch: number of rows.
        num_draws: draws per row.
    """
    if generators is None:
        generators = Generator()
        generators.seed()
    if isinstance(generators, Generator):
        # Draw by draw, so that fewer draws are the beginning of more.
        return torch.rand(num_draws, batch, generator=generators, dtype=torch.float64, device=generators.device).T
    if len(generators) != batch:
        raise ValueError(f"Expected one generator, or one for each of {batch} rows, got {len(generators)}.")
    for i, generator in enumerate(generators):
        if not isinstance(generator, Generator):
            raise TypeError(f"Generator {i} must be a torch.Generator, got {type(generator).__name__}.")
    rows = [torch.rand(num_draws, generator=g, dtype=torch.float64, device=g.device) for g in generators]
    return torch.stack([row.to(rows[0].device) for row in rows])
