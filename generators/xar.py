"""xAR: writes the latents of an image cell by cell, each by flow matching given the cells before it.

Ren et al., 2025, "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv 2502.20388).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for it when it loads a pipeline
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Generator, Tensor, nn

from generators.annealing import StepAnnealing
from generators.base import LatentGenerator, Trace
from generators.guidance import Guidance, combine
from generators.heads.flow import (
    NORM_EPS,
    AdaptiveBlock,
    BlockState,
    NoiseStream,
    RotaryTable,
    TimeEmbedder,
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

PRESETS: dict[str, dict[str, int]] = {
    "B": {"hidden_size": 768, "encoder_layers": 8, "decoder_layers": 8, "num_heads": 12},
    "L": {"hidden_size": 1024, "encoder_layers": 16, "decoder_layers": 16, "num_heads": 16},
    "H": {"hidden_size": 1280, "encoder_layers": 20, "decoder_layers": 20, "num_heads": 16},
}
# What the published figures were made with.
GENERATION_PRESETS: dict[str, dict[str, Any]] = {
    "B": {"num_steps": 40, "guidance_scale": 2.7},
    "L": {"num_steps": 50, "guidance_scale": 2.3},
    "H": {"num_steps": 50, "guidance_scale": 2.2},
}
SAMPLERS = ("euler_maruyama", "euler")
_LAST_TIME = 0.04  # the stochastic sampler ends here, then makes one step without noise


def sampler_times(sampler: str, num_steps: int) -> Tensor:
    """Return the times between the steps of a sampler, float64 `(num_steps + 1,)`, from 1 to 0."""
    if sampler == "euler":
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return torch.cat([torch.linspace(1, _LAST_TIME, num_steps, dtype=torch.float64), torch.zeros(1)])


@dataclass
class XARForwardOutput(BaseOutput):
    """What `XAR.forward` returns.

    Attributes:
        velocity: `(batch, latent_channels, h, w)`, float32; learned to be noise minus latents.
        loss: scalar mean squared error.
    """

    velocity: Tensor
    loss: Tensor


@dataclass
class XAROutput(BaseOutput):
    """What `XAR.generate` returns.

    Attributes:
        latents: `(batch, latent_channels, h, w)`, float32, scaled as those in training.
        trace: what was executed.
    """

    latents: Tensor
    trace: Trace


class XAR(LatentGenerator, PretrainedModel):
    """Predicts the velocity of a cell of latents from its noisy state and the cells before it (Ren et al., 2025).

    The grid of latents is cut into square cells, in raster order; positions within a cell are in raster order, too. All
    of the network depends on the time of the cell, so every flow step is a pass through it.

    Args:
        hidden_size: width.
        encoder_layers: number of blocks before the second position embedding.
        decoder_layers: number of blocks after it.
        num_heads: attention heads; the head dimension must divide by 4.
        intermediate_size: width of the MLPs, by default `8 / 3 * hidden_size`, rounded down.
        grid_size: latents along each side of an image.
        cell_size: latents along each side of a cell.
        latent_channels: numbers in a latent.
        num_classes: number of classes.
        rope_base: base of the rotary frequencies.
        condition_dropout: how often a trainer should drop the condition; the model itself never does.
        initializer_range: standard deviation of the initial weights; modulations and output start at 0.

    Raises:
        ValueError: sizes are not positive or do not fit each other.
    """

    registry_name = "xar"

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 768,
        encoder_layers: int = 8,
        decoder_layers: int = 8,
        num_heads: int = 12,
        intermediate_size: int | None = None,
        grid_size: int = 16,
        cell_size: int = 8,
        latent_channels: int = 16,
        num_classes: int = 1000,
        rope_base: float = 10000.0,
        condition_dropout: float = 0.1,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        check_backbone(
            hidden_size, num_heads, encoder_layers=encoder_layers, decoder_layers=decoder_layers,
            latent_channels=latent_channels, num_classes=num_classes,
        )  # fmt: skip
        if cell_size < 1 or grid_size < cell_size or grid_size % cell_size:
            raise ValueError(f"cell_size must divide grid_size, got {cell_size} and {grid_size}.")
        self.cell_tokens = cell_size**2
        self.num_cells = (grid_size // cell_size) ** 2
        positions = grid_size**2
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, positions, hidden_size))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, positions, hidden_size))
        self.class_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.time_embed = TimeEmbedder(hidden_size)
        self.z_proj = nn.Linear(latent_channels, hidden_size)
        self.z_proj_ln = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        block = (hidden_size, num_heads, intermediate_size)
        self.encoder_blocks = nn.ModuleList(AdaptiveBlock(*block) for _ in range(encoder_layers))
        self.encoder_norm = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.decoder_embed = nn.Linear(hidden_size, hidden_size)
        self.decoder_blocks = nn.ModuleList(AdaptiveBlock(*block) for _ in range(decoder_layers))
        self.decoder_norm = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.pred = nn.Linear(hidden_size, latent_channels)
        table = rotary_table(grid_size, hidden_size // num_heads, rope_base)
        self._rotary = RotaryTable(self._cut(table.view(1, grid_size, grid_size, -1)).flatten(0, 2))
        initialise(self, initializer_range)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image."""
        return self.config.latent_channels, self.config.grid_size, self.config.grid_size

    def count_steps(self, **settings: Any) -> int:
        """Return how many steps a generation takes, whatever the settings."""
        return self.num_cells

    # ------------------------------------------------------------------------------------------------ construction

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> XAR:
        """Build a published model, `"B"`, `"L"` or `"H"`, with new weights.

        Args:
            name: one of these.
            **overrides: configuration values to change.

        Raises:
            UnknownNameError: the name is not a preset.
        """
        if name not in PRESETS:
            raise unknown_name("xAR preset", name, list(PRESETS))
        return cls(**(PRESETS[name] | overrides))

    @classmethod
    def from_original(cls, checkpoint: Any, config: Mapping[str, Any] | None = None) -> XAR:
        """Load a checkpoint in the published format.

        Args:
            checkpoint: path, or state dict.
            config: configuration values, which go before what the checkpoint tells.

        Raises:
            CheckpointError: keys or shapes do not fit, or a value is neither given nor told.
        """
        parameters, values, ends = read_published(checkpoint, "xAR")
        values["grid_size"] = math.isqrt(values.pop("positions"))
        if ends:
            values["cell_size"] = math.isqrt(ends[0])
        values |= config or {}
        for name, hint in (("num_heads", 12), ("cell_size", 8)):
            if name not in values:
                raise CheckpointError(f"The checkpoint does not tell {name}; pass it: config={{'{name}': {hint}}}.")
        model = cls(**values)
        load_into(model, parameters)
        return model.eval()

    # ------------------------------------------------------------------------------------------------ cells

    def _cut(self, grid: Tensor) -> Tensor:
        """Cut `(batch, grid_size, grid_size, dim)` into `(batch, num_cells, cell_tokens, dim)`."""
        size = self.config.cell_size
        return grid.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def to_cells(self, latents: Tensor) -> Tensor:
        """Cut `(batch, latent_channels, h, w)` into `(batch, num_cells, cell_tokens, latent_channels)`."""
        return self._cut(latents.permute(0, 2, 3, 1))

    def from_cells(self, cells: Tensor) -> Tensor:
        """Put `(batch, num_cells, cell_tokens, latent_channels)` together to `(batch, latent_channels, h, w)`."""
        size, side = self.config.cell_size, self.config.grid_size // self.config.cell_size
        grid = cells.unflatten(2, (size, size)).unflatten(1, (side, side)).transpose(2, 3)
        return grid.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    # ------------------------------------------------------------------------------------------------ network

    @property
    def _blocks(self) -> list[AdaptiveBlock]:
        return [*self.encoder_blocks, *self.decoder_blocks]

    def _network(
        self,
        tokens: Tensor,
        modulations: Sequence[Tensor],
        start: int = 0,
        mask: Tensor | None = None,
        state: BlockState | None = None,
    ) -> Tensor:
        """Return velocities, float32 like `tokens` `(rows, length, latent_channels)`, that begin at position `start`.

        `modulations` holds for every block `(rows, length or 1, 6 * hidden_size)`.
        """
        positions = slice(start, start + tokens.shape[1])
        rotary = self._rotary.on(tokens.device)[positions]
        hidden = self.z_proj(tokens.to(self.z_proj.weight.dtype)) + self.encoder_pos_embed_learned[:, positions]
        hidden = self.z_proj_ln(hidden)
        for i, block in enumerate(self._blocks):
            if i == len(self.encoder_blocks):
                hidden = self.decoder_embed(self.encoder_norm(hidden)) + self.decoder_pos_embed_learned[:, positions]
            hidden = block(hidden, modulations[i], rotary, mask, None if state is None else state.layer(i))
        return self.pred(self.decoder_norm(hidden)).float()

    def velocity(self, cells: Tensor, times: Tensor, class_labels: Tensor) -> Tensor:
        """Predict the velocities of all cells in one pass; each sees itself and the cells before it.

        Args:
            cells: `(batch, k, cell_tokens, latent_channels)`, the first k cells; finished ones have time 0.
            times: `(batch, k)` in [0, 1].
            class_labels: `(batch,)`; `num_classes` is none.

        Returns:
            Float32, of the shape of `cells`.
        """
        condition = self.time_embed(times) + self.class_emb(class_labels)[:, None]
        modulations = [block.ada_lin(condition).repeat_interleave(self.cell_tokens, 1) for block in self._blocks]
        cell = torch.arange(cells.shape[1], device=cells.device).repeat_interleave(self.cell_tokens)
        velocity = self._network(cells.flatten(1, 2), modulations, mask=cell[:, None] >= cell)
        return velocity.view_as(cells)

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
    ) -> XARForwardOutput | tuple[Tensor, Tensor]:
        """Predict the velocities of noisy latents; every cell has its own time, and sees noisy cells before it.

        Args:
            latents: `(batch, latent_channels, h, w)`.
            class_labels: `(batch,)`.
            times: `(batch, num_cells)` in [0, 1], 1 is noise; drawn from a logit-normal distribution by default.
            noise: like `latents`; drawn by default.
            drop_condition: `(batch,)` bool; rows trained without their label, for guidance.
            generator: draws times, then noise: one, or one per row; none draws with a new seed.
            return_dict: False returns `(velocity, loss)`.

        Raises:
            ValueError: a shape is wrong or a value is out of its range.
        """
        config = self.config
        shape = (config.latent_channels, config.grid_size, config.grid_size)
        labels = check_training_batch(latents, shape, class_labels, drop_condition, config.num_classes)
        stream = NoiseStream(generator, len(latents))
        times = training_times(times, stream, self.num_cells).to(latents.device)
        noise = training_noise(noise, stream, shape).to(latents.device)
        target, start = self.to_cells(latents.float()), self.to_cells(noise)
        t = times[:, :, None, None]
        velocity = self.velocity((1 - t) * target + t * start, times, labels)
        loss = (velocity - (start - target)).square().mean()
        output = XARForwardOutput(velocity=self.from_cells(velocity), loss=loss)
        return output if return_dict else output.to_tuple()

    # ------------------------------------------------------------------------------------------------ generation

    def _modulations(self, times: Tensor, labels: Tensor, guided: bool) -> list[Tensor]:
        """Return for every block `(len(times), conditions, 6 * hidden_size)`.

        Conditions are the labels and, where guided, the one that all unconditional rows share.
        """
        if guided:
            labels = torch.cat([labels, labels.new_tensor([self.config.num_classes])])
        condition = self.time_embed(times.to(labels.device))[:, None] + self.class_emb(labels)
        return [block.ada_lin(condition) for block in self._blocks]

    def iter_generate(
        self,
        class_labels: Tensor | Sequence[int],
        guidance_scale: float | Guidance = 1.0,
        num_steps: int | None = None,
        annealing: StepAnnealing | None = None,
        sampler: str = "euler_maruyama",
        generator: Generator | Sequence[Generator] | None = None,
        noise: Sequence[Tensor] | None = None,
        trace: Trace | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Generate cell by cell: yields the cell and the latents so far, zero in cells to come; see `generate`.

        Arguments are checked at once, not at the first cell.
        """
        config = self.config
        if sampler not in SAMPLERS:
            raise unknown_name("sampler", sampler, list(SAMPLERS))
        labels = check_labels(class_labels, config.num_classes, self.z_proj.weight.device)
        steps = plan_steps(num_steps, annealing, self.num_cells, default=50, least=1)
        scales = plan_guidance(guidance_scale, self.num_cells)
        shape = (len(labels), self.cell_tokens, config.latent_channels)
        if noise is not None:
            if generator is not None:
                raise ValueError("Pass noise or a generator, not both.")
            check_noise(noise, [(1 if sampler == "euler" else count, *shape) for count in steps])
        stream = NoiseStream(generator, len(labels))
        return self._iterate(labels, scales, steps, sampler, stream, noise, Trace() if trace is None else trace)

    @torch.no_grad()
    def _iterate(
        self,
        labels: Tensor,
        scales: list[float],
        steps: list[int],
        sampler: str,
        stream: NoiseStream,
        noise: Sequence[Tensor] | None,
        trace: Trace,
    ) -> Iterator[tuple[int, Tensor]]:
        config, batch, size = self.config, len(labels), self.cell_tokens
        last_guided = max((cell for cell, scale in enumerate(scales) if scale != 1.0), default=-1)
        rows = 2 * batch if last_guided >= 0 else batch
        condition_of_row = torch.arange(rows, device=labels.device).clamp(max=batch)
        head_dim = config.hidden_size // config.num_heads
        capacity = self.num_cells * size
        cache = self.z_proj.weight.new_empty(len(self._blocks), 2, rows, config.num_heads, capacity, head_dim)
        state = BlockState(cache)

        def advance(x: Tensor, step: int, rows: int) -> Tensor:
            """Return velocities `(rows, size, channels)` of the cell at one time of the table."""
            tokens = x.repeat(rows // batch, 1, 1)
            row = condition_of_row[:rows]
            trace.record_forward(rows, size)
            return self._network(tokens, [table[step, row, None] for table in tables], state.length, state=state)

        def draw(cell: int, index: int, dtype: torch.dtype) -> Tensor:
            drawn = stream.draw(size, config.latent_channels, dtype=dtype) if noise is None else noise[cell][index]
            # Noise and latents stay in float64, as published; the network does not see it.
            return drawn.to(labels.device, torch.float64)

        cells = torch.zeros(batch, self.num_cells, size, config.latent_channels, device=labels.device)
        for cell, (scale, num_steps) in enumerate(zip(scales, steps, strict=True)):
            if cell == 0 or num_steps != steps[cell - 1]:
                times = sampler_times(sampler, num_steps)
                tables = self._modulations(times, labels, guided=rows > batch)
            trace.guidance.append(scale)
            x = draw(cell, 0, torch.float32)
            for step, (t, end) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
                velocity = advance(x, step, batch if scale == 1.0 else 2 * batch).double()
                if scale != 1.0:
                    velocity = combine(velocity[:batch], velocity[batch:], scale)
                if sampler == "euler":
                    x = x + (end - t) * velocity
                    continue
                # The drift is velocity - t * score, with the score ((t - 1) * velocity - x) / t.
                x = x + (end - t) * ((2 - t) * velocity + x)
                if step < num_steps - 1:
                    x = x + math.sqrt(2 * t * (t - end)) * draw(cell, step + 1, torch.float64)
            cells[:, cell] = x
            if cell + 1 < self.num_cells:
                if cell >= last_guided:
                    state.select_rows(slice(0, batch))
                advance(x, num_steps, state.num_rows)  # at time 0, for the cells to come
                state.append(size)
            yield cell, self.from_cells(cells)

    def generate(
        self,
        class_labels: Tensor | Sequence[int],
        guidance_scale: float | Guidance = 1.0,
        num_steps: int | None = None,
        annealing: StepAnnealing | None = None,
        sampler: str = "euler_maruyama",
        generator: Generator | Sequence[Generator] | None = None,
        noise: Sequence[Tensor] | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
        trace: Trace | None = None,
        return_dict: bool = True,
    ) -> XAROutput | tuple[Tensor, Trace]:
        """Generate the latents of a batch of images.

        Each cell starts as noise and takes its flow steps, then enters the cache once at time 0. Unconditional rows are
        computed in guided cells, enter the cache up to the last of these, and are not there where none is. With one
        generator per image, an image does not depend on the rest of the batch, as far as floating point allows.

        Args:
            class_labels: `(batch,)`.
            guidance_scale: 1 is none. A number is reached linearly, from 1 in the first cell, as published; a
                `Guidance` gives the scale of every cell.
            num_steps: flow steps of each cell, at least 1; 50 by default.
            annealing: in place of `num_steps`: fewer steps from cell to cell.
            sampler: `euler_maruyama`, stochastic, or `euler`.
            generator: one, or one per image; none draws with a new seed. The global one is never used. One generator
                for all gives the draws of the published code: the noise of a cell, then that of its steps.
            noise: for every cell `(draws, batch, cell_tokens, latent_channels)` in place of a generator's: the noise
                the cell starts from, then that of each step but the last (only the first with `euler`).
            callback: called as `callback(cell, latents)` after every cell; cells to come are zero.
            trace: filled with what is executed.
            return_dict: False returns `(latents, trace)`.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: an argument is out of its range, or two exclude each other.
        """
        trace = Trace() if trace is None else trace
        cells = self.iter_generate(class_labels, guidance_scale, num_steps, annealing, sampler, generator, noise, trace)
        for cell, latents in cells:
            if callback is not None:
                callback(cell, latents)
        return XAROutput(latents=latents, trace=trace) if return_dict else (latents, trace)
