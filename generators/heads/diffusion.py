"""The diffusion head: denoises the continuous token of a position, given what the backbone knows of it.

Li et al., 2024, "Autoregressive Image Generation without Vector Quantization" (arXiv 2406.11838). The diffusion is that
of Nichol and Dhariwal, 2021, "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Generator, Tensor, nn

from generators.guidance import combine
from mmsdk.errors import unknown_name

NUM_TIMESTEPS = 1000
SPACINGS = ("linspace", "leading")
SAMPLERS = ("ddpm", "ddim")
NORM_EPS = 1e-6
_FREQUENCIES = 128
# Rows of modulations to compute at once: enough to use the weights well, few enough to stay small.
_MODULATION_ROWS = 512


# ---------------------------------------------------------------------------------------------------- schedules


def respaced_timesteps(num_steps: int, spacing: str = "linspace", last_timestep: int | None = None) -> tuple[int, ...]:
    """Return diffusion timesteps, ascending, each one once.

    Args:
        num_steps: number of timesteps, before any become the same.
        spacing: `"linspace"`: rounded, 0 and 999 included (published as `"100"`); `"leading"`: from 0 with the smallest
            integer stride that gives as many (published as `"ddim100"`).
        last_timestep: timesteps above it become it.

    Raises:
        ValueError: `num_steps` is below 2 or above 1000, or no integer stride gives as many.
        UnknownNameError: there is no such spacing.
    """
    if spacing not in SPACINGS:
        raise unknown_name("timestep spacing", spacing, list(SPACINGS))
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 2 <= num_steps <= NUM_TIMESTEPS:
        raise ValueError(f"The number of diffusion steps must be 2 to {NUM_TIMESTEPS}, got {num_steps!r}.")
    if spacing == "linspace":
        stride = (NUM_TIMESTEPS - 1) / (num_steps - 1)
        steps, position = [], 0.0
        for _ in range(num_steps):  # the published code adds up, which rounds differently from multiplying
            steps.append(round(position))
            position += stride
    else:
        width = next((i for i in range(1, NUM_TIMESTEPS) if len(range(0, NUM_TIMESTEPS, i)) == num_steps), None)
        if width is None:
            raise ValueError(f"No integer stride gives {num_steps} diffusion steps; use the spacing 'linspace'.")
        steps = list(range(0, NUM_TIMESTEPS, width))
    if last_timestep is not None:
        steps = [min(step, last_timestep) for step in steps]
    return tuple(sorted(set(steps)))


class DiffusionSchedule:
    """Tables of the cosine schedule at chosen timesteps, float64 `(num_steps,)` on the CPU, from data to noise.

    Args:
        timesteps: of 0 to 999, ascending; all by default.

    Attributes:
        timesteps: the timesteps.
        betas: variance that each step adds.
        alphas_cumprod: share of the data's variance that is left after each step.
        alphas_cumprod_prev: the same before each step.
        sqrt_recip_alphas_cumprod: factor of the noisy token in the clean one.
        sqrt_recipm1_alphas_cumprod: factor of the noise in the clean token.
        posterior_variance: of the token before a step, given those after it and at the start.
        posterior_log_variance_clipped: its logarithm; the first, which would be infinite, is the second one's.
        posterior_mean_coef1: factor of the clean token in the mean of that posterior.
        posterior_mean_coef2: factor of the noisy token in it.
    """

    def __init__(self, timesteps: Sequence[int] | None = None) -> None:
        edges = torch.arange(NUM_TIMESTEPS + 1, dtype=torch.float64, device="cpu") / NUM_TIMESTEPS
        signal = ((edges + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
        self.timesteps = tuple(range(NUM_TIMESTEPS)) if timesteps is None else tuple(timesteps)
        kept = (1 - betas).cumprod(0)[list(self.timesteps)]
        one = kept.new_ones(1)
        self.betas = 1 - kept / torch.cat([one, kept[:-1]])
        alphas = 1 - self.betas
        self.alphas_cumprod = alphas.cumprod(0)
        self.alphas_cumprod_prev = torch.cat([one, self.alphas_cumprod[:-1]])
        self.sqrt_recip_alphas_cumprod = (1 / self.alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / self.alphas_cumprod - 1).sqrt()
        open_part = 1 - self.alphas_cumprod
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / open_part
        self.posterior_log_variance_clipped = torch.cat(
            [self.posterior_variance[1:2], self.posterior_variance[1:]]
        ).log()
        self.posterior_mean_coef1 = self.betas * self.alphas_cumprod_prev.sqrt() / open_part
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * alphas.sqrt() / open_part

    def __len__(self) -> int:
        return len(self.timesteps)


class _StepFactors(NamedTuple):
    """Of one step: mean `x_mean * x - eps_mean * eps`, log std `std_slope * v + std_center`; and the token of DDIM."""

    x_mean: float
    eps_mean: float
    std_slope: float
    std_center: float
    x_ddim: float
    eps_ddim: float


def _step_factors(schedule: DiffusionSchedule) -> list[_StepFactors]:
    # The clean token is a * x - b * eps. Put into the mean and into DDIM's step in float64, where it is large and the
    # factors before it are small.
    a, b = schedule.sqrt_recip_alphas_cumprod, schedule.sqrt_recipm1_alphas_cumprod
    most, least = schedule.betas.log(), schedule.posterior_log_variance_clipped
    previous = schedule.alphas_cumprod_prev
    columns = (
        schedule.posterior_mean_coef1 * a + schedule.posterior_mean_coef2,
        schedule.posterior_mean_coef1 * b,
        (most - least) / 4,
        (most + least) / 4,
        previous.sqrt() * a,
        previous.sqrt() * b - (1 - previous).sqrt(),
    )
    return [_StepFactors(*row) for row in torch.stack(columns, 1).tolist()]


@dataclass(frozen=True)
class DiffusionPlan:
    """A schedule and what a head knows of it before it sees a token; made once by `DiffusionHead.plan`.

    Attributes:
        schedule: the tables.
        factors: what each step needs of them.
        clock: embedded timesteps, `(num_steps, width)`.
    """

    schedule: DiffusionSchedule
    factors: list[_StepFactors]
    clock: Tensor

    def __len__(self) -> int:
        return len(self.factors)


# ---------------------------------------------------------------------------------------------------- network


class TimestepEmbedder(nn.Module):
    """Timesteps to vectors: cosines and sines, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Map timesteps `(n,)` to `(n, width)`."""
        exponents = torch.arange(_FREQUENCIES, device=timesteps.device) * (-math.log(10000) / _FREQUENCIES)
        angles = timesteps.float()[:, None] * exponents.exp()
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(cast(nn.Linear, self.mlp[0]).weight.dtype))


class ResidualBlock(nn.Module):
    """A two-layer MLP whose input is scaled and shifted, and whose output is gated, by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map `(..., width)` to shift, scale and gate, each of the same shape."""
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, -1)
        return shift, scale + 1, gate

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Map `(n, width)` to the same shape."""
        return torch.addcmul(x, gate, self.mlp(torch.addcmul(shift, self.in_ln(x), scale)))


