"""HiRED: budgets, selection, and what it does to real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.base import PruningContext
from pruning.hired import HiRED
from pruning.vision import CropLayout, LayerAttention, VisionAttention
from tests.tiny_vlms import FAMILIES, tiny_inputs, tiny_vlm


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def attention_of_rows(rows: Tensor, has_cls: bool = True) -> VisionAttention:
    """Return attention with one head whose class token pays what `rows` `(num_crops, num_tokens)` says, times 1 / 2."""
    logits = torch.cat([torch.ones(len(rows), 1), rows / rows.sum(1, keepdim=True)], 1).log()[:, None, :, None]
    return VisionAttention(torch.ones_like(logits), logits, 1.0, has_cls, num_tokens=rows.shape[1])


def layout_of(crops: int, height: int, width: int, grid: tuple[int, int] | None, newlines: int = 0) -> CropLayout:
    """Return crops one after the other, without padding, then newline tokens."""
    size = height * width
    crop = torch.cat([torch.arange(crops).repeat_interleave(size), torch.full((newlines,), -1)])
    index = torch.cat([torch.arange(size).repeat(crops), torch.arange(newlines)])
    return CropLayout(crop, index, crops, (height, width), grid)


def select(pruner: HiRED, layout: CropLayout, final: Tensor, initial: Tensor | None = None) -> list[list[int]]:
    """Return the places of the kept tokens of each crop."""
    maps = {5: attention_of_rows(final)} | ({} if initial is None else {0: attention_of_rows(initial)})
    context = PruningContext(layout=layout, attention=LayerAttention(maps))
    kept = layout[pruner.select(torch.zeros(len(layout.crop), 1), context)]
    assert bool((kept.crop >= 0).all())
    return [kept.index[kept.crop == crop].tolist() for crop in range(layout.num_crops)]


def rows_with(peaks: list[list[int]], size: int = 16) -> Tensor:
    """Return scores that descend over the listed places; all others are equal and lower."""
    rows = torch.ones(len(peaks), size)
    for row, places in zip(rows, peaks, strict=True):
        row[places] = torch.arange(len(places) + 1, 1, -1).float()
    return rows


def test_by_hand() -> None:
    # Three crops of 16 tokens, 24 to keep: 12 of the whole image, 12 shared. The eight highest of the first layer lie
    # six to two in the upper and lower half of the whole image: nine and three tokens.
    layout = layout_of(3, 4, 4, grid=(2, 1), newlines=8)
    initial = rows_with([[0, 1, 2, 3, 4, 5, 14, 15], [], []])
    final = rows_with([[15, 3], [9, 8, 7], [2, 15, 7]])
    kept = select(HiRED(keep_ratio=0.5), layout, final, initial)
    assert kept == [[*range(11), 15], [0, 1, 2, 3, 4, 5, 7, 8, 9], [2, 7, 15]]
    # A quarter of 24 for the whole image, and twelve of its tokens for the guide, ties by lowest index: eight to four.
    kept = select(HiRED(keep_ratio=0.5, alpha=0.25), layout, final, initial)
    assert [len(k) for k in kept] == [6, 12, 6]
    # Seven of eight tokens of the guide give one crop 23 tokens: what exceeds it is lost.
    crowded = rows_with([[0, 1, 2, 3, 4, 5, 6, 15], [], []])
    assert [len(k) for k in select(HiRED(keep_ratio=0.9), layout, final, crowded)] == [16, 16, 3]


def test_partitions() -> None:
    # The highest scores fill the left half of the whole image: bands see all crops alike, quadrants do not.
    left = rows_with([[0, 1, 4, 5, 8, 9, 12, 13]])[0]
    assert HiRED(keep_ratio=0.5).budgets(24, left, (4, 4), (2, 2)) == [12, 3, 3, 3, 3]
    assert HiRED(keep_ratio=0.5, partition="quadrants").budgets(24, left, (4, 4), (2, 2)) == [12, 6, 0, 6, 0]
    # Sides that the grid does not divide.
    top = torch.arange(9, 0, -1).float()
    assert HiRED(keep_ratio=0.5, alpha=0.0).budgets(9, top, (3, 3), (2, 2)) == [0, 3, 2, 2, 2]
    quadrants = HiRED(keep_ratio=0.5, alpha=0.0, partition="quadrants")
    assert quadrants.budgets(9, top, (3, 3), (2, 2)) == [0, 4, 2, 2, 1]


def test_one_crop_and_tiles_need_no_first_layer() -> None:
    final = rows_with([[7, 3, 12]])
    assert select(HiRED(keep_ratio=0.2), layout_of(1, 4, 4, None), final) == [[3, 7, 12]]
    assert select(HiRED(num_tokens=2), layout_of(1, 4, 4, None), final) == [[3, 7]]
    assert select(HiRED(keep_ratio=1e-6), layout_of(1, 4, 4, None), final) == [[7]]
    tiles = rows_with([[7, 3, 12], [1, 0, 5]])
    assert select(HiRED(keep_ratio=0.13), layout_of(2, 4, 4, None), tiles) == [[3, 7], [0, 1]]
    # Newline tokens go.
    assert select(HiRED(keep_ratio=0.2), layout_of(1, 4, 4, None, newlines=3), final) == [[3, 7, 12]]


def test_heads_are_summed_and_the_class_token_left_out() -> None:
    # Softmax per head: 0.6 on place 1 by one head, 0.35 on place 2 by both; the class token's column is the largest.
    rows = torch.tensor([[9.0, 0.05, 0.60, 0.35], [9.0, 0.60, 0.05, 0.35]]).log()[None]
    attention = VisionAttention(torch.ones(1, 2, 4, 1), rows[..., None], 1.0, has_cls=True, num_tokens=3)
    layout = layout_of(1, 1, 3, None)
    context = PruningContext(layout=layout, attention=LayerAttention({1: attention}))
    assert HiRED(num_tokens=1).select(torch.zeros(3, 1), context).tolist() == [2]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_dropped_is_exact(family: str) -> None:
    model = tiny_vlm(family)
    inputs = tiny_inputs(model, (2, 0, 1))
    logits = model(**inputs).logits
    with HiRED(keep_ratio=1.0, alpha=1.0)(model):
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("partition", ["bands", "quadrants"])
def test_real_crops(partition: str) -> None:
    """A model's attention, by its own account, gives the tokens that remain."""
    model = tiny_vlm("llava_next")
    inputs = tiny_inputs(model, (2,))
    pruner = HiRED(keep_ratio=0.4, partition=partition)
    pruner.prepare(model, inputs)
    model.set_attn_implementation("eager")
    maps = model.model.vision_tower(inputs["pixel_values"].flatten(0, 1), output_attentions=True).attentions
    first, last = (m[:, :, 0, 1:].sum(1).unflatten(0, (2, 5)) for m in (maps[0], maps[1]))
    # The second image, 16 x 32 pixels, has two crops, side by side, and is not padded.
    budgets = pruner.budgets(int(3 * 16 * 0.4), first[1, 0], (4, 4), (1, 2))
    expected: list[int] = []
    for crop, budget in enumerate(budgets):
        for place in last[1, crop].topk(budget).indices.tolist():
            row, column = divmod(place, 4)
            # A newline ends each row of eight.
            expected.append(place if crop == 0 else 16 + row * 9 + (crop - 1) * 4 + column)
    assert pruner.report.kept[1].tolist() == sorted(expected)
    assert pruner.report.tokens_before == (72, 52)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, r"in \[0, 1\], received -0.1"),
        ({"alpha": 1.1}, r"in \[0, 1\], received 1.1"),
        ({"alpha": float("nan")}, r"in \[0, 1\], received nan"),
        ({"partition": "quadrant"}, "Unknown partition 'quadrant'. Did you mean 'quadrants'"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiRED(keep_ratio=0.2, **arguments)


def test_nothing_to_share_by() -> None:
    model = tiny_vlm("llava_next")
    inputs = tiny_inputs(model)
    with pytest.raises(ValueError, match="alpha=1.0 leaves 24 tokens to 4 crops, but none of the whole image's 16"):
        HiRED(keep_ratio=0.5, alpha=1.0).prepare(model, inputs)
    # As long as the whole image takes all, there is nothing to share.
    pruner = HiRED(keep_ratio=0.2, alpha=1.0)
    pruner.prepare(model, inputs)
    assert pruner.report.kept[0].tolist() == list(range(16))
    with pytest.raises(ValueError, match="num_tokens=73 tokens cannot be kept: an image has 72"):
        HiRED(num_tokens=73).prepare(model, inputs)


def test_towers_without_attention_maps() -> None:
    model, calls = tiny_vlm("llava"), []
    inputs = tiny_inputs(model)

    class Tower(torch.nn.Identity):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(args)

    model.model.vision_tower = Tower()
    with pytest.raises(ValueError, match="HiRED needs attention maps, which Tower does not offer"):
        HiRED(keep_ratio=0.5).prepare(model, inputs)
    assert calls == []
