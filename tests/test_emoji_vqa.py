"""Grids of emoji with questions, and the recipe of the model that answers them; on drawings made up here."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmsdk.data.emoji import EmojiRecord
from mmsdk.data.emoji_vqa import CELLS, KINDS, NOTHING, NUMBERS, QUESTIONS, EmojiScenes, Scene, ask, write_scenes
from mmsdk.errors import UnknownNameError
from mmsdk.training.loop import train
from mmsdk.training.vqa_recipe import EmojiVQARecipe, answer, pixels_to_tiles, vqa_model, vqa_processor


@pytest.fixture(autouse=True)
def drawings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of one plain colour per kind, where the real one would lie."""
    cache = tmp_path_factory.mktemp("cache")
    folder = cache / "emoji-64"
    folder.mkdir()
    images = np.full((len(KINDS), 64, 64, 4), 255, np.uint8)
    images[..., 0] = 4 * np.arange(len(KINDS))[:, None, None]
    records = [EmojiRecord(code, code, name, (), "objects", "noto", "train") for code, name in KINDS.items()]
    np.save(folder / "images.npy", images)
    (folder / "records.json").write_text(json.dumps([asdict(record) for record in records]))
    monkeypatch.setenv("MMSDK_CACHE", str(cache))
    return cache


def test_a_scene_shows_what_it_says() -> None:
    scenes = EmojiScenes()
    for index in range(50):
        scene = scenes[index]
        assert 3 <= sum(kind != NOTHING for kind in scene.kinds) <= 8
        cells = scene.pixels.reshape(4, 64, 4, 64, 3).transpose(0, 2, 1, 3, 4).reshape(16, -1, 3)
        for kind, cell in zip(scene.kinds, cells, strict=True):
            colours = set(cell[(cell != 255).any(-1)][:, 0].tolist())
            assert colours == (set() if kind == NOTHING else {4 * list(KINDS.values()).index(kind)})


def test_scenes_are_reproducible_and_splits_differ() -> None:
    first, again, test = EmojiScenes("train"), EmojiScenes("train"), EmojiScenes("test")
    assert np.array_equal(first[7].pixels, again[7].pixels)
    assert first[7].kinds == again[7].kinds
    assert first.question(7, "at") == again.question(7, "at")
    assert all(not np.array_equal(first[i].pixels, test[i].pixels) for i in range(20))
    with pytest.raises(UnknownNameError, match="validation"):
        EmojiScenes("validation")


@pytest.mark.parametrize("task", QUESTIONS)
def test_answers_are_true(task: str) -> None:
    scenes = EmojiScenes()
    for index in range(200):
        scene, question = scenes[index], scenes.question(index, task)
        words = question.text.rstrip("?").split()
        if task == "at":
            truth = scene.kinds[CELLS.index(words[-1])]
        elif task == "where":
            truth = CELLS[scene.kinds.index(words[-1])]
        elif task == "exist":
            truth = "yes" if words[-1] in scene.kinds else "no"
        else:
            truth = NUMBERS[scene.kinds.count(words[-1]) - 1]
        assert question.answer == truth
        if task == "where":
            assert scene.kinds.count(words[-1]) == 1


@pytest.mark.parametrize(("task", "most"), [("at", 0.27), ("where", 0.12), ("exist", 0.56), ("count", 0.52)])
def test_guessing_does_not_pay(task: str, most: float) -> None:
    scenes = EmojiScenes()
    answers = Counter(scenes.question(index, task).answer for index in range(1000))
    assert max(answers.values()) / 1000 < most


def test_unknown_tasks_are_refused() -> None:
    scene = Scene(np.zeros((256, 256, 3), np.uint8), ("apple", "pig", *[NOTHING] * 14))
    with pytest.raises(UnknownNameError, match="colour"):
        ask(scene, "colour", random.Random(0))