class FinalLayer(nn.Module):
    """Modulated norm and projection."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Map `(..., width)` to shift and scale, each of the same shape."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, -1)
        return shift, scale + 1

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Map `(n, width)` to `(n, out_channels)`."""
        return self.linear(torch.addcmul(shift, self.norm_final(x), scale))


class Denoiser(nn.Module):
    """An MLP with adaptive norms over a noisy token; it returns the noise, and the log-variance between its bounds."""

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(condition_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(cast(nn.Linear, layer).weight, std=0.02)
        for block in (*self.res_blocks, self.final_layer):  # every block begins as the identity, the output as 0
            nn.init.zeros_(cast(nn.Linear, cast(ResidualBlock, block).adaLN_modulation[1]).weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def modulations(self, condition: Tensor) -> list[tuple[Tensor, ...]]:
        """Return what every layer needs of the sum of embedded time and `z`, `(..., width)`."""
        layers = cast(list[ResidualBlock | FinalLayer], [*self.res_blocks, self.final_layer])
        return [layer.modulation(condition) for layer in layers]

    def run(self, hidden: Tensor, modulations: Sequence[Sequence[Tensor]]) -> Tensor:
        """Map projected tokens `(n, width)` to `(n, 2 * token_dim)`, float32."""
        for block, modulation in zip(self.res_blocks, modulations[:-1], strict=True):
            hidden = block(hidden, *modulation)
        return self.final_layer(hidden, *modulations[-1]).float()

    def forward(self, x: Tensor, timesteps: Tensor, z: Tensor) -> Tensor:
        """Return noise and log-variance, float32 `(n, 2 * token_dim)`.

        Args:
            x: noisy tokens `(n, token_dim)`.
            timesteps: `(n,)`, 0 to 999.
            z: `(n, condition_dim)`.
        """
        condition = self.time_embed(timesteps) + self.cond_embed(z)
        return self.run(self.input_proj(x.to(self.input_proj.weight.dtype)), self.modulations(condition))


# ---------------------------------------------------------------------------------------------------- head


class DiffusionLoss(NamedTuple):
    """Loss of each token, `(n,)`.

    Attributes:
        loss: the sum of the others.
        mse: squared error of the noise.
        vb: variational bound in bits per number, which teaches the variance only.
    """

    loss: Tensor
    mse: Tensor
    vb: Tensor


class PreparedTokens:
    """Tokens of one step of the generation on their way from noise to data; made by `DiffusionHead.prepare`.

    Unconditional rows share noisy tokens with the conditional ones, and give nothing but their noise.
    """

    def __init__(self, net: Denoiser, z: Tensor, plan: DiffusionPlan, guidance_scale: float) -> None:
        self.net, self.plan, self.guidance_scale = net, plan, guidance_scale
        self.condition = net.cond_embed(z)
        self._begin, self._modulations = 0, cast(list[tuple[Tensor, ...]], [])
        self._held = 0

    @property
    def rows(self) -> int:
        """Rows that the network computes, unconditional ones included."""
        return len(self.condition)

    def _modulation_of(self, index: int) -> list[tuple[Tensor, ...]]:
        """Return the modulations of one step; they do not depend on the tokens, so those of many come at once."""
        if not self._begin <= index < self._begin + self._held:
            self._begin = max(0, index + 1 - max(1, _MODULATION_ROWS // self.rows))
            clock = self.plan.clock[self._begin : index + 1]
            self._held = len(clock)
            self._modulations = self.net.modulations(clock[:, None] + self.condition)
        offset = index - self._begin
        return [tuple(part[offset] for part in layer) for layer in self._modulations]

    def predict(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return noise, guided, and position of the log-variance, each float32 `(n, token_dim)`; see `posterior`."""
        net = self.net
        hidden = net.input_proj(x.to(net.input_proj.weight.dtype))
        if len(hidden) < self.rows:
            hidden = torch.cat([hidden, hidden])
        noise, variance = net.run(hidden, self._modulation_of(index)).chunk(2, -1)
        if len(x) < self.rows:
            noise = combine(noise[: len(x)], noise[len(x) :], self.guidance_scale)
        return noise, variance[: len(x)]

    def posterior(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each float32 `(n, token_dim)`, of the tokens one step nearer to data.

        Args:
            x: noisy tokens `(n, token_dim)`, float32.
            index: of the step, `len(plan) - 1` at the noise to 0 at the data.
        """
        noise, variance = self.predict(x, index)
        factors = self.plan.factors[index]
        mean = (factors.x_mean * x).sub_(noise, alpha=factors.eps_mean)
        return mean, (variance * factors.std_slope).add_(factors.std_center).exp_()

    def ddim(self, x: Tensor, index: int) -> Tensor:
        """Return the tokens one step nearer to data, without new noise; see `posterior`."""
        noise, _ = self.predict(x, index)
        factors = self.plan.factors[index]
        return (factors.x_ddim * x).sub_(noise, alpha=factors.eps_ddim)


class DiffusionHead(nn.Module):
    """Turns noise into continuous tokens, given `z` of each, one by one and independently of each other.

    1000 timesteps with the cosine schedule; the noise is predicted, and the variance between its two bounds.

    Args:
        token_dim: numbers in a token.
        condition_dim: width of `z`.
        width: width of the network.
        depth: number of its residual blocks.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        for name, size in (("token_dim", token_dim), ("condition_dim", condition_dim), ("width", width)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}.")
        self.token_dim = token_dim
        self.net = Denoiser(token_dim, condition_dim, width, depth)
        self._training_schedule: DiffusionSchedule | None = None

    # ------------------------------------------------------------------------------------------------ training

    def loss(self, z: Tensor, target: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the loss of each token, `(n,)`, at a random timestep; see `loss_terms`.

        Args:
            z: `(n, condition_dim)`.
            target: tokens `(n, token_dim)`.
            generator: draws timesteps, then noise; none draws with a new seed.
        """
        if generator is None:
            generator = Generator()
            generator.seed()
        timesteps = torch.randint(0, NUM_TIMESTEPS, (len(z),), generator=generator, device=generator.device)
        noise = torch.randn(target.shape, generator=generator, device=generator.device)
        return self.loss_terms(z, target, timesteps.to(z.device), noise.to(z.device)).loss

    def loss_terms(self, z: Tensor, target: Tensor, timesteps: Tensor, noise: Tensor) -> DiffusionLoss:
        """Return the loss of each token at given timesteps `(n,)` and with given noise, like `target`."""
        if self._training_schedule is None:
            self._training_schedule = DiffusionSchedule()
        schedule = self._training_schedule

        def at(table: Tensor) -> Tensor:
            return table.float().to(timesteps.device)[timesteps][:, None]

        target = target.float()
        kept = schedule.alphas_cumprod
        x = at(kept.sqrt()) * target + at((1 - kept).sqrt()) * noise
        predicted, position = self.net(x, timesteps, z).chunk(2, -1)
        mse = (noise - predicted).square().mean(-1)

        # The bound must not reach the noise.
        a, b = at(schedule.sqrt_recip_alphas_cumprod), at(schedule.sqrt_recipm1_alphas_cumprod)
        clean = a * x - b * predicted.detach()
        coef1, coef2 = at(schedule.posterior_mean_coef1), at(schedule.posterior_mean_coef2)
        least, most = at(schedule.posterior_log_variance_clipped), at(schedule.betas.log())
        logvar = least + (position + 1) / 2 * (most - least)
        distance = coef1 * (target - clean)  # of the means; the part of x is common to both
        divergence = (logvar - least - 1 + (least - logvar).exp() + distance.square() * (-logvar).exp()) / 2
        likelihood = _discretised_log_likelihood(target, coef1 * clean + coef2 * x, logvar / 2)
        vb = torch.where(timesteps == 0, -likelihood.mean(-1), divergence.mean(-1)) / math.log(2)
        return DiffusionLoss(mse + vb, mse, vb)

    # ------------------------------------------------------------------------------------------------ sampling

    @torch.no_grad()
    def plan(self, timesteps: Sequence[int]) -> DiffusionPlan:
        """Compute what does not depend on the tokens, of ascending timesteps; see `respaced_timesteps`."""
        schedule = DiffusionSchedule(timesteps)
        device = self.net.input_proj.weight.device
        clock = self.net.time_embed(torch.tensor(schedule.timesteps, device=device))
        return DiffusionPlan(schedule, _step_factors(schedule), clock)

    def prepare(self, z: Tensor, plan: DiffusionPlan, guidance_scale: float = 1.0) -> PreparedTokens:
        """Compute what does not depend on the noisy tokens.

        Args:
            z: `(n, condition_dim)`, or twice the rows, the unconditional ones last, where guided.
            plan: of `plan`.
            guidance_scale: 1 is none.
        """
        return PreparedTokens(self.net, z, plan, guidance_scale)

    @torch.no_grad()
    def posterior(
        self, x: Tensor, index: int, z: Tensor, plan: DiffusionPlan, guidance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the tokens one step nearer to data; see `PreparedTokens.posterior`.

        For many steps of the same tokens, `prepare` them once.
        """
        return self.prepare(z, plan, guidance_scale).posterior(x, index)

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        plan: DiffusionPlan,
        temperature: float = 1.0,
        guidance_scale: float = 1.0,
        sampler: str = "ddpm",
    ) -> Tensor:
        """Denoise to tokens, float32 `(n, token_dim)`.

        Args:
            z: `(n, condition_dim)`, or twice the rows, the unconditional ones last, where guided.
            noise: `(1 + num_steps, n, token_dim)`: that to start from, then that of each step in the order they are
                run. The last step does not use its own, and `"ddim"` none but the first.
            plan: of `plan`.
            temperature: factor of the noise of the steps.
            guidance_scale: 1 is none.
            sampler: `"ddpm"`, ancestral, or `"ddim"` without new noise (Song et al., 2021).

        Raises:
            UnknownNameError: there is no such sampler.
        """
        if sampler not in SAMPLERS:
            raise unknown_name("sampler", sampler, list(SAMPLERS))
        tokens = self.prepare(z, plan, guidance_scale)
        x = noise[0]
        for step, index in enumerate(reversed(range(len(plan)))):
            if sampler == "ddim":
                x = tokens.ddim(x, index)
                continue
            mean, std = tokens.posterior(x, index)
            x = mean if index == 0 else mean.addcmul_(std, noise[1 + step], value=temperature)
        return x


def _discretised_log_likelihood(target: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log-likelihood of a number under a normal distribution over the 256 values of a pixel in [-1, 1].

    That is what the published loss takes at timestep 0, although latents are no pixels.
    """

    def cdf(x: Tensor) -> Tensor:
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    precision = (-log_std).exp()
    above = cdf((target - mean + 1 / 255) * precision)
    below = cdf((target - mean - 1 / 255) * precision)
    inside = torch.where(target > 0.999, 1 - below, above - below)
    return torch.where(target < -0.999, above, inside).clamp(min=1e-12).log()
