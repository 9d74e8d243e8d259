"""Acceptance rules: by hand, exactly, statistically, and what must fail."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmsdk.decoding.base import AcceptanceRule, Decision
from mmsdk.decoding.rules import RULES, Greedy, KSeq, Lantern, Matching, Rejection
from mmsdk.decoding.rules.lantern import nearest_codes
from mmsdk.decoding.rules.walk import SiblingRule
from mmsdk.decoding.sampling import sample_inverse_cdf
from mmsdk.decoding.tree import DraftTree
from mmsdk.errors import UnknownNameError

VOCAB = 4
SAMPLES = 200_000
# What target and draft say at the root and after each token.
TARGET = torch.tensor(
    [[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1], [0, 0.9, 0.1, 0]],
    dtype=torch.float64,
)
DRAFT = torch.tensor(
    [[0.3, 0.4, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1], [0.2, 0.3, 0.3, 0.2], [0.2, 0.3, 0.4, 0.1]],
    dtype=torch.float64,
)


def state_of(tokens: Tensor) -> Tensor:
    """Return the row of the tables that holds after these tokens."""
    return 1 + tokens


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_tree(num_children: int, with_replacement: bool, seed: int = 1) -> DraftTree:
    """Draw children of the root, and two children of the first of them, for every sample."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.multinomial(DRAFT[0].expand(SAMPLES, -1), num_children, with_replacement, generator=generator)
    second = torch.multinomial(DRAFT[state_of(first[:, 0])], 2, with_replacement, generator=generator)
    tokens = torch.cat([torch.zeros(SAMPLES, 1, dtype=torch.int64), first, second], 1)
    parents = torch.tensor([-1, *[0] * num_children, 1, 1]).expand_as(tokens)
    probs = torch.zeros(*tokens.shape, VOCAB, dtype=torch.float64)
    probs[:, 0] = DRAFT[0]
    probs[:, 1] = DRAFT[state_of(first[:, 0])]
    return DraftTree(tokens, parents, probs, with_replacement)


def chosen_tree() -> DraftTree:
    """Return the same tree for all: two children of the root, and two of the first of them."""
    return DraftTree(
        torch.tensor([[0, 1, 0, 3, 2]]).expand(SAMPLES, -1), torch.tensor([[-1, 0, 0, 1, 1]]).expand(SAMPLES, -1)
    )


def target_logits(tree: DraftTree) -> Tensor:
    states = state_of(tree.tokens)
    states[:, 0] = 0
    return TARGET[states].log()


def joint_p_value(tree: DraftTree, decision: Decision) -> float:
    """Return the p-value of the first two tokens after the root; where only one was decided, the target goes on."""
    tokens = torch.cat([tree.tokens, decision.bonus[:, None]], 1)
    index = torch.nn.functional.pad(decision.path, (0, 2), value=-1)[:, :2]
    places = torch.arange(2)
    decided = tokens.gather(1, torch.where(places < decision.lengths[:, None], index, tokens.shape[1] - 1))
    onward = sample_inverse_cdf(TARGET[state_of(decided[:, 0])], uniforms(SAMPLES, seed=99))
    second = torch.where(decision.lengths > 0, decided[:, 1], onward)
    counts = torch.bincount(decided[:, 0] * VOCAB + second, minlength=VOCAB**2).double()
    expected = (TARGET[0][:, None] * TARGET[state_of(torch.arange(VOCAB))]).flatten() * SAMPLES
    if bool(counts[expected == 0].any()):
        return 0.0
    possible = expected > 0
    statistic = ((counts - expected)[possible].square() / expected[possible]).sum()
    freedom = possible.sum().double() - 1
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))  # survival of chi-square


class AlwaysAccept(Rejection):
    """A wrong rule: believes the draft."""

    def acceptance(self, node: Any, tokens: Tensor) -> Tensor:
        return torch.ones(len(tokens), dtype=torch.float64)


class NoResidual(Rejection):
    """A wrong rule: samples anew from the whole target after a refusal."""

    def refuse(self, node: Any, tokens: Tensor, refused: Tensor) -> None:
        pass


