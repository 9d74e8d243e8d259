"""Tiny real vision-language models of ten families with random weights, and inputs as their processors make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PaliGemmaConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

VOCABULARY = 64
IMAGE, VIDEO, VISION_START, VISION_END, PAD, BOS, EOS = 60, 61, 58, 59, 0, 1, 2
SIDE = 16  # pixels of a square image or crop
PATCH = 4  # pixels of a patch
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]

_SPECIAL: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
    **_SPECIAL,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_TOKENS: dict[str, Any] = {"image_token_id": IMAGE, **_SPECIAL}
_MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "in_channels": 3,
}
_QWEN: dict[str, Any] = {
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    **_TOKENS,
}


def _llava() -> LlavaConfig:
    return LlavaConfig(vision_config=CLIPVisionConfig(**_VISION), text_config=LlamaConfig(**_TEXT), **_TOKENS)


def _llava_next() -> LlavaNextConfig:
    vision, text = CLIPVisionConfig(**_VISION), LlamaConfig(**_TEXT)
    return LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=PINPOINTS, **_TOKENS)


def _llava_onevision() -> LlavaOnevisionConfig:
    vision, text = SiglipVisionConfig(**_VISION, vision_use_head=False), Qwen2Config(**_TEXT)
    tokens = {**_TOKENS, "video_token_id": VIDEO}
    # A limit of one crop's patches, so that images are shrunk as large ones are.
    ratio = "anyres_max_1"
    return LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=PINPOINTS, vision_aspect_ratio=ratio, **tokens
    )


def _qwen2_vl() -> Qwen2VLConfig:
    vision = {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
    return Qwen2VLConfig(text_config={**_TEXT, **_MROPE}, vision_config=vision, **_QWEN)


def _qwen2_5_vl() -> Qwen2_5_VLConfig:
    vision = {**_QWEN_VISION, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 16, "num_heads": 2}
    vision |= {"window_size": 2 * 2 * PATCH, "fullatt_block_indexes": [2]}
    return Qwen2_5_VLConfig(text_config={**_TEXT, **_MROPE}, vision_config=vision, **_QWEN)


def _qwen3_vl() -> Qwen3VLConfig:
    vision = {**_QWEN_VISION, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 16, "num_heads": 2}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return Qwen3VLConfig(text_config={**_TEXT, **_MROPE}, vision_config=vision, **_QWEN)


def _smolvlm() -> SmolVLMConfig:
    return SmolVLMConfig(text_config=LlamaConfig(**_TEXT), vision_config=_VISION, scale_factor=2, **_TOKENS)


def _idefics3() -> Idefics3Config:
    return Idefics3Config(text_config=LlamaConfig(**_TEXT), vision_config=_VISION, scale_factor=2, **_TOKENS)


def _internvl() -> InternVLConfig:
    vision = InternVLVisionConfig(**{**_VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]})
    return InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**_TEXT), image_seq_length=4, downsample_ratio=0.5, **_TOKENS
    )


def _gemma3() -> Gemma3Config:
    text = Gemma3TextConfig(**_TEXT, query_pre_attn_scalar=8, sliding_window=8)
    text.layer_types = ["sliding_attention", "full_attention"]
    vision = SiglipVisionConfig(**_VISION, vision_use_head=False)
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **_TOKENS)


def _paligemma() -> PaliGemmaConfig:
    vision = SiglipVisionConfig(**_VISION, vision_use_head=False)
    vision.projection_dim = 16
    return PaliGemmaConfig(
        vision_config=vision, text_config=GemmaConfig(**_TEXT), projection_dim=16, hidden_size=16, **_TOKENS
    )


@dataclass(frozen=True)
class Family:
    """A family of models: its configuration, and the inputs that describe an image to it."""

    config: Callable[[], Any]
    kind: str  # square (one crop), anyres, grid (any size), crops (padded), tiles (several of one image)


FAMILIES = {
    "llava": Family(_llava, "square"),
    "llava_next": Family(_llava_next, "anyres"),
    "llava_onevision": Family(_llava_onevision, "anyres"),
    "qwen2_vl": Family(_qwen2_vl, "grid"),
    "qwen2_5_vl": Family(_qwen2_5_vl, "grid"),
    "qwen3_vl": Family(_qwen3_vl, "grid"),
    "smolvlm": Family(_smolvlm, "crops"),
    "idefics3": Family(_idefics3, "crops"),
    "internvl": Family(_internvl, "tiles"),
    "gemma3": Family(_gemma3, "square"),
    "paligemma": Family(_paligemma, "square"),
}
# Heights and widths in pixels of images of several sizes; families of square images use their order alone.
SIZES = ((30, 20), (16, 32), (32, 32))


def tiny_vlm(name: str, seed: int = 0) -> PreTrainedModel:
    """Return a model of the family; weights are large enough that every token matters."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(FAMILIES[name].config()).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    # Nothing but the limit ends a text, so that lengths are known.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def _pixels(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _image(name: str, size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Return one image as the model's `get_image_features` takes it."""
    kind = FAMILIES[name].kind
    if kind == "square":
        return {"pixel_values": _pixels(1, 3, SIDE, SIDE, seed=seed)}
    if kind == "tiles":
        return {"pixel_values": _pixels(1 + (size[0] > SIDE), 3, SIDE, SIDE, seed=seed)}
    if kind == "crops":
        return {"pixel_values": _pixels(1, 1, 3, SIDE, SIDE, seed=seed)}
    if kind == "grid":
        height, width = (-(-x // (2 * PATCH)) * 2 for x in size)
        pixels = _pixels(height * width, 3 * PATCH**2, seed=seed)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}
    # The whole image and the crops of the largest resolution; the model takes as many as the size needs.
    return {"pixel_values": _pixels(1, 5, 3, SIDE, SIDE, seed=seed), "image_sizes": torch.tensor([size])}


def _video(name: str, size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Return one video as the model's `get_video_features` takes it."""
    if FAMILIES[name].kind == "grid":
        image = _image(name, size, seed)
        return {"pixel_values_videos": image["pixel_values"], "video_grid_thw": image["image_grid_thw"]}
    return {"pixel_values_videos": _pixels(1, 2, 3, SIDE, SIDE, seed=seed)}


def _placeholders(model: PreTrainedModel, modality: str, visual: dict[str, Tensor]) -> int:
    with torch.no_grad():
        output = getattr(model.base_model, f"get_{modality}_features")(**visual, return_dict=True)
    return sum(entry.reshape(-1, entry.shape[-1]).shape[0] for entry in output.pooler_output)


def tiny_inputs(
    model: PreTrainedModel,
    images: tuple[int, ...] = (1,),
    padding_side: str = "left",
    seed: int = 0,
    video: bool = False,
    only: int | None = None,
) -> dict[str, Tensor]:
    """Return inputs of a batch with as many images (or videos) per row as `images` says, padded to the same length.

    Every row begins and ends with text of its own length, and text stands between images. Images differ in content and,
    in families that take any, in size. `only` keeps one row of the batch.
    """
    name = model.config.model_type
    generator = torch.Generator().manual_seed(seed)
    modality, token, make = ("video", VIDEO, _video) if video else ("image", IMAGE, _image)

    def text(length: int) -> list[int]:
        return torch.randint(3, 50, (length,), generator=generator).tolist()

    parts: list[list[dict[str, Tensor]]] = []
    rows = []
    for row, count in enumerate(images):
        ids = [BOS, *text(3)]
        parts.append([])
        for index in range(count):
            number = sum(images[:row]) + index
            visual = make(name, SIZES[(number + seed) % len(SIZES)], 100 * seed + number)
            parts[-1].append(visual)
            ids += [VISION_START] + [token] * _placeholders(model, modality, visual) + [VISION_END] + text(1 + index)
        rows.append(ids + text(4 + row))

    if only is not None:
        parts, rows = [parts[only]], [rows[only]]
    inputs: dict[str, Tensor] = {}
    if FAMILIES[name].kind == "crops":
        # Rows with fewer images are filled with zeros, which the model drops.
        pixels = torch.zeros(len(rows), max(map(len, parts)), 3, SIDE, SIDE)
        for row, row_visuals in enumerate(parts):
            for index, visual in enumerate(row_visuals):
                pixels[row, index] = visual["pixel_values"][0, 0]
        inputs["pixel_values"] = pixels
    else:
        visuals = [visual for row_visuals in parts for visual in row_visuals]
        inputs = {key: torch.cat([visual[key] for visual in visuals]) for key in (visuals or [{}])[0]}
    width = max(map(len, rows))
    pad = [[PAD] * (width - len(ids)) for ids in rows]
    left = padding_side == "left"
    inputs["input_ids"] = torch.tensor([p + r if left else r + p for p, r in zip(pad, rows, strict=True)])
    ones = [[1] * len(r) for r in rows]
    inputs["attention_mask"] = torch.tensor([p + r if left else r + p for p, r in zip(pad, ones, strict=True)])
    places = inputs["input_ids"] == token
    if FAMILIES[name].kind == "grid":
        inputs["mm_token_type_ids"] = places.int() * (2 if video else 1)
    if name == "gemma3":
        inputs["token_type_ids"] = places.long()
    if name == "paligemma":
        # The prompt is the bidirectional prefix; there is no suffix yet.
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs
