"""FlexTok-AR: the published proportions, prefixes through the flow decoder, variations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from generators.flextok_ar import FlexTokAR
from generators.pipelines import ARImagePipeline
from tests.tiny import randomised, tiny_flextok


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipeline() -> ARImagePipeline:
    tokenizer = tiny_flextok()
    torch.manual_seed(0)
    transformer = FlexTokAR(
        hidden_size=16, num_layers=2, num_heads=2, intermediate_size=64, positions="learned", num_classes=5,
        codebook_size=tokenizer.codebook_sizes[0], max_tokens=tokenizer.max_tokens,
    )  # fmt: skip
    pipeline = ARImagePipeline(randomised(transformer), tokenizer, presets={"default": {"guidance_scale": 2.0}})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_published_proportions() -> None:
    with torch.device("meta"):
        model = FlexTokAR.of_depth(18)
    assert model.config.hidden_size == 64 * 18
    assert model.layers[0].feed_forward.w1.weight.shape == (4 * 64 * 18, 64 * 18)
    assert (len(model.layers), model.config.num_heads) == (18, 18)
    assert model.output.weight.shape[0] == 64000
    assert model.position_embedding.weight.shape[0] == 256 + 1
    with pytest.raises(ValueError, match="depth must be an integer of at least 1, got 0"):
        FlexTokAR.of_depth(0)


def test_it_stops_anywhere_and_the_decoder_draws_the_rest(pipeline: ARImagePipeline) -> None:
    most = pipeline.image_tokenizer.max_tokens
    full = pipeline(class_labels=3, generator=generator(0))
    for count in (1, 2, most):
        output = pipeline(class_labels=3, num_tokens=count, generator=generator(0), output_type="pt")
        assert torch.equal(output.tokens.token_ids, full.tokens.token_ids[:, :count])
        assert output.trace.forwards == count
        assert output.images.shape[-1] == pipeline.image_tokenizer.config.image_size


def test_variation(pipeline: ARImagePipeline) -> None:
    size = pipeline.image_tokenizer.config.image_size
    image = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    known = pipeline.image_tokenizer.encode(image).token_ids
    tokens = pipeline.vary(image, 2, class_labels=3, generator=generator(1)).tokens.token_ids
    assert torch.equal(tokens[:, :2], known[:, :2])
    assert tokens.shape == known.shape


def test_save_and_load(tmp_path: Path, pipeline: ARImagePipeline) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = ARImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    one, other = (p(class_labels=1, generator=generator(2)).tokens.token_ids for p in (pipeline, loaded))
    assert torch.equal(one, other)
