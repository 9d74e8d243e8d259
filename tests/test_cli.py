"""Every command on tiny real models: what it writes, what it says, how it fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from generators.annealing import StepAnnealing
from generators.pipelines import ARImagePipeline
from mmsdk.bench.runner import BENCHMARKS
from mmsdk.cli import _is_user_error, app, guess_family, main
from mmsdk.data.emoji import PACKAGES, EmojiRecord
from mmsdk.errors import ImageError
from mmsdk.tokens import ImageTokens
from mmsdk.training.tokenizer_recipes import psnr
from tests.tiny import tiny_latent_pipeline, tiny_one_d_piece, tiny_pipeline, tiny_tokenbridge, tiny_vq
from tokenizers_img.one_d_piece import OneDPiece
from tokenizers_img.vq import VQ

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(str(c.name or c.callback.__name__) for c in app.registered_commands if c.callback)

# A published configuration in the form of its yaml file, for `tiny_one_d_piece`.
PUBLISHED_CONFIG = {
    "model": {
        "vq_model": {
            "vit_enc_model_size": [16, 1, 2],
            "vit_dec_model_size": [16, 1, 2],
            "vit_enc_patch_size": 4,
            "vit_dec_patch_size": 4,
            "num_latent_tokens": 8,
            "codebook_size": 32,
            "token_size": 4,
            "use_l2_norm": True,
            "is_legacy": False,
        }
    },
    "dataset": {"preprocessing": {"crop_size": 16}},
}

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def _library_settings() -> Iterator[None]:
    """The command line quiets libraries for its process; the other tests share it."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    yield
    diffusers_logging.set_verbosity(levels[0])
    transformers_logging.set_verbosity(levels[1])
    diffusers_logging.enable_progress_bar()
    transformers_logging.enable_progress_bar()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pipelines: `text` and `class` over grid tokens, `ordered` over One-D-Piece, `latent` with a MAR."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(folder / "text")
    tiny_pipeline(tiny_one_d_piece()).save_pretrained(folder / "ordered")
    tiny_pipeline(condition="class").save_pretrained(folder / "class")
    tiny_latent_pipeline().save_pretrained(folder / "latent")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], here: Path) -> Run:
    """Run a command that must succeed; return its stdout."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return call


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str], here: Path) -> Run:
    """Run a command that the user got wrong; return the one line that says so."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("mmsdk: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return call


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path))


