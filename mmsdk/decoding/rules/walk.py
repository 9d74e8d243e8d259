"""How rules walk down a tree: after one chosen token at each node, or from sibling to sibling."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from mmsdk.decoding.base import AcceptanceRule, Decision
from mmsdk.decoding.sampling import sample_inverse_cdf
from mmsdk.decoding.tree import DraftTree


def follow(tree: DraftTree, logits: Tensor, choose: Callable[[Tensor, int], Tensor]) -> Decision:
    """Let the target choose one token after each node; accept the child that says it.

    Args:
        tree: the drafts.
        logits: `(batch, n, vocab)`.
        choose: gives the tokens `(batch,)` that follow nodes of the logits `(batch, vocab)`, at this depth of the path.
    """
    rows = torch.arange(len(tree.tokens), device=tree.tokens.device)
    node = torch.zeros_like(rows)
    bonus = choose(logits[rows, node], 0)
    path: list[Tensor] = []
    while True:
        same = tree.children(node) & (tree.tokens == bonus[:, None])
        child = torch.where(same.any(1), same.int().argmax(1), -1)
        if not bool((child >= 0).any()):
            break
        path.append(child)
        node = child  # -1 has no children, so that a row that is done stays so
        chosen = choose(logits[rows, node.clamp_min(0)], len(path))
        bonus = torch.where(node >= 0, chosen, bonus)
    return to_decision(path, bonus)


def to_decision(path: list[Tensor], bonus: Tensor) -> Decision:
    """Return the decision of the nodes `(batch,)` of each level, -1 behind a row's last one."""
    nodes = torch.stack(path, 1) if path else bonus.new_empty(len(bonus), 0)
    return Decision(nodes, (nodes >= 0).sum(1), bonus)


Node = TypeVar("Node")


class SiblingRule(AcceptanceRule, Generic[Node]):
    """Examines the children of a node one after the other; where all are refused, samples from what is left.

    A rule says what it knows of a node (of each row), how probably it accepts a token there, what a refusal changes,
    and what is left after all of them.
    """

    lossless: ClassVar[bool] = True

    @abstractmethod
    def enter(self, target: Tensor, draft: Tensor | None, num_children: Tensor) -> Node:
        """Return what is known of a node.

        Args:
            target: `(batch, vocab)` float64, the target's probabilities.
            draft: the distribution that the children were drawn from, if they were.
            num_children: `(batch,)`.
        """

    @abstractmethod
    def acceptance(self, node: Node, tokens: Tensor) -> Tensor:
        """Return the probability `(batch,)` to accept `tokens` `(batch,)`."""

    @abstractmethod
    def refuse(self, node: Node, tokens: Tensor, refused: Tensor) -> None:
        """Note that `tokens` `(batch,)` were refused in the rows `refused` `(batch,)` bool."""

    @abstractmethod
    def rest(self, node: Node) -> Tensor:
        """Return what to sample from where no child was accepted, `(batch, vocab)`; need not sum to 1."""

    def check(self, tree: DraftTree) -> None:  # noqa: B027 - most rules take any tree
        """Raise `ValueError` where the tree was not drawn as the rule needs."""

    def verify(self, tree: DraftTree, logits: Tensor, uniforms: Tensor) -> Decision:
        """Walk down each tree.

        Args:
            tree: the drafts.
            logits: `(batch, n, vocab)`, what the target says after each node, processed.
            uniforms: `(batch, n)` in [0, 1), one for each examined candidate, and the last for the bonus token.

        Raises:
            ValueError: the tree was not drawn as the rule needs.
        """
        path, rest = self.walk(tree, logits, uniforms)
        return to_decision(path, sample_inverse_cdf(rest, uniforms[:, -1].to(rest.device)))

    def walk(self, tree: DraftTree, logits: Tensor, uniforms: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the accepted nodes of each level, -1 where none is, and what to sample the bonus tokens from.

        Returns:
            A list of `(batch,)` int64, and `(batch, vocab)` float64.
        """
        self.check(tree)
        batch, _ = tree.tokens.shape
        uniforms = uniforms.to(logits.device)
        rows = torch.arange(batch, device=logits.device)
        node = torch.zeros_like(rows)
        examined = torch.zeros_like(rows)
        rest = torch.empty(batch, logits.shape[-1], dtype=torch.float64, device=logits.device)
        path: list[Tensor] = []
        while bool((node >= 0).any()):
            here = node.clamp_min(0)
            children = tree.children(node)
            order = children.cumsum(1) * children
            known = self.enter(
                torch.softmax(logits[rows, here].double(), -1),
                None if tree.probs is None else tree.probs[rows, here].double(),
                children.sum(1),
            )
            accepted = torch.full_like(rows, -1)
            for rank in range(1, int(order.max()) + 1):
                candidate = order == rank
                is_open = candidate.any(1) & (accepted < 0)
                child = candidate.int().argmax(1)
                tokens = tree.tokens[rows, child]
                is_accepted = is_open & (uniforms[rows, examined] < self.acceptance(known, tokens))
                examined = examined + is_open
                accepted = torch.where(is_accepted, child, accepted)
                self.refuse(known, tokens, is_open & ~is_accepted)
            ends = (node >= 0) & (accepted < 0)
            rest[ends] = self.rest(known)[ends]
            node = accepted
            path.append(accepted)
        return path[:-1], rest


def normalise(probs: Tensor) -> Tensor:
    """Return `probs` `(batch, vocab)` with rows that sum to 1, or to 0 where nothing is left."""
    total = probs.sum(-1, keepdim=True)
    return probs / torch.where(total > 0, total, 1)
