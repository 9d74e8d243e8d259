"""Image generators as targets of the decoding core: trees of image tokens, guided inside."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from generators.base import Trace
from generators.guidance import combine
from mmsdk.decoding.base import Decision, Drafter, Prefill
from mmsdk.decoding.sampling import process_logits, sample_ids
from mmsdk.decoding.target import TargetModel
from mmsdk.decoding.tree import DraftTree

if TYPE_CHECKING:
    from generators.llamagen import LlamaGen, LlamaGenState
    from mmsdk.decoding.decoder import SpeculativeDecoder


# Slots for drafts beside those of the tokens: nodes of a tree, at least.
DRAFT_SLOTS = 64


class Conditions(NamedTuple):
    """What images are written from.

    Attributes:
        arguments: class labels, or text features and their mask, as `LlamaGen.prefill` takes them.
        scales: guidance scale of each token.
    """

    arguments: dict[str, Any]
    scales: list[float]


class ConditionedDrafter(Drafter):
    """A drafter that reads the conditions of the images."""

    @abstractmethod
    def condition(self, conditions: Conditions) -> None:
        """Read the conditions of the images that are to be written next; called before `reset`."""


class LlamaGenTarget(TargetModel):
    """Verifies trees of image tokens with a LlamaGen, with guidance at the scale of each token's place.

    The first token comes from the condition alone; trees begin at it. Rows may have accepted different numbers of
    tokens: what a row holds lies in the first slots of its cache, and a mask hides the rest. Equals the generation
    token by token up to rounding.

    Args:
        generator: the model; one token at a step.
        state: as `prefill` returns it, with slots for drafts.
        batch: images; where the state has twice the rows, the second half are unconditional.
        scales: guidance scale of each token.
        trace: counts the forwards.
    """

    def __init__(
        self, generator: LlamaGen, state: LlamaGenState, batch: int, scales: Sequence[float], trace: Trace
    ) -> None:
        if generator.tokens_per_step != 1:
            raise ValueError(
                f"{type(generator).__name__} writes {generator.tokens_per_step} tokens at a step; drafts are trees of "
                "single tokens: use LlamaGen, or shuffle_size=1."
            )
        self.generator = generator
        self.state = state
        self._batch = batch
        self._device = state.condition_hidden.device
        self._scales = torch.tensor(scales, device=self._device)
        self._held = torch.zeros(batch, dtype=torch.int64, device=self._device)
        self._states = state.condition_hidden_states
        self._trace = trace

    @property
    def room(self) -> int:
        """Nodes that the next trees may have, the root included."""
        return self.state.capacity - self.state.length

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return self.generator.config.codebook_size

    @property
    def cost_context(self) -> Hashable:
        """What the cost of a forward depends on, besides the trees."""
        return id(self.generator), self.state.num_rows

    def read(self, prefix: Tensor | None = None) -> Tensor:
        """Read tokens that are given, before any tree, and return what the model says of those that follow.

        Args:
            prefix: `(batch, k)`; None: none.

        Returns:
            `(batch, codebook_size)` float32.
        """
        state, count = self.state, 0 if prefix is None else prefix.shape[1]
        hidden = state.condition_hidden
        if prefix is not None and count:
            states = self.generator.advance(prefix.repeat(state.num_rows // self._batch, 1), state)
            self._trace.record_forward(state.num_rows, count)
            self._states = torch.cat([self._states, states], 1)
            self._held += count
            hidden = states[:, -1]
        return self.generator.guided_logits(hidden, self._batch, float(self._scales[count]))

    @property
    def prefill(self) -> Prefill:
        """What the model made of the conditions and of what was read; rows of no condition behind the others."""
        mask = torch.ones(self._states.shape[:2], dtype=torch.bool, device=self._device)
        if self.state.key_bias is not None:
            mask &= self.state.key_bias[:, 0, 0, : mask.shape[1]] == 0
        return Prefill(self._states, mask)

    @torch.no_grad()
    def forward_tree(self, tree: DraftTree, output_hidden_states: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return what the model says after each node, and its states there, if that is asked for.

        Args:
            tree: the drafts, with the last token of each image as their root.
            output_hidden_states: whether to return the states after the last norm.

        Returns:
            The guided logits `(batch, n, codebook_size)` float32, and the states `(rows, n, hidden_size)` or None:
            where the generation is guided, those of no condition behind the others.
        """
        state, model = self.state, self.generator
        times = state.num_rows // self._batch
        places = self._held[:, None] + tree.depths
        # Nodes beyond the last token are never kept; they need any place.
        places = places.clamp_max(model.config.max_tokens - 1)
        slots = torch.arange(state.length, device=self._device)
        held = (slots < state.condition_length + self._held[:, None])[:, None].expand(-1, tree.num_nodes, -1)
        mask = torch.zeros(self._batch, 1, tree.num_nodes, state.length + tree.num_nodes, device=self._device)
        mask.masked_fill_(~torch.cat([held, tree.mask], -1)[:, None], float("-inf"))
        mask = mask.to(state.condition_hidden.dtype).repeat(times, 1, 1, 1)
        if state.key_bias is not None:
            mask = mask + F.pad(
                state.key_bias[..., : state.condition_length], (0, mask.shape[-1] - state.condition_length)
            )
        positions = (state.position_offset + state.condition_length + places).repeat(times, 1)
        hidden = model.extend(model.embed_tokens(tree.tokens.repeat(times, 1)), state, mask, positions=positions)
        self._trace.record_forward(state.num_rows, tree.num_nodes)
        guided = hidden
        if times > 1:
            # A node at place i says what token i + 1 is.
            scales = self._scales[(places + 1).clamp_max(len(self._scales) - 1)][..., None]
            guided = combine(hidden[: self._batch].float(), hidden[self._batch :].float(), scales).to(hidden.dtype)
        return model.predict(guided).float(), hidden if output_hidden_states else None

    def commit(self, decision: Decision) -> None:
        """Keep the roots and the accepted paths of the last trees; the bonus tokens are the next roots."""
        state = self.state
        times = state.num_rows // self._batch
        paths = F.pad(decision.path.clamp_min(0), (1, 0))
        state.commit_rows(paths.repeat(times, 1), (state.condition_length + self._held).repeat(times))
        self._held = self._held + 1 + decision.lengths
        state.rollback(state.condition_length + int(self._held.max()))

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget the last tokens of each image, as many as `counts` says."""
        self._held = self._held - torch.tensor(counts, device=self._device)
        self.state.rollback(self.state.condition_length + int(self._held.max()))

    def discard(self) -> None:
        """Forget the last trees, roots included."""
        self.state.rollback(self.state.condition_length + int(self._held.max()))

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these images, in that order; the others are finished."""
        if list(rows) == list(range(self._batch)):
            return
        times = self.state.num_rows // self._batch
        self.state.select_rows([row + part * self._batch for part in range(times) for row in rows])
        self._held = self._held[torch.tensor(rows, device=self._device)]
        self._batch = len(rows)


