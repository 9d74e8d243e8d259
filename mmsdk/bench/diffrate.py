"""`mmsdk bench diffrate`: what a vision transformer gains when DiffRate compresses its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmsdk.bench.prune_select import best_times
from mmsdk.bench.runner import BenchResult
from mmsdk.errors import MMSDKError
from mmsdk.loading import resolve


def diffrate(
    model: str = "vit_small_patch16_224",
    pretrained: bool = False,
    rates: Sequence[float] = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2),
    batch_size: int = 8,
    seconds: float = 60.0,
    seed: int = 0,
    output_dir: Path | None = None,
) -> BenchResult:
    """Time a timm ViT at several rates, in turn, beside its operations: by the formula, and as executed.

    Args:
        model: name of a timm `VisionTransformer`.
        pretrained: fetch its weights; random ones take just as long.
        rates: fraction of its patches that each block but the first prunes, and of the rest that it merges.
        batch_size: images in one forward.
        seconds: how long to repeat all rates, after a first round that is not timed.
        seed: of random weights and of the images.
        output_dir: not used.

    Raises:
        MMSDKError: a rate of 0 changes the output, or a forward executes fewer operations than the formula says.
        ValueError: `rates` are not in [0, 1), or the model is none that DiffRate takes.
    """
    compression = resolve("diffrate")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vit: Any = timm.create_model(model, pretrained=pretrained).eval()
        images = torch.randn(batch_size, *vit.pretrained_cfg["input_size"])
    methods = [compression.uniform(vit, prune_rate=rate, merge_rate=rate) for rate in rates]

    @torch.inference_mode()
    def run(method: Any = None) -> torch.Tensor:
        if method is None:
            return vit(images)
        with method(vit):
            return vit(images)

    plain, plain_executed = run(), _multiply_adds(run)
    executed = []
    for rate, method in zip(rates, methods, strict=True):
        counted = _multiply_adds(lambda method=method: run(method))
        if rate == 0 and not torch.equal(run(method), plain):
            raise MMSDKError("A rate of 0 must leave the output as it is, but it differs: speeds cannot be compared.")
        formula = batch_size * method.flops(vit)
        if counted < formula or (rate == 0 and counted != plain_executed):
            raise MMSDKError(
                f"At rate {rate:g} a forward executes {counted} multiply-adds, where the formula says {formula} and "
                f"the model alone executes {plain_executed}."
            )
        executed.append(counted)
    wall, processor = best_times([run, *(lambda method=method: run(method) for method in methods)], seconds)
    full = batch_size * compression().flops(vit)
    table = [
        [
            rate,
            method.table(vit)[-1][1],
            method.flops(vit) / 1e9,
            counted / batch_size / 1e9,
            batch_size / time,
            wall[0] / time,
            processor[0] / used,
            full / (batch_size * method.flops(vit)),
        ]
        for rate, method, counted, time, used in zip(rates, methods, executed, wall[1:], processor[1:], strict=True)
    ]
    notes = [
        f"{model} at {images.shape[-2]} x {images.shape[-1]}, {'trained' if pretrained else 'random'} weights, batches "
        f"of {batch_size}. Every block but the first prunes, then merges, the rate of its patches.",
        "tokens: what leaves the last block. GMAC: billions of multiply-adds per image by DiffRate's formula; "
        "executed: those of all matrix products of a forward, so with the selection's.",
        f"images/s: the fastest of the repeats within {seconds:g} s, in turn; {batch_size / wall[0]:.1f} for the model "
        "alone. speed-up: against the model alone, by the clock and by processor time; GMAC allow: were time "
        "proportional.",
        "Checked: rate 0 gives the same bits and executes the same operations.",
    ]
    columns = ["rate", "tokens", "GMAC", "executed", "images/s", "speed-up", "CPU speed-up", "GMAC allow"]
    return BenchResult("diffrate", columns, table, notes)


def _multiply_adds(run: Any) -> int:
    """Count the multiply-adds of the matrix products and convolutions that a function executes."""
    # The fused attention of CPUs is not among what the counter knows; its parts are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2