class NoRho(KSeq):
    """A wrong rule: accepts independent drafts as if there were one."""

    def acceptance(self, node: Any, tokens: Tensor) -> Tensor:
        return super().acceptance(node, tokens) * node.rho


CASES: list[tuple[AcceptanceRule, Callable[[], DraftTree]]] = [
    (Matching(), chosen_tree),
    (Matching(), lambda: drawn_tree(3, False)),
    (Rejection(), chosen_tree),
    (Rejection(), lambda: drawn_tree(1, False)),
    (Rejection(), lambda: drawn_tree(3, False)),
    (KSeq(), lambda: drawn_tree(1, True)),
    (KSeq(), lambda: drawn_tree(3, True)),
    (Lantern(nearest_codes(torch.eye(VOCAB), 3), delta=0.0, k=3), lambda: drawn_tree(2, False)),
]
WRONG: list[tuple[AcceptanceRule, Callable[[], DraftTree]]] = [
    (AlwaysAccept(), lambda: drawn_tree(2, False)),
    (NoResidual(), lambda: drawn_tree(2, False)),
    (NoRho(), lambda: drawn_tree(3, True)),
    (Lantern(nearest_codes(torch.eye(VOCAB), 3), delta=0.2, k=2), chosen_tree),
]


@pytest.mark.parametrize(("rule", "draw"), CASES)
def test_tokens_follow_the_target(rule: AcceptanceRule, draw: Callable[[], DraftTree]) -> None:
    tree = draw()
    decision = rule.verify(tree, target_logits(tree), uniforms(*tree.tokens.shape))
    assert joint_p_value(tree, decision) > 1e-3


@pytest.mark.parametrize(("rule", "draw"), WRONG)
def test_wrong_rules_do_not(rule: AcceptanceRule, draw: Callable[[], DraftTree]) -> None:
    tree = draw()
    decision = rule.verify(tree, target_logits(tree), uniforms(*tree.tokens.shape))
    assert joint_p_value(tree, decision) < 1e-3


def test_one_draft_is_accepted_as_often_as_distributions_overlap() -> None:
    expected = float(torch.minimum(TARGET[0], DRAFT[0]).sum())
    for rule, with_replacement in ((Rejection(), False), (KSeq(), True)):
        tree = drawn_tree(1, with_replacement)
        decision = rule.verify(tree, target_logits(tree), uniforms(*tree.tokens.shape))
        assert (decision.lengths > 0).double().mean() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("num_children", [1, 2, 3, 5])
def test_kseq_is_exact(num_children: int) -> None:
    """Sum over all drafts, with the probability of each decision in place of a draw."""
    rule = KSeq()
    node = rule.enter(TARGET[:1], DRAFT[:1], torch.tensor([num_children]))
    output = torch.zeros(VOCAB, dtype=torch.float64)
    for drafts in itertools.product(range(VOCAB), repeat=num_children):
        weight = float(torch.prod(DRAFT[0][list(drafts)]))
        for token in drafts:
            accepted = min(1.0, float(rule.acceptance(node, torch.tensor([token]))))
            output[token] += weight * accepted
            weight *= 1 - accepted
        rest = rule.rest(node)[0]
        output += weight * rest / rest.sum()
    torch.testing.assert_close(output, TARGET[0], atol=1e-9, rtol=0)


def test_more_independent_drafts_are_accepted_more_often() -> None:
    rates = []
    for count in (1, 2, 4):
        node = KSeq().enter(TARGET[:1], DRAFT[:1], torch.tensor([count]))
        assert 1 <= float(node.rho) <= count
        rates.append(float(1 - (1 - node.overlap) ** count))
    assert rates == sorted(set(rates))


# ---------------------------------------------------------------- exact cases


def test_a_tree_of_the_targets_own_choices_is_accepted_whole() -> None:
    tokens = [0]
    for _ in range(4):
        tokens.append(int(TARGET[0 if len(tokens) == 1 else 1 + tokens[-1]].argmax()))
    tree = DraftTree.chain(torch.tensor([0]), torch.tensor([tokens[1:]]))
    decision = Greedy().verify(tree, target_logits(tree), torch.zeros(1, 5))
    assert decision.path.tolist() == [[1, 2, 3, 4]]
    assert decision.lengths.tolist() == [4]
    assert decision.bonus.tolist() == [int(TARGET[1 + tokens[-1]].argmax())]


