"""The recipe of draft heads."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.feature_head import FeatureDrafter, FeatureHead
from generators.llamagen import LlamaGen
from generators.pipelines import ARImagePipeline
from mmsdk.data.emoji import EmojiDataset
from mmsdk.decoding.decoder import SpeculativeDecoder
from mmsdk.training.generator_recipes import TextToImageModule, TextToImageRecipe, sampling_weights
from mmsdk.training.loop import TrainingConfig


class FeatureHeadRecipe(TextToImageRecipe):
    """A draft head for a finished LlamaGen, which gives the states to learn, and its token probabilities.

    As published for LANTERN, the loss is the smooth L1 distance of the states and a tenth of the cross entropy between
    the token distributions, on noisy states.

    Args:
        config: shared hyper-parameters.
        generator_source: embedded name or folder of the pipeline to draft for.
        num_layers: blocks of the head.

    Attributes:
        noise: width of the uniform noise on states, for sequences of 512.
        token_weight: weight of the cross entropy.
        chain: candidates of the chain that the evaluation drafts.
    """

    name = "feature_head"
    default_steps = 6000
    hidden_modules = ("layers",)
    noise = 0.2
    token_weight = 0.1
    chain = 4

    def __init__(
        self,
        config: TrainingConfig | None = None,
        generator_source: str | Path = "emoji-64",
        num_layers: int = 1,
    ) -> None:
        super().__init__(config)
        self.generator_source = generator_source
        self.num_layers = num_layers

    def setup(self) -> nn.Module:
        """Load the pipeline, and tokenize the images that it learned from."""
        pipeline = ARImagePipeline.from_pretrained(self.generator_source)
        self.guidance_scale = pipeline.config.presets["default"].get("guidance_scale", 1.0)
        self.caption_tokenizer = pipeline.tokenizer
        self.image_tokenizer = pipeline.image_tokenizer.eval()
        self.generator: LlamaGen = pipeline.transformer
        self.target = TextToImageModule(self.generator, pipeline.text_encoder).eval().requires_grad_(False)
        train, pair = EmojiDataset("train", self.styles), EmojiDataset("pair", self.styles)
        self.records, self.pair_records = train.records, pair.records
        with torch.no_grad():
            self.targets, self.pair_targets = (
                torch.cat([self.tokenize(part.images[i : i + 64]) for i in range(0, len(part.images), 64)])
                for part in (train, pair)
            )
        self.cumulative = sampling_weights(self.records)
        return self.build(pipeline.text_encoder.config.d_model)

    def tokenize(self, images: np.ndarray) -> Tensor:
        """Return token ids `(n, num_tokens)`."""
        ids = self.image_tokenizer.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).token_ids
        return ids[:, : self.generator.config.max_tokens]

    def build(self, caption_dim: int) -> FeatureHead:
        """Build a head for the generator."""
        return FeatureHead.for_generator(self.generator, num_layers=self.num_layers)

    def muon_parameters(self, module: Any) -> list[nn.Parameter]:
        """Return the matrices of the head."""
        return [module.fc.weight, *(p for p in module.layers.parameters() if p.ndim == 2)]

    def batch(self, step: int, rng: random.Random) -> dict[str, Tensor]:
        """Return what the base does, and the seed of the noise."""
        return super().batch(step, rng) | {"seed": torch.tensor(rng.getrandbits(62))}

    def compare(
        self, module: Any, token_ids: Tensor, captions: dict[str, Tensor], noise: Tensor | float = 0.0, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the states and logits of the head and of the generator at all image tokens but the last.

        Args:
            module: the head.
            token_ids: `(batch, num_tokens)`.
            captions: their captions.
            noise: `(batch, length, hidden_size)` to add to the states that the head reads.
            **options: of the generator's `forward`.

        Returns:
            The head's states `(batch, num_tokens - 1, hidden_size)`, those of the generator, and the logits of both.
        """
        generator = self.generator
        conditions = self.conditions(self.target, captions)
        output = generator(token_ids, **conditions, **options, output_hidden_states=True)
        states, first = output.hidden_states, generator.config.num_condition_tokens - 1
        ids = F.pad(token_ids[:, :-1], (first, 0))
        mask = None
        if not module.config.reads_padding:
            mask = generator.build_attention_mask(conditions["caption_mask"], ids.shape[1])
        predicted = module(generator.embed_tokens(ids), states[:, :-1] + noise, mask=mask)[:, first:]
        return predicted, states[:, first + 1 :], generator.predict(predicted), output.logits[:, 1:]

    def loss(self, module: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance of the states, and cross entropy of the tokens."""
        token_ids, config = batch["targets"], module.config
        length = config.num_condition_tokens + token_ids.shape[1] - 2
        generator = torch.Generator().manual_seed(int(batch["seed"]))
        uniform = torch.rand(len(token_ids), length, config.hidden_size, generator=generator) - 0.5
        noise = uniform * (self.noise * 512 / length)
        predicted, states, logits, target = self.compare(
            module, token_ids, batch, noise, drop_condition=batch["drop_condition"]
        )
        regression = F.smooth_l1_loss(predicted.float(), states.float())
        tokens = F.cross_entropy(logits.float().flatten(0, 1), target.float().softmax(-1).flatten(0, 1))
        agreement = (logits.argmax(-1) == target.argmax(-1)).float().mean()
        metrics = {"regression": regression, "tokens": tokens, "agreement": agreement}
        return regression + self.token_weight * tokens, {name: value.detach() for name, value in metrics.items()}

    def evaluate(self, module: Any, folder: Path) -> dict[str, float]:
        """On unseen emoji x style pairs: distance of the states, share of equal choices, and what chains bring."""
        distances, agreements = [], []
        for token_ids, captions in self.pairs():
            predicted, states, logits, target = self.compare(module, token_ids, captions)
            distances.append(F.smooth_l1_loss(predicted, states))
            agreements.append((logits.argmax(-1) == target.argmax(-1)).float().mean())
        return {
            "regression": float(torch.stack(distances).mean()),
            "agreement": float(torch.stack(agreements).mean()),
            "tokens_per_forward": self.tokens_per_forward(module),
        }

    def tokens_per_forward(self, module: Any) -> float:
        """Return how many tokens a forward of the generator brings when it writes greedily with chains of the head."""
        generator: Any = self.generator
        drafter = FeatureDrafter(module, generator, tree_choices=[(0,) * (i + 1) for i in range(self.chain)])
        decoder = SpeculativeDecoder(drafter, num_candidates=self.chain)
        _, captions = next(self.pairs(64))
        conditions = self.conditions(self.target, captions)
        generator.generate(**conditions, guidance_scale=self.guidance_scale, do_sample=False, speculation=decoder)
        return decoder.stats.tokens_per_forward

    def save(self, module: Any, folder: Path) -> None:
        """Write the head."""
        module.save_pretrained(folder)
