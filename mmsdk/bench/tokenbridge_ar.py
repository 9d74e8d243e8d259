"""TokenBridge-AR's channel head with and without a cache of the channels before."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from generators.heads.channel import ChannelHead
from generators.tokenbridge_ar import PRESETS
from mmsdk.bench.measure import interleaved
from mmsdk.bench.runner import BenchResult
from mmsdk.decoding.sampling import draw_uniforms
from mmsdk.errors import MMSDKError

# A quarter as wide as the published heads.
SHORT_SHAPE = (192, 3, 6)


def tokenbridge_ar(
    preset: str | None = None,
    num_channels: int = 16,
    bits: int = 6,
    rows: Sequence[int] = (1, 4, 16, 64),
    repeats: int = 5,
    seed: int = 0,
    output_dir: Path | None = None,
) -> BenchResult:
    """Time the sampling of tokens with a cache, and with all channels so far computed anew for every channel.

    Args:
        preset: the head of a published size, `"B"`, `"L"` or `"H"`; by default a narrow one.
        num_channels: indices of a token.
        bits: bits of an index.
        rows: tokens at once.
        repeats: runs of each side, in turn; the median counts.
        seed: of weights and draws.
        output_dir: not used; there is nothing to draw.

    Raises:
        MMSDKError: the sides draw different tokens.
    """
    shape = SHORT_SHAPE if preset is None else PRESETS[preset]["head_shape"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = ChannelHead(num_channels, 2**bits, shape[0], *shape).eval()
        for parameter in head.parameters():  # those that begin at zero would make all tokens equally probable
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.05)
    generator = torch.Generator().manual_seed(seed)
    table: list[list[Any]] = []
    for count in rows:
        z = torch.randn(count, shape[0], generator=generator)
        uniforms = draw_uniforms(generator, count, num_channels)
        sides = [partial(_sample, head, z, uniforms, use_cache) for use_cache in (False, True)]
        if not torch.equal(sides[0](), sides[1]()):
            raise MMSDKError(f"The tokens of {count} rows differ with and without the cache.")
        plain, cached = (statistics.median(times) for times in interleaved(sides, repeats))
        table.append([count, plain * 1e3, cached * 1e3, plain / cached])
    passes = num_channels * (num_channels + 1) // 2
    return BenchResult(
        "tokenbridge-ar",
        ["rows", "without ms", "with ms", "ratio"],
        table,
        [
            f"Channel head {shape} (width, layers, heads), random weights, {num_channels} channels of {bits} bits, "
            f"float32, median of {repeats}. Both sides draw the same tokens.",
            f"For every token {num_channels} channels go through the layers with the cache, {passes} without it.",
        ],
    )


@torch.no_grad()
def _sample(head: ChannelHead, z: torch.Tensor, uniforms: torch.Tensor, use_cache: bool) -> torch.Tensor:
    return head.sample(z, uniforms, use_cache=use_cache)
