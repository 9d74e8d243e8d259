"""GlobalCom2: ratios, scores, and what it does to real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pruning.base import PruningContext
from pruning.globalcom2 import GlobalCom2
from pruning.vision import CropLayout, LayerAttention, VisionAttention
from tests.tiny_vlms import FAMILIES, tiny_inputs, tiny_vlm


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def layout_of(grid: tuple[int, int], side: int, first: int = 0, last: int | None = None) -> CropLayout:
    """Return an AnyRes image of which the columns `first` to `last` are no padding, as LLaVA-NeXT packs it."""
    places = [(0, index) for index in range(side * side)]
    for row in range(grid[0] * side):
        for column in range(grid[1] * side)[first:last]:
            crop = 1 + row // side * grid[1] + column // side
            places.append((crop, row % side * side + column % side))
        places.append((-1, row))
    crop, index = torch.tensor(places).unbind(-1)
    return CropLayout(crop, index, 1 + grid[0] * grid[1], (side, side), grid)


def select(pruner: GlobalCom2, layout: CropLayout, logits: Tensor) -> Tensor:
    """Return the indices kept where one head gives `logits` `(num_crops, num_tokens)`, and less to the class token."""
    key = torch.cat([torch.full((len(logits), 1), -99.0), logits], 1)[:, None, :, None]
    attention = VisionAttention(torch.ones_like(key), key, 1.0, has_cls=True, num_tokens=logits.shape[1])
    context = PruningContext(layout=layout, attention=LayerAttention({2: attention}))
    return pruner.select(torch.zeros(len(layout.crop), 1), context)


def test_ratios_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # Sums 3 and 7 of rows, 4 and 6 of columns; the softmax of 0 and -4 / tau, of 0 and -2 / tau.
    rows = GlobalCom2(keep_ratio=0.5, temperature=4.0).ratios(scores, (2, 2), (2, 1))
    high = 1 / (1 + torch.tensor(-1.0, dtype=torch.float64).exp())
    torch.testing.assert_close(rows, 0.5 * torch.stack([1.5 - high, 0.5 + high]), atol=1e-8, rtol=0)
    assert rows.dtype == torch.float64
    columns = GlobalCom2(keep_ratio=0.5, temperature=2.0).ratios(scores, (2, 2), (1, 2))
    torch.testing.assert_close(columns, rows, atol=1e-8, rtol=0)
    assert GlobalCom2(keep_ratio=0.9, temperature=0.01).ratios(scores, (2, 2), (1, 2)).tolist() == pytest.approx(
        [0.45, 1.0]
    )
    # Five rows for two crops: two and the rest.
    uneven = GlobalCom2(keep_ratio=0.5, temperature=1e9).ratios(torch.ones(5), (5, 1), (2, 1))
    torch.testing.assert_close(uneven, torch.full((2,), 0.5, dtype=torch.float64), atol=1e-8, rtol=0)


def test_scores_by_hand() -> None:
    # One row of two crops, 2 x 2 each; the first and last of four columns are padding.
    layout = layout_of((1, 2), 2, 1, 3)
    assert layout.crop.tolist() == [0] * 4 + [1, 2, -1] * 2
    pruner = GlobalCom2(keep_ratio=0.5)
    logits = torch.tensor([[4.0, 3.0, 0.0, 4.0], [9.0, 6.0, 9.0, 8.0], [5.0, 9.0, 12.0, 9.0]])
    # What is left has the size of the whole image, which needs no enlarging.
    assert pruner.guide_scores(logits[0], layout).tolist() == [0] * 4 + [4, 3, 0, 0, 4, 0]
    expected = [4, 3, 0, 4, 0.6 + 1, 5 / 13 + 3 / 5, 0, 0.8 + 0, 12 / 13 + 4 / 5, 0]
    torch.testing.assert_close(pruner.combined_scores(logits, layout), torch.tensor(expected))
    # Two of the whole image, int(2 r) of each crop, where r is 0.46 and 0.54, and the newlines.
    assert select(pruner, layout, logits).tolist() == [0, 3, 6, 8, 9]
    # Nearly equal shares: three of the whole image, and of the two tokens of each crop int(1.49...) and int(1.50...).
    assert select(GlobalCom2(keep_ratio=0.75, temperature=1e3), layout, logits).tolist() == [0, 1, 3, 4, 6, 8, 9]
    assert select(GlobalCom2(keep_ratio=1e-6), layout, logits).tolist() == [0, 6, 9]


def test_the_guide_is_enlarged_to_what_is_no_padding() -> None:
    layout = layout_of((2, 2), 4, 1, 7)
    scores = torch.randn(16, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(scores.view(1, 1, 4, 4), (8, 6), mode="bilinear", align_corners=False)
    guide = GlobalCom2().guide_scores(scores, layout)
    torch.testing.assert_close(guide[layout.crop > 0], expected.flatten())
    assert bool((guide[layout.crop <= 0] == 0).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_dropped_is_exact(family: str) -> None:
    model = tiny_vlm(family)
    inputs = tiny_inputs(model, (2, 0, 1))
    logits = model(**inputs).logits
    # Images without crops stay whole, at any ratio.
    with GlobalCom2(keep_ratio=1.0 if FAMILIES[family].kind == "anyres" else 0.2)(model):
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_real_crops(family: str) -> None:
    """The choice is that of the scores which the tower's own maps give."""
    model = tiny_vlm(family)
    model.config.vision_aspect_ratio = "anyres_max_9"
    inputs = tiny_inputs(model, (2,))
    pruner = GlobalCom2(keep_ratio=0.3)
    pruner.prepare(model, inputs)
    model.set_attn_implementation("eager")
    tower = model.model.vision_tower
    maps = tower(inputs["pixel_values"][1, :3], output_attentions=True).attentions[-1]
    if family == "llava_next":
        # Logarithms of attention are logits up to a constant per head.
        layer = tower.encoder.layers[-1]
        hidden = tower(inputs["pixel_values"][1, :3], output_hidden_states=True).hidden_states[2]
        states = layer.layer_norm1(hidden)
        query, key = (getattr(layer.self_attn, f"{x}_proj")(states).unflatten(-1, (2, 8)).transpose(1, 2) for x in "qk")
        scores = (query[:, :, :1] @ key.transpose(-1, -2) * 8**-0.5)[:, :, 0, 1:].mean(1)
        torch.testing.assert_close((query @ key.transpose(-1, -2) * 8**-0.5).softmax(-1), maps)
    else:
        scores = maps.mean((1, 2)).log()
    # The second image, 16 x 32 pixels, has two crops, side by side, and is not padded.
    layout = layout_of((1, 2), 4)
    ratios, combined = pruner.ratios(scores[0], (4, 4), (1, 2)), pruner.combined_scores(scores, layout)
    expected = (layout.crop < 0).nonzero()[:, 0].tolist()
    for crop, count in enumerate([int(16 * 0.3), *(16 * ratios).int().tolist()]):
        tokens = (layout.crop == crop).nonzero()[:, 0]
        expected += tokens[combined[tokens].topk(count).indices].tolist()
    assert pruner.report.kept[1].tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature is a finite number above 0, received 0.0"),
        ({"temperature": float("nan")}, "temperature is a finite number above 0, received nan"),
        ({"num_tokens": 5}, "pass keep_ratio instead of num_tokens=5"),
        ({"keep_ratio": None}, "either keep_ratio"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GlobalCom2(**arguments)
    assert GlobalCom2().keep_ratio == 0.25


def test_towers_without_attention_maps() -> None:
    model = tiny_vlm("llava_next")
    inputs = tiny_inputs(model)
    model.model.vision_tower = torch.nn.Identity()
    with pytest.raises(ValueError, match="GlobalCom2 needs attention maps, which Identity does not offer"):
        GlobalCom2().prepare(model, inputs)
