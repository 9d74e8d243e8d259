"""FlowAR: writes the latents of an image scale by scale; a transformer conditions, a flow head samples each scale.

Ren et al., 2024, "FlowAR: Scale-wise Autoregressive Image Generation Meets Flow Matching" (arXiv 2412.15205).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for it when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Generator, Tensor, nn

from generators.annealing import StepAnnealing
from generators.base import LatentGenerator, Trace
from generators.guidance import Guidance
from generators.heads.flow import (
    HEAD_DIM,
    NORM_EPS,
    AdaptiveBlock,
    BlockState,
    FlowHead,
    NoiseStream,
    RotaryTable,
    check_backbone,
    check_labels,
    check_noise,
    check_training_batch,
    initialise,
    plan_guidance,
    plan_steps,
    read_published,
    training_noise,
    training_times,
)
from generators.llamagen import rotary_table
from mmsdk.errors import CheckpointError, unknown_name
from mmsdk.loading import load_into
from mmsdk.modeling import PretrainedModel

PRESETS: dict[str, dict[str, Any]] = {
    "S": {
        "hidden_size": 768,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "num_heads": 12,
        "head_width": 1024,
        "head_depth": 2,
        "cross_attention": False,
    },
    "L": {
        "hidden_size": 1024,
        "encoder_layers": 8,
        "decoder_layers": 8,
        "num_heads": 16,
        "head_width": 1024,
        "head_depth": 12,
    },
    "H": {
        "hidden_size": 1536,
        "encoder_layers": 15,
        "decoder_layers": 15,
        "num_heads": 16,
        "head_width": 1536,
        "head_depth": 12,
    },
}
# What the published figures were made with.
GENERATION_PRESETS: dict[str, dict[str, Any]] = {
    "S": {"num_steps": 25, "guidance_scale": 4.3, "guidance_high": 0.9},
    "L": {"num_steps": 25, "guidance_scale": 2.4, "guidance_high": 0.9},
    "H": {"num_steps": 50, "guidance_scale": 2.4, "guidance_high": 0.7},
}


@dataclass
class FlowARForwardOutput(BaseOutput):
    """What `FlowAR.forward` returns.

    Attributes:
        velocity: `(batch, num_tokens, latent_channels)`, float32, scale after scale; learned to be noise minus latents.
        loss: scalar mean squared error over the tokens of all scales.
    """

    velocity: Tensor
    loss: Tensor


@dataclass
class FlowAROutput(BaseOutput):
    """What `FlowAR.generate` returns.

    Attributes:
        latents: `(batch, latent_channels, h, w)`, float32, scaled as those in training.
        trace: what was executed: the forwards of the transformer, then those of the head, for each scale.
    """

    latents: Tensor
    trace: Trace


class FlowAR(LatentGenerator, PretrainedModel):
    """Predicts latents scale by scale, coarse to fine, each of them whole and not a residual (Ren et al., 2024).

    A transformer, causal over scales, turns the class and the scales so far into a vector `z` for every position of the
    next scale; a flow head, see `FlowHead`, samples the scale from noise given `z`.

    Args:
        hidden_size: width of the transformer.
        encoder_layers: number of blocks before the second position embedding.
        decoder_layers: number of blocks after it.
        num_heads: attention heads of the transformer; the head dimension must divide by 4.
        intermediate_size: width of its MLPs, by default `8 / 3 * hidden_size`, rounded down.
        head_width: width of the flow head, a multiple of 64.
        head_depth: number of its blocks.
        cross_attention: the flow head also attends to `z`; the smallest published model does not.
        scales: latents along each side, growing; each divides the last.
        latent_channels: numbers in a latent.
        num_classes: number of classes.
        rope_base: base of the rotary frequencies.
        condition_dropout: how often a trainer should drop the condition; the model itself never does.
        initializer_range: standard deviation of the initial weights; modulations and output start at 0.

    Raises:
        ValueError: sizes are not positive or do not fit each other.
    """

    registry_name = "flowar"

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 768,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        num_heads: int = 12,
        intermediate_size: int | None = None,
        head_width: int = 1024,
        head_depth: int = 2,
        cross_attention: bool = True,
        scales: Sequence[int] = (1, 2, 4, 8, 16),
        latent_channels: int = 16,
        num_classes: int = 1000,
        rope_base: float = 10000.0,
        condition_dropout: float = 0.1,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        check_backbone(
            hidden_size, num_heads, encoder_layers=encoder_layers, decoder_layers=decoder_layers,
            head_depth=head_depth, latent_channels=latent_channels, num_classes=num_classes,
        )  # fmt: skip
        self.scales = tuple(scales)
        if not self.scales or sorted(set(self.scales)) != list(self.scales) or self.scales[0] < 1:
            raise ValueError(f"scales must be positive and grow, got {self.scales}.")
        if any(self.scales[-1] % side for side in self.scales):
            raise ValueError(f"Every scale must divide the last, {self.scales[-1]}; got {self.scales}.")
        self.scale_tokens = [side**2 for side in self.scales]
        positions = sum(self.scale_tokens)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, positions, hidden_size))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, positions, hidden_size))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, positions, hidden_size))
        self.class_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.z_proj = nn.Linear(latent_channels, hidden_size)
        self.z_proj_ln = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        block = (hidden_size, num_heads, intermediate_size)
        self.encoder_blocks = nn.ModuleList(AdaptiveBlock(*block) for _ in range(encoder_layers))
        self.encoder_norm = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.decoder_embed = nn.Linear(hidden_size, hidden_size)
        self.decoder_blocks = nn.ModuleList(AdaptiveBlock(*block) for _ in range(decoder_layers))
        self.decoder_norm = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.flownet = FlowHead(hidden_size, head_width, head_depth, latent_channels, cross_attention)
        self._rotary = RotaryTable(self._positions(hidden_size // num_heads))
        self._head_rotary = RotaryTable(self._positions(HEAD_DIM))
        initialise(self, initializer_range)

    def _positions(self, head_dim: int) -> Tensor:
        """Return the rotations of all scales; a coarse position is that of its upper left fine one."""
        side = self.scales[-1]
        grid = rotary_table(side, head_dim, self.config.rope_base).view(side, side, -1)
        return torch.cat([grid[:: side // s, :: side // s].flatten(0, 1) for s in self.scales])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image."""
        return self.config.latent_channels, self.scales[-1], self.scales[-1]

    def count_steps(self, **settings: Any) -> int:
        """Return how many steps a generation takes, whatever the settings."""
        return len(self.scales)

    # ------------------------------------------------------------------------------------------------ construction

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> FlowAR:
        """Build a published model, `"S"`, `"L"` or `"H"`, with new weights.

        Args:
            name: one of these.
            **overrides: configuration values to change.

        Raises:
            UnknownNameError: the name is not a preset.
        """
        if name not in PRESETS:
            raise unknown_name("FlowAR preset", name, list(PRESETS))
        return cls(**(PRESETS[name] | overrides))

    @classmethod
    def from_original(cls, checkpoint: Any, config: Mapping[str, Any] | None = None) -> FlowAR:
        """Load a checkpoint in the published format.

        Args:
            checkpoint: path, or state dict.
            config: configuration values, which go before what the checkpoint tells.

        Raises:
            CheckpointError: keys or shapes do not fit, or a value is neither given nor told.
        """
        parameters, values, ends = read_published(checkpoint, "FlowAR")
        blocks = [key.split(".") for key in parameters if key.startswith("flownet.res_blocks.")]
        if not blocks or "flownet.input_proj.bias" not in parameters:
            raise CheckpointError("This is no FlowAR checkpoint: it has no flow head under 'flownet.'.")
        del values["positions"]
        values["head_width"] = len(parameters["flownet.input_proj.bias"])
        values["head_depth"] = 1 + max(int(key[2]) for key in blocks)
        values["cross_attention"] = any(key[3] == "crossattn" for key in blocks)
        values["scales"] = [math.isqrt(end - start) for start, end in zip([0, *ends], ends, strict=False)]
        values |= config or {}
        if "num_heads" not in values:
            raise CheckpointError("The checkpoint does not tell num_heads; pass it: config={'num_heads': 12}.")
        if not values["scales"]:
            raise CheckpointError(
                "The checkpoint does not tell scales; pass them: config={'scales': (1, 2, 4, 8, 16)}."
            )
        model = cls(**values)
        load_into(model, parameters)
        return model.eval()

    # ------------------------------------------------------------------------------------------------ scales

    def pyramid(self, latents: Tensor) -> list[Tensor]:
        """Return the mean over each scale's cells of `(batch, latent_channels, h, w)`: `(batch, channels, s, s)`."""
        return [F.interpolate(latents, size=(side, side), mode="area") for side in self.scales]

    def next_input(self, latents: Tensor, side: int) -> Tensor:
        """Bring a scale `(batch, channels, s, s)` to the positions of the next, `(batch, side**2, channels)`.

        It goes through the last scale, as published: bicubic to there, then means.
        """
        last = self.scales[-1]
        full = F.interpolate(latents.float(), size=(last, last), mode="bicubic")
        return F.interpolate(full, size=(side, side), mode="area").flatten(2).mT

    def _slice(self, scale: int) -> slice:
        start = sum(self.scale_tokens[:scale])
        return slice(start, start + self.scale_tokens[scale])

    # ------------------------------------------------------------------------------------------------ transformer

    @property
    def _blocks(self) -> list[AdaptiveBlock]:
        return [*self.encoder_blocks, *self.decoder_blocks]

    def _start(self, class_labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the input of the first scale, `(rows, tokens, hidden_size)`, and what modulates every block."""
        condition = self.class_emb(class_labels)[:, None]
        return condition.expand(-1, self.scale_tokens[0], -1), [block.ada_lin(condition) for block in self._blocks]

    def _transform(
        self,
        hidden: Tensor,
        modulations: Sequence[Tensor],
        positions: slice,
        mask: Tensor | None = None,
        state: BlockState | None = None,
    ) -> Tensor:
        """Return `z` of embedded tokens `(rows, length, hidden_size)`, of the same shape."""
        rotary = self._rotary.on(hidden.device)[positions]
        hidden = self.z_proj_ln(hidden + self.encoder_pos_embed_learned[:, positions])
        for i, block in enumerate(self._blocks):
            if i == len(self.encoder_blocks):
                hidden = self.decoder_embed(self.encoder_norm(hidden)) + self.decoder_pos_embed_learned[:, positions]
            hidden = block(hidden, modulations[i], rotary, mask, None if state is None else state.layer(i))
        return self.decoder_norm(hidden) + self.diffusion_pos_embed_learned[:, positions]

    def _embed(self, inputs: Tensor) -> Tensor:
        return self.z_proj(inputs.to(self.z_proj.weight.dtype))

    def conditions(self, scales: Sequence[Tensor], class_labels: Tensor) -> Tensor:
        """Compute `z` of the first scale and of the one after each given scale in one pass.

        Args:
            scales: `(batch, latent_channels, s, s)` each, the first k scales, k below the number of scales.
            class_labels: `(batch,)`; `num_classes` is none.

        Returns:
            `(batch, tokens of k + 1 scales, hidden_size)`.
        """
        first, modulations = self._start(class_labels)
        inputs = [self._embed(self.next_input(x, side)) for x, side in zip(scales, self.scales[1:], strict=False)]
        hidden = torch.cat([first, *inputs], 1)
        scale = torch.cat([torch.full((n,), i) for i, n in enumerate(self.scale_tokens[: len(scales) + 1])])
        scale = scale.to(hidden.device)
        return self._transform(hidden, modulations, slice(0, hidden.shape[1]), mask=scale[:, None] >= scale)

    # ------------------------------------------------------------------------------------------------ training

    def forward(
        self,
        latents: Tensor,
        class_labels: Tensor | Sequence[int],
        times: Tensor | None = None,
        noise: Tensor | None = None,
        drop_condition: Tensor | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowARForwardOutput | tuple[Tensor, Tensor]:
        """Predict the velocities of every scale, given the coarser scales of the same latents.

        Args:
            latents: `(batch, latent_channels, h, w)`.
            class_labels: `(batch,)`.
            times: `(batch, num_scales)` in [0, 1], 1 is noise; drawn from a logit-normal distribution by default.
            noise: `(batch, num_tokens, latent_channels)`, scale after scale; drawn by default.
            drop_condition: `(batch,)` bool; rows trained without their label, for guidance.
            generator: draws times, then noise: one, or one per row; none draws with a new seed.
            return_dict: False returns `(velocity, loss)`.

        Raises:
            ValueError: a shape is wrong or a value is out of its range.
        """
        config, side = self.config, self.scales[-1]
        labels = check_training_batch(
            latents, (config.latent_channels, side, side), class_labels, drop_condition, config.num_classes
        )
        stream = NoiseStream(generator, len(latents))
        times = training_times(times, stream, len(self.scales)).to(latents.device)
        shape = (sum(self.scale_tokens), config.latent_channels)
        noise = training_noise(noise, stream, shape).to(latents.device)
        pyramid = self.pyramid(latents.float())
        z = self.conditions(pyramid[:-1], labels)
        errors, velocities = [], []
        for scale, target in enumerate(pyramid):
            part = self._slice(scale)
            rotary = self._head_rotary.on(z.device)[part]
            error, velocity = self.flownet.loss(
                z[:, part], target.flatten(2).mT, times[:, scale], noise[:, part], rotary
            )
            errors.append(error)
            velocities.append(velocity)
        output = FlowARForwardOutput(velocity=torch.cat(velocities, 1), loss=torch.cat(errors, 1).mean())
        return output if return_dict else output.to_tuple()

    # ------------------------------------------------------------------------------------------------ generation

    def iter_generate(
        self,
        class_labels: Tensor | Sequence[int],
        guidance_scale: float | Guidance = 1.0,
        guidance_high: float = 0.9,
        num_steps: int | None = None,
        annealing: StepAnnealing | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        noise: Sequence[Tensor] | None = None,
        trace: Trace | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Generate scale by scale: yields the scale and its latents `(batch, latent_channels, s, s)`; see `generate`.

        Arguments are checked at once, not at the first scale.
        """
        config, num_scales = self.config, len(self.scales)
        labels = check_labels(class_labels, config.num_classes, self.z_proj.weight.device)
        if not guidance_high >= 0:
            raise ValueError(f"guidance_high must be at least 0, the time below which is guided; got {guidance_high}.")
        steps = plan_steps(num_steps, annealing, num_scales, default=25, least=2)
        scales = plan_guidance(guidance_scale, num_scales)
        if noise is not None:
            if generator is not None:
                raise ValueError("Pass noise or a generator, not both.")
            check_noise(noise, [(len(labels), tokens, config.latent_channels) for tokens in self.scale_tokens])
        stream = NoiseStream(generator, len(labels))
        trace = Trace() if trace is None else trace
        return self._iterate(labels, scales, guidance_high, steps, stream, noise, trace)

    @torch.no_grad()
    def _iterate(
        self,
        labels: Tensor,
        guidance: list[float],
        guidance_high: float,
        steps: list[int],
        stream: NoiseStream,
        noise: Sequence[Tensor] | None,
        trace: Trace,
    ) -> Iterator[tuple[int, Tensor]]:
        config, batch = self.config, len(labels)
        last_guided = max((i for i, scale in enumerate(guidance) if scale != 1.0), default=-1)
        unconditional = batch if last_guided >= 0 else 0
        first, modulations = self._start(torch.cat([labels, labels.new_full((unconditional,), config.num_classes)]))
        head_dim, positions = config.hidden_size // config.num_heads, sum(self.scale_tokens)
        cache = first.new_empty(len(self._blocks), 2, batch + unconditional, config.num_heads, positions, head_dim)
        state = BlockState(cache)
        latents = None
        for i, side in enumerate(self.scales):
            if state.num_rows > batch and i > last_guided:
                state.select_rows(slice(0, batch))
                modulations = [modulation[:batch] for modulation in modulations]
            if latents is None:
                hidden = first
            else:
                hidden = self._embed(self.next_input(latents, side)).repeat(state.num_rows // batch, 1, 1)
            part = self._slice(i)
            z = self._transform(hidden, modulations, part, state=state)
            state.append(self.scale_tokens[i])
            trace.record_forward(len(z), self.scale_tokens[i])
            trace.guidance.append(guidance[i])
            if noise is None:
                start = stream.draw(self.scale_tokens[i], config.latent_channels, unused_rows=unconditional)
            else:
                start = noise[i]
            latents = self.flownet.sample(
                z, start.to(z.device), self._head_rotary.on(z.device)[part], steps[i], guidance[i], guidance_high, trace
            )
            latents = latents.mT.unflatten(2, (side, side))
            yield i, latents

    def generate(
        self,
        class_labels: Tensor | Sequence[int],
        guidance_scale: float | Guidance = 1.0,
        guidance_high: float = 0.9,
        num_steps: int | None = None,
        annealing: StepAnnealing | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        noise: Sequence[Tensor] | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
        trace: Trace | None = None,
        return_dict: bool = True,
    ) -> FlowAROutput | tuple[Tensor, Trace]:
        """Generate the latents of a batch of images.

        Every scale is one forward of the transformer, behind the cache of the scales before it, and the flow steps of
        the head. Unconditional rows pass the transformer up to the last guided scale, and the head in guided steps
        only; where nothing is guided there are none. With one generator per image, an image does not depend on the rest
        of the batch, as far as floating point allows.

        Args:
            class_labels: `(batch,)`.
            guidance_scale: 1 is none. A number is reached linearly, from 1 in the first scale, as published; a
                `Guidance` gives the scale of every scale.
            guidance_high: flow steps are guided from this time on, down to 0; above 1 all are.
            num_steps: flow steps of each scale, at least 2; 25 by default. An odd number makes one step less, as
                published.
            annealing: in place of `num_steps`: fewer steps from scale to scale.
            generator: one, or one per image; none draws with a new seed. The global one is never used. One generator
                for all gives the draws of the published code, unused noise of unconditional rows included.
            noise: for every scale `(batch, s * s, latent_channels)` in place of a generator's.
            callback: called as `callback(scale, latents)` after every scale.
            trace: filled with what is executed.
            return_dict: False returns `(latents, trace)`.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of its range, or two exclude each other.
        """
        trace = Trace() if trace is None else trace
        scales = self.iter_generate(
            class_labels, guidance_scale, guidance_high, num_steps, annealing, generator, noise, trace
        )
        for scale, latents in scales:
            if callback is not None:
                callback(scale, latents)
        return FlowAROutput(latents=latents, trace=trace) if return_dict else (latents, trace)
