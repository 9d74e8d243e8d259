"""Accelerators by name, for pipelines and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

import generators.accelerators
import mmsdk.loading
from generators.accelerators import ACCELERATORS, make_accelerator
from generators.annealing import StepAnnealing
from generators.continuous import ContinuousSpeculation
from generators.feature_head import FeatureHead
from generators.generator_drafter import GeneratorDrafter
from generators.lantern import lantern
from generators.llamagen import LlamaGen
from generators.mar import MAR
from generators.pipelines import ARImagePipeline
from mmsdk.decoding.drafters.token_recycling import TokenRecycling
from mmsdk.decoding.rules import Lantern
from mmsdk.errors import UnknownNameError
from tests.tiny import CONDITION_TOKENS, randomised, tiny_flextok, tiny_latent_pipeline, tiny_mar, tiny_pipeline


@pytest.fixture(scope="module")
def grid() -> ARImagePipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def latent() -> ARImagePipeline:
    return tiny_latent_pipeline()


def seeded(count: int) -> list[Generator]:
    return [Generator().manual_seed(i) for i in range(count)]


def images(pipeline: ARImagePipeline, **settings: Any) -> np.ndarray:
    return pipeline(["pizza", "red heart"], generator=seeded(2), output_type="np", **settings).images


def head_of(pipeline: ARImagePipeline) -> FeatureHead:
    torch.manual_seed(0)
    return FeatureHead.for_generator(pipeline.transformer).eval()


def draft_mar() -> MAR:
    """A MAR of the latents of `tiny_latent_pipeline`."""
    sizes = {"grid_size": 8, "patch_size": 2, "latent_channels": 4, "buffer_size": CONDITION_TOKENS}
    return tiny_mar(seed=4, **sizes, condition="text", num_classes=None, caption_dim=16)


# ---------------------------------------------------------------- names


def test_every_name_says_what_it_is_for() -> None:
    assert all(ACCELERATORS.values())
    assert set(ACCELERATORS) == {"disa", "lantern", "cspd", "recycling"}


def test_recycling_draws_the_same_pictures(grid: ARImagePipeline) -> None:
    assert np.array_equal(images(grid, accelerator="recycling"), images(grid))
    decoder = make_accelerator("recycling", grid)
    assert isinstance(decoder.drafter, TokenRecycling) and decoder.lossless


def test_a_name_keeps_what_it_has_learnt(grid: ARImagePipeline) -> None:
    grid("pizza", accelerator="recycling", generator=seeded(1)[0])
    first = grid._accelerators["recycling", grid.device]
    grid("pizza", accelerator="recycling", generator=seeded(1)[0])
    assert grid._accelerators["recycling", grid.device] is first


def test_disa_by_name(latent: ARImagePipeline) -> None:
    by_name, by_class = (images(latent, num_iter=3, accelerator=a) for a in ("disa", StepAnnealing()))
    assert np.array_equal(by_name, by_class)


def test_lantern_and_cspd_with_given_drafts(grid: ARImagePipeline, latent: ARImagePipeline, tmp_path: Path) -> None:
    head = head_of(grid)
    head.save_pretrained(tmp_path / "head")
    decoders = [make_accelerator("lantern", grid, draft) for draft in (head, tmp_path / "head", str(tmp_path / "head"))]
    assert isinstance(decoders[0].acceptance, Lantern) and not decoders[0].lossless
    for decoder in decoders:
        assert torch.equal(decoder.drafter.head.fc.weight, head.fc.weight)
        assert images(grid, accelerator=decoder).shape == (2, 16, 16, 3)
    small = make_accelerator("cspd", latent, draft_mar())
    assert isinstance(small, ContinuousSpeculation) and not small.lossless
    assert images(latent, num_iter=4, accelerator=small).shape == images(latent, num_iter=4).shape
    assert small.stats.draft_forwards > 0


def test_drafts_that_ship_are_found_by_the_name_of_the_pipeline(
    grid: ARImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid.save_pretrained(tmp_path / "small-8")
    head_of(grid).save_pretrained(tmp_path / "small-8-head")
    index = {"small-8": {"ar_image_pipeline": "small-8"}, "small-8-head": {"feature_head": "small-8-head"}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    for module in (mmsdk.loading, generators.accelerators):
        monkeypatch.setattr(module, "WEIGHTS_FOLDER", tmp_path)
    shipped = ARImagePipeline.from_pretrained("small-8")
    shipped.set_progress_bar_config(disable=True)
    assert make_accelerator("lantern", shipped).drafter.vocab_size == 32
    with pytest.raises(ValueError, match="No model that drafts for this pipeline ships.*there are some for .'small-8'"):
        make_accelerator("lantern", grid)


@pytest.mark.parametrize(
    ("name", "which", "error", "message"),
    [
        ("lanterns", "grid", UnknownNameError, "Unknown accelerator 'lanterns'. Did you mean 'lantern'"),
        ("lantern", "grid", ValueError, "ships with the package .*give 'lantern' its draft, a FeatureHead"),
        ("cspd", "latent", ValueError, "give 'cspd' its draft, a MAR"),
        ("recycling", "latent", TypeError, "Token ids are recycled, but KLVAE has none"),
        ("disa", "grid", ValueError, "chooses among token ids|LlamaGen is not such"),
    ],
)
def test_names_that_do_not_fit(
    grid: ARImagePipeline, latent: ARImagePipeline, name: str, which: str, error: type[Exception], message: str
) -> None:
    pipeline = {"grid": grid, "latent": latent}[which]
    with pytest.raises(error, match=message):
        pipeline("pizza", accelerator=name)


def test_a_draft_where_none_is_needed(grid: ARImagePipeline) -> None:
    for name in ("disa", "recycling"):
        with pytest.raises(ValueError, match=f"'{name}' needs no model to draft with, got 'emoji-64-head'"):
            make_accelerator(name, grid, "emoji-64-head")


# ---------------------------------------------------------------- LANTERN


def test_lantern_without_relaxation_draws_the_chances_of_the_target(grid: ARImagePipeline) -> None:
    decoder = lantern(grid, head_of(grid), delta=0.0, do_sample=False, num_candidates=6)
    assert np.array_equal(images(grid, do_sample=False, accelerator=decoder), images(grid, do_sample=False))


def test_lantern_takes_any_drafter(grid: ARImagePipeline) -> None:
    decoder = lantern(grid, GeneratorDrafter(grid.transformer), delta=0.5, do_sample=False, num_candidates=4)
    assert images(grid, do_sample=False, accelerator=decoder).shape == (2, 16, 16, 3)
    assert decoder.stats.accepted > 0


def test_lantern_accepts_more_where_more_is_allowed(grid: ARImagePipeline) -> None:
    rates = []
    for delta in (0.0, 0.9):
        decoder = lantern(grid, head_of(grid), delta=delta, num_candidates=6, generator=Generator().manual_seed(0))
        images(grid, accelerator=decoder)
        rates.append(decoder.stats.tokens_per_forward)
    assert rates[0] < rates[1]


def test_lantern_needs_a_codebook_that_is_learned(grid: ARImagePipeline, latent: ARImagePipeline) -> None:
    with pytest.raises(TypeError, match="LANTERN drafts for a LlamaGen, not for MAR"):
        lantern(latent, head_of(grid))
    fixed = tiny_flextok()
    transformer = randomised(LlamaGen(
        hidden_size=16, num_layers=1, num_heads=2, codebook_size=40, max_tokens=8, num_classes=3, positions="learned"
    ))  # fmt: skip
    with pytest.raises(TypeError, match="needs a learned codebook.*FlexTok has none here"):
        lantern(ARImagePipeline(transformer, fixed), FeatureHead.for_generator(transformer))
    with pytest.raises(ValueError, match="delta must be finite and at least 0, got -1"):
        lantern(grid, head_of(grid), delta=-1)


def test_neighbours_are_computed_once() -> None:
    pipeline = tiny_pipeline()
    quantize = pipeline.image_tokenizer.quantize
    first = quantize.nearest_codes(6)
    assert quantize.nearest_codes(6).data_ptr() == first.data_ptr()
    assert torch.equal(quantize.nearest_codes(3), first[:, :3])
    distances = torch.cdist(quantize.codebook.double(), quantize.codebook.double()).fill_diagonal_(float("inf"))
    assert torch.equal(first[:, 0], distances.argmin(1))
    with torch.no_grad():
        quantize.embedding.weight.copy_(quantize.embedding.weight.flip(0))
    turned = len(first) - 1 - first.flip(0)
    assert torch.equal(quantize.nearest_codes(6)[:, 0], turned[:, 0])
