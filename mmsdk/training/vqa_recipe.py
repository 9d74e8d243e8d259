"""Recipe of `emoji-vqa`: a LLaVA-NeXT small enough for a CPU that answers questions about grids of emoji.

It learns in three stages: what each image patch shows (every projected patch is trained towards the word embeddings
of its kind and its cell), questions about the small base view, and questions about the base view with its crops.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from mmsdk.data.emoji_vqa import (
    CELLS,
    GRID,
    KINDS,
    NOTHING,
    NUMBERS,
    QUESTIONS,
    SCENE_SIZE,
    EmojiScenes,
    Question,
    Scene,
    ask,
)
from mmsdk.training.loop import Recipe, TrainingConfig

TILE = 128
PATCH = 16
PATCHES = TILE // PATCH
GRID_PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} {% endif %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image>{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def vqa_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer of `emoji-vqa`; it knows every word of its questions and answers."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    special = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
    asked = {word for text in QUESTIONS.values() for word in text.replace("?", " ?").split() if "{" not in word}
    words = [*special, *KINDS.values(), NOTHING, *CELLS, *NUMBERS, "yes", "no", *sorted(asked)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special[1]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z0-9]+|\?"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        **dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), special, strict=False)),
        additional_special_tokens=special[4:],
    )


def vqa_processor() -> LlavaNextProcessor:
    """Build the processor of `emoji-vqa`: AnyRes tiles of 128 pixels, up to 2 x 2 of them and the base view."""
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=GRID_PINPOINTS,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=vqa_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def vqa_model(tokenizer: PreTrainedTokenizerFast, dim: int = 128, num_layers: int = 4) -> Any:
    """Build the untrained model: a CLIP tower and a Llama of `num_layers` layers of width `dim`, embeddings tied."""
    words: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=dim,
            intermediate_size=4 * dim,
            projection_dim=dim,
            num_hidden_layers=num_layers,
            num_attention_heads=dim // 32,
            image_size=TILE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=dim,
            intermediate_size=3 * dim,
            num_hidden_layers=num_layers,
            num_attention_heads=dim // 32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            **words,
        ),
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_grid_pinpoints=GRID_PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **words,
    )
    model = LlavaNextForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 4
    return model


def whiten_patches(weight: Tensor, patches: Tensor) -> None:
    """Set a patch embedding's `weight` `(dim, 3, p, p)` to the leading principal directions of `patches`, whitened."""
    rows = patches.flatten(1)
    covariance = (rows.T @ rows / len(rows)).double()
    values, directions = torch.linalg.eigh(covariance)
    chosen = directions[:, -len(weight) :] / values[-len(weight) :].sqrt().clamp(min=1e-2)
    weight.copy_(chosen.T.reshape(weight.shape))


