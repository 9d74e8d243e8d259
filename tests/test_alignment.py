"""Feature alignment (REPA): the loss, what it trains, and that FlexTok's recipe uses it."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from mmsdk.training.alignment import FeatureAlignment
from mmsdk.training.tokenizer_recipes import AlignedFlexTok, FlexTokRecipe
from tests.tiny import tiny_flextok


def teacher(patch: int = 8) -> timm.models.VisionTransformer:
    torch.manual_seed(0)
    return timm.models.VisionTransformer(img_size=32, patch_size=patch, embed_dim=24, depth=2, num_heads=2)


def test_the_features_are_the_teachers() -> None:
    model = teacher().eval()
    alignment = FeatureAlignment(model, hidden_size=16)
    images = torch.rand(2, 3, 32, 32)
    settings = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = model.forward_features((images - mean) / std)[:, 1:]
    torch.testing.assert_close(alignment.features(images, 4), expected, atol=1e-5, rtol=1e-5)
    # A coarser grid averages, so a constant stays what it is.
    assert alignment.features(torch.rand(2, 3, 64, 64), 2).shape == (2, 4, 24)


def test_the_loss_is_minus_the_cosine() -> None:
    alignment = FeatureAlignment(teacher(), hidden_size=24)
    alignment.projector = torch.nn.Identity()
    images = torch.rand(2, 3, 32, 32)
    features = alignment.features(images, 4)
    assert float(alignment(3 * features, images)) == pytest.approx(-1, abs=1e-6)
    other = torch.randn_like(features)
    expected = -F.cosine_similarity(other, features, dim=-1).mean()
    torch.testing.assert_close(alignment(other, images), expected)


def test_only_the_projector_is_trained() -> None:
    alignment = FeatureAlignment(teacher(), hidden_size=16, projector_size=32)
    assert {name.split(".")[0] for name, _ in alignment.named_parameters()} == {"projector"}
    assert all(key.startswith("projector.") for key in alignment.state_dict())
    hidden = torch.randn(2, 16, 16, requires_grad=True)
    alignment(hidden, torch.rand(2, 3, 32, 32)).backward()
    assert bool(hidden.grad.any())
    assert all(p.grad is None for p in alignment._teacher[0].parameters())


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a timm ViT, received Linear"):
        FeatureAlignment(torch.nn.Linear(2, 2), hidden_size=16)


def test_flextok_is_trained_with_it() -> None:
    recipe = FlexTokRecipe(align_with=teacher(), align_weight=0.25)
    model = tiny_flextok().train()
    alignment = FeatureAlignment(teacher(), model.config.decoder_shape[0], projector_size=32)
    recipe.align_block = len(model.flow_decoder.blocks) - 1
    images = torch.randint(256, (2, model.config.image_size, model.config.image_size, 3), dtype=torch.uint8)
    latents = model.encode_latents(images.permute(0, 3, 1, 2).float() / 255)
    batch = {
        "latents": latents,
        "num_tokens": torch.tensor([1, model.max_tokens]),
        "sigmas": torch.tensor([0.3, 0.7]),
        "noise": torch.randn(latents.shape),
        "drop_condition": torch.tensor([False, False]),
    }
    module = AlignedFlexTok(model, alignment)
    plain, scalars = recipe.loss(module, dict(batch), 0)
    assert scalars == {}
    torch.testing.assert_close(plain, model(**batch).loss)
    aligned, scalars = recipe.loss(module, batch | {"images": images}, 0)
    torch.testing.assert_close(aligned, plain - 0.25 * scalars["cosine"])
    aligned.backward()
    assert all(p.grad is not None for p in alignment.projector.parameters())
