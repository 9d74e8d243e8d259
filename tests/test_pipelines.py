"""The text-to-image pipeline: exactness, batches, prefixes, streaming, round trips, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from generators.annealing import StepAnnealing
from generators.guidance import LinearGuidance
from generators.pipelines import SHARED_FILE, ARImagePipeline
from mmsdk.errors import CheckpointError, UnknownNameError
from mmsdk.tokens import ImageTokens
from tests.tiny import (
    CONDITION_TOKENS,
    tiny_flowar,
    tiny_latent_pipeline,
    tiny_one_d_piece,
    tiny_pipeline,
    tiny_tokenbridge,
    tiny_tokenbridge_ar,
    tiny_vq,
    tiny_xar,
)


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
    assert loaded.config.presets == {"default": {"guidance_scale": 2.0}}
    one, other = (p(**call, generator=seeded(9), output_type="pt") for p in (pipeline, loaded))
    assert torch.equal(one.tokens.token_ids, other.tokens.token_ids)
    assert one.tokens.spec == other.tokens.spec
    assert torch.equal(one.images, other.images)


# ---------------------------------------------------------------- generators of latents


@pytest.fixture(scope="module")
def latent() -> ARImagePipeline:
    return tiny_latent_pipeline()


def test_a_call_is_the_generator_and_the_vae(latent: ARImagePipeline) -> None:
    output = latent(["red heart", "pizza"], num_iter=4, generator=seeded(3, 4), output_type="pt")
    with torch.no_grad():
        features, mask = latent.encode_prompt(["red heart", "pizza"])
        latents = latent.transformer.generate(
            caption_features=features, caption_mask=mask, num_iter=4, annealing=StepAnnealing(4, 4),
            guidance_scale=2.0, generator=seeded(3, 4),
        ).latents  # fmt: skip
        images = latent.image_tokenizer.decode_latents(latents).clamp(0, 1)
    assert torch.equal(output.tokens.latents, latents.flatten(2).mT)
    torch.testing.assert_close(output.images, images, atol=1e-4, rtol=0)
    assert output.trace.head_steps == [4] * 4


def test_annealing_is_an_accelerator(latent: ARImagePipeline) -> None:
    annealed = latent("pizza", num_iter=4, accelerator=StepAnnealing(6, 3), generator=seeded(0)).trace
    assert annealed.head_steps == [6, 5, 4, 3]
    given = latent("pizza", num_iter=4, annealing=StepAnnealing(6, 3), num_steps=None, generator=seeded(0)).trace
    assert given.head_steps == annealed.head_steps


def test_presets_are_saved_and_yield_to_arguments(tmp_path: Path) -> None:
    pipeline = tiny_latent_pipeline()
    presets = {"default": {"num_steps": 3}, "fast": {"num_iter": 2, "annealing": {"upper": 4, "lower": 2}}}
    ARImagePipeline(
        pipeline.transformer, pipeline.image_tokenizer, pipeline.text_encoder, pipeline.tokenizer, presets
    ).save_pretrained(tmp_path)
    loaded = ARImagePipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded("pizza", preset="fast").trace.head_steps == [4, 2]
    assert loaded("pizza", preset="fast", num_steps=5).trace.head_steps == [5, 5]
    assert loaded("pizza", num_iter=1).trace.head_steps == [3]
    with pytest.raises(UnknownNameError, match="Did you mean 'fast'"):
        loaded("pizza", preset="fats")
    with pytest.raises(TypeError, match="MAR has no setting 'num_step'"):
        ARImagePipeline(
            pipeline.transformer, pipeline.image_tokenizer, pipeline.text_encoder, pipeline.tokenizer,
            {"default": {"num_step": 3}},
        )  # fmt: skip


def test_stream_of_latents_paints_what_is_there(latent: ARImagePipeline) -> None:
    steps = list(latent.stream("pizza", num_iter=4, generator=seeded(7), output_type="pt"))
    assert [step.num_tokens for step in steps] == sorted(step.num_tokens for step in steps)
    assert steps[-1].num_tokens == 64
    grey = (steps[0].images == 0.5).all(1).float().mean()
    assert float(grey) == pytest.approx(1 - steps[0].num_tokens / 64)
    final = latent("pizza", num_iter=4, generator=seeded(7), output_type="pt").images
    assert torch.equal(steps[-1].images, final)


@pytest.mark.parametrize(
    "generator", [lambda: tiny_xar(grid_size=8, cell_size=4), lambda: tiny_flowar(scales=(1, 2, 4, 8))]
)
def test_class_conditional_generators_of_latents(generator: Any) -> None:
    transformer = generator().__class__(**{**generator().config, "latent_channels": 4})
    pipeline = tiny_latent_pipeline(transformer)
    output = pipeline(class_labels=[1, 4], num_steps=3, generator=seeded(0, 1), output_type="pt")
    assert output.images.shape == (2, 3, 16, 16)
    steps = list(pipeline.stream(class_labels=[1], num_steps=3, generator=seeded(0), output_type="pt"))
    assert torch.allclose(steps[-1].images, output.images[:1], atol=1e-4)
    with pytest.raises(ValueError, match="whole images"):
        pipeline.inpaint(output.images, np.ones((16, 16), bool), class_labels=[0, 1])


def test_indices_of_latents(tmp_path: Path) -> None:
    sizes = {"grid_size": 8, "patch_size": 2, "latent_channels": 4, "buffer_size": CONDITION_TOKENS, "bits": 4}
    transformer = tiny_tokenbridge_ar(**sizes, condition="text", caption_dim=16, channel_order=None)
    pipeline = tiny_latent_pipeline(transformer, tiny_tokenbridge())
    pipeline.save_pretrained(tmp_path)
    pipeline = ARImagePipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline("pizza", num_iter=4, guidance_scale=2.0, generator=seeded(1), output_type="pt")
    assert output.tokens.token_ids.shape == (1, 64, 4)
    steps = list(pipeline.stream("pizza", num_iter=4, guidance_scale=2.0, generator=seeded(1), output_type="pt"))
    grey = [float((step.images == 0.5).all(1).float().mean()) for step in steps]
    assert grey == pytest.approx([1 - step.num_tokens / 64 for step in steps])
    assert torch.equal(steps[-1].images, output.images)
    latents = pipeline("pizza", num_iter=4, guidance_scale=2.0, generator=seeded(1), output_type="latent").images
    decoded = pipeline.image_tokenizer.vae.decode_latents(latents.mT.unflatten(2, (8, 8))).clamp(0, 1)
    torch.testing.assert_close(decoded.detach(), output.images)
    mask = halves(slice(0, 16), slice(8, 16))
    edited = pipeline.inpaint(output.images, mask, "cat face", num_iter=2, generator=seeded(2)).tokens.token_ids
    known = pipeline.image_tokenizer.encode(output.images).token_ids
    left = torch.arange(64) % 8 < 4
    assert torch.equal(edited[:, left], known[:, left])
    assert not torch.equal(edited[:, ~left], known[:, ~left])


# ---------------------------------------------------------------- editing


def halves(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((16, 16), bool)
    mask[rows, columns] = True
    return mask


def test_inpainting_of_latents_leaves_the_rest(latent: ARImagePipeline) -> None:
    images = latent(["red heart", "pizza"], num_iter=2, generator=seeded(1, 2), output_type="pt").images
    mask = halves(slice(8, 16), slice(0, 16))
    output = latent.inpaint(
        images, mask, ["cat face", "pizza"], num_iter=3, generator=seeded(3, 4), output_type="latent"
    )
    before = latent.image_tokenizer.encode(images).latents
    after = output.images
    assert torch.equal(after[:, :32], before[:, :32])
    assert bool((after[:, 32:] != before[:, 32:]).all())
    assert sum(output.trace.head_rows) == 2 * 2 * 8  # 8 tokens of 2 x 2 latents, guided, in 2 images


def test_inpainting_everything_is_generating(latent: ARImagePipeline) -> None:
    images = latent("pizza", num_iter=2, generator=seeded(1), output_type="pt").images
    full = latent.inpaint(images, np.ones((16, 16), bool), "cat face", num_iter=3, generator=seeded(5)).tokens
    assert torch.equal(full.latents, latent("cat face", num_iter=3, generator=seeded(5)).tokens.latents)


def test_inpainting_of_a_causal_grid_writes_on(grid: ARImagePipeline) -> None:
    tokens = grid("pizza", generator=seeded(1)).tokens
    image = grid.image_tokenizer.decode(tokens).images
    known = grid.image_tokenizer.encode(image).token_ids
    output = grid.inpaint(image, halves(slice(8, 9), slice(5, 6)), "red heart", generator=seeded(2))
    assert torch.equal(output.tokens.token_ids[:, :9], known[:, :9])  # row 2, column 1 of 4 x 4 cells
    assert output.trace.forwards == 1 + 16 - 9


def test_a_variation_with_the_generator_of_an_image_is_that_image(ordered: ARImagePipeline) -> None:
    original = ordered("pizza", generator=seeded(5))
    with_prefix = ordered.transformer.generate(
        **dict(zip(("caption_features", "caption_mask"), ordered.encode_prompt("pizza"), strict=True)),
        guidance_scale=2.0, prefix=original.tokens.token_ids[:, :3], generator=seeded(5),
    )  # fmt: skip
    assert torch.equal(with_prefix.token_ids, original.tokens.token_ids)


def test_variations_keep_their_prefix(ordered: ARImagePipeline) -> None:
    images = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    known = ordered.image_tokenizer.encode(images).token_ids
    kept = ordered.vary(images, 5, "pizza", generator=seeded(2)).tokens.token_ids
    assert torch.equal(kept[:, :5], known[:, :5])
    free = ordered.vary(images, 0, "pizza", generator=seeded(2)).tokens.token_ids
    assert torch.equal(free, ordered("pizza", generator=seeded(2)).tokens.token_ids)


def test_a_component_may_lie_with_another_model(tmp_path: Path) -> None:
    pipeline = tiny_latent_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    shutil.move(tmp_path / "pipeline" / "image_tokenizer", tmp_path / "vae")
    shared = {"image_tokenizer": {"component": "vae", "source": str(tmp_path / "vae")}}
    (tmp_path / "pipeline" / SHARED_FILE).write_text(json.dumps(shared))
    loaded = ARImagePipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    one, other = (p("pizza", num_iter=2, generator=seeded(0), output_type="pt").images for p in (pipeline, loaded))
    assert torch.equal(one, other)
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="vae"):
        ARImagePipeline.from_pretrained(tmp_path / "pipeline")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("grid", {"accelerator": StepAnnealing()}, "as MAR, XAR and FlowAR have one; LlamaGen is not such"),
        ("grid", {"preset": "bset"}, "preset"),
        ("latent", {"num_tokens": 3}, "KLVAE needs all 64 tokens"),
        ("latent", {"num_steps": 5, "annealing": StepAnnealing()}, "not both"),
        ("latent", {"num_iter": 0}, "num_iter must be an integer of at least 1"),
    ],
)
def test_settings_that_do_not_fit(kind: str, arguments: dict, message: str, request: Any) -> None:
    with pytest.raises(ValueError, match=message):
        request.getfixturevalue(kind)("pizza", **arguments)


def test_a_setting_of_another_generator(grid: ARImagePipeline, latent: ARImagePipeline) -> None:
    with pytest.raises(TypeError, match="LlamaGen has no setting 'num_iter'"):
        grid("pizza", num_iter=3)
    with pytest.raises(TypeError, match="MAR has no setting 'top_k'"):
        latent("pizza", top_k=3)
    with pytest.raises(TypeError, match="accelerator must be a StepAnnealing, .* got int"):
        latent("pizza", accelerator=3)


def test_edits_that_cannot_be(grid: ARImagePipeline, ordered: ARImagePipeline) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="touches no token"):
        grid.inpaint(image, np.zeros((16, 16), bool), "pizza")
    with pytest.raises(ValueError, match=r"size \(16, 16\), got \(8, 8\)"):
        grid.inpaint(image, np.ones((8, 8), bool), "pizza")
    with pytest.raises(ValueError, match="begin at the same token"):
        masks = [halves(slice(0, 4), slice(0, 4)), halves(slice(8, 9), slice(0, 4))]
        grid.inpaint([image, image], masks, ["pizza", "pizza"])
    with pytest.raises(ValueError, match="1 prompts or labels for 2 images"):
        grid.inpaint([image, image], np.ones((16, 16), bool), "pizza")
    with pytest.raises(ValueError, match="use inpaint"):
        grid.vary(image, 2, "pizza")
    with pytest.raises(ValueError, match="use vary"):
        ordered.inpaint(image, np.ones((16, 16), bool), "pizza")
    with pytest.raises(ValueError, match="num_kept_tokens must be 0 to 7, got 8"):
        ordered.vary(image, 8, "pizza")


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