def speculate(
    decoder: SpeculativeDecoder,
    target: LlamaGenTarget,
    sampling: tuple[float, int, float],
    prefix: Tensor | None,
    uniforms: Tensor | None,
    generators: Generator | Sequence[Generator] | None,
    num_tokens: int,
) -> Iterator[tuple[int, Tensor]]:
    """Write images with a decoder: yields the last step that all of them have made, and the tokens so far.

    With a rule such as `Greedy` or `Matching` the tokens are those that are written without, of the same numbers.

    Args:
        decoder: drafts and accepts.
        target: verifies.
        sampling: temperature, top-k and top-p.
        prefix: `(batch, k)`, tokens that are given.
        uniforms: `(batch, num_tokens)`, which draw the tokens; None takes the most probable ones.
        generators: for what else is drawn; None: those of the decoder.
        num_tokens: tokens of each image.
    """
    scores = target.read(prefix)
    batch, first = len(scores), 0 if prefix is None else prefix.shape[1]
    token_ids = torch.zeros(batch, num_tokens, dtype=torch.int64, device=scores.device)
    if prefix is not None:
        token_ids[:, :first] = prefix
    token_ids[:, first] = sample_ids(scores, sampling, None if uniforms is None else uniforms[:, first])
    yield first, token_ids[:, : first + 1]
    left = num_tokens - first - 1
    if not left:
        return
    written = [first + 1] * batch
    rounds = decoder.decode(
        target,
        list(token_ids[:, first : first + 1]),
        left,
        do_sample=uniforms is not None,
        prefill=target.prefill,
        process=None if uniforms is None else lambda rows, tokens, tree, logits: process_logits(logits, *sampling),
        generators=generators,
        uniforms=None if uniforms is None else uniforms[:, first + 1 :],
    )
    for done in rounds:
        for row, tokens in zip(done.rows, done.tokens, strict=True):
            token_ids[row, written[row] : written[row] + len(tokens)] = torch.tensor(tokens, device=token_ids.device)
            written[row] += len(tokens)
        yield min(written) - 1, token_ids[:, : min(written)]