def test_matching_says_what_sampling_says_whatever_the_drafts_are() -> None:
    numbers = uniforms(500, 5, seed=3)
    expected = [sample_inverse_cdf(TARGET[0].expand(500, -1), numbers[:, 0])]
    for i in range(1, 4):
        expected.append(sample_inverse_cdf(TARGET[state_of(expected[-1])], numbers[:, i]))
    tokens = torch.randint(VOCAB, (500, 5), generator=torch.Generator().manual_seed(4))
    tree = DraftTree(tokens, torch.tensor([[-1, 0, 0, 1, 3]]).expand_as(tokens))
    decision = Matching().verify(tree, target_logits(tree), numbers)
    assert sorted(set(decision.lengths.tolist())) == [0, 1, 2, 3]
    for row, length in enumerate(decision.lengths.tolist()):
        said = [int(tokens[row, node]) for node in decision.path[row, :length]] + [int(decision.bonus[row])]
        assert said == [int(step[row]) for step in expected[: length + 1]]


def test_rejection_by_hand() -> None:
    """Candidates 1 and 0 were drawn from (.3 .4 .2 .1) without replacement; the target says (.5 .3 .15 .05)."""
    probs = torch.zeros(1, 3, VOCAB, dtype=torch.float64)
    probs[0, 0] = DRAFT[0]
    tree = DraftTree(torch.tensor([[0, 1, 0]]), torch.tensor([[-1, 0, 0]]), probs)
    logits = target_logits(tree)
    # .3 / .4 = .75: below it, the first one is accepted.
    assert Rejection().verify(tree, logits, torch.tensor([[0.74, 0, 0]])).path.tolist() == [[1]]
    # Refused, only the excess of token 0 is left: it is certain.
    assert Rejection().verify(tree, logits, torch.tensor([[0.76, 0.99, 0]])).path.tolist() == [[2]]
    lone = DraftTree(torch.tensor([[0, 1]]), torch.tensor([[-1, 0]]), probs[:, :2])
    decision = Rejection().verify(lone, logits[:, :2], torch.tensor([[0.76, 0.99]]))
    assert (decision.lengths.tolist(), decision.bonus.tolist()) == ([0], [0])


def lantern_target(probs: list[float]) -> Tensor:
    return torch.tensor([[probs, [0.25] * 4]]).double().log()


@pytest.mark.parametrize(
    ("delta", "relaxed"),
    # The neighbours of 0 add .1, then .3 more.
    [(0.05, 0.2), (0.11, 0.3), (0.39, 0.3), (0.41, 0.6), (1.0, 1.0), (1.4, 0.2), (1.6, 0.3), (3.1, 0.6)],
)
def test_lantern_by_hand(delta: float, relaxed: float) -> None:
    neighbours = torch.tensor([[1, 2, 3], [0, 2, 3], [3, 1, 0], [2, 1, 0]])
    rule = Lantern(neighbours, delta, k=3)
    tree = DraftTree(torch.tensor([[0, 0]]), torch.tensor([[-1, 0]]))
    logits = lantern_target([0.2, 0.1, 0.3, 0.4])
    assert rule.verify(tree, logits, torch.tensor([[relaxed - 1e-6, 0]])).lengths.tolist() == [1]
    if relaxed < 1:
        assert rule.verify(tree, logits, torch.tensor([[relaxed + 1e-6, 0]])).lengths.tolist() == [0]