def load(folder: Path) -> ARImagePipeline:
    pipeline = ARImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def photo(here: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    Image.fromarray(values).save(here / "photo.png")
    return here / "photo.png"


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_of_the_command(run: Run, command: str) -> None:
    text = run(command, "--help")
    assert "Examples:" in text
    assert f"  mmsdk {command}" in text.split("Examples:")[1]


def test_help_lists_every_command(run: Run) -> None:
    text = run("--help")
    assert run() == text
    for command in COMMANDS:
        assert f"\n  {command} " in text


def test_version(run: Run) -> None:
    assert run("--version") == "mmsdk 0.1.0\n"


# ---------------------------------------------------------------- generate


def test_generate_saves_what_the_pipeline_draws(run: Run, models: Path) -> None:
    said = run("generate", "red heart", "-m", models / "text", "-o", "a.png", "--seed", 5, "--scale", 1)
    assert said.startswith("a.png: 1 picture, 16 x 16 pixels, seed 5, ")
    expected = load(models / "text")("red heart", generator=seeded(5)).images[0]
    assert np.array_equal(pixels("a.png"), np.asarray(expected))


def test_generate_passes_its_settings_on(run: Run, models: Path) -> None:
    settings = {"guidance_scale": 1.5, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "num_tokens": 3}
    options = [text for k, v in settings.items() for text in (f"--{k.replace('_', '-')}", v)]
    run("generate", "pizza", "-m", models / "ordered", "-o", "a.png", "--scale", 1, *options)
    pipeline = load(models / "ordered")
    expected = pipeline("pizza", generator=seeded(0), **settings).images[0]
    assert np.array_equal(pixels("a.png"), np.asarray(expected))
    plain = pipeline("pizza", generator=seeded(0)).images[0]
    assert not np.array_equal(pixels("a.png"), np.asarray(plain))


def test_small_pictures_are_enlarged(run: Run, models: Path) -> None:
    run("generate", "pizza", "-m", models / "text", "-o", "a.png")
    run("generate", "pizza", "-m", models / "text", "-o", "b.png", "--scale", 3)
    assert pixels("a.png").shape == (256, 256, 3)
    assert pixels("b.png").shape == (48, 48, 3)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_picture_depends_on_its_own_seed_only(run: Run, models: Path, batch_size: int) -> None:
    run(
        "generate", "pizza", "cat face", "-n", 2, "-m", models / "text", "-o", "many/", "--seed", 3, "--scale", 1,
        "--batch-size", batch_size,
    )  # fmt: skip
    assert sorted(os.listdir("many")) == ["0.png", "1.png", "2.png", "3.png"]
    for number, prompt in enumerate(["pizza", "pizza", "cat face", "cat face"]):
        run("generate", prompt, "-m", models / "text", "-o", "one.png", "--seed", 3 + number, "--scale", 1)
        assert np.array_equal(pixels(f"many/{number}.png"), pixels("one.png"))


def test_several_pictures_become_a_sheet_with_a_row_for_each_prompt(run: Run, models: Path) -> None:
    common = ("generate", "pizza", "cat face", "-n", 3, "-m", models / "text", "--scale", 1)
    assert run(*common, "-o", "sheet.png").startswith("sheet.png: 6 pictures, 56 x 38 pixels")
    run(*common, "-o", "single/")
    sheet = pixels("sheet.png")
    for number in range(6):
        top, left = 2 + 18 * (number // 3), 2 + 18 * (number % 3)
        assert np.array_equal(sheet[top : top + 16, left : left + 16], pixels(f"single/{number}.png"))


def test_one_picture_of_each_prompt_makes_a_square_sheet(run: Run, models: Path) -> None:
    prompts = ["pizza", "cat face", "red heart", "green apple"]
    run("generate", *prompts, "-m", models / "text", "-o", "sheet.png", "--scale", 1)
    assert pixels("sheet.png").shape == (38, 38, 3)


def test_class_labels_in_place_of_prompts(run: Run, models: Path) -> None:
    run("generate", "--class-label", 3, "-m", models / "class", "-o", "a.png", "--scale", 1)
    expected = load(models / "class")(class_labels=3, generator=seeded(0)).images[0]
    assert np.array_equal(pixels("a.png"), np.asarray(expected))


def test_streaming_keeps_the_unfinished_pictures(run: Run, models: Path) -> None:
    run("generate", "pizza", "-m", models / "ordered", "-o", "a.png", "--stream-to", "steps", "--scale", 1)
    assert sorted(os.listdir("steps")) == ["0001.png", "0002.png", "0004.png", "0008.png"]
    assert np.array_equal(pixels("steps/0008.png"), pixels("a.png"))
    run("generate", "pizza", "-m", models / "ordered", "-o", "b.png", "--scale", 1)
    assert np.array_equal(pixels("b.png"), pixels("a.png"))
    run("generate", "pizza", "-m", models / "ordered", "-o", "c.png", "--scale", 1, "--num-tokens", 2)
    assert np.array_equal(pixels("c.png"), pixels("steps/0002.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a PROMPT"),
        (["pizza", "--class-label", "1"], "not both"),
        (["pizza", "-o", "nowhere/a.png"], "there is no folder nowhere"),
        (["pizza", "-o", "a.gif"], r"extension '.gif' is unknown. Accepted are .png"),
        (["pizza", "-m", "emoji-46"], "Unknown model .*'emoji-46'"),
        (["", "-m", "{text}"], "The prompt '' is empty"),
        (["pizza", "-m", "{text}", "--num-tokens", "3"], "not ordered by importance"),
        (["pizza", "-m", "{text}", "--top-p", "2"], "top_p must be above 0"),
        (["pizza", "-m", "{text}", "--guidance-scale", "nan"], "guidance scale must be finite"),
        (["pizza", "-m", "{class}"], "class-conditional"),
        (["--class-label", "9", "-m", "{class}"], "9"),
        (["pizza", "-n", "3", "--batch-size", "2", "--stream-to", "steps"], "--batch-size 3"),
        (["pizza", "-m", "{text}", "--device", "nonsense"], "--device 'nonsense' cannot be used here"),
        (["pizza", "-n", "0"], "--num-images"),
        (["pizza", "--seed", "-1"], "--seed"),
        (["pizza", "--colour", "red"], "No such option"),
        (["pizza", "-m", "."], "Cannot load ARImagePipeline from .*model_index.json"),
    ],
)
def test_generate_refuses(fail: Run, models: Path, arguments: list[str], message: str) -> None:
    names = {"{text}": str(models / "text"), "{class}": str(models / "class")}
    given = [names.get(a, a) for a in arguments]
    line = fail("generate", *given, *(() if "-o" in given else ("-o", "a.png")))
    assert re.search(message, line), line
    assert not Path("a.png").exists()


def test_generate_with_fewer_diffusion_steps(run: Run, fail: Run, models: Path) -> None:
    common = ("generate", "pizza", "-m", models / "latent", "--scale", 1, "--option", "num_iter=3")
    run(*common, "--accelerate", "disa", "-o", "a.png")
    pipeline = load(models / "latent")
    image = pipeline("pizza", num_iter=3, accelerator=StepAnnealing(), generator=seeded(0)).images[0]
    assert np.array_equal(pixels("a.png"), np.asarray(image))
    assert "MAR has no setting 'num_iters'" in fail(*common[:-1], "num_iters=3", "-o", "b.png")
    assert "Unknown preset 'fast'" in fail(*common, "--preset", "fast", "-o", "b.png")
    common = ("generate", "pizza", "-m", models / "text", "--accelerate", "disa", "-o", "b.png")
    assert "LlamaGen is not such a generator" in fail(*common)


# ---------------------------------------------------------------- edit


def test_edit_draws_what_the_mask_shows(run: Run, models: Path) -> None:
    run("generate", "pizza", "-m", models / "latent", "--scale", 1, "--option", "num_iter=2", "-o", "a.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[8:] = 255
    Image.fromarray(mask).save("mask.png")
    run(
        "edit", "a.png", "red heart", "--mask", "mask.png", "-m", models / "latent", "-n", 2, "--seed", 4,
        "--option", "num_iter=2", "--scale", 1, "-o", "b.png",
    )  # fmt: skip
    expected = load(models / "latent").inpaint(
        ["a.png"] * 2, "mask.png", ["red heart"] * 2, num_iter=2, generator=seeded(4, 5)
    )
    first, second = (np.asarray(image) for image in expected.images)
    assert np.array_equal(pixels("b.png")[2:18, 2:18], first)
    assert np.array_equal(pixels("b.png")[2:18, 20:36], second)


def test_edit_keeps_tokens(run: Run, models: Path, photo: Path) -> None:
    run("edit", photo, "pizza", "--keep-tokens", 5, "-m", models / "ordered", "--scale", 1, "-o", "b.png")
    image = load(models / "ordered").vary(photo, 5, "pizza", generator=seeded(0)).images[0]
    assert np.array_equal(pixels("b.png"), np.asarray(image))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pizza"], "--mask .* or --keep-tokens"),
        (["pizza", "--mask", "photo.png", "--keep-tokens", "3"], "not both"),
        (["--keep-tokens", "3"], "Give a PROMPT"),
        (["pizza", "--keep-tokens", "3", "-m", "{text}"], "not ordered by importance"),
        (["pizza", "--keep-tokens", "8", "-m", "{ordered}"], "num_kept_tokens must be 0 to 7, got 8"),
        (["pizza", "--mask", "photo.png", "-m", "{ordered}"], "have no place in the image"),
        (["pizza", "--mask", "none.png", "-m", "{text}"], "none.png"),
        (["pizza", "--keep-tokens", "3", "-m", "{ordered}", "--accelerate", "disa"], "LlamaGen is not such"),
    ],
)
def test_edit_refuses(fail: Run, models: Path, photo: Path, arguments: list[str], message: str) -> None:
    names = {"{text}": str(models / "text"), "{ordered}": str(models / "ordered")}
    line = fail("edit", photo, *(names.get(a, a) for a in arguments), "-o", "a.png")
    assert re.search(message, line), line


