"""Recipes of the embedded text-to-image generators."""

from __future__ import annotations

import logging
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from generators.annealing import StepAnnealing
from generators.flextok_ar import FlexTokAR
from generators.llamagen import LlamaGen
from generators.mar import MAR
from generators.token_shuffle import TokenShuffle
from generators.tokenbridge_ar import TokenBridgeAR
from mmsdk.data.captions import MAX_PROMPT_TOKENS, train_caption_tokenizer
from mmsdk.data.emoji import STYLES, EmojiDataset, EmojiRecord, caption_of
from mmsdk.errors import CheckpointError
from mmsdk.images import image_grid, tensor_to_pil
from mmsdk.loading import resolve_pretrained
from mmsdk.tokens import ImageTokens
from mmsdk.training.loop import Recipe, TrainingConfig
from mmsdk.training.tokenizer_recipes import to_float
from tokenizers_img.base import ImageTokenizer
from tokenizers_img.flextok import FlexTok
from tokenizers_img.one_d_piece import OneDPiece
from tokenizers_img.tokenbridge import TokenBridge
from tokenizers_img.vae import KLVAE
from tokenizers_img.vq import VQ

logger = logging.getLogger(__name__)

# Drawn often enough to be learned well, with a share of everything else: prompts that people type.
SAMPLE_PROMPTS = (
    "red heart", "pizza", "cat face", "green apple", "dog face", "sun", "rainbow", "star", "rocket", "fire",
    "smiling face with sunglasses", "crying face", "strawberry", "soccer ball", "house", "red car", "tree", "fish",
    "blue heart", "hamburger", "pizza, twemoji", "cat face, noto", "red heart, fluent flat", "penguin",
)  # fmt: skip
_GROUP_WEIGHTS = {"flags": 0.25, "symbols": 0.7}


def sampling_weights(records: list[EmojiRecord]) -> np.ndarray:
    """Return how often each image is drawn: flags less, and the many variants of one person share their weight."""
    variants = Counter((r.base, r.style) for r in records)
    weights = np.array([_GROUP_WEIGHTS.get(r.group, 1.0) * variants[r.base, r.style] ** -0.7 for r in records])
    return np.cumsum(weights / weights.sum())


class TextToImageModule(nn.Module):
    """A text encoder and the transformer that it conditions, trained together."""

    def __init__(self, transformer: nn.Module, text_encoder: T5EncoderModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode prompts `(batch, length)` to features `(batch, length, dim)`."""
        return self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def tiny_text_encoder(vocab_size: int, dim: int = 192, num_layers: int = 2) -> T5EncoderModel:
    """Build the embedded text encoder: T5's architecture at a tiny size, without dropout."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=dim,
        d_kv=dim // 4,
        num_heads=4,
        d_ff=2 * dim,
        num_layers=num_layers,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
    )
    return T5EncoderModel(config)