def test_patches_are_told_what_they_show() -> None:
    recipe = EmojiVQARecipe()
    recipe.setup()
    scene = recipe.scenes[3]
    for view in range(5):
        kinds, cells = recipe._patch_truth(scene, view)
        tile = pixels_to_tiles(scene.pixels[None])[0, view]
        patches = tile.unflatten(2, (8, 16)).unflatten(1, (8, 16)).permute(1, 3, 0, 2, 4).flatten(2)
        white = (patches > 0.99).all(-1).flatten()
        assert (kinds[white] == len(KINDS)).all()
        assert (kinds != len(KINDS)).any() == (~white).any()
        assert (cells.view(8, 8)[::2, ::2].flatten() == (torch.arange(16) if view == 0 else -100)).all()
        if view == 0:
            shown = kinds != len(KINDS)
            assert all(
                list(KINDS.values())[k] == scene.kinds[c] for k, c in zip(kinds[shown], cells[shown], strict=True)
            )


def test_tiles_are_the_processors() -> None:
    processor = vqa_processor()
    scene = EmojiScenes()[5]
    inputs = processor(images=[scene.image], text=["<s><image>what is at b3?"], return_tensors="pt")
    torch.testing.assert_close(inputs.pixel_values, pixels_to_tiles(scene.pixels[None]), atol=1e-6, rtol=0)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is at b3?"}]}
    assert processor.apply_chat_template([message]) == "<s><image>what is at b3?"


def test_packed_questions_are_answered_as_if_they_were_alone() -> None:
    recipe = EmojiVQARecipe()
    model = recipe.setup().eval()
    scene = recipe.scenes[1]
    asked = [ask(scene, task, random.Random(0)) for task in QUESTIONS]
    tiles = pixels_to_tiles(scene.pixels[None])
    batch = {"tiles": tiles, "keep": 1.0, **recipe._tokens([asked])}
    losses = []
    for question in asked:
        prompt = f"<s><image>{question.text} {question.answer}</s>"
        inputs = recipe.processor(images=[scene.image], text=[prompt], return_tensors="pt")
        logits = model(**inputs).logits[0, -3:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, inputs.input_ids[0, -2:]))
    loss, _ = recipe.loss(model, batch, 0)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_training_passes_through_its_stages(tmp_path: Path) -> None:
    recipe = EmojiVQARecipe(visual_steps=1, base_steps=1, questions=4)
    recipe.config.steps, recipe.config.batch_size = 3, 2
    shapes = [recipe_batch(recipe, step)["tiles"].shape for step in range(3)]
    assert shapes == [(4, 3, 128, 128), (4, 1, 3, 128, 128), (2, 5, 3, 128, 128)]
    recipe.num_test_scenes = 2
    folder = train(recipe, tmp_path)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    scene = recipe.test_scenes[0]
    said = answer(model, processor, [scene.image] * 2, ["what is at b3?", "is there any apple?"])
    assert len(said) == 2
    assert all(word in processor.tokenizer.get_vocab() for word in said)


def recipe_batch(recipe: EmojiVQARecipe, step: int) -> dict[str, torch.Tensor]:
    recipe.setup()
    return recipe.batch(step, random.Random(step))


def test_embeddings_are_tied_and_the_tower_has_a_class_token() -> None:
    model = vqa_model(vqa_processor().tokenizer)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.model.vision_tower.embeddings.class_embedding.shape == (128,)


def test_scenes_are_written_with_their_questions(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "vqa", count=3)
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == list(QUESTIONS) * 3
    scenes = EmojiScenes("test")
    for i, line in enumerate(lines):
        question = scenes.question(i // 4, line["task"])
        assert (line["question"], line["answer"]) == (question.text, question.answer)
        assert np.array_equal(np.asarray(Image.open(folder / line["image"])), scenes[i // 4].pixels)
    with pytest.raises(ValueError, match="count must be at least 1, received 0"):
        write_scenes(tmp_path, count=0)
