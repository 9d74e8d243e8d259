"""Continuous speculative decoding: a small MAR drafts latents for a large one.

Wang et al., 2024, "Continuous Speculative Decoding for Autoregressive Image Generation" (arXiv 2411.11925).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from generators.base import Trace
from generators.heads.diffusion import DiffusionPlan
from generators.heads.flow import NoiseStream
from mmsdk.decoding.rules.continuous import Continuous, Normals
from mmsdk.decoding.sampling import draw_uniforms

if TYPE_CHECKING:
    from generators.mar import MAR, Walk

# What draft and target must have in common.
_SAME = ("grid_size", "patch_size", "latent_channels", "condition", "num_classes", "caption_dim")


@dataclass
class ContinuousStats:
    """What a generation took and brought.

    Attributes:
        target_forwards: forwards of the target's transformer, over any number of images.
        draft_forwards: forwards of the draft's.
        drafted: tokens that were verified.
        accepted: tokens of these that stayed.
    """

    target_forwards: int = 0
    draft_forwards: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the verified tokens that stayed."""
        return self.accepted / self.drafted if self.drafted else 0.0


class Side(NamedTuple):
    """One of both models in a generation.

    Attributes:
        model: the model.
        condition: `(rows, buffer_size, width)`, unconditional rows behind the others where any step is guided.
        plans: for each step its diffusion.
        trace: counts forwards.
    """

    model: MAR
    condition: Tensor
    plans: Sequence[DiffusionPlan]
    trace: Trace


class SharedNoise(NamedTuple):
    """The noise of both models.

    Attributes:
        start: `(batch, num_tokens, token_dim)`, what the token of each position starts from.
        inner: `(batch, num_tokens, most, token_dim)`, what is added at each diffusion index.
    """

    start: Tensor
    inner: Tensor


class _Drawn(NamedTuple):
    """Tokens `(batch, n, token_dim)`; of `batch * n` of them the last distribution, and the log stds before it."""

    tokens: Tensor
    last: Normals
    log_std: Tensor