def test_an_output_is_required(fail: Run) -> None:
    assert "--output" in fail("generate", "pizza")


# ---------------------------------------------------------------- tokens


def test_tokenize_and_detokenize(run: Run, models: Path, photo: Path) -> None:
    tokenizer = tiny_one_d_piece()
    said = run("tokenize", photo, "-o", "photo.tok", "-m", models / "ordered", "--num-tokens", 5)
    tokens = ImageTokens.load("photo.tok")
    assert tokens.equal(tokenizer.encode(photo, 5))
    assert said == f"photo.tok: 5 tokens, {os.path.getsize('photo.tok')} bytes\n"
    run("detokenize", "photo.tok", "-o", "all.png", "-m", models / "ordered")
    run("detokenize", "photo.tok", "-o", "two.png", "-m", models / "ordered", "--num-tokens", 2, "--scale", 2)
    expected = (tokenizer.decode(tokens).images[0] * 255).round().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels("all.png"), expected.astype(np.uint8))
    assert pixels("two.png").shape == (32, 32, 3)


def test_the_folder_says_which_tokenizer_it_holds(run: Run, models: Path, photo: Path) -> None:
    run("tokenize", photo, "-o", "a.tok", "-m", models / "text")
    run("tokenize", photo, "-o", "b.tok", "-m", models / "text" / "image_tokenizer", "--tokenizer", "vq")
    assert ImageTokens.load("a.tok").spec.tokenizer == "vq"
    assert Path("a.tok").read_bytes() == Path("b.tok").read_bytes()
    run("detokenize", "a.tok", "-o", "a.png", "-m", models / "text")


