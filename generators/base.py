"""What the generators share: the state of a backbone, and the trace of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Generator, Tensor

from tokenizers_img.base import ImageTokenizer


class BackboneState(Protocol):
    """What a backbone remembers of its sequences; it belongs to one generation and is changed in place.

    Attributes:
        length: number of positions that are held, the same for every row.
    """

    length: int

    def commit(self, path: Sequence[int] | Tensor) -> None:
        """Keep only the positions `path` `(k,)` of the last block, in that order; offsets count from its start."""

    def rollback(self, length: int) -> None:
        """Forget everything from position `length` on."""

    def select_rows(self, rows: slice | Sequence[int] | Tensor) -> None:
        """Keep only these rows, in that order."""


class TokenHead(Protocol):
    """From what a backbone knows of positions, `z`, to their tokens."""

    def loss(self, z: Tensor, target: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the loss of each token, `(n,)`, of `z` `(n, condition_dim)` and `target` `(n, token_dim)`."""

    def plan(self, timesteps: Sequence[int]) -> Any:
        """Compute what does not depend on the tokens; a plan is as long as the number of steps to make."""

    def sample(
        self, z: Tensor, noise: Tensor, plan: Any, temperature: float = 1.0, guidance_scale: float = 1.0
    ) -> Tensor:
        """Return tokens `(n, token_dim)`.

        Args:
            z: `(n, condition_dim)`, or twice the rows, the unconditional ones last, where guided.
            noise: `(draws, n, token_dim)`, that to start from first.
            plan: of `plan`.
            temperature: factor of the noise of the steps.
            guidance_scale: 1 is none.
        """


class LatentGenerator:
    """What generators of continuous latents share, so that a pipeline can use any of them."""

    generates = "latents"
    config: Any

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image."""
        raise NotImplementedError

    def check_tokenizer(self, image_tokenizer: ImageTokenizer) -> None:
        """Check that this generator writes the latents of an image tokenizer.

        Raises:
            ValueError: it does not.
        """
        name = type(image_tokenizer).__name__
        channels = getattr(image_tokenizer, "latent_channels", None)
        if image_tokenizer.codebook_sizes is not None or image_tokenizer.grid is None or channels is None:
            raise ValueError(f"The generator writes continuous latents, but {name} has other tokens; pass a KLVAE.")
        if (channels, *image_tokenizer.grid) != self.latent_shape:
            raise ValueError(
                f"The generator writes latents {self.latent_shape} (channels, height, width), but those of {name} are "
                f"{(channels, *image_tokenizer.grid)}: they do not belong together."
            )

    def inpainting(self, latents: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the arguments of a generation that regenerates masked latents.

        Args:
            latents: `(batch, latent_channels, h, w)`.
            mask: bool `(batch, h * w)`.

        Raises:
            ValueError: this generator cannot.
        """
        raise ValueError(f"{type(self).__name__} generates whole images; MAR regenerates any part of one.")


@dataclass
class Trace:
    """What a generation executed, so that a saving can be counted and not only timed.

    Attributes:
        keep_logits: also keep the logits of every step; costs `num_steps * batch * codebook_size` floats.
        rows: rows of each forward, conditional and unconditional.
        positions: positions per row of each forward.
        guidance: guidance scale of each step.
        head_steps: passes through the token head at each step of the generation, for heads that make several.
        head_rows: tokens in each of these passes, conditional and unconditional.
        logits: per step `(batch, codebook_size)`, or `(batch, tokens_per_step, codebook_size)` of several tokens: after
            guidance, before temperature, top-k and top-p.
    """

    keep_logits: bool = False
    rows: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    guidance: list[float] = field(default_factory=list)
    head_steps: list[int] = field(default_factory=list)
    head_rows: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list, repr=False)

    def record_forward(self, rows: int, positions: int) -> None:
        """Count one forward of `rows` sequences with `positions` new positions each."""
        self.rows.append(rows)
        self.positions.append(positions)

    def record_step(self, guidance: float, logits: Tensor) -> None:
        """Note the guidance of one step, and its `logits` `(batch, codebook_size)` where they are kept."""
        self.guidance.append(guidance)
        if self.keep_logits:
            self.logits.append(logits)

    def record_head(self, rows: int, steps: int) -> None:
        """Count `steps` passes of `rows` tokens through the head."""
        self.head_rows.append(rows)
        self.head_steps.append(steps)

    @property
    def forwards(self) -> int:
        """Number of forwards."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Positions processed: the sum over forwards of rows times positions."""
        return sum(rows * positions for rows, positions in zip(self.rows, self.positions, strict=True))