@dataclass(eq=False)
class ContinuousSpeculation:
    """Lets a small MAR predict the tokens of several steps, and the large one verify all of them in one forward.

    Both denoise with the same noise, so that their tokens are alike where the models agree. The target predicts all
    drafted positions at once, from what was known before the first of them. The first steps of a generation are the
    target's own: nothing is known that could guide a draft.

    With `mode="official"`, every verified token stays or is replaced, and all are known afterwards; most of what the
    draft says stays, whatever the target would have said. With `mode="paper"`, tokens are verified in the order in
    which they were drafted, and what comes after the first refused one is drafted again. Each token then follows
    exactly what the target says of its position from what was known before the verification, with the noise of the last
    diffusion step, which plain generation leaves out (its standard deviation is below 0.01). Within so little noise,
    models that differ hardly ever agree: `paper` is exact, and accepts next to nothing. It writes the images of a batch
    one by one, since each accepts another number of tokens.

    It does not fit xAR, whose last interval adds no noise: its tokens have no density that could be compared.

    Attributes:
        draft: a MAR of the same latents and conditions, in evaluation mode.
        num_draft: drafts are verified after every step whose index it divides.
        mode: `"official"` or `"paper"`, see `Continuous`.
        prefill_ratio: part of the steps that the target makes itself, 0 to 1; the first is always its own.
        temperature: of the official test.
        stats: what the last generation took and brought.

    Raises:
        TypeError: the draft is no MAR.
        ValueError: a number is out of its range.
        UnknownNameError: there is no such mode.

    Example:
        ```py
        draft = MAR.from_pretrained("emoji-64-mar-draft")
        pipe("red heart", accelerator=ContinuousSpeculation(draft))
        ```
    """

    setting: ClassVar[str] = "speculation"  # the argument of generators that takes it

    draft: MAR = field(repr=False)
    num_draft: int = 4
    mode: str = "official"
    prefill_ratio: float = 0.15
    temperature: float = 42.0
    stats: ContinuousStats = field(default_factory=ContinuousStats, init=False)

    def __post_init__(self) -> None:
        from generators.mar import MAR

        if not isinstance(self.draft, MAR):
            raise TypeError(
                f"The draft must be a MAR, whose tokens are continuous, got {type(self.draft).__name__}; token ids are "
                "drafted by a SpeculativeDecoder."
            )
        if isinstance(self.num_draft, bool) or not isinstance(self.num_draft, int) or self.num_draft < 1:
            raise ValueError(f"num_draft must be an integer of at least 1, got {self.num_draft!r}.")
        if not 0 <= self.prefill_ratio <= 1:
            raise ValueError(f"prefill_ratio must be 0 to 1, got {self.prefill_ratio!r}.")
        self.rule = Continuous(self.mode, self.temperature)

    @property
    def lossless(self) -> bool:
        """Whether tokens follow what the target says of them."""
        return self.rule.lossless

    def check_target(self, target: MAR) -> None:
        """Raise `ValueError` unless the draft writes the latents of `target` from the same conditions."""
        for name in _SAME:
            if self.draft.config[name] != target.config[name]:
                raise ValueError(
                    f"The draft has {name}={self.draft.config[name]!r}, the target {target.config[name]!r}: they must "
                    "write the same latents from the same conditions."
                )

    def draw_uniforms(self, stream: NoiseStream, num_positions: int) -> Tensor:
        """Return the numbers in [0, 1) `(batch, n)` that `n` drafts are tested with."""
        return draw_uniforms(stream.generators, stream.batch, num_positions)

    def draw_proposal(self, stream: NoiseStream, num_positions: int, token_dim: int) -> tuple[Tensor, Tensor]:
        """Return normal numbers `(batch, n, token_dim)`, and numbers in [0, 1) `(batch, n)`, in place of drafts."""
        return stream.draw(num_positions, token_dim), draw_uniforms(stream.generators, stream.batch, num_positions)

    @torch.no_grad()
    def generate(
        self,
        walk: Walk,
        target: Side,
        draft: Side,
        num_iter: int,
        temperature: float,
        noise: SharedNoise,
        stream: NoiseStream,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the last step that is done, and the tokens `(batch, num_tokens, token_dim)` so far.

        Args:
            walk: what the steps predict, of the target.
            target: the large model.
            draft: the small one.
            num_iter: number of steps.
            temperature: factor of the noise of the diffusion steps, above 0.
            noise: of both models.
            stream: what the verification draws from.
        """
        self.stats = ContinuousStats()
        if self.mode == "official" or stream.batch == 1:
            yield from _Generation(self, walk, target, draft, num_iter, temperature, noise, stream).run()
            return
        generators = stream.generators
        if isinstance(generators, Generator):
            seeds = torch.randint(2**62, (stream.batch,), generator=generators, device=generators.device).tolist()
            generators = [Generator(device=generators.device).manual_seed(seed) for seed in seeds]
        runs = []
        for row, generator in enumerate(generators):
            one = slice(row, row + 1)
            both = [row, row + stream.batch] if walk.is_guided else [row]
            steps = [step._replace(known=step.known[one], positions=step.positions[one]) for step in walk.steps]
            large, small = (side._replace(condition=side.condition[both]) for side in (target, draft))
            lone = walk._replace(tokens=walk.tokens[one], condition=walk.condition[both], steps=steps)
            own = SharedNoise(noise.start[one], noise.inner[one])
            alone = NoiseStream([generator], 1)
            runs.append(_Generation(self, lone, large, small, num_iter, temperature, own, alone).run())
        done = [(-1, walk.tokens[row : row + 1]) for row in range(stream.batch)]
        for results in zip_longest(*runs):
            done = [old if new is None else new for old, new in zip(done, results, strict=True)]
            yield min(step for step, _ in done), torch.cat([tokens for _, tokens in done])


class _Generation:
    """One generation, of images that accept equally many tokens."""

    def __init__(
        self,
        speculation: ContinuousSpeculation,
        walk: Walk,
        target: Side,
        draft: Side,
        num_iter: int,
        temperature: float,
        noise: SharedNoise,
        stream: NoiseStream,
    ) -> None:
        self.speculation, self.walk, self.target, self.draft = speculation, walk, target, draft
        self.temperature, self.noise, self.stream = temperature, noise, stream
        self.prefill = num_iter * speculation.prefill_ratio
        self.tokens = walk.tokens
        # Positions in the order in which they become known, and how many there are after each step.
        self.order = torch.cat([step.positions for step in walk.steps], 1)
        self.ends = torch.tensor([step.positions.shape[1] for step in walk.steps]).cumsum(0).tolist()
        self.done = 0

    def run(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the last step that is done, and the tokens so far."""
        steps, stats = self.walk.steps, self.speculation.stats
        index = 0
        while index < len(steps):
            if steps[index].step <= self.prefill:
                positions = self.order[:, self.done : self.ends[index]]
                self._put(positions, self._draw(self.target, index, index, self.known, positions).tokens)
                stats.target_forwards += 1
                self.done = self.ends[index]
            else:
                last = index
                while last < len(steps) - 1 and steps[last].step % self.speculation.num_draft:
                    last += 1
                self._speculate(index, last)
            finished = sum(end <= self.done for end in self.ends)
            if finished > index:
                index = finished
                yield steps[index - 1].step, self.tokens

    @property
    def known(self) -> Tensor:
        """Positions that are known, `(batch, k)`."""
        return torch.cat([self.walk.steps[0].known, self.order[:, : self.done]], 1).sort(1).values

    def _speculate(self, first: int, last: int) -> None:
        """Draft what remains of the steps `first` to `last`, and keep what passes."""
        rule, stats = self.speculation.rule, self.speculation.stats
        begin, end, before, known = self.done, self.ends[last], self.tokens, self.known
        batch, token_dim = len(before), before.shape[2]
        drafts = []
        for index in range(first, last + 1):
            positions = self.order[:, self.done : self.ends[index]]
            drafts.append(self._draw(self.draft, index, first, self.known, positions))
            self._put(positions, drafts[-1].tokens)
            stats.draft_forwards += 1
            self.done = self.ends[index]
        positions = self.order[:, begin:end]
        # The published code verifies in the order of the positions; what is exact needs that of the drafts.
        places = torch.arange(end - begin, device=positions.device).expand(batch, -1)
        if not rule.lossless:
            places = positions.argsort(1)
            positions = positions.gather(1, places)
        drafted = _join(drafts, places)
        self.tokens = before
        truth = self._draw(self.target, last, first, known, positions)
        stats.target_forwards += 1
        trajectory = truth.log_std - drafted.log_std
        flat = drafted.tokens.flatten(0, 1)
        numbers = self.speculation.draw_uniforms(self.stream, end - begin).flatten().to(flat)
        passes = rule.log_ratio(flat, truth.last, drafted.last, trajectory) > numbers.log()
        count = end - begin
        if rule.lossless:  # of a single image
            refused = (~passes).nonzero().flatten()
            if len(refused):
                count = int(refused[0]) + 1
                passes[count:] = True  # what is drafted again needs nothing in its place
        stats.drafted += batch * count
        stats.accepted += int(passes.view(batch, -1)[:, :count].sum())

        def propose() -> tuple[Tensor, Tensor]:
            normals, uniforms = self.speculation.draw_proposal(self.stream, end - begin, token_dim)
            return normals.flatten(0, 1).to(flat), uniforms.flatten().to(flat)

        others = rule.resample(~passes, truth.last, drafted.last, trajectory, propose)
        kept = torch.where(passes[:, None], flat, others).view(batch, -1, token_dim)
        self._put(positions[:, :count], kept[:, :count])
        self.done = begin + count

    def _draw(self, side: Side, index: int, planned: int, known: Tensor, positions: Tensor) -> _Drawn:
        """Denoise the tokens of positions `(batch, n)`, guided as in step `index`, with the timesteps of `planned`."""
        model, scale, plan = side.model, self.walk.scales[index], side.plans[planned]
        z = model.features_at(side.condition, scale, self.tokens, known, positions, side.trace).flatten(0, 1)
        prepared = model.diffloss.prepare(z, plan, scale)
        side.trace.record_head(len(z), len(plan))
        side.trace.guidance.append(scale)
        gathered = positions[..., None]
        x = self.noise.start.gather(1, gathered.expand(-1, -1, self.tokens.shape[2])).flatten(0, 1)
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        inner = self.noise.inner[rows, positions].flatten(0, 1)
        log_std = x.new_zeros(len(x))
        for step in reversed(range(len(plan))):
            mean, std = prepared.posterior(x, step)
            std = std * self.temperature
            if step:
                x = mean + std * inner[:, step]
                log_std = log_std + std.log().sum(-1)
        tokens = mean + std * inner[:, 0] if self.speculation.rule.lossless else mean
        return _Drawn(tokens.view(*positions.shape, -1), Normals(mean, std), log_std)

    def _put(self, positions: Tensor, tokens: Tensor) -> None:
        self.tokens = self.tokens.scatter(1, positions[..., None].expand_as(tokens), tokens)


def _join(drafts: Sequence[_Drawn], places: Tensor) -> _Drawn:
    """Return drafts of several steps as one, in the order `places` `(batch, n)`."""
    batch = len(places)

    def arrange(parts: Sequence[Tensor]) -> Tensor:
        joined = torch.cat([part.view(batch, -1, *part.shape[1:]) for part in parts], 1)
        index = places.view(*places.shape, *[1] * (joined.ndim - 2)).expand(-1, -1, *joined.shape[2:])
        return joined.gather(1, index).flatten(0, 1)

    tokens = arrange([draft.tokens.flatten(0, 1) for draft in drafts])
    last = Normals(arrange([draft.last.mean for draft in drafts]), arrange([draft.last.std for draft in drafts]))
    return _Drawn(tokens.view(batch, -1, tokens.shape[1]), last, arrange([draft.log_std for draft in drafts]))