def test_a_letterboxed_picture_returns_whole(run: Run, models: Path, photo: Path) -> None:
    tokenizer = tiny_one_d_piece()
    run("tokenize", photo, "-o", "photo.tok", "-m", models / "ordered", "--fit", "letterbox")
    tokens = ImageTokens.load("photo.tok")
    assert tokens.equal(tokenizer.encode(photo, fit="letterbox"))
    assert fields(run("inspect", "photo.tok"))["images"] == "1 of 16 x 16 pixels, letterboxed from 30 x 24"
    assert run("detokenize", "photo.tok", "-o", "a.png", "-m", models / "ordered").endswith("30 x 24 pixels\n")
    (expected,) = tokenizer.decode(tokens).to_pil()
    assert np.array_equal(pixels("a.png"), np.asarray(expected))
    run("detokenize", "photo.tok", "-o", "b.png", "-m", models / "ordered", "--num-tokens", 2, "--scale", 2)
    assert pixels("b.png").shape == (48, 60, 3)


def test_letterboxed_pictures_of_different_sizes_become_files(run: Run, fail: Run, models: Path, photo: Path) -> None:
    square = np.zeros((9, 9, 3), dtype=np.uint8)
    tiny_one_d_piece().encode([photo, square], fit="letterbox").save("two.tok")
    said = run("detokenize", "two.tok", "-o", "two/", "-m", models / "ordered")
    assert said == "two: 2 pictures of 30 x 24 and 9 x 9 pixels\n"
    assert [pixels(f"two/{i}.png").shape for i in range(2)] == [(24, 30, 3), (9, 9, 3)]
    line = fail("detokenize", "two.tok", "-o", "sheet.png", "-m", models / "ordered")
    assert "2 pictures of different sizes make no sheet 'sheet.png'; name a folder" in line


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_target_psnr_keeps_the_fewest_tokens(run: Run, fail: Run, models: Path, photo: Path, fit: str) -> None:
    tokenizer = tiny_one_d_piece()
    tokens = tokenizer.encode(photo, fit=fit)
    rows = slice(None) if fit == "crop" else slice(1, 14)  # 24 x 30 pixels lie in the rows 1 to 13 of 16
    reference = tokenizer.preprocess(photo, fit)[:, :, rows]
    reached = [float(psnr(tokenizer.decode(tokens.truncate(k)).images[:, :, rows], reference)) for k in range(1, 9)]
    ranked = sorted(reached)
    for lower, upper in zip(ranked, ranked[1:], strict=False):
        target = (lower + upper) / 2
        fewest = next(k for k, quality in enumerate(reached, start=1) if quality >= target)
        said = run("tokenize", photo, "-o", "a.tok", "-m", models / "ordered", "--fit", fit, "--target-psnr", target)
        assert ImageTokens.load("a.tok").equal(tokens.truncate(fewest))
        assert said == f"a.tok: {fewest} tokens, {os.path.getsize('a.tok')} bytes, {reached[fewest - 1]:.1f} dB\n"
    line = fail("tokenize", photo, "-o", "b.tok", "-m", models / "ordered", "--fit", fit, "--target-psnr", 60)
    assert f"No number of tokens reaches --target-psnr 60: the best of 1 to 8 is {ranked[-1]:.2f} dB" in line
    assert not Path("b.tok").exists()


def test_bits_are_the_knob_of_tokenbridge(run: Run, fail: Run, photo: Path) -> None:
    tokenizer = tiny_tokenbridge(bits=3)
    tiny_tokenbridge(bits=6).save_pretrained("bridge")
    run("tokenize", photo, "-o", "a.tok", "-m", "bridge", "--bits", 3)
    tokens = ImageTokens.load("a.tok")
    assert tokens.equal(tokenizer.encode(photo))
    run("detokenize", "a.tok", "-o", "a.png", "-m", "bridge")  # the file says how many
    assert np.array_equal(pixels("a.png"), np.asarray(tokenizer.decode(tokens).to_pil()[0]))
    run("tokenize", photo, "-o", "b.tok", "-m", "bridge")
    assert ImageTokens.load("b.tok").spec.codebook_size == (64,) * 4
    run("detokenize", "b.tok", "-o", "b.png", "-m", "bridge")
    assert "bits must be" in fail("tokenize", photo, "-o", "c.tok", "-m", "bridge", "--bits", 9)
    line = fail("tokenize", photo, "-o", "c.tok", "-m", "bridge", "--target-psnr", 20)
    assert "'tokenbridge' always takes all 64; choose its --bits instead" in line


