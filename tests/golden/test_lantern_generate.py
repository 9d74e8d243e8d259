"""Whole generations with LANTERN's drafter and rules against recorded ones of the published code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from generators.feature_head import FeatureDrafter
from generators.llamagen import LlamaGen
from mmsdk.decoding.base import AcceptanceRule, Decision
from mmsdk.decoding.decoder import SpeculativeDecoder
from mmsdk.decoding.rules import Greedy, Lantern, Rejection
from mmsdk.decoding.rules.walk import SiblingRule, to_decision
from mmsdk.decoding.sampling import process_logits
from mmsdk.decoding.tree import DraftTree
from tests.golden.test_lantern import recorded_neighbours
from tests.golden.test_lantern_drafter import load_models
from tests.golden.util import golden_cases, golden_index, load_json, load_tensors, select_cases

CASES = golden_cases("lantern")
SPECULATIVE = select_cases(CASES, lambda name, case: "generate" in name and "args" in case)
PLAIN = select_cases(CASES, lambda name, case: "plain_greedy" in case.get("file", ""))


class Recording:
    """The draws of a generation, in the order in which they were made."""

    def __init__(self, golden: dict[str, Tensor]) -> None:
        self._picks = list(zip(golden["multinomial_shapes"].tolist(), golden["multinomial_picks"], strict=True))
        self._uniforms = golden.get("uniforms", torch.empty(0)).tolist()

    def pick(self) -> Tensor:
        """Return the next ids, `(rows, count)`."""
        (rows, count), ids = self._picks.pop(0)
        return ids[: rows * count].view(rows, count)

    def upcoming(self, count: int) -> Tensor:
        """Return the next numbers; where there are fewer, zeros follow."""
        return torch.tensor([(self._uniforms + [0.0] * count)[:count]], dtype=torch.float64)

    def spend(self, count: int) -> None:
        """Drop numbers that were used."""
        del self._uniforms[:count]


class ReplayedRule(AcceptanceRule):
    """A rule whose numbers and bonus tokens are recorded ones."""

    lossless = False
    do_sample = True

    def __init__(self, rule: SiblingRule[Any], recording: Recording) -> None:
        self.rule, self.recording = rule, recording

    def verify(self, tree: DraftTree, logits: Tensor, uniforms: Tensor) -> Decision:
        path, rest = self.rule.walk(tree, logits, self.recording.upcoming(tree.num_nodes))
        nodes = [0, *(int(node) for node in path)]
        examined = int((tree.parents[0] == nodes[-1]).sum())
        for parent, node in zip(nodes, nodes[1:], strict=False):
            examined += int((tree.parents[0, : node + 1] == parent).sum())
        self.recording.spend(examined)
        bonus = self.recording.pick()[0]
        assert rest[0, bonus] > 0
        return to_decision(path, bonus)


class ReplayedDrafter(FeatureDrafter):
    """A drafter whose draws are recorded ones."""

    recording: Recording

    def draw(self, probs: Tensor, count: int, generators: Sequence[Generator]) -> Tensor:
        picks = self.recording.pick()
        assert len(picks) == probs.shape[1]
        return picks[None, :, :count]


def generate(base: LlamaGen, golden: dict[str, Tensor], count: int, **settings: Any) -> Tensor:
    """Return the first tokens of a generation that goes on beyond them."""
    steps = base.iter_generate(caption_features=golden["cond"], caption_mask=golden["mask"], **settings)
    for _, ids in steps:
        if ids.shape[1] >= count:
            return ids[:, :count]
    raise AssertionError("The generation ended before the recorded one.")


@pytest.mark.parametrize(("name", "case"), SPECULATIVE)
@torch.no_grad()
def test_generations(name: str, case: dict[str, Any]) -> None:
    (base, head), golden, args = load_models(), load_tensors("lantern", case["file"]), case["args"]
    shape = golden_index("lantern")["config"]["drafter"]
    do_sample = args["temperature"] > 0
    sampling = {key: args[key] for key in ("temperature", "top_k", "top_p")} if do_sample else {}
    tree: dict[str, Any] = {
        "total_tokens": shape["total_tokens"],
        "depth": shape["depth"],
        "tree_top_k": shape["top_k"],
    }
    if args["static_tree"]:
        choices = load_json("lantern", "tree_buffers.json")[args["tree_choices"]]["choices"]
        tree = {"tree_choices": choices, "do_sample": do_sample, **sampling}
    rule: Any = Rejection() if do_sample else Greedy()
    if args["lantern"]:
        rule = Lantern(recorded_neighbours(), args["lantern_delta"], args["lantern_k"], do_sample, mode="official")
    drafter, uniforms = ReplayedDrafter(head, base, **tree), None
    if do_sample:
        drafter.recording = Recording(golden)
        rule = ReplayedRule(rule, drafter.recording)
        # The number that draws the recorded first token.
        state = base.prefill(caption_features=golden["cond"], caption_mask=golden["mask"], guided=True)
        logits = base.guided_logits(state.condition_hidden, len(golden["cond"]), args["cfg"])
        probs = torch.softmax(process_logits(logits, **sampling)[0].double(), -1)
        first = int(drafter.recording.pick())
        uniforms = torch.full((1, base.config.max_tokens), 0.5, dtype=torch.float64)
        uniforms[0, 0] = (probs[:first].sum() + probs[first] / 2) / probs.sum()
    decoder = SpeculativeDecoder(drafter, rule, num_candidates=1000)
    settings = {"guidance_scale": args["cfg"], "do_sample": do_sample, "uniforms": uniforms, **sampling}
    tokens = golden["tokens"]
    got = generate(base, golden, tokens.shape[1], speculation=decoder, **settings)
    assert torch.equal(got, tokens)
    # The published code may go on for one more round than it needs.
    accepted, rounds = golden["accept_lengths"].tolist(), decoder.stats.forwards
    assert len(accepted) - 1 <= rounds <= len(accepted) == case["target_forwards"] - 1
    assert decoder.stats.accepted == sum(accepted[:rounds])


@pytest.mark.parametrize(("name", "case"), PLAIN)
@torch.no_grad()
def test_plain_generation(name: str, case: dict[str, Any]) -> None:
    (base, _), golden = load_models(), load_tensors("lantern", case["file"])
    got = generate(base, golden, golden["tokens"].shape[1], guidance_scale=case["cfg"], do_sample=False)
    assert torch.equal(got, golden["tokens"])
