"""One training loop for every recipe: accelerate, bit-exact resume on a CPU, EMA, progress bar, metrics as JSON lines.

A recipe says what is trained, on what and by which loss; the loop does the rest. A batch is a pure function of
`(seed, step)`, so a run that was interrupted continues exactly where its last checkpoint stood.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)


@dataclass
class TrainingConfig:
    """Hyper-parameters that every recipe shares.

    The learning rate warms up linearly, stays, and falls linearly to zero over the last `decay_fraction` of `steps`: a
    run can be resumed with more steps, and only its tail is spent on the decay.

    Attributes:
        steps: optimizer steps in all.
        batch_size: images per step.
        learning_rate: peak rate of AdamW.
        muon_learning_rate: peak rate of Muon for the hidden matrices that the recipe names; 0 uses AdamW for all.
        weight_decay: decoupled decay of matrices.
        warmup_steps: length of the linear warm-up.
        decay_fraction: share of `steps` in which the rate falls to zero.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: decay of the exponential moving average whose weights are saved.
        mixed_precision: `no` or `bf16` (accelerate's names).
        checkpoint_every: steps between checkpoints.
        evaluate_every: steps between evaluations.
        seed: of weights, batches and dropout.
    """

    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.0
    weight_decay: float = 0.01
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "no"
    checkpoint_every: int = 500
    evaluate_every: int = 1000
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def rate_factor(self, step: int) -> float:
        """Return the factor on the peak learning rates at `step` (0-based)."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = max(1, int(self.steps * self.decay_fraction))
        return warm * min(1.0, max(0.0, (self.steps - step) / decay_steps))


class Recipe(ABC):
    """What one embedded model is, learns from and is judged by.

    A recipe is created cheaply; `setup` loads data and builds modules.
    """

    name: str
    config: TrainingConfig

    @abstractmethod
    def setup(self) -> nn.Module:
        """Load the data and return the module to train."""

    @abstractmethod
    def batch(self, step: int, rng: random.Random) -> Any:
        """Return the batch of `step`; everything random in it is drawn from `rng`, which is seeded by the step."""

    @abstractmethod
    def loss(self, module: Any, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss and detached scalars to log."""

    @abstractmethod
    def evaluate(self, module: Any, folder: Path) -> dict[str, float]:
        """Measure `module` (EMA weights) on held-out data; may write sample sheets into `folder`."""

    @abstractmethod
    def save(self, module: Any, folder: Path) -> None:
        """Write the trained model (EMA weights) in the format that users load."""

    def muon_parameters(self, module: Any) -> list[nn.Parameter]:
        """Return the hidden matrices for Muon (none by default)."""
        return []

    def after_step(self, module: Any, step: int) -> None:  # noqa: B027 - an optional hook
        """Run after each optimizer step (for example to revive unused codes)."""


class _LossModule(nn.Module):
    """The module with the recipe's loss as its `forward`, so that accelerate wraps plain tensors only."""

    def __init__(self, recipe: Recipe, module: Any) -> None:
        super().__init__()
        self.recipe = recipe
        self.module = module

    def forward(self, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.recipe.loss(self.module, batch, step)


class _Progress:
    """Step counter that accelerate saves and restores with everything else."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def _optimizers(recipe: Recipe, module: Any) -> list[torch.optim.Optimizer]:
    config = recipe.config
    hidden = recipe.muon_parameters(module) if config.muon_learning_rate > 0 else []
    chosen = {id(p) for p in hidden}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    ]
    if hidden:
        optimizers.append(
            torch.optim.Muon(
                hidden,
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                ns_steps=4,  # on a CPU and small batches each Newton-Schulz step is a noticeable share of the time
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def _latest_checkpoint(folder: Path) -> Path | None:
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    complete = [p for p in found if (p / "complete").exists()]
    return complete[-1] if complete else None


def _save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write a checkpoint, mark it complete, then drop the older ones: an interruption never loses the last good one."""
    target = folder / f"checkpoint-{step}"
    accelerator.save_state(str(target))
    (target / "complete").touch()
    for old in folder.glob("checkpoint-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def _append_json_line(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def train(recipe: Recipe, folder: str | Path, resume: bool = True, max_seconds: float | None = None) -> Path:
    """Train `recipe` in `folder` and return the folder of the saved model.

    Args:
        recipe: what to train.
        folder: receives `metrics.jsonl`, checkpoints, sample sheets and, at every evaluation, `model/` (EMA weights).
        resume: continue from the last complete checkpoint in `folder`, if there is one.
        max_seconds: stop with a checkpoint after this time; `resume` goes on from there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = recipe.config
    set_seed(config.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.mixed_precision)
    module = recipe.setup()
    optimizers = _optimizers(recipe, module)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, config.rate_factor) for o in optimizers]
    ema = EMAModel(module.parameters(), decay=config.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    progress = _Progress()
    prepared = accelerator.prepare(_LossModule(recipe, module))
    optimizers = [accelerator.prepare(o) for o in optimizers]
    accelerator.register_for_checkpointing(progress, ema, *schedulers)
    checkpoint = _latest_checkpoint(folder) if resume else None
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        logger.info("resumed %s from step %d", recipe.name, progress.step)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2))
    started = time.monotonic()
    bar = tqdm(total=config.steps, initial=progress.step, desc=recipe.name, unit="step", mininterval=2.0)
    while progress.step < config.steps:
        step = progress.step
        batch = recipe.batch(step, random.Random(f"{config.seed} {step}"))  # noqa: S311 - not for cryptography
        prepared.train()
        loss, metrics = prepared(batch, step)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(_trainable(module), config.max_grad_norm)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        recipe.after_step(module, step)
        ema.step(module.parameters())
        progress.step += 1
        bar.update()
        if progress.step % 50 == 0:
            record = {"step": progress.step, "loss": float(loss.detach()), "grad_norm": float(norm)}
            record |= {k: float(v) for k, v in metrics.items()} | {"seconds": round(time.monotonic() - started, 1)}
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{recipe.name}: the loss is {record['loss']} at step {progress.step}.")
            bar.set_postfix(loss=f"{record['loss']:.4f}")
            _append_json_line(folder / "metrics.jsonl", record)
        stop = max_seconds is not None and time.monotonic() - started > max_seconds
        finished = progress.step == config.steps
        if progress.step % config.checkpoint_every == 0 or stop or finished:
            _save_checkpoint(accelerator, folder, progress.step)
        if progress.step % config.evaluate_every == 0 or finished:
            _evaluate(recipe, module, ema, folder, progress.step)
        if stop:
            break
    bar.close()
    return folder / "model"


def _trainable(module: Any) -> Iterable[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _evaluate(recipe: Recipe, module: Any, ema: EMAModel, folder: Path, step: int) -> None:
    """Measure and save the averaged weights, then put the trained ones back. The random state is left as it was."""
    module.eval()
    ema.store(module.parameters())
    ema.copy_to(module.parameters())
    with torch.no_grad(), torch.random.fork_rng():
        scores = recipe.evaluate(module, folder)
        recipe.save(module, folder / "model")
    ema.restore(module.parameters())
    _append_json_line(folder / "metrics.jsonl", {"step": step, "evaluation": scores})
    logger.info("%s step %d: %s", recipe.name, step, scores)