def load_fitting(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the tensors of `state_dict` that have the name and shape of some in `model`; the others stay as they are.

    Raises:
        CheckpointError: there are none.
    """
    own = model.state_dict()
    fitting = {k: v for k, v in state_dict.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        raise CheckpointError(f"No weight has the name and shape of one of {type(model).__name__}.")
    model.load_state_dict(fitting, strict=False)
    logger.info("went on from %d of %d tensors of %s", len(fitting), len(own), type(model).__name__)


class TextToImageRecipe(Recipe):
    """A generator of images from captions, over an embedded tokenizer, with its text encoder.

    Args:
        config: shared hyper-parameters.
        tokenizer_source: folder or embedded name of the image tokenizer.
        start_from: folder or embedded name of a pipeline to go on from: its vocabulary, its text encoder, and those
            weights of its transformer that have the name and shape of some here, so that it may be another model with
            the same backbone. By default everything begins anew.

    Attributes:
        default_steps: steps of the embedded model.
        batch_size: images of a step.
        tokenizer_class: class of the image tokenizer.
        tokenizer_options: configuration values to load it with.
        styles: image sets to learn; fewer are learned better in the same time.
        condition_dropout: share of captions that are dropped, for guidance.
        plain_captions: share of captions that are just "label, style", what people type most.
        hidden_modules: parts of the transformer whose matrices Muon trains.
    """

    default_steps: int
    batch_size = 32
    tokenizer_class: type[ImageTokenizer]
    tokenizer_options: Mapping[str, Any] = MappingProxyType({})
    styles: tuple[str, ...] = ("noto", "twemoji", "fluent flat")
    condition_dropout = 0.1
    plain_captions = 0.5
    hidden_modules: tuple[str, ...]

    def __init__(
        self,
        config: TrainingConfig | None = None,
        tokenizer_source: str | Path = "emoji-64",
        start_from: str | Path | None = None,
    ) -> None:
        self.tokenizer_source = tokenizer_source
        self.start_from = start_from
        self.config = config or TrainingConfig(
            steps=self.default_steps,
            batch_size=self.batch_size,
            learning_rate=1.5e-3,
            muon_learning_rate=2e-3,
            weight_decay=0.02,
            warmup_steps=100,
            decay_fraction=0.35,
            ema_decay=0.998,
            mixed_precision="bf16",
            checkpoint_every=400,
            evaluate_every=800,
        )
        if start_from is not None:
            self.config = replace(self.config, extra=self.config.extra | {"start_from": Path(start_from).name})

    @abstractmethod
    def tokenize(self, images: np.ndarray) -> Tensor:
        """Turn uint8 images `(n, H, W, 3)` into what the transformer learns, `(n, ...)`."""

    @abstractmethod
    def build(self, caption_dim: int) -> Any:
        """Build the transformer, for text features of this width."""

    def setup(self) -> nn.Module:
        """Tokenize the images, learn the caption vocabulary, build the models."""
        self.image_tokenizer: Any = self.tokenizer_class.from_pretrained(
            self.tokenizer_source, **self.tokenizer_options
        ).eval()
        train, pair = EmojiDataset("train", self.styles), EmojiDataset("pair", self.styles)
        self.records, self.pair_records = train.records, pair.records
        with torch.no_grad():
            self.targets, self.pair_targets = (
                torch.cat([self.tokenize(part.images[i : i + 64]) for i in range(0, len(part.images), 64)])
                for part in (train, pair)
            )
        self.cumulative = sampling_weights(self.records)
        if self.start_from is None:
            self.caption_tokenizer, text_encoder = self.build_text_encoder()
            return TextToImageModule(self.build(text_encoder.config.d_model), text_encoder)
        from generators.pipelines import ARImagePipeline

        start = ARImagePipeline.from_pretrained(self.start_from)
        self.caption_tokenizer = start.tokenizer
        transformer = self.build(start.text_encoder.config.d_model)
        load_fitting(transformer, start.transformer.state_dict())
        return TextToImageModule(transformer, start.text_encoder)

    def build_text_encoder(self) -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
        """Learn the vocabulary of the captions, and build an encoder for it."""
        texts = [" ".join((r.label, *r.tags)) for r in self.records] + list(STYLES) * 200
        tokenizer = train_caption_tokenizer(texts)
        return tokenizer, tiny_text_encoder(len(tokenizer))

    def muon_parameters(self, module: Any) -> list[nn.Parameter]:
        """Return the hidden matrices of the transformer and of the text encoder, which learns much faster so."""
        hidden = [getattr(module.transformer, name) for name in self.hidden_modules]
        return [
            p
            for part in (*hidden, module.text_encoder.encoder.block)
            for name, p in part.named_parameters()
            if p.ndim == 2 and p.requires_grad and "relative_attention_bias" not in name
        ]

    def captions(self, texts: list[str]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask` of captions, padded to the longest prompt."""
        return dict(
            self.caption_tokenizer(
                texts,
                padding="max_length",
                truncation=True,
                max_length=MAX_PROMPT_TOKENS,
                return_tensors="pt",
                return_token_type_ids=False,
            )
        )

    def batch(self, step: int, rng: random.Random) -> dict[str, Tensor]:
        """Return the images' tokens, a caption of each image, and which captions to drop."""
        draws = [rng.random() for _ in range(self.config.batch_size)]
        rows = np.searchsorted(self.cumulative, draws).clip(max=len(self.records) - 1)
        captions = self.captions(
            [caption_of(self.records[i], None if rng.random() < self.plain_captions else rng) for i in rows]
        )
        drop = torch.tensor([rng.random() < self.condition_dropout for _ in rows])
        return {"targets": self.targets[torch.from_numpy(rows)], "drop_condition": drop, **captions}

    def conditions(self, module: Any, captions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the arguments that tell the transformer the captions."""
        mask = captions["attention_mask"]
        return {"caption_features": module.features(captions["input_ids"], mask), "caption_mask": mask}

    def pairs(self, count: int = 256) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Go through tokens and captions of images whose emoji x style is not trained, 64 at a time."""
        for i in range(0, min(count, len(self.pair_records)), 64):
            yield self.pair_targets[i : i + 64], self.captions([caption_of(r) for r in self.pair_records[i : i + 64]])

    def write_samples(self, module: Any, folder: Path, draw: Callable[..., Tensor]) -> None:
        """Write a sheet of two samples per prompt; `draw(generator=..., **conditions)` returns images."""
        prompts = [p for p in SAMPLE_PROMPTS for _ in range(2)]
        images = draw(
            **self.conditions(module, self.captions(prompts)),
            generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
        )
        sheet = image_grid(tensor_to_pil(F.interpolate(images, scale_factor=2)), columns=12)
        sheet.save(folder / "samples.png")

    def save(self, module: Any, folder: Path) -> None:
        """Write a pipeline folder."""
        from generators.pipelines import ARImagePipeline

        ARImagePipeline(
            transformer=module.transformer,
            image_tokenizer=self.image_tokenizer,
            text_encoder=module.text_encoder,
            tokenizer=self.caption_tokenizer,
        ).save_pretrained(folder)


class CausalRecipe(TextToImageRecipe):
    """LlamaGen over token ids.

    Attributes:
        num_tokens: tokens to learn (a prefix, for ordered tokenizers); None for all.
        transformer_class: class of the transformer.
        shape: its sizes.
    """

    num_tokens: int | None = None
    transformer_class: type[LlamaGen] = LlamaGen
    shape: dict[str, int] = {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "multiple_of": 64}
    hidden_modules: tuple[str, ...] = ("layers", "cls_embedding")

    def tokenize(self, images: np.ndarray) -> Tensor:
        """Return token ids `(n, num_tokens)`."""
        ids = self.image_tokenizer.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).token_ids
        return ids[:, : self.num_tokens]

    def build(self, caption_dim: int) -> LlamaGen:
        """Build a LlamaGen of these tokens."""
        return self.transformer_class(
            **self.shape,
            codebook_size=self.image_tokenizer.codebook_sizes[0],
            max_tokens=self.targets.shape[1],
            condition="text",
            num_classes=None,
            caption_dim=caption_dim,
            num_condition_tokens=MAX_PROMPT_TOKENS,
            positions="learned",
            token_dropout=0.0,
            residual_dropout=0.0,
            feed_forward_dropout=0.0,
        )

    def batch(self, step: int, rng: random.Random) -> dict[str, Tensor]:
        """Return what the base does, and the input tokens.

        A small model soon recognises an image by its first tokens and recites the rest without reading the caption.
        Up to 80% of the input tokens of four images in five therefore come from another image of the batch, so that
        only the caption tells what comes next. It also prepares for the errors of sampling.
        """
        batch = super().batch(step, rng)
        token_ids = batch["targets"]
        rates = [rng.uniform(0.0, 0.8) if rng.random() < 0.8 else 0.0 for _ in token_ids]
        wrong = torch.tensor([[rng.random() < rate for _ in range(token_ids.shape[1])] for rate in rates])
        return batch | {"inputs": torch.where(wrong, token_ids.roll(1, 0), token_ids)}

    def loss(self, module: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross entropy of the tokens."""
        output = module.transformer(
            batch["inputs"],
            **self.conditions(module, batch),
            drop_condition=batch["drop_condition"],
            labels=batch["targets"],
        )
        return output.loss, {}

    def evaluate(self, module: Any, folder: Path) -> dict[str, float]:
        """Cross entropy on unseen emoji x style pairs, and a sheet of samples."""
        losses = [
            module.transformer(ids, **self.conditions(module, captions), labels=ids).loss
            for ids, captions in self.pairs()
        ]

        def draw(**arguments: Any) -> Tensor:
            ids = module.transformer.generate(guidance_scale=3.0, top_k=100, **arguments).token_ids
            tokens = ImageTokens(token_ids=ids, spec=self.image_tokenizer.token_spec())
            return self.image_tokenizer.decode(tokens).images

        self.write_samples(module, folder, draw)
        return {"pair_loss": float(torch.stack(losses).mean())}


class LlamaGenRecipe(CausalRecipe):
    """LlamaGen over the 8 x 8 grid tokens."""

    name = "llamagen"
    default_steps = 5600
    tokenizer_class = VQ


class LlamaGen1DRecipe(CausalRecipe):
    """LlamaGen over the first half of the One-D-Piece tokens: it can stop after any number of them."""

    name = "llamagen_1d"
    default_steps = 8500
    tokenizer_class = OneDPiece
    num_tokens = 32


class FlexTokARRecipe(CausalRecipe):
    """FlexTok-AR over all FlexTok tokens: it can stop after any number of them, and the decoder fills in the rest."""

    name = "flextok_ar"
    default_steps = 5600
    tokenizer_class = FlexTok
    transformer_class = FlexTokAR
    shape = {"hidden_size": 256, "num_layers": 5, "num_heads": 4, "intermediate_size": 1024}


class TokenShuffleRecipe(CausalRecipe):
    """Token-Shuffle over the 16 x 16 grid tokens, in windows of 2 x 2: as long a sequence as over the coarse grid."""

    name = "token_shuffle"
    default_steps = 5600
    tokenizer_class = VQ
    transformer_class = TokenShuffle
    shape = {"hidden_size": 256, "num_layers": 6, "num_heads": 4, "multiple_of": 64, "shuffle_size": 2}
    hidden_modules = ("layers", "cls_embedding", "mix_inputs", "mix_outputs")


class MaskedRecipe(TextToImageRecipe):
    """A masked transformer over the latents of the embedded KL VAE, 2 x 2 of them to a token.

    The loss of the head alone tells the backbone little in a few thousand steps, since what the head sees of a token
    tells it much of what the caption could. A linear layer therefore predicts the masked tokens from the same features,
    and is thrown away after training.

    Attributes:
        shape: sizes of the transformer and its head.
        regression_weight: weight of the squared error of the linear prediction.
    """

    shape: dict[str, Sequence[int]]
    regression_weight = 0.5
    hidden_modules: tuple[str, ...] = ("encoder_blocks", "decoder_blocks", "cap_proj")

    @abstractmethod
    def draw(self, module: Any, **arguments: Any) -> Tensor:
        """Generate images."""

    def sizes(self, caption_dim: int) -> dict[str, Any]:
        """Return the configuration of a transformer over these latents."""
        return {
            **self.shape,
            "grid_size": self.image_tokenizer.grid[0],
            "patch_size": 2,
            "latent_channels": self.targets.shape[1],
            "condition": "text",
            "num_classes": None,
            "caption_dim": caption_dim,
            "buffer_size": MAX_PROMPT_TOKENS,
            "attention_dropout": 0.0,
            "projection_dropout": 0.0,
            "mask_ratio_min": 0.2,
        }

    def setup(self) -> nn.Module:
        """Add the linear layer."""
        module: Any = super().setup()
        module.regression = nn.Linear(module.transformer.config.decoder_shape[0], module.transformer.token_dim)
        return module

    def batch(self, step: int, rng: random.Random) -> dict[str, Tensor]:
        """Return what the base does, and the seed of the masks and of the noise."""
        return super().batch(step, rng) | {"seed": torch.tensor(rng.getrandbits(62))}

    def loss(self, module: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the head, and the squared error of the linear prediction."""
        transformer, latents = module.transformer, batch["targets"]
        output = transformer(
            latents,
            **self.conditions(module, batch),
            drop_condition=batch["drop_condition"],
            generator=torch.Generator().manual_seed(int(batch["seed"])),
        )
        tokens = transformer.to_tokens(latents)[output.mask]
        regression = (module.regression(output.hidden_states.flatten(0, 1)).float() - tokens).square().mean()
        return output.loss + self.regression_weight * regression, {
            "head": output.loss.detach(),
            "regression": regression.detach(),
        }

    def evaluate(self, module: Any, folder: Path) -> dict[str, float]:
        """Loss of the head on unseen emoji x style pairs, and a sheet of samples."""
        losses = [
            module.transformer(
                latents, **self.conditions(module, captions), generator=torch.Generator().manual_seed(0)
            ).loss
            for latents, captions in self.pairs()
        ]
        self.write_samples(module, folder, partial(self.draw, module))
        return {"pair_loss": float(torch.stack(losses).mean())}


class MARRecipe(MaskedRecipe):
    """MAR with its diffusion head."""

    name = "mar"
    default_steps = 16000
    tokenizer_class = KLVAE
    shape = {"encoder_shape": (192, 4, 3), "decoder_shape": (192, 4, 3), "head_shape": (256, 3)}

    def tokenize(self, images: np.ndarray) -> Tensor:
        """Return latents `(n, latent_channels, h, w)`."""
        return self.image_tokenizer.encode_latents(to_float(torch.from_numpy(images)))

    def build(self, caption_dim: int) -> MAR:
        """Build a MAR of these latents."""
        return MAR(**self.sizes(caption_dim))

    def draw(self, module: Any, **arguments: Any) -> Tensor:
        """Generate images."""
        annealing = StepAnnealing(25, 25, "constant")
        latents = module.transformer.generate(num_iter=16, guidance_scale=2.0, annealing=annealing, **arguments).latents
        return self.image_tokenizer.decode_latents(latents)


class TokenBridgeARRecipe(MaskedRecipe):
    """TokenBridge-AR, whose head goes through the 32 indices of 2 x 2 latents, which takes most of the time."""

    name = "tokenbridge_ar"
    default_steps = 8000
    tokenizer_class = TokenBridge
    tokenizer_options = MappingProxyType({"bits": 4})
    batch_size = 16
    shape = {"encoder_shape": (192, 4, 3), "decoder_shape": (192, 4, 3), "head_shape": (128, 2, 2)}

    def tokenize(self, images: np.ndarray) -> Tensor:
        """Return the levels of the indices, `(n, latent_channels, h, w)`."""
        ids = self.image_tokenizer.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).token_ids
        return self.image_tokenizer.quantize.dequantize(ids).mT.unflatten(2, self.image_tokenizer.grid)

    def build(self, caption_dim: int) -> TokenBridgeAR:
        """Build a TokenBridge-AR of these indices."""
        quantize = self.image_tokenizer.config
        return TokenBridgeAR(**self.sizes(caption_dim), bits=quantize.bits, value_range=quantize.value_range)

    def draw(self, module: Any, **arguments: Any) -> Tensor:
        """Generate images."""
        ids = module.transformer.generate(num_iter=16, guidance_scale=2.0, temperature=0.8, **arguments).token_ids
        tokens = ImageTokens(token_ids=ids, spec=self.image_tokenizer.token_spec())
        return self.image_tokenizer.decode(tokens).images


class DraftRecipe(TextToImageRecipe):
    """A small transformer to draft for a finished one. It reads that one's text features, which stay as they are.

    Args:
        config: shared hyper-parameters.
        tokenizer_source: folder or embedded name of the image tokenizer.
        target_source: folder or embedded name of the pipeline to draft for.

    Attributes:
        default_target: its embedded name.
    """

    default_target: str

    def __init__(
        self,
        config: TrainingConfig | None = None,
        tokenizer_source: str | Path = "emoji-64",
        target_source: str | Path | None = None,
    ) -> None:
        super().__init__(config, tokenizer_source)
        self.target_source = self.default_target if target_source is None else target_source

    def build_text_encoder(self) -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
        """Load the target's."""
        folder = Path(resolve_pretrained("ar_image_pipeline", self.target_source))
        encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"), encoder.requires_grad_(False)

    def save(self, module: Any, folder: Path) -> None:
        """Write the transformer alone."""
        module.transformer.save_pretrained(folder)


class DraftMARRecipe(DraftRecipe, MARRecipe):
    """A MAR of the same latents with a third of the layers."""

    name = "mar_draft"
    default_steps = 9000
    default_target = "emoji-64-mar"
    shape = {"encoder_shape": (128, 2, 2), "decoder_shape": (128, 1, 2), "head_shape": (192, 2)}


class DraftLlamaGenRecipe(DraftRecipe, LlamaGenRecipe):
    """A LlamaGen over the same grid tokens with a tenth of the parameters."""

    name = "llamagen_draft"
    default_steps = 5600
    default_target = "emoji-64"
    shape = {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "multiple_of": 64}