def test_what_a_refused_token_takes_with_it() -> None:
    neighbours = torch.tensor([[1, 2, 3], [0, 2, 3], [3, 1, 0], [2, 1, 0]])
    tree = DraftTree(torch.tensor([[0, 0]]), torch.tensor([[-1, 0]]))
    logits = lantern_target([0.2, 0.1, 0.3, 0.4])
    numbers = torch.tensor([[0.99, 0.0]])

    def rest(bound: float, k: int, mode: str) -> Tensor:
        return Lantern(neighbours, bound, k=k, mode=mode).walk(tree, logits, numbers)[1][0]

    assert rest(0.11, 1, "official").tolist() == [0, 0, 0, 1]  # k + 1 neighbours, as published
    torch.testing.assert_close(rest(0.11, 2, "paper"), torch.tensor([0, 0, 0.3, 0.4]).double() / 0.7)  # one was added
    for mode in ("official", "paper"):
        torch.testing.assert_close(rest(0.05, 1, mode), torch.tensor([0, 0.1, 0.3, 0.4]).double() / 0.8)  # none was


@pytest.mark.parametrize("delta", [0.1, 0.2, 0.5])
@pytest.mark.parametrize(("mode", "stays_within"), [("paper", True), ("official", False)])
def test_one_chosen_candidate_changes_the_distribution_by_delta_at_most(
    delta: float, mode: str, stays_within: bool
) -> None:
    probs = torch.tensor([0.02, 0.05, 0.13, 0.1, 0.3, 0.4], dtype=torch.float64)
    neighbours = nearest_codes(torch.arange(6.0)[:, None], 5)
    rule = Lantern(neighbours, delta, k=4, mode=mode)
    distances = []
    for token in range(6):
        tree = DraftTree(torch.tensor([[0, token]]), torch.tensor([[-1, 0]]))
        logits = torch.stack([probs, probs]).log()[None]
        accepted, added = rule.relaxed(probs[None], torch.tensor([token]))
        rest = rule.walk(tree, logits, torch.tensor([[1.0, 0.0]]).double())[1][0]
        got = (1 - accepted) * rest
        got[token] += accepted[0]
        distances.append(float((got - probs).abs().sum() / 2))
        if mode == "paper":
            assert distances[-1] == pytest.approx(float(probs[neighbours[token, :4]][added[0]].sum()))
    assert (max(distances) <= delta + 1e-9) == stays_within
    assert max(distances) > 0


def test_relaxed_drawn_candidates_by_hand() -> None:
    """What the token was weighed as, with its neighbour's share, less what the draft offers of each."""
    draft = torch.tensor([[[0.5, 0.2, 0.2, 0.1], [0.25] * 4]]).double()
    tree = DraftTree(torch.tensor([[0, 0]]), torch.tensor([[-1, 0]]), draft)
    rule = Lantern(torch.tensor([[1], [0], [3], [2]]), 0.15, k=1)
    logits = lantern_target([0.2, 0.1, 0.3, 0.4])
    assert rule.verify(tree, logits, torch.tensor([[0.599, 0.0]])).lengths.tolist() == [1]  # .3 over .5
    assert rule.verify(tree, logits, torch.tensor([[0.601, 0.0]])).lengths.tolist() == [0]
    rest = rule.walk(tree, logits, torch.tensor([[0.99, 0.0]]))[1][0]
    torch.testing.assert_close(rest, torch.tensor([0, 0, 0.1, 0.3]).double() / 0.4)


def test_greedy_lantern_takes_the_longest_path() -> None:
    neighbours = torch.tensor([[1, 2, 3], [0, 2, 3], [3, 1, 0], [2, 1, 0]])
    # Candidate 1 is the most probable one by itself, candidate 0 with its neighbour; below that another one follows.
    tree = DraftTree(torch.tensor([[0, 1, 0, 3]]), torch.tensor([[-1, 0, 0, 2]]))
    logits = torch.tensor([[[0.3, 0.4, 0.2, 0.1], [0.25] * 4, [0.1, 0.1, 0.2, 0.6], [0.1, 0.7, 0.1, 0.1]]]).log()
    decision = Lantern(neighbours, 0.45, k=1, do_sample=False).verify(tree, logits, torch.zeros(1, 4))
    assert decision.path.tolist() == [[2, 3]]
    assert decision.bonus.tolist() == [1]


