"""What drafters, acceptance rules and the decoder tell each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from mmsdk.decoding.tree import DraftTree

# How drafters find the candidates that follow a node.
CHOSEN, CHAIN = "chosen", "drawn one by one"
WITHOUT_REPLACEMENT, WITH_REPLACEMENT = "drawn without replacement", "drawn with replacement"


@dataclass(frozen=True)
class Decision:
    """Which path of each tree a rule accepts.

    Attributes:
        path: `(batch, depth)` int64, accepted nodes from the root's child on, -1 behind the last one.
        lengths: `(batch,)` int64, how many nodes are accepted, 0 or more.
        bonus: `(batch,)` int64, the token that follows the path: from the target, or from what is left of it where
            candidates were refused.
    """

    path: Tensor
    lengths: Tensor
    bonus: Tensor


class AcceptanceRule(ABC):
    """Decides how much of a draft the target would have said. Rules are pure functions of tensors.

    Attributes:
        lossless: whether the tokens follow exactly the target's distribution (or are its greedy choice).
        drawings: what candidates it takes: those of drafters with one of these as their `drawing`.
        by_position: whether a number belongs to the place of a token, whatever the drafts are: the i-th number of a row
            then draws the i-th token after the root, and those that are not used are passed again.
    """

    lossless: ClassVar[bool]
    drawings: ClassVar[tuple[str, ...]] = (CHOSEN, CHAIN, WITHOUT_REPLACEMENT, WITH_REPLACEMENT)
    by_position: ClassVar[bool] = False

    @abstractmethod
    def verify(self, tree: DraftTree, logits: Tensor, uniforms: Tensor) -> Decision:
        """Walk down each tree.

        Args:
            tree: the drafts.
            logits: `(batch, n, vocab)`, what the target says after each node, processed: temperature and the like are
                in it, and -inf stands for tokens that are excluded.
            uniforms: `(batch, n)` in [0, 1): the i-th examined candidate of a row uses its i-th number, the bonus token
                its last; but see `by_position`. A rule that draws nothing ignores them.
        """


@dataclass(frozen=True)
class Verified:
    """What the target made of a draft.

    Attributes:
        tree: the draft.
        logits: `(batch, n, vocab)`, what the target says after each node, before any processing.
        decision: what was accepted.
        hidden_states: `(batch, n, hidden_size)` of the target's last layer after its norm, for drafters that need them.
    """

    tree: DraftTree
    logits: Tensor
    decision: Decision
    hidden_states: Tensor | None = None


@dataclass(frozen=True)
class Prefill:
    """What the target made of the beginning of its sequences, for drafters that need its hidden states.

    Attributes:
        hidden_states: `(rows, length, hidden_size)` of the target's last layer after its norm, at every position before
            the root; behind the rows of the batch come those without condition, where a generator is guided.
        mask: `(rows, length)` bool, which of these positions are no padding.
    """

    hidden_states: Tensor
    mask: Tensor


class Drafter(ABC):
    """Proposes continuations of the sequences of a batch, and learns from what became of them.

    Attributes:
        needs_hidden_states: whether `reset` and `observe` need the target's hidden states.
        drawing: how candidates are found: `CHOSEN`; or drawn, and then their trees tell the distributions: in a `CHAIN`
            without siblings, or with siblings `WITHOUT_REPLACEMENT` or `WITH_REPLACEMENT`.
    """

    needs_hidden_states: ClassVar[bool] = False

    @property
    def drawing(self) -> str:
        """How candidates are found."""
        return CHOSEN

    @abstractmethod
    def reset(self, prompts: Sequence[Tensor], prefill: Prefill | None = None) -> None:
        """Begin new sequences: one 1-D int64 tensor for each row, without padding, the last token included.

        Args:
            prompts: the tokens.
            prefill: what the target made of all of them but the last, for drafters that need its hidden states.
        """

    @abstractmethod
    def propose(self, budget: int, generators: Sequence[Generator] | None = None) -> DraftTree:
        """Return a tree for each row, with the row's last token as its root and at most `budget` candidates."""

    @abstractmethod
    def observe(self, verified: Verified) -> None:
        """Note the accepted path and the bonus token of each row, which now end the sequences."""

    @abstractmethod
    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in that order; the others are finished."""
