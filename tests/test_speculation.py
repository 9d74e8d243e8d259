"""Trees of image tokens, verified by LlamaGen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from generators.base import Trace
from generators.guidance import combine
from generators.llamagen import LlamaGen
from generators.speculation import LlamaGenTarget
from mmsdk.decoding.base import Decision
from mmsdk.decoding.tree import DraftTree
from tests.tiny import tiny_token_shuffle

SCALES = [1.0, 3.0, 2.0, 1.5, 2.5, 1.0, 3.0, 2.0, 1.0]
PARENTS = torch.tensor([[-1, 0, 0, 1, 1, 2, 4], [-1, 0, 1, 2, 3, 0, -1]])


def captions(batch: int) -> tuple[Tensor, Tensor]:
    features = torch.randn(batch, 5, 12, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(batch, 5)
    mask[0, :3] = 0
    return features, mask


@pytest.fixture(scope="module", params=["rope2d", "learned"])
def model(request: pytest.FixtureRequest) -> LlamaGen:
    torch.manual_seed(0)
    model = LlamaGen(
        hidden_size=32, num_layers=2, num_heads=2, multiple_of=8, codebook_size=17, max_tokens=9, condition="text",
        num_classes=None, caption_dim=12, num_condition_tokens=5, positions=request.param,
    )  # fmt: skip
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model.eval()


def plain_logits(model: LlamaGen, row: int, token_ids: list[int]) -> Tensor:
    """Return the guided logits of what follows `token_ids`, from a forward over all of them."""
    features, mask = captions(2)
    ids = torch.tensor([[*token_ids, 0]] * 2)
    logits = model(
        ids,
        caption_features=features[[row] * 2],
        caption_mask=mask[[row] * 2],
        drop_condition=torch.tensor([False, True]),
    ).logits[:, -1]
    return combine(logits[0], logits[1], SCALES[len(token_ids)])


def target_of(model: LlamaGen) -> LlamaGenTarget:
    features, mask = captions(2)
    state = model.prefill(caption_features=features, caption_mask=mask, guided=True, draft_slots=7)
    return LlamaGenTarget(model, state, 2, SCALES, Trace())


def path_to(tree: DraftTree, row: int, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(int(tree.tokens[row, node]))
        node = int(tree.parents[row, node])
    return path[::-1]


def test_every_node_equals_a_forward_over_its_path_whatever_the_rows_have_accepted(model: LlamaGen) -> None:
    target = target_of(model)
    first = target.read()
    for row in range(2):
        torch.testing.assert_close(first[row], plain_logits(model, row, []), atol=1e-5, rtol=1e-5)
    generator = torch.Generator().manual_seed(2)
    held: list[list[int]] = [[], []]
    roots = torch.tensor([3, 5])
    for paths in ([[1, 4, 6], [-1, -1, -1]], [[-1, -1, -1], [1, 2, -1]], [[2, -1, -1], [1, 2, 3]]):
        tokens = torch.randint(17, PARENTS.shape, generator=generator)
        tokens[:, 0] = roots
        tree = DraftTree(tokens, PARENTS)
        logits, hidden = target.forward_tree(tree, output_hidden_states=True)
        assert hidden is not None and hidden.shape == (4, 7, 32)
        for row in range(2):
            for node in range(7):
                ids = held[row] + path_to(tree, row, node)
                if (node == 0 or PARENTS[row, node] >= 0) and len(ids) < 9:
                    expected = plain_logits(model, row, ids)
                    torch.testing.assert_close(logits[row, node], expected, atol=1e-4, rtol=1e-4)
        path = torch.tensor(paths)
        lengths = (path >= 0).sum(-1)
        roots = torch.randint(17, (2,), generator=generator)
        target.commit(Decision(path, lengths, roots))
        for row in range(2):
            held[row] += [int(tokens[row, node]) for node in [0, *paths[row][: lengths[row]]]]
    assert [len(row) for row in held] == [7, 8]
    assert target.state.num_tokens == 8


def test_finished_images_can_leave(model: LlamaGen) -> None:
    both, lone = target_of(model), target_of(model)
    first = DraftTree(torch.tensor([[3, 1, 2], [5, 6, 7]]), torch.tensor([[-1, 0, 1]] * 2))
    for target in (both, lone):
        target.forward_tree(first)
        target.commit(Decision(torch.tensor([[1, 2], [1, -1]]), torch.tensor([2, 1]), torch.tensor([4, 4])))
    lone.select_rows([1])
    second = DraftTree(torch.tensor([[4, 8, 9]] * 2), torch.tensor([[-1, 0, 0]] * 2))
    expected, _ = both.forward_tree(second)
    got, _ = lone.forward_tree(DraftTree(second.tokens[1:], second.parents[1:]))
    torch.testing.assert_close(got[0], expected[1], atol=1e-5, rtol=1e-5)


def test_the_first_states_are_those_of_the_condition(model: LlamaGen) -> None:
    prefill = target_of(model).prefill
    assert prefill.hidden_states.shape == (4, 5, 32)
    assert prefill.mask.tolist() == [[False] * 3 + [True] * 2, [True] * 5] * 2


def test_windows_of_tokens_are_refused() -> None:
    shuffle = tiny_token_shuffle()
    with pytest.raises(ValueError, match="4 tokens at a step; drafts are trees of single tokens"):
        LlamaGenTarget(shuffle, shuffle.prefill([0]), 1, [1.0], Trace())