@pytest.mark.parametrize("rule", [Greedy(), Matching(), Rejection()])
def test_padding_and_excluded_tokens_are_never_accepted(rule: AcceptanceRule) -> None:
    tree = DraftTree(torch.tensor([[0, 2, 1, 1]]), torch.tensor([[-1, 0, -1, -1]]))
    logits = torch.full((1, 4, VOCAB), -float("inf"))
    logits[..., 1] = 0.0
    decision = rule.verify(tree, logits, torch.zeros(1, 4))
    assert (decision.lengths.tolist(), decision.bonus.tolist()) == ([0], [1])


@pytest.mark.parametrize("rule", [Greedy(), Matching(), Rejection(), Lantern(nearest_codes(torch.eye(4), 2), 0.3, k=2)])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_batch_equals_its_rows(rule: AcceptanceRule, drawn: bool) -> None:
    whole = drawn_tree(3, False) if drawn else chosen_tree()
    size = 40
    tree = DraftTree(whole.tokens[:size], whole.parents[:size], None if whole.probs is None else whole.probs[:size])
    logits, numbers = target_logits(tree), uniforms(*tree.tokens.shape)
    batch = rule.verify(tree, logits, numbers)
    for i in range(size):
        one = slice(i, i + 1)
        single = DraftTree(tree.tokens[one], tree.parents[one], None if tree.probs is None else tree.probs[one])
        lone = rule.verify(single, logits[one], numbers[one])
        length = int(lone.lengths)
        assert (length, int(lone.bonus)) == (int(batch.lengths[i]), int(batch.bonus[i]))
        assert lone.path[0, :length].tolist() == batch.path[i, :length].tolist()
        assert (batch.path[i, length:] == -1).all()


def test_nearest_codes_by_hand() -> None:
    codebook = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
    assert nearest_codes(codebook, 3).tolist() == [[1, 2, 3], [0, 2, 3], [3, 1, 0], [2, 1, 0]]


# ---------------------------------------------------------------- what is known of rules, and bad input


def test_rules_say_whether_they_are_lossless() -> None:
    assert {name: rule.lossless for name, rule in RULES.items()} == {
        "greedy": True, "matching": True, "rejection": True, "kseq": True, "lantern": False,
    }  # fmt: skip
    assert issubclass(Lantern, SiblingRule)


def test_bad_input() -> None:
    neighbours = nearest_codes(torch.eye(4), 3)
    with pytest.raises(ValueError, match="k must be 1 to 3, the neighbours that are known, got 4"):
        Lantern(neighbours, k=4)
    with pytest.raises(ValueError, match="delta must be finite and at least 0, got -0.1"):
        Lantern(neighbours, delta=-0.1, k=2)
    with pytest.raises(ValueError, match="as nearest_codes.codebook, k. returns them; got .4, 3. torch.float32"):
        Lantern(neighbours.float(), k=2)
    with pytest.raises(ValueError, match="ids from 0 to 3"):
        Lantern(neighbours + 2, k=2)
    with pytest.raises(UnknownNameError, match="Unknown mode 'papers'. Did you mean 'paper'"):
        Lantern(neighbours, k=2, mode="papers")
    with pytest.raises(ValueError, match="k must be 1 to 3, one less than there are codes, got 4"):
        nearest_codes(torch.eye(4), 4)
    independent = DraftTree(torch.tensor([[0, 1, 1]]), torch.tensor([[-1, 0, 0]]), torch.full((1, 3, 4), 0.25), True)
    logits, numbers = torch.zeros(1, 3, 4), torch.zeros(1, 3)
    for rule in (Rejection(), Lantern(neighbours, k=2)):
        with pytest.raises(ValueError, match="without replacement"):
            rule.verify(independent, logits, numbers)
    chosen = DraftTree(independent.tokens, independent.parents)
    with pytest.raises(ValueError, match="drawn with replacement, and their distribution"):
        KSeq().verify(chosen, logits, numbers)
    with pytest.raises(ValueError, match="neighbours are those of 4 codes, but the target chooses among 5"):
        Lantern(neighbours, k=2).verify(chosen, torch.zeros(1, 3, 5), numbers)
