"""A small image generator drafts for a large one: the same images, or images of the same distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from generators.generator_drafter import GeneratorDrafter
from generators.guidance import combine
from generators.llamagen import LlamaGen
from mmsdk.decoding.base import AcceptanceRule
from mmsdk.decoding.decoder import SpeculativeDecoder
from mmsdk.decoding.rules import Greedy, KSeq, Lantern, Matching, Rejection
from mmsdk.decoding.rules.lantern import nearest_codes
from tests.test_feature_head import TOKENS, VOCAB, make_condition, make_generator
from tests.tiny import tiny_mar, tiny_token_shuffle


@pytest.fixture(scope="module")
def target() -> LlamaGen:
    return make_generator()


@pytest.fixture(scope="module")
def draft(target: LlamaGen) -> LlamaGen:
    """A generator that often, not always, says what the target says."""
    model = make_generator()
    noise = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
    return model


def seeds(count: int = 3) -> list[Generator]:
    return [Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"top_k": 5}])
def test_the_images_are_those_without(
    target: LlamaGen, draft: LlamaGen, scale: float, sampling: dict[str, Any]
) -> None:
    decoder = SpeculativeDecoder(GeneratorDrafter(draft), num_candidates=4)
    arguments = make_condition() | sampling | {"guidance_scale": scale}
    plain = target.generate(**arguments, generator=seeds())
    output = target.generate(**arguments, generator=seeds(), speculation=decoder)
    assert torch.equal(output.token_ids, plain.token_ids)
    assert 0 < decoder.stats.accepted < decoder.stats.drafted
    assert output.trace.forwards < plain.trace.forwards


@pytest.mark.parametrize("rule", [Greedy(), Rejection()])
def test_a_draft_that_is_the_target_is_always_right(target: LlamaGen, rule: AcceptanceRule) -> None:
    do_sample = isinstance(rule, Rejection)
    drafter = GeneratorDrafter(target, do_sample=do_sample)
    decoder = SpeculativeDecoder(drafter, rule, num_candidates=4, generator=Generator().manual_seed(0))
    output = target.generate(**make_condition(), guidance_scale=2.0, do_sample=do_sample, speculation=decoder)
    assert decoder.stats.acceptance_rate == 1.0
    assert output.trace.positions == [5, 5, 5]  # the condition gives the first token, each forward five more


@pytest.mark.parametrize("rule", [Matching(), Rejection()])
def test_a_batch_equals_its_images(target: LlamaGen, draft: LlamaGen, rule: AcceptanceRule) -> None:
    condition = make_condition()

    def write(rows: list[int]) -> Tensor:
        # The drafts, the acceptance and the tokens are drawn with numbers of each image alone.
        drafter = GeneratorDrafter(draft, do_sample=isinstance(rule, Rejection))
        own = [Generator().manual_seed(i) for i in rows]
        decoder = SpeculativeDecoder(drafter, rule, num_candidates=3)
        chosen = {name: value[rows] for name, value in condition.items()}
        return target.generate(**chosen, guidance_scale=2.0, generator=own, speculation=decoder).token_ids

    together = write([0, 1, 2])
    for row in range(3):
        assert torch.equal(write([row])[0], together[row])


def pairs(target: LlamaGen, drafter: GeneratorDrafter, rule: AcceptanceRule) -> float:
    """Return the p-value of the second and third token of many images of one caption, given the first.

    The first token comes from the condition alone, and no draft is involved.
    """
    count, scale = 600, 2.0
    condition = {name: value[:1] for name, value in make_condition().items()}
    prefix = torch.tensor([[3]])

    def probs(tokens: list[int]) -> Tensor:
        ids = torch.tensor([[*tokens, 0]] * 2)
        both = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in condition.items()}
        with torch.no_grad():
            logits = target(ids, **both, drop_condition=torch.tensor([False, True])).logits[:, -1]
        return torch.softmax(combine(logits[0], logits[1], scale).double(), -1)

    second = probs([3])
    joint = torch.stack([second[t] * probs([3, t]) for t in range(VOCAB)])
    decoder = SpeculativeDecoder(drafter, rule, num_candidates=2, generator=Generator().manual_seed(0))
    many = {name: value.expand(count, *value.shape[1:]) for name, value in condition.items()}
    output = target.generate(
        **many, prefix=prefix.expand(count, 1), num_tokens=4, guidance_scale=scale, speculation=decoder,
        generator=Generator().manual_seed(1),
    )  # fmt: skip
    assert 0 < decoder.stats.accepted < decoder.stats.drafted
    # The token behind the given ones is drawn from the target; a draft begins at the next one.
    got = output.token_ids[:, 1] * VOCAB + output.token_ids[:, 2]
    expected = joint.flatten() * count
    counts = torch.bincount(got, minlength=VOCAB**2).double()
    # Cells that are hardly ever met are counted as one.
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    statistic = ((counts - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize("rule", [Matching(), Rejection(), KSeq()])
def test_pairs_of_tokens_follow_the_target(target: LlamaGen, draft: LlamaGen, rule: AcceptanceRule) -> None:
    drafter = GeneratorDrafter(draft, num_tokens=2, do_sample=not isinstance(rule, Matching))
    assert pairs(target, drafter, rule) > 1e-3


def test_pairs_of_a_relaxed_rule_do_not(target: LlamaGen, draft: LlamaGen) -> None:
    wrong = Lantern(nearest_codes(torch.eye(VOCAB), 8), delta=0.9, k=8)
    assert pairs(target, GeneratorDrafter(draft, num_tokens=2), wrong) < 1e-3


def test_goes_on_behind_a_prefix(target: LlamaGen, draft: LlamaGen) -> None:
    prefix = torch.tensor([[1, 5, 2], [0, 4, 4], [7, 7, 9]])
    decoder = SpeculativeDecoder(GeneratorDrafter(draft), num_candidates=4)
    arguments = make_condition() | {"prefix": prefix, "guidance_scale": 2.0}
    plain = target.generate(**arguments, generator=seeds())
    output = target.generate(**arguments, generator=seeds(), speculation=decoder)
    assert torch.equal(output.token_ids, plain.token_ids)
    assert output.token_ids.shape == (3, TOKENS)


def test_bad_input(target: LlamaGen, draft: LlamaGen) -> None:
    with pytest.raises(TypeError, match="drafts with a LlamaGen, got MAR"):
        GeneratorDrafter(tiny_mar())
    with pytest.raises(ValueError, match="TokenShuffle writes 4 at a step"):
        GeneratorDrafter(tiny_token_shuffle())
    with pytest.raises(ValueError, match="num_tokens must be .*at least 1, got 0"):
        GeneratorDrafter(draft, num_tokens=0)
    with pytest.raises(ValueError, match="temperature"):
        GeneratorDrafter(draft, temperature=0.0)
    with pytest.raises(RuntimeError, match="knows no conditions"):
        GeneratorDrafter(draft).reset([torch.tensor([1])])
    with pytest.raises(RuntimeError, match="call `reset"):
        GeneratorDrafter(draft).propose(3)
    other = GeneratorDrafter(make_generator(codebook_size=VOCAB + 1))
    with pytest.raises(ValueError, match=f"{VOCAB + 1}"):
        target.generate(**make_condition(), speculation=SpeculativeDecoder(other, num_candidates=2))
