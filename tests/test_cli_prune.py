"""`mmsdk prune`: answers, plans, and draws what was kept; with the embedded model and its examples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmsdk.cli import main
from mmsdk.loading import WEIGHTS_FOLDER, load_vlm
from pruning.picture import draw_kept
from pruning.uniform import UniformPruner
from tests.tiny_vlms import tiny_inputs, tiny_vlm

EXAMPLES = WEIGHTS_FOLDER / "emoji-vqa" / "examples"
QUESTIONS = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text().splitlines()]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["prune", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_answers_and_draws(run) -> None:
    entry = next(q for q in QUESTIONS if q["task"] == "where")
    code, out, err = run(EXAMPLES / entry["image"], "-q", entry["question"], "--keep-ratio", 0.25, "--show", "kept.png")
    assert code == 0
    assert out.strip() == entry["answer"]
    assert "84 of 336 visual tokens" in err
    with Image.open("kept.png") as drawn:
        assert drawn.size == (2 * 512 + 8, 512)


def test_plans(run) -> None:
    scene = EXAMPLES / QUESTIONS[0]["image"]
    code, out, _ = run(scene, "-q", "what is at b3?", "--plan", "--target-flops", 1e8)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["method", "tokens", "keep_ratio", "ms", "MFLOP"]
    rows = {line.split()[0]: line.split() for line in lines[1:]}
    assert {"divprune", "hired", "globalcom2", "visionzip", "random", "uniform"} <= set(rows)
    assert all(float(row[4]) <= 100 for row in rows.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan"], "--plan needs a target"),
        (["--target-ms", "5"], "--plan needs a target"),
        (["--keep-ratio", "0.1", "--num-tokens", "3"], "Give --keep-ratio or --num-tokens, and not both"),
        (["--keep-ratio", "0"], "keep_ratio"),
        (["--method", "divprun"], "Did you mean 'divprune'"),
        (["-m", "emoji-64"], "has no 'vlm'"),
        (["--num-tokens", "337"], "num_tokens=337 tokens cannot be kept: an image has 336"),
        (["--plan", "--target-flops", "1"], "No method reaches 1 operations"),
    ],
)
def test_refusals(run, options: list[str], message: str) -> None:
    code, out, err = run(EXAMPLES / QUESTIONS[0]["image"], "-q", "what is at b3?", *options)
    assert (code, out) == (2, "")
    assert message in err


def test_the_drawing_shows_what_was_kept() -> None:
    model, processor = load_vlm()
    image = Image.new("RGB", (256, 256), "red")
    inputs = dict(processor(images=image, text="<s><image>what is at b3?", return_tensors="pt"))
    everything = draw_kept(model, inputs, image, torch.arange(336))
    pixels = np.asarray(everything)
    assert (pixels[:, :512] == (255, 0, 0)).all()
    assert (pixels[:, 520:] == (255, 0, 0)).all()
    # The first patch of the base view, and the one at row 9, column 10 of the crops (17 tokens a row).
    some = np.asarray(draw_kept(model, inputs, image, torch.tensor([0, 64 + 9 * 17 + 10])))
    red = (some == (255, 0, 0)).all(-1)
    assert red[:64, :64].all()
    assert red[:, :512].sum() == 64 * 64
    assert red[9 * 32 : 10 * 32, 520 + 10 * 32 : 520 + 11 * 32].all()
    assert red[:, 520:].sum() == 32 * 32


def test_families_with_one_grid_are_drawn() -> None:
    model = tiny_vlm("qwen2_vl")
    inputs = tiny_inputs(model)
    pruner = UniformPruner(num_tokens=1)
    pruner.prepare(model, inputs)
    drawn = np.asarray(draw_kept(model, inputs, Image.new("RGB", (64, 64), "blue"), pruner.report.kept[0]))
    share = (drawn == (0, 0, 255)).all(-1).mean()
    assert share == pytest.approx(1 / pruner.report.tokens_before[0], rel=0.05)
