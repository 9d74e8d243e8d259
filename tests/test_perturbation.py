"""Latent perturbation: what it replaces, how often, by what; and the recipe that trains with it."""

from __future__ import annotations

import pytest
import torch

from mmsdk.training.tokenizer_recipes import CodeReviver, VQRecipe
from tests.tiny import tiny_vq
from tokenizers_img.perturbation import LatentPerturbation
from tokenizers_img.quantizers import VectorQuantizer


def quantizer(size: int = 64, l2_norm: bool = True) -> VectorQuantizer:
    torch.manual_seed(0)
    module = VectorQuantizer(size, 4, l2_norm)
    torch.nn.init.normal_(module.embedding.weight)
    return module


def perturbed(perturbation: LatentPerturbation, module: VectorQuantizer, latents: torch.Tensor, seed: int = 0):
    ids = module.quantize(latents)
    draws = perturbation.draw(ids.shape, torch.Generator().manual_seed(seed))
    return ids, perturbation.perturb(module, latents, ids, *draws)


@pytest.mark.parametrize(
    "perturbation", [LatentPerturbation(0.0, 1.0, 9), LatentPerturbation(1.0, 0.0, 9), LatentPerturbation(1.0, 1.0, 1)]
)
def test_nothing_perturbed_is_the_identity(perturbation: LatentPerturbation) -> None:
    module = quantizer()
    latents = torch.randn(4, 8, 8, 4)
    ids, replaced = perturbed(perturbation, module, latents)
    assert torch.equal(ids, replaced)
    plain = module(latents)
    applied = perturbation.apply(module, latents, plain, torch.Generator().manual_seed(0))
    assert torch.equal(applied, plain.latents)


def test_by_hand() -> None:
    module = VectorQuantizer(4, 1)
    with torch.no_grad():
        module.embedding.weight.copy_(torch.tensor([[0.0], [1.0], [3.0], [7.0]]))
    latents = torch.tensor([[[0.1], [2.9]], [[0.1], [2.9]]])
    ids = module.quantize(latents)
    assert ids.tolist() == [[0, 2], [0, 2]]
    uniforms, ranks = torch.tensor([[0.2, 0.9], [0.2, 0.2]]), torch.tensor([[1, 1], [1, 1]])
    # Half of two images; there only where the uniform is at most alpha.
    replaced = LatentPerturbation(0.5, 0.5, 2).perturb(module, latents, ids, uniforms, ranks)
    assert replaced.tolist() == [[1, 2], [0, 2]]
    replaced = LatentPerturbation(1.0, 1.0, 3).perturb(module, latents, ids, uniforms, torch.tensor([[2, 2], [0, 1]]))
    assert replaced.tolist() == [[2, 0], [0, 1]]


@pytest.mark.parametrize(("alpha", "right"), [(0.3, True), (0.5, False)])
def test_as_many_are_replaced_as_asked(alpha: float, right: bool) -> None:
    """With a wrong rate as the negative control: 64,000 draws tell 0.3 from 0.5."""
    module = quantizer(size=512)
    latents = torch.randn(100, 640, 4)
    ids, replaced = perturbed(LatentPerturbation(alpha, 1.0, 50), module, latents)
    # One rank in fifty is the code itself.
    share = float((ids != replaced).float().mean()) / 0.98
    assert (abs(share - 0.3) < 0.01) == right


def test_replacements_are_near_and_reproducible() -> None:
    module = quantizer()
    latents = torch.randn(8, 16, 4)
    near, far = LatentPerturbation(1.0, 1.0, 3), LatentPerturbation(1.0, 1.0, 64)
    ids, replaced = perturbed(near, module, latents)
    distances = torch.cdist(torch.nn.functional.normalize(latents, dim=-1), module.codebook)
    ranks = distances.argsort(-1).argsort(-1).gather(2, replaced[..., None])
    assert int(ranks.max()) <= 2
    assert torch.equal(replaced, perturbed(near, module, latents)[1])
    assert not torch.equal(replaced, perturbed(near, module, latents, seed=1)[1])
    assert not torch.equal(replaced, perturbed(far, module, latents)[1])


def test_gradients_pass_to_the_encoder_and_losses_stay() -> None:
    module = quantizer()
    latents = torch.randn(2, 8, 4, requires_grad=True)
    plain = module(latents)
    applied = LatentPerturbation(1.0, 1.0, 20).apply(module, latents, plain, torch.Generator().manual_seed(0))
    assert not torch.equal(applied, plain.latents)
    applied.sum().backward()
    expected = torch.autograd.grad(module(latents).latents.sum(), latents)[0]
    torch.testing.assert_close(latents.grad, expected)


def test_annealing_ends_with_nothing() -> None:
    start = LatentPerturbation()
    assert start.annealed(0.0) == start
    assert start.annealed(0.5) == LatentPerturbation(0.5, 0.1, 50)
    assert start.annealed(1.0) == LatentPerturbation(0.0, 0.1, 1)
    with pytest.raises(ValueError, match=r"progress must lie in \[0, 1\], received 1.5"):
        start.annealed(1.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.1}, r"alpha must lie in \[0, 1\], received 1.1"),
        ({"beta": float("nan")}, "beta must lie in"),
        ({"delta": 0}, "delta must be a positive integer, received 0"),
        ({"delta": 2.0}, "delta must be a positive integer, received 2.0"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentPerturbation(**fields)


def test_more_neighbours_than_codes_are_refused() -> None:
    module = quantizer()
    with pytest.raises(ValueError, match="delta=65 codes were asked for; the codebook has 64"):
        perturbed(LatentPerturbation(delta=65), module, torch.randn(1, 2, 4))


def test_the_recipe_perturbs_training_only() -> None:
    model = tiny_vq()
    images = torch.randint(256, (4, model.config.image_size, model.config.image_size, 3), dtype=torch.uint8)
    losses = {}
    for name, settings in (("plain", None), ("perturbed", {"alpha": 1.0, "beta": 1.0, "delta": 16})):
        recipe = VQRecipe(perturbation=settings)
        recipe.reviver = CodeReviver(model.quantize, 50, 0)
        losses[name] = [float(recipe.loss(model, images, step)[0].detach()) for step in (0, 0, 1, recipe.config.steps)]
        recipe.used = set()
        reconstructed = recipe.reconstruct(model, images.permute(0, 3, 1, 2) / 255)
        torch.testing.assert_close(reconstructed, tiny_reconstruction(model, images))
    assert losses["plain"][0] == losses["plain"][1] == losses["plain"][2]
    assert losses["perturbed"][0] == losses["perturbed"][1] != losses["plain"][0]
    assert losses["perturbed"][2] != losses["perturbed"][0]
    # Annealed to nothing at the end.
    assert losses["perturbed"][3] == losses["plain"][3]


def tiny_reconstruction(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images.permute(0, 3, 1, 2) / 255)[0]