def test_a_batch_of_tokens_becomes_a_sheet_or_files(run: Run, models: Path) -> None:
    tokenizer = tiny_one_d_piece()
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokenizer.encode(images).save("three.tok")
    run("detokenize", "three.tok", "-o", "sheet.png", "-m", models / "ordered")
    assert pixels("sheet.png").shape == (38, 38, 3)
    run("detokenize", "three.tok", "-o", "three/", "-m", models / "ordered")
    assert sorted(os.listdir("three")) == ["0.png", "1.png", "2.png"]


def test_tokenize_refuses(fail: Run, models: Path, photo: Path) -> None:
    to = ("-o", "a.tok", "-m", models / "text")
    assert "No such file" in fail("tokenize", "missing.png", *to)
    Path("broken.png").write_bytes(photo.read_bytes()[:200])
    assert "damaged or truncated" in fail("tokenize", "broken.png", *to)
    assert "cannot be truncated" in fail("tokenize", photo, *to, "--num-tokens", 3)
    assert "Unknown tokenizer 'vqq'. Did you mean 'vq'?" in fail(
        "tokenize", photo, "-o", "a.tok", "-m", "owner/name", "--tokenizer", "vqq"
    )
    assert "of the class VQ, not the 'titok'" in fail("tokenize", photo, *to, "--tokenizer", "titok")
    assert "there is no folder" in fail("tokenize", photo, "-o", "nowhere/a.tok")
    assert "--bits 4 is a setting of tokenbridge only, not of 'vq'." in fail("tokenize", photo, *to, "--bits", 4)
    ordered = ("-o", "a.tok", "-m", models / "ordered")
    assert "--num-tokens makes them cheaper" in fail("tokenize", photo, *ordered, "--bits", 4)
    assert "'vq' always takes all 16." in fail("tokenize", photo, *to, "--target-psnr", 20)
    assert "and not both" in fail("tokenize", photo, *ordered, "--target-psnr", 20, "--num-tokens", 3)
    for target in ("nan", "inf", "0", "-3"):
        assert "must be a positive number of dB" in fail("tokenize", photo, *ordered, "--target-psnr", target)
    assert "'stretch' is not one of 'crop', 'letterbox'" in fail("tokenize", photo, *ordered, "--fit", "stretch")
    assert not Path("a.tok").exists()


def test_detokenize_refuses(fail: Run, models: Path, photo: Path) -> None:
    tokens = tiny_one_d_piece(seed=1).encode(photo)
    tokens.save("a.tok")
    to = ("-o", "a.png", "-m", models / "ordered")
    assert "decode them with the tokenizer that made them" in fail("detokenize", "a.tok", *to)
    assert "of the class VQ, not the 'one_d_piece'" in fail("detokenize", "a.tok", "-o", "a.png", "-m", models / "text")
    assert "Cannot keep 9 tokens" in fail("detokenize", "a.tok", *to, "--num-tokens", 9)
    assert "not a token stream" in fail("detokenize", photo, *to)
    Path("a.tok").write_bytes(tokens.to_bytes()[:-1])
    assert "damaged or truncated" in fail("detokenize", "a.tok", *to)
    assert fail("detokenize", "missing.tok", *to) == "mmsdk: missing.tok: No such file or directory.\n"
    assert not Path("a.png").exists()


# ---------------------------------------------------------------- inspect


def fields(text: str) -> dict[str, str]:
    rows = [line.strip().split("  ", 1) for line in text.splitlines()[1:]]
    return {row[0]: row[1].strip() for row in rows}


def test_inspect_tokens(run: Run, photo: Path) -> None:
    tokens = tiny_one_d_piece().encode([photo, photo], [3, 8])
    tokens.save("a.tok")
    size = os.path.getsize("a.tok")
    described = fields(run("inspect", "a.tok"))
    assert described["tokenizer"] == f"one_d_piece, fingerprint {tokens.spec.fingerprint}"
    assert described["tokens"] == "3, 8 of at most 8"
    assert described["bits"] == "55, 5 per token"  # 11 tokens of log2(32) bits
    assert described["bytes"] == f"{size}, of which 7 for tokens; {4 * size:g} bits per image in all"
    Path("tokens").write_bytes(Path("a.tok").read_bytes())
    assert fields(run("inspect", "tokens")) == described


