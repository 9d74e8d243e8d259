"""The text-to-image pipeline: exactness, batches, prefixes, streaming, round trips, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from generators.guidance import LinearGuidance
from generators.pipelines import ARImagePipeline
from mmsdk.errors import CheckpointError, UnknownNameError
from mmsdk.tokens import ImageTokens
from tests.tiny import tiny_one_d_piece, tiny_pipeline, tiny_vq


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def grid() -> ARImagePipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def ordered() -> ARImagePipeline:
    return tiny_pipeline(tiny_one_d_piece())


def test_a_call_is_the_transformer_and_the_tokenizer(grid: ARImagePipeline) -> None:
    output = grid("red heart", guidance_scale=2.0, generator=seeded(3), output_type="pt")
    features, mask = grid.encode_prompt("red heart")
    token_ids = grid.transformer.generate(
        caption_features=features, caption_mask=mask, guidance_scale=2.0, generator=seeded(3)
    ).token_ids
    assert torch.equal(output.tokens.token_ids, token_ids)
    decoded = grid.image_tokenizer.decode(ImageTokens(token_ids=token_ids, spec=grid.image_tokenizer.token_spec()))
    assert torch.equal(output.images, decoded.images)


def test_guidance_of_one_runs_no_unconditional_row(grid: ARImagePipeline) -> None:
    assert set(grid("pizza", guidance_scale=1.0, generator=seeded(0)).trace.rows) == {1}
    assert set(grid("pizza", guidance_scale=2.0, generator=seeded(0)).trace.rows) == {2}
    assert len(set(grid("pizza", guidance_scale=LinearGuidance(3.0), generator=seeded(0)).trace.guidance)) > 2


def test_defaults_come_from_the_pipeline(grid: ARImagePipeline) -> None:
    assert set(grid("pizza", generator=seeded(0)).trace.guidance) == {2.0}


def test_batch_equals_single(grid: ARImagePipeline) -> None:
    batch = grid(["red heart", "cat face", "pizza"], generator=seeded(1, 2, 3), output_type="tokens").images
    for i, prompt in enumerate(["red heart", "cat face", "pizza"]):
        single = grid(prompt, generator=seeded(i + 1), output_type="tokens").images
        assert torch.equal(batch.token_ids[i : i + 1], single.token_ids)


def test_images_per_prompt_follow_their_prompt(grid: ARImagePipeline) -> None:
    four = grid(["red heart", "pizza"], num_images_per_prompt=2, generator=seeded(1, 2, 3, 4)).tokens
    assert len(four) == 4
    assert torch.equal(four.token_ids[2:3], grid("pizza", generator=seeded(3)).tokens.token_ids)


def test_the_prompt_changes_the_image(grid: ARImagePipeline) -> None:
    one, other = (grid(p, generator=seeded(0)).tokens.token_ids for p in ("red heart", "green apple"))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("output_type", "kind"), [("np", np.ndarray), ("pt", torch.Tensor), ("latent", torch.Tensor)])
def test_output_types(grid: ARImagePipeline, output_type: str, kind: type) -> None:
    images = grid(["pizza", "cat face"], generator=seeded(0, 1), output_type=output_type).images
    assert isinstance(images, kind)
    assert tuple(images.shape) == {"np": (2, 16, 16, 3), "pt": (2, 3, 16, 16), "latent": (2, 16, 4)}[output_type]


def test_pil_and_tuple_output(grid: ARImagePipeline) -> None:
    (images,) = grid("pizza", generator=seeded(0), return_dict=False)
    assert isinstance(images[0], Image.Image)
    assert images[0].size == (16, 16)


def test_fewer_tokens_are_a_prefix(ordered: ARImagePipeline) -> None:
    full = ordered("pizza", generator=seeded(5)).tokens
    short = ordered("pizza", num_tokens=3, generator=seeded(5))
    assert torch.equal(short.tokens.token_ids, full.token_ids[:, :3])
    assert short.trace.forwards == 3
    assert short.images[0].size == (16, 16)


def test_greedy_needs_no_generator(grid: ARImagePipeline) -> None:
    one, other = (grid("pizza", do_sample=False).tokens.token_ids for _ in range(2))
    assert torch.equal(one, other)


def test_the_global_random_state_is_left_alone(grid: ARImagePipeline) -> None:
    state = torch.get_rng_state()
    grid("pizza")
    assert torch.equal(state, torch.get_rng_state())


def test_stream_ends_with_what_a_call_gives(ordered: ARImagePipeline, grid: ARImagePipeline) -> None:
    for pipeline, counts in ((ordered, [1, 2, 4, 8]), (grid, [4, 8, 12, 16])):
        steps = list(pipeline.stream("pizza", generator=seeded(7), output_type="pt"))
        assert [step.num_tokens for step in steps] == counts
        assert torch.equal(steps[-1].images, pipeline("pizza", generator=seeded(7), output_type="pt").images)


def test_stream_of_ordered_tokens_decodes_prefixes(ordered: ARImagePipeline) -> None:
    steps = list(ordered.stream("pizza", generator=seeded(7), output_type="pt", every=3))
    assert [step.num_tokens for step in steps] == [3, 6, 8]
    full = ordered("pizza", generator=seeded(7)).tokens
    for step in steps:
        assert torch.equal(step.images, ordered.image_tokenizer.decode(full.truncate(step.num_tokens)).images)


def test_stream_of_a_grid_leaves_unfinished_cells_grey(grid: ARImagePipeline) -> None:
    first = next(iter(grid.stream("pizza", generator=seeded(7), output_type="pt")))
    assert bool((first.images[:, :, 4:] == 0.5).all())
    assert not bool((first.images[:, :, :4] == 0.5).all())
    assert first.tokens is None


def test_callback_sees_every_token_and_can_stop(ordered: ARImagePipeline) -> None:
    seen = []

    def watch(pipeline: ARImagePipeline, step: int, total: int, values: dict) -> None:
        seen.append((step, total, values["token_ids"].shape[1]))
        pipeline._interrupt = step == 2

    output = ordered("pizza", generator=seeded(0), callback_on_step_end=watch)
    assert seen == [(0, 8, 1), (1, 8, 2), (2, 8, 3)]
    assert output.tokens.num_tokens == 3


def test_class_conditional() -> None:
    pipeline = tiny_pipeline(condition="class")
    tokens = pipeline(class_labels=[1, 4], generator=seeded(0, 1)).tokens
    assert torch.equal(tokens.token_ids[1:], pipeline(class_labels=4, generator=seeded(1)).tokens.token_ids)
    with pytest.raises(ValueError, match="class-conditional"):
        pipeline("pizza")
    with pytest.raises(ValueError, match="0 to 4"):
        pipeline(class_labels=5)


@pytest.mark.parametrize("kind", ["grid", "ordered", "class"])
def test_save_and_load_round_trip(tmp_path: Path, kind: str) -> None:
    pipeline = {
        "grid": tiny_pipeline,
        "ordered": lambda: tiny_pipeline(tiny_one_d_piece()),
        "class": lambda: tiny_pipeline(condition="class"),
    }[kind]()
    pipeline.save_pretrained(tmp_path)
    loaded = ARImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    call = {"class_labels": 2} if kind == "class" else {"prompt": "green apple"}
    assert loaded.config.guidance_scale == 2.0
    one, other = (p(**call, generator=seeded(9), output_type="pt") for p in (pipeline, loaded))
    assert torch.equal(one.tokens.token_ids, other.tokens.token_ids)
    assert one.tokens.spec == other.tokens.spec
    assert torch.equal(one.images, other.images)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "text-conditional: pass a prompt"),
        ({"prompt": "pizza", "class_labels": 1}, "text-conditional"),
        ({"prompt": ""}, "empty"),
        ({"prompt": " ?! "}, "no letters or digits"),
        ({"prompt": "red heart green apple cat face pizza"}, "7 tokens, this model reads 6"),
        ({"prompt": "pizza", "num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, got 0"),
        ({"prompt": "pizza", "output_type": "pill"}, "Did you mean 'pil'"),
        ({"prompt": "pizza", "num_tokens": 3}, "needs all 16 tokens"),
        ({"prompt": "pizza", "num_tokens": 17}, r"1\.\.16"),
        ({"prompt": "pizza", "temperature": 0.0}, "temperature"),
        ({"prompt": "pizza", "top_p": 0.0}, "top_p"),
        ({"prompt": "pizza", "top_k": -1}, "top_k"),
        ({"prompt": "pizza", "guidance_scale": float("nan")}, "finite"),
        ({"prompt": ["pizza", "cat face"], "generator": seeded(1)}, "1 generators for 2 images"),
    ],
)
def test_bad_calls(grid: ARImagePipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(**arguments)


def test_a_prompt_must_be_text(grid: ARImagePipeline) -> None:
    with pytest.raises(TypeError, match="int"):
        grid([3])


def test_nan_weights_are_noticed(ordered: ARImagePipeline) -> None:
    pipeline = tiny_pipeline()
    pipeline.transformer.output.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        pipeline("pizza", generator=seeded(0))


def test_components_that_do_not_belong_together() -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="writes up to 16 tokens"):
        ARImagePipeline(pipeline.transformer, tiny_one_d_piece(), pipeline.text_encoder, pipeline.tokenizer)
    with pytest.raises(ValueError, match="needs a text_encoder"):
        ARImagePipeline(pipeline.transformer, tiny_vq())
    other = tiny_vq()
    other.register_to_config(codebook_size=64)
    other.quantize.codebook_size = 64
    with pytest.raises(ValueError, match="codebook with 32 entries"):
        ARImagePipeline(pipeline.transformer, other, pipeline.text_encoder, pipeline.tokenizer)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="hub id"):
        ARImagePipeline.from_pretrained("emoji-46")
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        ARImagePipeline.from_pretrained(tmp_path)
    tiny_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["image_tokenizer"] = ["antigravity", "Flyer"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="antigravity"):
        ARImagePipeline.from_pretrained(tmp_path)
