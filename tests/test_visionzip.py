"""VisionZip: dominant tokens, merging, and what it does to real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pruning.base import PruningContext
from pruning.vision import CropLayout, LayerAttention, VisionAttention
from pruning.visionzip import VisionZip
from tests.tiny_vlms import FAMILIES, tiny_inputs, tiny_vlm


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def context_of(keys: Tensor, crops: int = 1, newlines: int = 0) -> PruningContext:
    """Return an image whose class tokens look along the first axis of `keys` `(crops * num_tokens, dim)`."""
    size = len(keys) // crops
    places = (torch.arange(crops).repeat_interleave(size), torch.arange(size).repeat(crops))
    ends = (torch.full((newlines,), -1), torch.arange(newlines))
    crop, index = (torch.cat(parts) for parts in zip(places, ends, strict=True))
    layout = CropLayout(crop, index, crops, (1, size), (1, crops - 1) if crops > 1 else None)
    key = torch.cat([torch.zeros(crops, 1, keys.shape[1]), keys.view(crops, size, -1)], 1)[:, None]
    query = torch.zeros_like(key)
    query[..., 0] = 1
    attention = VisionAttention(query, key, 1.0, has_cls=True, num_tokens=size)
    return PruningContext(layout=layout, attention=LayerAttention({4: attention}))


# The class token looks along x. Places 1 and 6 dominate; the other six are close to y or to z.
KEYS = torch.tensor([[0, 1, 0], [9, 0, 0], [0, 1, 0.1], [0, 0, 1], [0, 0.1, 7], [0.5, 9, 0], [8, 0, 0], [0, 0.1, 1]])


def test_by_hand() -> None:
    context = context_of(KEYS)
    pruner = VisionZip(num_tokens=4, contextual_ratio=0.5)
    # The rest is 0, 2, 3, 4, 5, 7, every third of it a target: 0 and 4.
    assert pruner.groups(8, context).tolist() == [0, 1, 0, 4, 4, 0, 6, 4]
    features = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    before = features.clone()
    indices = pruner.select(features, context)
    assert indices.tolist() == [0, 1, 4, 6]
    expected = torch.stack([features[[0, 2, 5]].mean(0), features[1], features[[3, 4, 7]].mean(0), features[6]])
    merged = pruner.gather(features, indices, context)
    torch.testing.assert_close(merged, expected)
    assert torch.equal(merged[[1, 3]], features[[1, 6]])
    assert torch.equal(features, before)


def test_dominant_tokens_only() -> None:
    context, features = context_of(KEYS), torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    pruner = VisionZip(num_tokens=3, contextual_ratio=0.0)
    assert pruner.groups(8, context).tolist() == [-1, 1, -1, -1, -1, 5, 6, -1]
    indices = pruner.select(features, context)
    assert indices.tolist() == [1, 5, 6]
    assert torch.equal(pruner.gather(features, indices, context), features[[1, 5, 6]])
    # A fraction of a token is none.
    assert VisionZip(num_tokens=3, contextual_ratio=0.3).select(features, context).tolist() == [1, 5, 6]


def test_crops_share_and_newlines_go() -> None:
    context = context_of(KEYS.repeat(3, 1), crops=3, newlines=4)
    groups = VisionZip(num_tokens=13, contextual_ratio=0.5).groups(28, context)
    # Thirteen by three: four, four and five, of which two are contextual each.
    assert [len(part.unique()) for part in groups[:24].split(8)] == [4, 4, 5]
    assert groups[8:16].tolist() == [8, 9, 8, 12, 12, 8, 14, 12]
    assert groups[24:].tolist() == [-1] * 4
    assert VisionZip(num_tokens=26).groups(28, context).tolist() == [*range(24), -1, -1, -1, -1]
    assert VisionZip(num_tokens=28).groups(28, context).tolist() == list(range(28))
    assert VisionZip(num_tokens=1).select(torch.zeros(28, 1), context).tolist() == [17]


def test_means_are_taken_in_float32() -> None:
    features = torch.full((8, 1), 256.0, dtype=torch.bfloat16)
    features[0] = 1.0
    context = context_of(KEYS)
    pruner = VisionZip(num_tokens=3, contextual_ratio=0.4)
    merged = pruner.gather(features, pruner.select(features, context), context)
    assert merged.dtype == torch.bfloat16
    # One target for six: five of 256 and one of 1.
    assert merged[0] == torch.tensor((5 * 256 + 1) / 6).bfloat16()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_dropped_is_exact(family: str) -> None:
    model = tiny_vlm(family)
    inputs = tiny_inputs(model, (2, 0, 1))
    logits = model(**inputs).logits
    with VisionZip(keep_ratio=1.0)(model):
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_real_models(family: str) -> None:
    """Every layer of features is merged alike, and the exact number remains where there are no newlines."""
    model = tiny_vlm(family)
    inputs = tiny_inputs(model, (2,))
    pruner = VisionZip(keep_ratio=0.5, contextual_ratio=0.5)
    contexts = []
    select = pruner.select
    pruner.select = lambda features, context: contexts.append((features, context)) or select(features, context)
    output = pruner.prepare(model, inputs)["mm_encoder_outputs"]["image"]
    merged = torch.cat([entry.reshape(-1, entry.shape[-1]) for entry in output.pooler_output])
    expected = []
    for features, context in contexts:
        groups = pruner.groups(len(features), context)
        expected += [features[groups == target].mean(0) for target in groups[groups >= 0].unique()]
        newlines = int((context.layout.crop < 0).sum())
        assert len(groups[groups >= 0].unique()) == min(pruner.budget(len(features)), len(features) - newlines)
        assert bool((groups[context.layout.crop < 0] < 0).all())
    torch.testing.assert_close(merged, torch.stack(expected))
    for layer in getattr(output, "deepstack_features", None) or []:
        assert [len(entry) for entry in layer] == [len(entry) for entry in output.pooler_output]


def test_attention_is_that_of_the_feature_layer() -> None:
    model = tiny_vlm("llava")
    inputs = tiny_inputs(model)
    pruner = VisionZip(num_tokens=5, contextual_ratio=0.0)
    pruner.prepare(model, inputs)
    model.set_attn_implementation("eager")
    maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[1]
    assert pruner.report.kept[0].tolist() == sorted(maps[0, :, 0, 1:].sum(0).topk(5).indices.tolist())


def test_groups_are_the_same_under_autocast() -> None:
    """Groups are found again when features are gathered; rounding keys to bfloat16 would change them."""
    contexts = []
    model = tiny_vlm("qwen3_vl")
    inputs = tiny_inputs(model, (3,))
    pruner = VisionZip(keep_ratio=0.5, contextual_ratio=0.7)
    groups = pruner.groups
    pruner.groups = lambda total, context: contexts.append(groups(total, context)) or contexts[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = pruner.prepare(model, inputs)["mm_encoder_outputs"]["image"]
    # Three images: once to select, and once per layer of features.
    assert len(contexts) == 3 * (1 + 1 + len(output.deepstack_features))
    for number in range(3):
        assert all(torch.equal(contexts[number], again) for again in contexts[number + 3 :: 3])
    assert all(bool(entry.isfinite().all()) for entry in output.pooler_output)


def test_training_through_merged_tokens() -> None:
    model = tiny_vlm("llava")
    inputs = tiny_inputs(model)
    labels = inputs["input_ids"].clone()
    with torch.enable_grad(), VisionZip(keep_ratio=0.3, contextual_ratio=0.5)(model):
        model(**inputs, labels=labels.masked_fill(labels == model.config.image_token_id, -100)).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.model.multi_modal_projector.parameters())


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_bad_settings(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"in \[0, 1\), received {ratio}"):
        VisionZip(keep_ratio=0.1, contextual_ratio=ratio)


def test_towers_without_attention_maps() -> None:
    model = tiny_vlm("llava")
    inputs = tiny_inputs(model)
    model.model.vision_tower = torch.nn.Identity()
    with pytest.raises(ValueError, match="VisionZip needs attention maps, which Identity does not offer"):
        VisionZip(keep_ratio=0.5).prepare(model, inputs)