def test_inspect_a_pipeline_and_a_model(run: Run, models: Path) -> None:
    described = fields(run("inspect", models / "text"))
    assert described["class"] == "ARImagePipeline"
    vq = sum(v.numel() for v in tiny_vq().state_dict().values())
    assert described["image_tokenizer"] == f"VQ, {vq:,} parameters"
    assert "'guidance_scale': 2.0" in described["config"]
    folder = models / "text" / "image_tokenizer"
    described = fields(run("inspect", folder))
    assert described["class"] == "VQ"
    assert described["parameters"] == f"{vq:,}"
    assert "codebook_size=32" in described["config"]
    assert described["size"] == f"{sum(p.stat().st_size for p in folder.iterdir()) / 1e3:.1f} kB"
    assert described["licence"] == "not stated in a model card"


def test_inspect_reads_the_licence_from_the_model_card(run: Run) -> None:
    tiny_vq().save_pretrained("model")
    Path("model/README.md").write_text("---\nlibrary_name: mmsdk\nlicense: apache-2.0\n---\n# A model\n")
    assert fields(run("inspect", "model"))["licence"] == "apache-2.0"
    Path("model/README.md").write_text("---\nlibrary_name: mmsdk\n---\n# A model\nlicense: none of this\n")
    assert fields(run("inspect", "model"))["licence"] == "not stated in a model card"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_inspect_a_checkpoint(run: Run, suffix: str) -> None:
    weights = tiny_vq().state_dict()
    path = Path(f"checkpoint{suffix}")
    if suffix == ".pt":
        torch.save({"model": weights, "optimizer": {}}, path)
    else:
        save_file(weights, path)
    described = fields(run("inspect", path))
    assert described["keys"] == f"{len(weights)}"
    assert described["parameters"] == f"{sum(v.numel() for v in weights.values()):,}"
    assert described["family"] == "vq"
    assert "--family vq" in described["convert with"]


def test_families_are_guessed_from_keys_and_shapes() -> None:
    legacy = {"encoder.latent_token_positional_embedding": (256, 8), "decoder.ffn.2.weight": (1024, 16, 1, 1)}
    assert guess_family(legacy) == "one_d_piece"
    assert guess_family(legacy | {"encoder.latent_token_positional_embedding": (32, 8)}) == "titok"
    assert guess_family({"encoder.latent_token_positional_embedding": (256, 8)}) == "titok"
    assert guess_family({k: tuple(v.shape) for k, v in tiny_vq().state_dict().items()}) == "vq"
    pipeline = tiny_pipeline()
    assert guess_family({k: tuple(v.shape) for k, v in pipeline.transformer.state_dict().items()}) == "llamagen"
    assert guess_family({"weight": (1,)}) is None


def test_inspect_refuses(fail: Run, photo: Path) -> None:
    assert "Unknown file or model" in fail("inspect", "nothing")
    assert "neither a token file (.tok) nor a checkpoint" in fail("inspect", photo)
    Path("a.tok").write_bytes(b"\x89T\x01\x00\x00nonsense")
    assert "a.tok: The token stream is damaged" in fail("inspect", "a.tok")
    Path("a.safetensors").write_bytes(b"nonsense")
    assert "Cannot read the checkpoint 'a.safetensors'" in fail("inspect", "a.safetensors")
    Path("model").mkdir()
    assert "holds no model" in fail("inspect", "model")
    Path("model/config.json").write_text("[1]")
    assert "holds list, expected an object" in fail("inspect", "model")
    Path("model/config.json").write_text("{")
    assert "no readable JSON" in fail("inspect", "model")


# ---------------------------------------------------------------- data and training


