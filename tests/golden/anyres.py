"""AnyRes images for the golden cases of pruning methods: layouts as a model packs them, and given class attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig, LlavaNextConfig

from pruning.vision import CropLayout, VisionAttention, VisionRecord, layouts_of


def anyres_layouts(
    pinpoints_hw: Sequence[Sequence[int]], side: int, sizes_hw: Tensor, crops: Sequence[int]
) -> list[CropLayout]:
    """Return where a LLaVA-NeXT of `side` x `side` tokens per crop puts the tokens of images, padding left out."""
    image_size = min(min(resolution) for resolution in pinpoints_hw)
    vision = CLIPVisionConfig(
        image_size=image_size, patch_size=image_size // side, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    text = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    points = [list(resolution) for resolution in pinpoints_hw]
    model = AutoModel.from_config(LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=points))
    packing = {
        "image_features": [torch.zeros(count, side * side, 8) for count in crops],
        "image_sizes": sizes_hw,
        "vision_feature_select_strategy": "default",
        "image_newline": torch.zeros(8),
    }
    layouts = layouts_of(model, VisionRecord(packing=packing), [], None, None)
    known = [layout for layout in layouts if layout is not None]
    assert len(known) == len(crops)
    return known


def attention_with_logits(logits: Tensor) -> VisionAttention:
    """Return attention whose class token pays `logits` `(num_crops, num_heads, 1 + num_tokens)`, before softmax."""
    query = torch.ones(*logits.shape, 1)
    return VisionAttention(query, logits[..., None], 1.0, has_cls=True, num_tokens=logits.shape[-1] - 1)
