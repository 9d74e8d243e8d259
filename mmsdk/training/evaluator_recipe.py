"""Recipe of the embedded evaluator: captions against frozen image features."""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsdk.bench.evaluator import Evaluator, cached_features, evaluation_prompt
from mmsdk.data.captions import train_caption_tokenizer
from mmsdk.data.emoji import STYLES, EmojiDataset, caption_of
from mmsdk.training.loop import Recipe, TrainingConfig

logger = logging.getLogger(__name__)


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, scale, bend, blur and tint `images` `(batch, 3, H, W)` in [0, 1] a little, each in its own way.

    What tokenizers and generators do to a picture should not hide what it shows. White stays white, and nothing is
    mirrored: arrows and letters would change their meaning.
    """
    batch, _, height, width = images.shape

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    affine = torch.zeros(batch, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = between(0.92, 1.12)
    affine[:, :, 2] = between(-0.08, 0.08, 2)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    bend = torch.randn(batch, 2, 6, 6, generator=generator) * between(0.0, 0.025, 1, 1, 1)
    grid = grid + F.interpolate(bend, (height, width), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    # Of the negative: what comes in from outside is white, and so is what tints multiply by.
    moved = F.grid_sample(1 - images, grid, align_corners=False)
    blurred = []
    for image, size in zip(moved, between(0.35, 1.0).tolist(), strict=True):
        small = (max(4, round(height * size)), max(4, round(width * size)))
        small_image = F.interpolate(image[None], small, mode="bilinear", align_corners=False, antialias=True)
        blurred.append(F.interpolate(small_image, (height, width), mode="bicubic", align_corners=False))
    tinted = torch.cat(blurred) * between(0.88, 1.12, 3, 1, 1)
    noise = torch.randn(images.shape, generator=generator) * between(0.0, 0.02, 1, 1, 1)
    return (1 - tinted + noise).clamp(0, 1)


class EvaluatorRecipe(Recipe):
    """Text tower and image projection, contrastively, on the captions of the training split in all seven styles.

    Features of the images and of `num_views` disturbed copies are computed once (about four minutes on one core) and
    kept in the cache folder.

    Args:
        config: shared hyper-parameters.
    """

    name = "evaluator"
    num_views = 1
    # How often a batch shows the images as they are.
    clean_fraction = 0.4
    feature_noise = 0.2
    shape: dict[str, Any] = {"hidden_size": 128, "num_layers": 1, "num_heads": 4, "embedding_dim": 128, "dropout": 0.1}

    def __init__(self, config: TrainingConfig | None = None) -> None:
        self.config = config or TrainingConfig(
            steps=800,
            batch_size=256,
            learning_rate=2e-3,
            weight_decay=0.1,
            warmup_steps=100,
            decay_fraction=0.7,
            ema_decay=0.998,
            checkpoint_every=400,
            evaluate_every=800,
        )

    def setup(self) -> nn.Module:
        """Compute or read the features, learn the caption vocabulary, build the model."""
        data = {split: EmojiDataset(split) for split in ("train", "pair", "test")}
        self.records = data["train"].records
        self.prompts = {split: [evaluation_prompt(r) for r in d.records] for split, d in data.items()}
        self.features = {split: cached_features(d.images) for split, d in data.items()}
        views = [self.features["train"]]
        for view in range(self.num_views):

            def transform(images: Tensor, first: int, view: int = view) -> Tensor:
                return disturb(images, torch.Generator().manual_seed(1_000_003 * (view + 1) + first))

            views.append(cached_features(data["train"].images, transform=transform, tag=f"disturbed {view}"))
        self.views = torch.stack(views)
        texts = [" ".join((r.label, *r.tags)) for r in self.records] + list(STYLES) * 200
        tokenizer = train_caption_tokenizer(texts)
        model = Evaluator(vocab_size=len(tokenizer), **self.shape)
        model.tokenizer = tokenizer
        self.tokenize = model.tokenize
        flat = self.views.flatten(0, 1)
        model.feature_mean.copy_(flat.mean(0))
        model.feature_std.copy_(flat.std(0).clamp(min=1e-2))
        emoji = {record.hexcode: i for i, record in enumerate(self.records)}
        self.emoji_ids = torch.tensor([emoji[r.hexcode] for r in self.records])
        self.style_ids = torch.tensor([STYLES.index(r.style) for r in self.records])
        return model

    def batch(self, step: int, rng: random.Random) -> dict[str, Tensor]:
        """Return features, their captions, and which captions fit which images although they are not their own."""
        rows = rng.sample(range(len(self.records)), min(self.config.batch_size, len(self.records)))
        views = [0 if rng.random() < self.clean_fraction else rng.randrange(len(self.views)) for _ in rows]
        captions = [caption_of(self.records[i], rng) for i in rows]
        named = torch.tensor([c.split(", ")[-1] == self.records[i].style for i, c in zip(rows, captions, strict=True)])
        emoji, styles = self.emoji_ids[rows], self.style_ids[rows]
        same_style = styles[:, None] == styles
        also_right = (emoji[:, None] == emoji) & (same_style | ~named)
        also_right.fill_diagonal_(False)
        index = torch.tensor(rows)
        features = self.views[torch.tensor(views), index]
        return {"features": features, "also_right": also_right, **self.tokenize(captions)}

    def loss(self, module: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE in both directions."""
        features = batch["features"]
        if module.training:
            features = features + self.feature_noise * module.feature_std * torch.randn_like(features)
        images = module.embed_features(features)
        texts = module.embed_tokens(batch["input_ids"], batch["attention_mask"])
        logits = images @ texts.T * torch.exp(-module.log_temperature).clamp(max=100.0)
        logits = logits.masked_fill(batch["also_right"], -math.inf)
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        right = (logits.argmax(1) == target).float().mean()
        return loss, {"accuracy": right.detach(), "temperature": module.log_temperature.detach().exp()}

    def evaluate(self, module: Any, folder: Path) -> dict[str, float]:
        """Retrieval among 100 of real images of each split: the ceilings of everything that is measured with it."""
        scores: dict[str, float] = {}
        for split, prompts in self.prompts.items():
            # As many images of each, so that candidates are drawn from lists of one length.
            chosen = random.Random(0).sample(range(len(prompts)), min(496, len(prompts)))
            result = module.retrieval_of_features(
                self.features[split][chosen], [prompts[i] for i in chosen], min(100, len(chosen))
            )
            scores |= {f"{split}_top1": result.top1, f"{split}_top5": result.top5}
        return scores

    def save(self, module: Any, folder: Path) -> None:
        """Write a `from_pretrained` folder."""
        module.save_pretrained(folder)
