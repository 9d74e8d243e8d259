"""QueCC alone, and as the trained projector of a tiny LLaVA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmsdk.errors import CheckpointError
from pruning.quecc import QueCC, QueCCProjector, question_embedding

IMAGE_TOKEN = 99


def tiny_quecc(seed: int = 0, **changes: Any) -> QueCC:
    torch.manual_seed(seed)
    sizes = {"dim": 8, "text_dim": 12, "multi_level_dim": 32, "kernel_size": 2, "num_heads": 2}
    return QueCC(**sizes | changes).eval()


def inputs(batch: int = 2, count: int = 16, seed: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, *shape, generator=generator) for shape in ((count, 8), (count, 32), (1, 12)))


def test_each_query_sees_its_own_cell() -> None:
    model, (features, levels, text) = tiny_quecc(), inputs()
    levels.requires_grad_()
    output = model(features, levels, text)
    assert output.shape == (2, 4, 8)
    output[0, 1].sum().backward()
    seen = levels.grad.abs().sum(-1) > 0
    # The second cell of 2 x 2 in a grid of 4 x 4.
    assert seen[0].reshape(4, 4).nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert not bool(seen[1].any())


@torch.no_grad()
def test_one_token_per_cell_by_hand() -> None:
    """With cells of one token there is nothing to choose: attention returns its only value."""
    model, (features, levels, text) = tiny_quecc(kernel_size=1), inputs()
    value = nn.functional.linear(
        model.v_proj(levels), model.clip_attn.in_proj_weight[16:], model.clip_attn.in_proj_bias[16:]
    )
    torch.testing.assert_close(model(features, levels, text), model.clip_attn.out_proj(value))


@torch.no_grad()
def test_batch_equals_single_and_the_question_matters() -> None:
    model, batch = tiny_quecc(), inputs(3)
    together = model(*batch)
    for i in range(3):
        torch.testing.assert_close(model(*(x[i : i + 1] for x in batch))[0], together[i])
    assert not torch.allclose(model(batch[0], batch[1], batch[2].flip(0)), together)


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    model = tiny_quecc()
    model.save_pretrained(tmp_path)
    loaded = QueCC.from_pretrained(tmp_path)
    assert torch.equal(loaded(*inputs()), model(*inputs()))


def test_bad_input() -> None:
    model, (features, levels, text) = tiny_quecc(), inputs()
    with pytest.raises(ValueError, match="edge is a multiple of 2, got 9 tokens"):
        model.num_tokens(9)
    with pytest.raises(ValueError, match="edge is a multiple of 2, got 8 tokens"):
        model(features[:, :8], levels[:, :8], text)
    with pytest.raises(ValueError, match=r"text_query must have the shape \(2, 1, 12\), got \(1, 1, 12\)"):
        model(features, levels, text[:1])
    with pytest.raises(ValueError, match=r"multi_level_features must have the shape \(2, 16, 32\), got"):
        model(features, features, text)
    with pytest.raises(ValueError, match="num_heads must divide dim, got num_heads=3 and dim=8"):
        tiny_quecc(num_heads=3)
    with pytest.raises(ValueError, match="kernel_size must be at least 1, got 0"):
        tiny_quecc(kernel_size=0)
    with pytest.raises(CheckpointError, match="holds no QueCC module"):
        QueCC.from_original({"weight": torch.ones(1)})
    incomplete = {k: v for k, v in model.state_dict().items() if k != "v_proj.3.bias"}
    with pytest.raises(CheckpointError, match=r"missing 'v_proj\.3\.bias'"):
        QueCC.from_original(incomplete, num_heads=2)


# ------------------------------------------------------------ within a VLM


def tiny_llava() -> LlavaForConditionalGeneration:
    """16 patches per image; four vision layers side by side."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=12,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=[1, 2, 3, 4]
    )
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_trains_in_the_place_of_the_projector() -> None:
    model = tiny_llava().requires_grad_(False)
    projector = QueCCProjector(tiny_quecc(), nn.Linear(8, 12))
    model.model.multi_modal_projector = projector
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    question = torch.tensor([[5, 6, 7], [8, 9, 10]])
    answer = torch.tensor([[20], [21]])
    input_ids = torch.cat([torch.full((2, projector.compressor.num_tokens(16)), IMAGE_TOKEN), question, answer], 1)
    labels = input_ids.masked_fill(torch.arange(input_ids.shape[1]) < input_ids.shape[1] - 1, -100)
    optimizer = torch.optim.Adam(projector.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        projector.text_query = question_embedding(model, question)
        loss = model(input_ids=input_ids, pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            assert [n for n, p in projector.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is None for parameter in model.model.language_model.parameters())
    assert model.generate(input_ids=input_ids[:, :-1], pixel_values=images, max_new_tokens=1).shape == (2, 8)


@torch.no_grad()
def test_question_embedding_ignores_images_and_padding() -> None:
    model = tiny_llava()
    alone = question_embedding(model, torch.tensor([[5, 6, 7]]))
    assert alone.shape == (1, 1, 12)
    left = torch.tensor([[0, IMAGE_TOKEN, 5, IMAGE_TOKEN, 6, 7]])
    right = torch.tensor([[IMAGE_TOKEN, 5, 6, IMAGE_TOKEN, 7, 0]])
    for ids, mask in ((left, [[0, 1, 1, 1, 1, 1]]), (right, [[1, 1, 1, 1, 1, 0]])):
        torch.testing.assert_close(question_embedding(model, ids, torch.tensor(mask)), alone)
    assert not torch.allclose(question_embedding(model, torch.tensor([[5, 6, 8]])), alone)
    with pytest.raises(ValueError, match="Every question must have a token"):
        question_embedding(model, torch.tensor([[IMAGE_TOKEN]]))


@torch.no_grad()
def test_projector_wants_questions() -> None:
    projector = QueCCProjector(tiny_quecc(), nn.Identity())
    features, levels, text = inputs(3)
    with pytest.raises(ValueError, match="No question is set"):
        projector(levels)
    projector.text_query = text[:2]
    with pytest.raises(ValueError, match="one question or one per image, got 2 for 3 images"):
        projector(levels)
    projector.text_query = text[:1]
    expected = projector.compressor(levels[..., -8:], levels, text[:1].expand(3, -1, -1))
    assert torch.equal(projector(levels), expected)
