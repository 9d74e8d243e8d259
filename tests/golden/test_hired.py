"""HiRED against recorded budgets and selections of the published code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pruning.base import PruningContext
from pruning.hired import HiRED
from pruning.vision import CropLayout, LayerAttention, VisionAttention
from tests.golden.anyres import anyres_layouts, attention_with_logits
from tests.golden.listed import listed_cases
from tests.golden.util import golden_index, load_tensors


@pytest.mark.parametrize("case", listed_cases("hired", "anyres_cases"))
def test_crops(case: dict[str, Any]) -> None:
    settings = golden_index("hired")["settings"]
    golden = load_tensors("hired", f"{case['name']}.safetensors")
    pruner = HiRED(keep_ratio=case["token_budget_rate"], alpha=case["alpha"])
    counts = [image["crops"] for image in case["images"]]
    side = round(settings["tokens_per_crop"] ** 0.5)
    layouts = anyres_layouts(settings["grid_pinpoints_hw"], side, golden["image_sizes_hw"], counts)
    rows = [golden[f"{layer}_layer_cls_row"].split(counts) for layer in ("initial", "final")]
    for number, (image, layout, initial, final) in enumerate(zip(case["images"], layouts, *rows, strict=True)):
        assert list(layout.grid) == image["grid_hw"]
        guide = initial[0, :, 1:].sum(0)
        budgets = pruner.budgets(image["total_budget"], guide, layout.crop_size, layout.grid)
        assert budgets[0] == image["full_image_budget"]
        assert budgets[1:] == image.get("sub_budgets", [0] * (image["crops"] - 1))
        if "sub_budgets" in image:
            assert budgets[1:] == golden[f"image{number}.sub_budgets"].tolist()
        mask = golden[f"image{number}.mask"].bool()
        assert budgets == mask.sum(1).tolist()
        attention = {0: attention_with_logits(initial.log()), 22: attention_with_logits(final.log())}
        context = PruningContext(layout=layout, attention=LayerAttention(attention))
        kept = layout[pruner.select(torch.zeros(len(layout.crop), 1), context)]
        packed = golden[f"image{number}.packed_ids_correct_grid"]
        assert torch.equal(torch.stack([kept.crop, kept.index], 1), packed)
        # What the mask holds besides lies in the padding of the image.
        assert bool(mask[kept.crop, kept.index].all())
        if image["grid_hw"][0] == image["grid_hw"][1]:
            assert torch.equal(packed, golden[f"image{number}.packed_ids_upstream"])


@pytest.mark.parametrize("case", listed_cases("hired", "single_image_cases"))
def test_one_crop(case: dict[str, Any]) -> None:
    golden = load_tensors("hired", f"{case['name']}.safetensors")
    masks = golden["mask"].view(case["batch"], -1)
    total = masks.shape[1]
    side = round(total**0.5)
    layout = CropLayout(torch.zeros(total, dtype=torch.long), torch.arange(total), 1, (side, side))
    for row, mask in zip(golden["final_layer_cls_row"], masks, strict=True):
        context = PruningContext(layout=layout, attention=LayerAttention({22: attention_with_logits(row.log()[None])}))
        kept = HiRED(keep_ratio=case["token_budget_rate"]).select(torch.zeros(total, 1), context)
        assert len(kept) == case["n_keep"]
        assert torch.equal(kept, mask.nonzero()[:, 0])


def attention_case() -> list[Any]:
    """Return the one case of attention from queries and keys."""
    if not (index := golden_index("hired")):
        return listed_cases("hired")
    return [pytest.param(index["attention_case"], id="attention")]


@pytest.mark.parametrize("case", attention_case())
def test_class_attention(case: dict[str, Any]) -> None:
    golden = load_tensors("hired", f"{case['name']}.safetensors")
    heads = (case["heads"], case["head_dim"])
    query, key = (golden[f"{x}_proj_output"].unflatten(-1, heads).transpose(1, 2) for x in "qk")
    attention = VisionAttention(query, key, case["head_dim"] ** -0.5, has_cls=True, num_tokens=query.shape[2] - 1)
    torch.testing.assert_close(attention.cls_row(), golden["cls_row"], atol=1e-6, rtol=1e-5)
