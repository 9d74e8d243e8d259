"""MAR against a plain loop of the published design, over the same weights and with the same noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from generators.annealing import StepAnnealing
from generators.base import Trace
from generators.guidance import LinearGuidance
from generators.heads.diffusion import DiffusionSchedule
from generators.mar import MAR
from generators.orders import RandomCosineMask
from mmsdk.bench.measure import interleaved
from mmsdk.bench.runner import BenchResult
from mmsdk.errors import MMSDKError

# 256 tokens and 64 condition tokens as published, with few and narrow layers.
SHORT_SIZE: dict[str, Any] = {"encoder_shape": (192, 4, 3), "decoder_shape": (192, 4, 3), "head_shape": (256, 3)}
_TABLES = (
    "betas", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
)  # fmt: skip
# Of the largest value: the order of sums differs.
TOLERANCE = 1e-4


class PlainMAR:
    """The published loop, written anew over the weights of a class-conditional `MAR`.

    Both halves of a guided batch run at every step. The decoder gives `z` of all positions, of which a step uses some.
    Every diffusion step embeds its time and `z` of every row, looks its constants up for every row, and moves
    conditional and unconditional rows alike.

    Args:
        model: read, not changed.
    """

    def __init__(self, model: MAR) -> None:
        self.model = model

    def features(self, tokens: Tensor, known: Tensor, condition: Tensor) -> Tensor:
        """Return `z` of all positions, `(rows, num_tokens, decoder_width)`."""
        model = self.model
        positions = torch.arange(model.num_tokens).expand(len(tokens), -1)
        held = tokens.take_along_dim(known[..., None], 1)
        hidden = model.decoder_embed(model.encode(held, known, condition))
        size = model.config.buffer_size
        grid = model.mask_token.expand(len(tokens), model.num_tokens, -1)
        grid = grid.scatter(1, known[..., None].expand(-1, -1, hidden.shape[-1]), hidden[:, size:])
        hidden = torch.cat([hidden[:, :size], grid], 1) + model.decoder_pos_embed_learned
        for block in model.decoder_blocks:
            hidden = block(hidden)
        return model.decoder_norm(hidden)[:, size:] + model.diffusion_pos_embed_learned[0][positions]

    def denoise(
        self, z: Tensor, noise: Tensor, schedule: DiffusionSchedule, temperature: float, scale: float
    ) -> Tensor:
        """Return tokens `(rows, token_dim)`; arguments as those of `DiffusionHead.sample`, noise for all rows."""
        net = self.model.diffloss.net
        x, half = noise[0], len(z) // 2
        timesteps = torch.tensor(schedule.timesteps)
        for step, index in enumerate(reversed(range(len(schedule)))):
            rows = torch.full((len(x),), index)
            at = {name: getattr(schedule, name)[rows].float()[:, None].expand_as(x) for name in _TABLES}
            times = timesteps[rows]
            if scale != 1.0:
                x = torch.cat([x[:half], x[:half]])
            predicted, position = net(x, times, z).chunk(2, -1)
            if scale != 1.0:
                conditional, unconditional = predicted.split(half)
                guided = unconditional + scale * (conditional - unconditional)
                predicted = torch.cat([guided, guided])
            least, most = at["posterior_log_variance_clipped"], at["betas"].log()
            share = (position + 1) / 2
            logvar = share * most + (1 - share) * least
            clean = at["sqrt_recip_alphas_cumprod"] * x - at["sqrt_recipm1_alphas_cumprod"] * predicted
            mean = at["posterior_mean_coef1"] * clean + at["posterior_mean_coef2"] * x
            x = mean + (rows != 0)[:, None] * (logvar / 2).exp() * noise[1 + step] * temperature
        return x

    @torch.no_grad()
    def generate(
        self,
        class_labels: Sequence[int],
        num_iter: int,
        timesteps: Sequence[int],
        guidance_scale: float,
        orders: Tensor,
        noise: Sequence[Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """Return latents; arguments as those of `MAR.generate`, noise of the conditional rows."""
        model, batch = self.model, len(class_labels)
        condition = model.embed_condition(class_labels)
        if guidance_scale != 1.0:
            condition = torch.cat([condition, model.unconditional(batch)])
        tokens = torch.zeros(batch, model.num_tokens, model.token_dim)
        copies = len(condition) // batch
        schedule = DiffusionSchedule(timesteps)
        steps = RandomCosineMask(num_iter).steps(orders, model.num_tokens)
        guidance = LinearGuidance(guidance_scale)
        for step, drawn in zip(steps, noise, strict=True):
            scale = guidance.scale(step.step, num_iter, step.progress)
            z = self.features(tokens.repeat(copies, 1, 1), step.known.repeat(copies, 1), condition)
            z = z.take_along_dim(step.positions.repeat(copies, 1)[..., None], 1).flatten(0, 1)
            rows = drawn.flatten(1, 2).repeat(1, copies, 1)
            sampled = self.denoise(z, rows, schedule, temperature, scale)[: drawn.shape[1] * drawn.shape[2]]
            places = step.positions[..., None].expand(-1, -1, model.token_dim)
            tokens = tokens.scatter(1, places, sampled.view(batch, -1, model.token_dim))
        return model.to_latents(tokens)


def mar(
    preset: str | None = None,
    num_iter: int = 16,
    num_steps: int = 25,
    guidance_scale: float = 3.0,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 3,
    seed: int = 0,
    output_dir: Path | None = None,
) -> BenchResult:
    """Time the generation of MAR against the published loop, and check that both give the same latents.

    Args:
        preset: a published size, `"B"`, `"L"` or `"H"`; by default a short and narrow one of as many tokens.
        num_iter: steps of the generation.
        num_steps: diffusion steps of each token.
        guidance_scale: reached linearly.
        batch_sizes: images at once.
        repeats: runs of each side, in turn; the median counts.
        seed: of weights and noise.
        output_dir: not used; there is nothing to draw.

    Raises:
        MMSDKError: the sides differ.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (MAR(**SHORT_SIZE) if preset is None else MAR.preset(preset)).eval()
        # Layers that begin at zero would make the comparison of outputs empty.
        for parameter in model.diffloss.parameters():
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.02)
    plain = PlainMAR(model)
    # Ends below 999, where a random network divides by almost nothing.
    annealing = StepAnnealing(num_steps, num_steps, "constant")
    timesteps = annealing.timesteps(0, num_iter)
    rows: list[list[Any]] = []
    for batch in batch_sizes:
        generator = torch.Generator().manual_seed(seed)
        labels = [7 * i % model.config.num_classes for i in range(batch)]
        orders = torch.rand(batch, model.num_tokens, generator=generator).argsort(-1)
        counts = [s.positions.shape[1] for s in RandomCosineMask(num_iter).steps(orders, model.num_tokens)]
        noise = [
            torch.randn(1 + len(timesteps), batch, count, model.token_dim, generator=generator) for count in counts
        ]
        trace = Trace()
        given: dict[str, Any] = {"num_iter": num_iter, "guidance_scale": guidance_scale, "orders": orders}
        given["noise"] = noise
        with FlopCounterMode(display=False) as own:
            ours = cast(Any, model.generate(labels, annealing=annealing, trace=trace, **given)).latents
        with FlopCounterMode(display=False) as published:
            theirs = plain.generate(labels, timesteps=timesteps, **given)
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
        if difference > TOLERANCE:
            raise MMSDKError(f"The sides differ by {difference:.1e} of the largest value, more than {TOLERANCE:.0e}.")
        sides = (
            partial(plain.generate, labels, timesteps=timesteps, **given),
            partial(model.generate, labels, annealing=annealing, **given),
        )
        seconds = [statistics.median(times) for times in interleaved(sides, repeats)]
        head_rows = sum(n * s for n, s in zip(trace.head_rows, trace.head_steps, strict=True))
        flops = [counter.get_total_flops() / 1e9 for counter in (published, own)]
        row = [batch, *seconds, seconds[0] / seconds[1], *flops, flops[0] / flops[1]]
        rows.append([*row, difference, trace.forwards, head_rows])
    return BenchResult(
        name="mar",
        columns=[
            "batch",
            "published loop s",
            "ours s",
            "ratio",
            "published GFLOP",
            "ours GFLOP",
            "by count",
            "difference",
            "forwards",
            "head rows",
        ],
        rows=rows,
        notes=[
            f"{'Preset ' + preset if preset else 'Short size'}, random weights: {num_iter} iterations, "
            f"{len(timesteps)} diffusion steps, guidance to {guidance_scale:g} linearly, float32, median of {repeats}.",
            "GFLOP: multiplications and additions of matrix products and attention, the same result on both sides; by "
            "count: what their ratio alone would give.",
            "Difference: largest of the latents for the same noise, as a share of their largest value.",
            "Head rows: tokens through the diffusion head over all its steps, unconditional ones included.",
        ],
    )