@pytest.fixture
def cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built data set of six pictures of each split."""
    folder = here / "cache" / "emoji-64"
    folder.mkdir(parents=True)
    records = [
        EmojiRecord(f"{i:x}", f"{i:x}", f"emoji {i}", (), "food-drink", "noto", split)
        for i, split in enumerate(["train", "pair", "test"] * 6)
    ]
    pictures = np.random.default_rng(0).integers(0, 256, (len(records), 64, 64, 4), dtype=np.uint8)
    np.save(folder / "images.npy", pictures)
    (folder / "records.json").write_text(json.dumps([asdict(r) for r in records]))
    monkeypatch.setenv("MMSDK_CACHE", str(here / "cache"))
    return here / "cache"


def test_data_shows_licences_and_the_folder(run: Run, cache: Path) -> None:
    licences = run("data", "--licences")
    for package in PACKAGES.values():
        line = next(line for line in licences.splitlines() if f"{package.npm_name}@{package.version}" in line)
        assert package.licence in line
    built = run("data", "--cache-dir", cache)
    assert built == licences + f"{cache / 'emoji-64'}: 18 images\n"


def test_data_without_npm(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["data", "--cache-dir", "cache"]) == 2
    captured = capsys.readouterr()
    assert "npm is needed" in captured.err
    assert captured.err.count("\n") == 1


def test_train_stops_and_goes_on(run: Run, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("train", "vq", "-o", "run", "--steps", 2, "--batch-size", 2, "--seed", 3, "--threads", 1)
    assert "stopped before the first evaluation" in run(*common, "--max-seconds", 0)
    assert [p.name for p in Path("run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert main([str(a) for a in common]) == 0
    captured = capsys.readouterr()
    assert "resumed vq from step 1" in captured.err
    assert captured.out.startswith(f"{Path('run/model')}: the model of the last evaluation")
    config = json.loads(Path("run/config.json").read_text())
    assert (config["steps"], config["batch_size"], config["seed"]) == (2, 2, 3)
    assert VQ.from_pretrained("run/model").max_tokens == 64
    assert main([*map(str, common), "--no-resume", "--max-seconds", "0"]) == 0
    assert "resumed" not in capsys.readouterr().err


def test_train_refuses(fail: Run) -> None:
    assert "Unknown recipe 'vqq'. Did you mean 'vq'?" in fail("train", "vqq")
    assert "--option takes KEY=VALUE, received 'foo'" in fail("train", "vq", "--option", "foo")
    assert "unexpected keyword argument 'foo'" in fail("train", "vq", "--option", "foo=1")
    assert "--steps" in fail("train", "vq", "--steps", 0)
    assert not Path("runs").exists()


# ---------------------------------------------------------------- bench


def test_bench_lists_and_runs(run: Run, cache: Path, models: Path) -> None:
    assert run("bench").split() == sorted(BENCHMARKS)
    options = ["one_d_piece=null", f"vq={models / 'text' / 'image_tokenizer'}", "num_images=2", "repeats=1"]
    arguments = [text for option in options for text in ("--option", option)]
    table = run("bench", "tokens", "--json", "figures.json", "--output-dir", "plots", *arguments)
    content = json.loads(Path("figures.json").read_text())
    assert content["name"] == "tokens"
    assert table.splitlines()[0].split()[0] == content["columns"][0]
    assert len(content["rows"]) == 1


def test_bench_refuses(fail: Run) -> None:
    assert "Unknown benchmark 'token'. Did you mean 'tokens'" in fail("bench", "token")
    assert "Unknown option of the benchmark 'tokens' 'repeat'" in fail("bench", "tokens", "--option", "repeat=1")
    assert "there is no folder nowhere" in fail("bench", "tokens", "--json", "nowhere/figures.json")


# ---------------------------------------------------------------- convert


def test_convert_grid_tokenizer(run: Run) -> None:
    model = tiny_vq()
    torch.save({"model": model.state_dict()}, "vq.pt")
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    Path("vq.json").write_text(json.dumps(config))
    said = run("convert", "vq.pt", "-o", "converted", "--family", "vq", "--config", "vq.json")
    assert fields(said)["class"] == "VQ"
    assert VQ.from_pretrained("converted").fingerprint() == model.fingerprint()
    assert sorted(os.listdir()) == ["converted", "vq.json", "vq.pt"]


def test_convert_one_d_piece_with_its_published_configuration(run: Run) -> None:
    model = tiny_one_d_piece()
    save_file(model.state_dict(), "weights.safetensors")
    Path("config.json").write_text(json.dumps(PUBLISHED_CONFIG))
    run("convert", "weights.safetensors", "-o", "converted", "--family", "one_d_piece", "--config", "config.json")
    converted = OneDPiece.from_pretrained("converted")
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(converted.encode(images).token_ids, model.encode(images).token_ids)


def test_convert_llamagen_reads_sizes_from_the_weights(run: Run, fail: Run) -> None:
    from generators.llamagen import LlamaGen

    torch.manual_seed(0)
    rotary = LlamaGen(hidden_size=16, num_layers=1, num_heads=2, multiple_of=8, codebook_size=32, num_classes=3)
    save_file(rotary.state_dict(), "weights.safetensors")
    Path("heads.json").write_text(json.dumps({"n_head": 2}))
    common = ("convert", "weights.safetensors", "--family", "llamagen")
    assert "does not tell num_heads" in fail(*common, "-o", "a")
    assert "does not tell max_tokens" in fail(*common, "-o", "a", "--config", "heads.json")
    run(*common, "-o", "a", "--config", "heads.json", "--image-size", 384)
    converted = LlamaGen.from_pretrained("a")
    assert (converted.config.max_tokens, converted.config.num_heads) == (576, 2)
    assert torch.equal(converted.output.weight, rotary.output.weight)
    assert "Unknown LlamaGen preset 'BB'" in fail(*common, "-o", "b", "--config", "BB")
    assert "does not fit LlamaGen" in fail(*common, "-o", "b", "--config", "B")


def test_convert_refuses(fail: Run) -> None:
    save_file(tiny_vq().state_dict(), "weights.safetensors")
    Path("there").mkdir()
    common = ("convert", "weights.safetensors")
    assert "exists already" in fail(*common, "-o", "there", "--family", "vq", "--config", "vq16")
    assert "No checkpoint file at 'missing.pt'" in fail("convert", "missing.pt", "-o", "a", "--family", "vq")
    assert "Unknown family 'titokk'. Did you mean 'titok'?" in fail(*common, "-o", "a", "--family", "titokk")
    assert "ar_image_pipeline" not in fail(*common, "-o", "a", "--family", "ar_image_pipeline").split("Available")[1]
    assert "--config is missing: a file, or one of vq16, vq8" in fail(*common, "-o", "a", "--family", "vq")
    assert "Unknown VQ preset 'vq32'" in fail(*common, "-o", "a", "--family", "vq", "--config", "vq32")
    assert "none.json: No such file" in fail(*common, "-o", "a", "--family", "vq", "--config", "none.json")
    Path("wrong.json").write_text(json.dumps({"channels": 8, "norm_num_groups": 4, "image_size": 16}))
    assert "does not fit VQ" in fail(*common, "-o", "a", "--family", "vq", "--config", "wrong.json")
    Path("damaged.pt").write_bytes(b"nonsense")
    assert "Cannot read the checkpoint" in fail("convert", "damaged.pt", "-o", "a", "--family", "vq", "--config", "vq8")
    assert sorted(os.listdir()) == ["damaged.pt", "there", "weights.safetensors", "wrong.json"]


# ---------------------------------------------------------------- errors


def test_unknown_commands_list_near_ones(fail: Run) -> None:
    assert "No such command 'genrate'. Did you mean 'generate'?" in fail("genrate", "pizza")


def test_debug_shows_the_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="extension"):
        main(["--debug", "generate", "pizza", "-o", "a.gif"])
    monkeypatch.setenv("MMSDK_DEBUG", "1")
    with pytest.raises(ImageError, match="extension"):
        main(["generate", "pizza", "-o", "a.gif"])
    monkeypatch.setenv("MMSDK_DEBUG", "0")
    assert main(["generate", "pizza", "-o", "a.gif"]) == 2


def test_only_our_own_refusals_count_as_mistakes_of_the_user() -> None:
    def raised_by(action: Callable[[], object]) -> BaseException:
        with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - any
            action()
        return caught.value

    assert _is_user_error(raised_by(lambda: tiny_vq().preset("vq32")))
    assert _is_user_error(raised_by(lambda: tiny_vq().encode(torch.rand(1, 3, 16, 16), num_tokens=2)))
    assert _is_user_error(raised_by(lambda: open("/no/such/file")))
    assert not _is_user_error(raised_by(lambda: torch.zeros(2).view(3)))
    assert not _is_user_error(raised_by(lambda: np.zeros((2, 2)) @ np.zeros((3, 3))))
    assert not _is_user_error(raised_by(lambda: [][0]))


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmsdk", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603


def test_as_a_process(here: Path) -> None:
    process = start("generate", "pizza", "-o", here / "a.gif")
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith("mmsdk: Cannot write") and err.count("\n") == 1


def test_interrupting_ends_with_130_and_no_traceback(here: Path) -> None:
    # Opening a pipe for writing waits until the command reads from it: then it is at work.
    pipe = here / "picture.png"
    os.mkfifo(pipe)
    process = start("tokenize", pipe, "-o", here / "a.tok")
    with open(pipe, "wb"):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert sorted(os.listdir(here)) == ["picture.png"]


def test_entropy_coded_files(run: Run, here: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(here / "red.png")
    said = run("tokenize", "red.png", "-o", "red.tok", "--num-tokens", "32", "--entropy-model", "emoji-64-1d")
    assert "without entropy coding)" in said
    run("detokenize", "red.tok", "-o", "again.png", "--entropy-model", "emoji-64-1d")
    assert (here / "again.png").is_file()
