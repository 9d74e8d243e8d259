"""GlobalCom2 against recorded ratios, scores and selections of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pruning.base import PruningContext
from pruning.globalcom2 import GlobalCom2
from pruning.vision import LayerAttention
from tests.golden.anyres import anyres_layouts, attention_with_logits
from tests.golden.listed import listed_cases
from tests.golden.util import golden_index, load_tensors


@pytest.mark.parametrize("case", listed_cases("globalcom2"))
def test_case(case: dict[str, Any]) -> None:
    golden = load_tensors("globalcom2", f"{case['name']}.safetensors")
    logits = golden["cls_logits"]
    pinpoints = [(height, width) for width, height in golden_index("globalcom2")["settings"]["grid_pinpoints_wh"]]
    size = torch.tensor([case["image_size_wh"][::-1]])
    (layout,) = anyres_layouts(pinpoints, case["side"], size, [len(logits)])
    assert layout.grid == tuple(case["grid_wh"][::-1])
    pruner = GlobalCom2(keep_ratio=case["retention_ratio"], temperature=case["temperature"])

    ratios = pruner.ratios(logits[0], layout.crop_size, layout.grid)
    torch.testing.assert_close(ratios, golden["ratios"], atol=1e-9, rtol=0)
    torch.testing.assert_close(ratios.tolist(), case["ratios"], atol=1e-9, rtol=0)
    guide, combined = pruner.guide_scores(logits[0], layout), pruner.combined_scores(logits, layout)
    with_class_token = torch.cat([torch.zeros(len(logits), 1), logits], 1)[:, None]
    attention = LayerAttention({23: attention_with_logits(with_class_token)})
    indices = pruner.select(torch.zeros(len(layout.crop), 1), PruningContext(layout=layout, attention=attention))
    kept = layout[indices]
    assert torch.equal(kept.index[kept.crop == 0], golden["thumbnail_kept_in_order"].sort().values)
    assert int((kept.crop == 0).sum()) == case["thumbnail_kept"]
    for crop, (width, height) in enumerate(case["crop_valid_wh"]):
        own = layout.crop == crop + 1
        assert int(own.sum()) == width * height
        assert torch.equal(layout.index[own], golden[f"crop{crop}.valid"])
        torch.testing.assert_close(guide[own], golden[f"crop{crop}.guide_score"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(combined[own], golden[f"crop{crop}.combined_score"], atol=1e-6, rtol=1e-5)
        assert torch.equal(kept.index[kept.crop == crop + 1], golden[f"crop{crop}.kept"])
        assert int((kept.crop == crop + 1).sum()) == case["crop_kept"][crop]
    # The order in which the language model sees crops. Newlines remain for the rows that the model keeps; the published
    # code has one for rows of padding too.
    sequence = golden["sequence_ids_true_place"]
    sequence = sequence[sequence[:, 0] > 0]
    high = kept.crop > 0
    assert torch.equal(torch.stack([kept.crop[high], kept.index[high]], 1), sequence)
    assert int((kept.crop < 0).sum()) == int((layout.crop < 0).sum()) <= case["newlines"]
    assert bool((golden["sequence_ids_true_place"][: case["thumbnail_kept"], 0] == 0).all())