def pixels_to_tiles(pixels: np.ndarray) -> Tensor:
    """Turn scenes `(batch, 256, 256, 3)` uint8 into what the processor makes: `(batch, 5, 3, 128, 128)`, base first."""
    full = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    base = transforms.resize(full, [TILE, TILE], transforms.InterpolationMode.BICUBIC, antialias=True)
    crops = full.unflatten(3, (2, TILE)).unflatten(2, (2, TILE)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat([base[:, None], crops], 1).float() / 127.5 - 1


class EmojiVQARecipe(Recipe):
    """LLaVA-NeXT on `emoji-vqa` scenes.

    Several questions about one scene share its image in one sequence, each hidden from the others.

    Args:
        config: shared hyper-parameters; `batch_size` counts the scenes of the last stage.
        visual_steps: steps of the first stage, patches.
        base_steps: steps of the second stage, base views; the rest are of the third.
        questions: questions about each scene, a multiple of the four tasks.
    """

    name = "emoji_vqa"
    num_test_scenes = 96

    def __init__(
        self,
        config: TrainingConfig | None = None,
        visual_steps: int = 4000,
        base_steps: int = 3000,
        questions: int = 12,
    ) -> None:
        self.visual_steps = visual_steps
        self.base_steps = base_steps
        self.questions = questions
        self.config = config or TrainingConfig(
            steps=11000,
            batch_size=8,
            learning_rate=1.5e-3,
            muon_learning_rate=2e-3,
            weight_decay=0.01,
            warmup_steps=100,
            decay_fraction=0.25,
            ema_decay=0.998,
            checkpoint_every=250,
            evaluate_every=2000,
        )

    def setup(self) -> nn.Module:
        """Draw the emoji, build tokenizer, processor and model."""
        self.scenes = EmojiScenes("train")
        self.test_scenes = EmojiScenes("test")
        self.processor = vqa_processor()
        tokenizer = self.processor.tokenizer
        self.kind_ids = torch.tensor(tokenizer.convert_tokens_to_ids([*KINDS.values(), NOTHING]))
        self.cell_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(CELLS)))
        self.kind_index = {kind: i for i, kind in enumerate((*KINDS.values(), NOTHING))}
        model = vqa_model(tokenizer)
        with torch.no_grad():
            tiles = pixels_to_tiles(np.stack([self.scenes[-1 - i].pixels for i in range(64)])).flatten(0, 1)
            patches = F.unfold(tiles, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
            whiten_patches(model.model.vision_tower.embeddings.patch_embedding.weight, patches)
            # Rows of about unit length: patches are trained towards sums of them.
            model.get_input_embeddings().weight.normal_(std=model.config.text_config.hidden_size**-0.5)
        return model

    def muon_parameters(self, module: Any) -> list[nn.Parameter]:
        """Return the matrices of tower, projector and language model."""
        parts = (
            module.model.vision_tower.encoder,
            module.model.multi_modal_projector,
            module.model.language_model.layers,
        )
        return [p for part in parts for p in part.parameters() if p.ndim == 2]

    # ------------------------------------------------------------ batches

    def batch(self, step: int, rng: random.Random) -> dict[str, Any]:
        """Return tiles with the truth of their patches (first stage), or tiles with questions."""
        visual = step < self.visual_steps
        base_only = step < self.visual_steps + self.base_steps
        count = 2 * self.config.batch_size if base_only else self.config.batch_size
        scenes = [self.scenes[rng.randrange(2**40)] for _ in range(count)]
        tiles = pixels_to_tiles(np.stack([scene.pixels for scene in scenes]))
        if visual:
            views = torch.tensor([rng.choice((0, 0, 0, 1, 2, 3, 4)) for _ in scenes])
            truth = [self._patch_truth(scene, int(view)) for scene, view in zip(scenes, views, strict=True)]
            return {
                "tiles": tiles[torch.arange(count), views],
                "kinds": torch.stack([kinds for kinds, _ in truth]),
                "cells": torch.stack([cells for _, cells in truth]),
            }
        tasks = list(QUESTIONS) * (self.questions // len(QUESTIONS))
        asked = [[ask(scene, task, rng) for task in tasks] for scene in scenes]
        return {
            "tiles": tiles[:, :1] if base_only else tiles,
            # Half of the batches see a part of their image tokens only, at consecutive positions.
            "keep": rng.uniform(0.1, 1.0) if rng.random() < 0.5 else 1.0,
            **self._tokens(asked),
        }

    def _patch_truth(self, scene: Scene, view: int) -> tuple[Tensor, Tensor]:
        """Return the kind and the cell of each patch of one view; cells are -100 in crops, which do not show them."""
        held = torch.tensor([self.kind_index[kind] for kind in scene.kinds]).view(GRID, GRID)
        cells = torch.arange(GRID * GRID).view(GRID, GRID)
        inked = torch.from_numpy((scene.pixels < 250).any(-1)).float()[None, None]
        if view == 0:
            size, repeat = SCENE_SIZE // PATCHES, PATCHES // GRID
        else:
            row, column = divmod(view - 1, 2)
            half, pixels = GRID // 2, SCENE_SIZE // 2
            held = held[row * half :, column * half :][:half, :half]
            cells = torch.full((half, half), -100)
            inked = inked[..., row * pixels :, column * pixels :][..., :pixels, :pixels]
            size, repeat = PATCH, PATCHES // half
        shown = F.avg_pool2d(inked, size)[0, 0] > 0.1
        kinds = held.repeat_interleave(repeat, 0).repeat_interleave(repeat, 1)
        kinds = torch.where(shown, kinds, self.kind_index[NOTHING])
        return kinds.flatten(), cells.repeat_interleave(repeat, 0).repeat_interleave(repeat, 1).flatten()

    def _tokens(self, asked: list[list[Question]]) -> dict[str, Tensor]:
        """Tokenize questions with their answers: ids and labels `(batch, questions, length)`."""
        tokenizer = self.processor.tokenizer
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        rows = [(tokenizer(q.text).input_ids, [*tokenizer(q.answer).input_ids, eos]) for qs in asked for q in qs]
        length = max(len(question) + len(answer) for question, answer in rows)
        ids = torch.full((len(rows), length), pad)
        labels = torch.full((len(rows), length), -100)
        for i, (question, answer) in enumerate(rows):
            ids[i, : len(question) + len(answer)] = torch.tensor(question + answer)
            labels[i, len(question) : len(question) + len(answer)] = torch.tensor(answer)
        shape = (len(asked), -1, length)
        return {"ids": ids.view(shape), "labels": labels.view(shape)}

    # ------------------------------------------------------------ losses

    def loss(self, module: Any, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy: of kinds and cells over patches in the first stage, of answers after it."""
        return self._patch_loss(module, batch) if "kinds" in batch else self._answer_loss(module, batch)

    def _patch_loss(self, module: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        words = module.get_input_embeddings().weight
        seen = module.model.vision_tower(batch["tiles"], output_hidden_states=True)
        patches = module.model.multi_modal_projector(seen.hidden_states[-2][:, 1:])
        weight = torch.ones(len(self.kind_ids))
        weight[-1] = 0.2
        logits = (patches @ words[self.kind_ids].T).transpose(1, 2)
        kind_loss = F.cross_entropy(logits, batch["kinds"], weight)
        loss = kind_loss
        # A batch may hold crops only, and the mean over no patch is not a number.
        if (batch["cells"] >= 0).any():
            loss = loss + 0.3 * F.cross_entropy((patches @ words[self.cell_ids].T).transpose(1, 2), batch["cells"])
        there = F.one_hot(batch["kinds"], len(self.kind_ids)).amax(1)[:, :-1].float()
        whole = module.model.multi_modal_projector(seen.pooler_output) @ words[self.kind_ids[:-1]].T
        loss = loss + 3 * F.binary_cross_entropy_with_logits(whole - 3, there)
        foreground = batch["kinds"] != self.kind_index[NOTHING]
        right = (logits.argmax(1) == batch["kinds"])[foreground].float().mean()
        return loss, {"kind_loss": kind_loss.detach(), "foreground_accuracy": right}

    def _answer_loss(self, module: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        ids, labels, tiles = batch["ids"], batch["labels"], batch["tiles"]
        images = self._image_features(module, tiles)
        count = images.shape[1]
        kept = max(1, round(batch["keep"] * count))
        if kept < count:
            chosen = torch.rand(len(images), count).argsort(1)[:, :kept].sort(1).values
            images = images.gather(1, chosen[..., None].expand(-1, -1, images.shape[-1]))
        embed = module.get_input_embeddings()
        start = embed(torch.full((len(images), 1), module.config.text_config.bos_token_id))
        hidden = module.model.language_model(
            inputs_embeds=torch.cat([start, images, embed(ids.flatten(1))], 1),
            attention_mask=_question_mask(1 + kept, ids.shape[1], ids.shape[2]),
            position_ids=_question_positions(1 + kept, ids.shape[1], ids.shape[2]),
            use_cache=False,
        ).last_hidden_state[:, 1 + kept :]
        target = labels[..., 1:]
        answered = target != -100
        logits = module.lm_head(hidden.view(*ids.shape, -1)[:, :, :-1][answered])
        loss = F.cross_entropy(logits, target[answered])
        # The first word of each answer; the second is always the end.
        words = target[answered] != module.config.text_config.eos_token_id
        right = (logits.argmax(-1) == target[answered])[words].view(-1, len(QUESTIONS)).float().mean(0)
        return loss, {task: accuracy for task, accuracy in zip(QUESTIONS, right, strict=True)}

    def _image_features(self, module: Any, tiles: Tensor) -> Tensor:
        """Encode `(batch, 1 or 5, 3, 128, 128)` to `(batch, tokens, dim)`; the tower itself has learned before."""
        with torch.no_grad():
            seen = module.model.vision_tower(tiles.flatten(0, 1), output_hidden_states=True).hidden_states[-2][:, 1:]
        features = module.model.multi_modal_projector(seen).view(*tiles.shape[:2], PATCHES**2, -1)
        if tiles.shape[1] == 1:
            return features[:, 0]
        sizes = torch.full((len(tiles), 2), SCENE_SIZE)
        packed = module.model.pack_image_features(
            list(features), sizes, "default", image_newline=module.model.image_newline
        )[0]
        return torch.stack(list(packed))

    # ------------------------------------------------------------ measuring

    def evaluate(self, module: Any, folder: Path) -> dict[str, float]:
        """Accuracy of each task on unseen scenes, and with another scene's image (what guessing is worth)."""
        count = self.num_test_scenes
        scores = {}
        scenes = [self.test_scenes[i] for i in range(count)]
        for task in QUESTIONS:
            asked = [self.test_scenes.question(i, task) for i in range(count)]
            for name, shift in ((task, 0), (f"{task}_wrong_image", 1)):
                images = [scene.image for scene in scenes[shift:] + scenes[:shift]]
                right = sum(
                    a == q.answer
                    for i in range(0, count, 32)
                    for a, q in zip(
                        answer(module, self.processor, images[i : i + 32], [q.text for q in asked[i : i + 32]]),
                        asked[i : i + 32],
                        strict=True,
                    )
                )
                scores[name] = right / count
        return scores

    def save(self, module: Any, folder: Path) -> None:
        """Write model and processor in transformers' format."""
        module.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def answer(model: Any, processor: Any, images: list[Any], questions: list[str]) -> list[str]:
    """Return the model's one-word answers to one question about each image."""
    prompts = [f"<s><image>{question}" for question in questions]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits[:, -1]
    return processor.batch_decode(logits.argmax(-1, keepdim=True))


def _question_mask(prefix: int, questions: int, length: int) -> Tensor:
    """Return who may attend to whom `(1, 1, n, n)`: questions see the prefix and themselves, never each other."""
    total = prefix + questions * length
    row = torch.arange(total)
    group = torch.where(row < prefix, -1, (row - prefix) // length)
    allowed = (row[:, None] >= row) & ((group == -1) | (group[:, None] == group))
    return allowed[None, None]


def _question_positions(prefix: int, questions: int, length: int) -> Tensor:
    """Return positions `(1, n)`: every question starts right behind the prefix."""
    return torch.cat([torch.arange(prefix), torch.arange(prefix, prefix + length).repeat(questions)])[None]
