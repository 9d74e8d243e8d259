"""The training loop: bit-exact resume, averaged weights, schedule, interruptions; and the parts of the recipes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmsdk.data.emoji import EmojiRecord
from mmsdk.training.generator_recipes import sampling_weights
from mmsdk.training.loop import Recipe, TrainingConfig, train
from mmsdk.training.tokenizer_recipes import psnr


class Line(Recipe):
    """Learns y = 2 x with dropout, so that the random state matters, and a hidden matrix for Muon."""

    name = "line"

    def __init__(self, **config: object) -> None:
        defaults = {"steps": 20, "batch_size": 4, "learning_rate": 0.05, "muon_learning_rate": 0.02, "warmup_steps": 2}
        cadence = {"checkpoint_every": 5, "evaluate_every": 10, "ema_decay": 0.9}
        self.config = TrainingConfig(**(defaults | cadence | config))
        self.stop_after: int | None = None

    def setup(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Linear(8, 8, bias=False), nn.Linear(8, 1))

    def muon_parameters(self, module: nn.Module) -> list[nn.Parameter]:
        return [module[2].weight]

    def batch(self, step: int, rng: random.Random) -> Tensor:
        if step == self.stop_after:
            raise KeyboardInterrupt
        return torch.tensor([[rng.random()] for _ in range(self.config.batch_size)])

    def loss(self, module: nn.Module, batch: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (module(batch) - 2 * batch).square().mean()
        return loss, {"error": loss.detach()}

    def evaluate(self, module: nn.Module, folder: Path) -> dict[str, float]:
        return {"at_one": float(module(torch.ones(1, 1)))}

    def save(self, module: nn.Module, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file(module.state_dict(), folder / "model.safetensors")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_training_learns(tmp_path: Path) -> None:
    train(Line(steps=200), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert abs(lines[-1]["evaluation"]["at_one"] - 2.0) < 0.4
    assert [line["step"] for line in lines if "loss" in line] == [50, 100, 150, 200]
    assert {"loss", "grad_norm", "error", "seconds", "step"} == set(lines[4])


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    train(Line(), tmp_path / "straight")
    broken = Line()
    broken.stop_after = 13
    with pytest.raises(KeyboardInterrupt):
        train(broken, tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "checkpoint-20").exists()
    train(Line(), tmp_path / "resumed")
    one, other = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    train(Line(), tmp_path / "one")
    train(Line(seed=1), tmp_path / "other")
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert not torch.equal(one["0.weight"], other["0.weight"])


def test_a_half_written_checkpoint_is_not_used(tmp_path: Path) -> None:
    train(Line(), tmp_path / "straight")
    broken = Line()
    broken.stop_after = 13
    with pytest.raises(KeyboardInterrupt):
        train(broken, tmp_path / "resumed")
    (tmp_path / "resumed" / "checkpoint-12").mkdir()
    train(Line(), tmp_path / "resumed")
    assert torch.equal(weights(tmp_path / "straight")["0.weight"], weights(tmp_path / "resumed")["0.weight"])


def test_time_limit_leaves_a_checkpoint(tmp_path: Path) -> None:
    train(Line(), tmp_path, max_seconds=0.0)
    assert (tmp_path / "checkpoint-1" / "complete").exists()
    train(Line(), tmp_path)
    assert (tmp_path / "checkpoint-20" / "complete").exists()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


def test_saved_weights_are_the_average(tmp_path: Path) -> None:
    train(Line(ema_decay=0.0), tmp_path / "last")
    train(Line(ema_decay=0.999), tmp_path / "average")
    assert not torch.equal(weights(tmp_path / "last")["3.weight"], weights(tmp_path / "average")["3.weight"])


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    recipe = Line(steps=60)
    recipe.batch = lambda step, rng: torch.full((4, 1), float("nan"))  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="line: the loss is nan at step 50"):
        train(recipe, tmp_path)


def test_schedule_by_hand() -> None:
    config = TrainingConfig(steps=100, warmup_steps=10, decay_fraction=0.2)
    assert [round(config.rate_factor(s), 3) for s in (0, 4, 9, 50, 80, 90, 99)] == [0.1, 0.5, 1, 1, 1, 0.5, 0.05]


def test_psnr_by_hand() -> None:
    reference = torch.zeros(2, 3, 4, 4)
    image = reference.clone()
    image[1] = 0.1  # rounds to 26 / 255
    assert psnr(image, reference).tolist() == pytest.approx([100.0, -20 * np.log10(26 / 255)])


def test_sampling_weights_share_variants() -> None:
    def record(base: str, group: str) -> EmojiRecord:
        return EmojiRecord(base, base, base, (), group, "noto", "train")

    cumulative = sampling_weights([record("a", "x"), record("b", "x"), record("b", "x"), record("c", "flags")])
    shares = np.diff(cumulative, prepend=0.0)
    assert cumulative[-1] == pytest.approx(1.0)
    assert shares[1] == pytest.approx(shares[0] * 2**-0.7)
    assert shares[3] == pytest.approx(shares[0] * 0.25)
