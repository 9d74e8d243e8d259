"""Pruning of visual tokens for every vision-language model of transformers.

A method writes `select`: which of an image's tokens to keep. Everything else is here: features are computed once by the
model's own `get_image_features`, the kept ones go back through `mm_encoder_outputs`, and the prompt's placeholders are
dropped with their features. No model code is replaced.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from mmsdk.caching import cache_of
from pruning.vision import CropLayout, LayerAttention, attention_modules, attention_of, layouts_of, recording

POSITIONS = ("contiguous", "original")
_PIXELS = {"image": ("pixel_values", "pixel_values_images", "image_patches"), "video": ("pixel_values_videos",)}
# Inputs with one value per token of the prompt, and what a slot without a token holds (None: the padding token).
_PER_TOKEN = {"input_ids": None, "attention_mask": 0, "token_type_ids": 0, "mm_token_type_ids": 0, "labels": -100}
# These return features per batch row (SmolVLM, Idefics3) or per tile (InternVL). An image of theirs is a run of
# consecutive placeholders: a crop of SmolVLM and Idefics3, which stand apart in the prompt, all tiles of InternVL's.
_IMAGES_ARE_RUNS = ("smolvlm", "idefics3", "internvl")
# Models within a pruned call: what that calls in turn (`forward` within `generate`, an outer block) is pruned already.
_RUNNING: WeakSet[PreTrainedModel] = WeakSet()


@dataclass(frozen=True)
class PruningContext:
    """What a method may know of an image besides its features.

    Attributes:
        row: batch row of the image.
        modality: `"image"` or `"video"`.
        layout: where each token comes from; for methods with `needs_layout` or `attention_layers`, None where unknown.
        attention: by layer; for methods with `attention_layers`.
        text: `(num_text_tokens, dim)`, embeddings of the text of the row; for methods with `needs_text`.
    """

    row: int = 0
    modality: str = "image"
    layout: CropLayout | None = None
    attention: LayerAttention = field(default_factory=LayerAttention)
    text: Tensor | None = None

    def known_layout(self) -> CropLayout:
        """Return the layout, for methods that cannot do without.

        Raises:
            ValueError: it is not known.
        """
        if self.layout is None:
            raise ValueError(
                f"It is not known where the tokens of this {self.modality} come from: the model arranges them in a way "
                "of its own. Use a method that looks at features alone, such as DivPrune."
            )
        return self.layout


@dataclass(frozen=True)
class PruningReport:
    """What a pruner did to the last inputs with images that it prepared.

    Attributes:
        kept: per image, the indices `(num_kept,)` of its kept tokens, ascending; videos come after images.
        tokens_before: per image, its tokens before pruning.
        prompt_before: tokens per batch row that the language model would have prefilled, without padding.
        prompt_after: tokens per batch row that it prefills.
        flops_before: estimated operations of that prefill without pruning: two per token and weight of the decoder
            layers (all experts of a mixture), and causal attention.
        flops_after: the same with pruning.
    """

    kept: tuple[Tensor, ...]
    tokens_before: tuple[int, ...]
    prompt_before: tuple[int, ...]
    prompt_after: tuple[int, ...]
    flops_before: float
    flops_after: float

    @property
    def tokens_after(self) -> tuple[int, ...]:
        """Per image, its tokens after pruning."""
        return tuple(len(indices) for indices in self.kept)


@dataclass(frozen=True)
class _History:
    """How a cache came to hold fewer tokens than the conversation.

    Attributes:
        columns: `(batch, prompt)` int64, the conversation's column of each prompt slot of the cache, -1 for padding.
        width: columns of the conversation that they stand for; all later ones are in the cache.
        shift: `(batch, 1)` int64, by what a position exceeds the number of tokens before it.
    """

    columns: Tensor
    width: int
    shift: Tensor


class PreparedInputs(UserDict[str, Any]):
    """Inputs whose images are pruned, for one call of `generate` or `forward`.

    `generate` changes the features in place (beams repeat them), and positions of some models are kept on the model, so
    the features can be taken out only once.
    """

    def __init__(self, inputs: dict[str, Any], history: _History) -> None:
        super().__init__(inputs)
        self.history = history
        self._taken = False

    def __getitem__(self, key: str) -> Any:
        if key == "mm_encoder_outputs":
            if self._taken:
                raise ValueError(
                    "These prepared inputs were used before. They serve one call of `generate` or `forward`; call "
                    "`prepare` again for the next one."
                )
            self._taken = True
        return super().__getitem__(key)


@dataclass(kw_only=True)
class Pruner(ABC):
    """Base class of the methods that drop visual tokens before the language model sees them.

    ```python
    with DivPrune(keep_ratio=0.1)(model):
        model.generate(**inputs)
    ```

    A subclass is a keyword-only dataclass that writes `select`. It declares what it needs besides the features:
    `needs_layout`, `needs_text`, `attention_layers`. Works on every transformers model whose `forward` takes
    `mm_encoder_outputs`; exact where nothing is dropped.

    Attributes:
        keep_ratio: fraction of each image's tokens to keep, in (0, 1]. Either this or `num_tokens`.
        num_tokens: tokens to keep of each image, at least 1.
        positions: `"contiguous"` renumbers the remaining tokens, as published; `"original"` lets each keep its place in
            the unpruned prompt, which matters for locating things. Models with two-dimensional positions (Qwen-VL)
            always keep the places of visual tokens.
        report: what happened to the last images, None before.
    """

    keep_ratio: float | None = None
    num_tokens: int | None = None
    positions: str = "contiguous"
    report: PruningReport | None = field(default=None, init=False, repr=False, compare=False)
    _histories: WeakKeyDictionary[Cache, _History] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    lossless: ClassVar[bool] = False
    needs_layout: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.keep_ratio is None) == (self.num_tokens is None):
            raise ValueError(
                "Pass either keep_ratio (the fraction of tokens kept, in (0, 1]) or num_tokens (a count per image), "
                f"received keep_ratio={self.keep_ratio!r} and num_tokens={self.num_tokens!r}."
            )
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio is the fraction of tokens kept, in (0, 1], received {self.keep_ratio!r}.")
        if self.num_tokens is not None and (not isinstance(self.num_tokens, int) or self.num_tokens < 1):
            raise ValueError(f"num_tokens is a count of at least 1, received {self.num_tokens!r}.")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is one of {POSITIONS}, received {self.positions!r}.")

    # ------------------------------------------------------------ what a method writes

    @abstractmethod
    def select(self, features: Tensor, context: PruningContext) -> Tensor:
        """Return the indices `(num_kept,)` int64, ascending, of the tokens to keep of one image.

        Args:
            features: `(num_tokens, dim)`, the image's tokens as the language model would see them, in its dtype.
            context: what the method declared that it needs.
        """

    def gather(self, features: Tensor, indices: Tensor, context: PruningContext) -> Tensor:
        """Return the features `(num_kept, dim)` at the kept indices; a method that merges tokens overrides this."""
        return features[indices]

    def attention_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        """Return the vision layers whose attention `select` needs; none unless overridden.

        Args:
            num_layers: self-attention layers of the vision tower.
            feature_layer: index of the layer whose output becomes the features.
        """
        return ()

    def budget(self, total: int) -> int:
        """Return how many of `total` tokens of an image to keep, at least 1: the ratio rounds half to even.

        Raises:
            ValueError: `num_tokens` exceeds `total`.
        """
        if self.keep_ratio is not None:
            return max(1, round(self.keep_ratio * total))
        if self.num_tokens is None or self.num_tokens > total:
            raise ValueError(f"num_tokens={self.num_tokens} tokens cannot be kept: an image has {total}.")
        return self.num_tokens

    # ------------------------------------------------------------ what users call

    def prepare(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> PreparedInputs:
        """Return what `model.generate` or `model.forward` takes in place of `inputs`, with pruned images.

        Args:
            model: a vision-language model.
            inputs: what its processor returned: token ids `(batch, length)` with a placeholder per visual token,
                pixels, and what belongs to them. Not changed. Chats that keep their cache need the `with` block.

        Raises:
            TypeError: the model takes no image features.
            ValueError: no images, prepared before, placeholders and features do not match, or more tokens asked for
                than an image has.
        """
        _check_model(model)
        if "mm_encoder_outputs" in inputs:
            raise ValueError("These inputs hold `mm_encoder_outputs`: they were prepared before. Pass the processor's.")
        if not _has_pixels(inputs):
            raise ValueError(f"There are no images to prune: the inputs hold only {sorted(inputs)}.")
        return self._prepare(model, inputs)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[Pruner]:
        """Prune the images of every call of `model.generate` and `model.forward` within a `with` block.

        Calls without images are left as they are. `generate` returns the unpruned prompt before the generated tokens,
        as always; `max_length` counts the pruned one, so prefer `max_new_tokens`. In a chat, pass the cache that the
        last turn returned to the next one under the same pruner, with the whole conversation (or its new columns and a
        mask for all) and the pixels of new images only. The model is restored at the end of the block, also after an
        exception. Blocks can be nested; the innermost prunes.
        """
        _check_model(model)
        names = ("generate", "forward") if hasattr(model, "generate") else ("forward",)
        before = {name: vars(model)[name] for name in names if name in vars(model)}

        def wrap(name: str) -> Callable[..., Any]:
            original = getattr(model, name)

            @functools.wraps(original)
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if model in _RUNNING or not self._concerns(inputs := _by_name(original, args, kwargs)):
                    return original(*args, **kwargs)
                _RUNNING.add(model)
                try:
                    return self._run(model, name, original, inputs)
                finally:
                    _RUNNING.discard(model)

            return wrapped

        try:
            for name in names:
                setattr(model, name, wrap(name))
            yield self
        finally:
            for name in names:
                if name in before:
                    setattr(model, name, before[name])
                else:
                    vars(model).pop(name, None)

    # ------------------------------------------------------------ how it is done

    def _concerns(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether a call has images, or goes on with a cache that holds fewer tokens than its caller sent."""
        if inputs.get("mm_encoder_outputs") is not None:
            return False
        cache = cache_of(inputs)
        return _has_pixels(inputs) or (cache is not None and cache in self._histories)

    def _run(self, model: PreTrainedModel, name: str, original: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        generates = name == "generate"
        config = inputs.get("generation_config") or getattr(model, "generation_config", None)
        if (
            generates
            and self.positions == "original"
            and not inputs.get("use_cache", getattr(config, "use_cache", True))
        ):
            raise ValueError(
                'positions="original" needs the cache: without it, transformers takes the gaps between positions for '
                'boundaries of packed sequences. Drop use_cache=False, or use positions="contiguous".'
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not generates):
            prepared = self._prepare(model, inputs)
        length = prepared["input_ids"].shape[1]
        output = original(**prepared)
        copies = 1
        if generates:
            sequences = output if isinstance(output, Tensor) else output.sequences
            prompt = inputs["input_ids"].to(sequences.device)
            copies = len(sequences) // len(prompt)
            sequences = torch.cat([prompt.repeat_interleave(copies, 0), sequences[:, length:]], 1)
            if isinstance(output, Tensor):
                return sequences
            output.sequences = sequences
        cache = cache_of(output) if isinstance(output, Mapping) else None
        # The rows of a cache after beam search are beams, which no later turn can go on with.
        if cache is not None and "beam_indices" not in output:
            past = prepared.history
            self._histories[cache] = _History(
                past.columns.repeat_interleave(copies, 0), past.width, past.shift.repeat_interleave(copies, 0)
            )
        return output

    def _prepare(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> PreparedInputs:
        inputs = {name: value for name, value in inputs.items() if value is not None}
        for name in ("inputs_embeds", "position_ids"):
            if name in inputs:
                raise ValueError(f"Pruning needs the prompt as `input_ids` and sets positions itself: drop {name!r}.")
        if "input_ids" not in inputs:
            raise ValueError(f"The inputs hold no `input_ids`, only {sorted(inputs)}.")
        base: Any = model.base_model
        ids: Tensor = inputs["input_ids"]
        mask: Tensor | None = inputs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"`attention_mask` is (batch, length), received {tuple(mask.shape)}.")

        # Columns of the conversation that the cache holds already, and how many are new.
        cache = cache_of(inputs)
        cached = int(cache.get_seq_length()) if cache is not None else 0
        past = self._past(base, cache, cached, ids)
        extra = torch.arange(past.width, past.width + cached - past.columns.shape[1], device=ids.device)
        old = torch.cat([past.columns, extra.expand(len(ids), -1)], 1)
        before, length = past.width + len(extra), ids.shape[1]
        total = mask.shape[1] if mask is not None else length if length > before else before + length
        new = total - before
        if new < 1 or length not in (new, total):
            raise ValueError(
                f"`input_ids` has {length} columns and the mask {total}, but the cache stands for {before} already. "
                "Pass the whole conversation, or the new columns and a mask for all."
            )

        # Every image's choice.
        new_ids = ids[:, -new:]
        new_mask = mask[:, -new:].bool() if mask is not None else torch.ones_like(new_ids, dtype=torch.bool)
        keep = new_mask.clone()
        outputs: dict[str, Any] = {}
        kept: list[Tensor] = []
        sizes: list[int] = []
        consumed = {name for names in _PIXELS.values() for name in names}
        for modality, names in _PIXELS.items():
            pixels = [name for name in names if name in inputs]
            if not pixels:
                continue
            if any(len(inputs[name]) == 0 for name in pixels):
                raise ValueError(f"There are no images to prune: {pixels[0]!r} is empty. Leave it out.")
            arguments = _subset(getattr(base, f"get_{modality}_features"), inputs)
            consumed |= arguments.keys()
            outputs[modality], choice, lengths = self._encode(model, modality, arguments, new_ids, new_mask)
            chosen = torch.zeros(sum(lengths), dtype=torch.bool, device=ids.device)
            for indices, start in zip(choice, _starts(lengths), strict=True):
                chosen[indices.to(ids.device) + start] = True
            keep[new_ids == _placeholder(model, modality)] = chosen
            kept += choice
            sizes += lengths

        # Move the rest together.
        if sum(map(len, kept)) == sum(sizes):
            columns = torch.arange(new, device=ids.device).expand(len(ids), -1)
        else:
            right = bool((~new_mask[:, -1]).any())
            width = int(keep.sum(1).max())
            order = (keep ^ right).long().argsort(dim=1, stable=True)
            order = order[:, :width] if right else order[:, new - width :]
            columns = torch.where(keep.gather(1, order), order, -1)
        every = torch.cat([old, torch.where(columns < 0, -1, columns + before)], 1)
        prepared: dict[str, Any] = {}
        for name, value in inputs.items():
            if name in _PER_TOKEN:
                fill = _PER_TOKEN[name] if name != "input_ids" else _padding_token(model)
                prepared[name] = _take(value, every if value.shape[1] == total else columns, fill)
            elif name not in consumed:
                prepared[name] = value
        prepared["mm_encoder_outputs"] = outputs
        if mask is None and bool((every < 0).any()):
            prepared["attention_mask"] = (every >= 0).long()

        # Give every token its position.
        filled = _take(new_mask, columns, False)
        earlier = prepared.get("attention_mask", torch.ones_like(every))[:, :cached].sum(1, keepdim=True)
        start, shift = earlier + past.shift, past.shift
        positions, span = self._positions(model, inputs, new_ids, new_mask)
        if positions is not None:
            shift = past.shift + span - filled.sum(1, keepdim=True)
            positions = _take(positions + start, columns.expand(len(positions), -1, -1), 0).masked_fill(~filled, 0)
            if hasattr(base, "rope_deltas"):
                text = (earlier + filled.cumsum(1) - 1).masked_fill(~filled, 0)
                prepared["position_ids"] = torch.cat([text[None], positions])
                base.rope_deltas = shift
            elif bool(shift.any()):
                prepared["position_ids"] = positions[0]
                # Without a mask, the gaps would be taken for boundaries of packed sequences.
                prepared.setdefault("attention_mask", torch.ones_like(every))

        if outputs:
            counts = [tuple(x.sum(1).tolist()) for x in (new_mask, filled)]
            flops = [prefill_flops(model, tokens, cached) for tokens in counts]
            self.report = PruningReport(tuple(kept), tuple(sizes), counts[0], counts[1], flops[0], flops[1])
        return PreparedInputs(prepared, _History(every, total, shift))

    def _past(self, base: Any, cache: Cache | None, cached: int, ids: Tensor) -> _History:
        if cache is not None and cached and cache in self._histories:
            return self._histories[cache]
        shift = getattr(base, "rope_deltas", None) if cached else None
        return _History(
            torch.arange(cached, device=ids.device).expand(len(ids), -1),
            cached,
            torch.zeros(len(ids), 1, dtype=torch.long, device=ids.device) if shift is None else shift.to(ids.device),
        )

    def _encode(
        self, model: PreTrainedModel, modality: str, arguments: dict[str, Any], ids: Tensor, mask: Tensor
    ) -> tuple[Any, list[Tensor], list[int]]:
        """Compute features and choose among them: the encoder's output with the kept ones, the choices, all counts."""
        base: Any = model.base_model
        tower: Any = model.get_encoder(modality=modality)
        layers = self._layers(model, tower, arguments)
        with recording(base, tower, layers) as record:
            output = getattr(base, f"get_{modality}_features")(**arguments, return_dict=True)
        pooled = output.pooler_output
        entries = [entry.reshape(-1, entry.shape[-1]) for entry in pooled]
        features = torch.cat(entries)
        places = ids == _placeholder(model, modality)
        found = int(places.sum())
        if found != len(features):
            raise ValueError(
                f"The prompt holds {found} {modality} placeholders, but the pixels give {len(features)} features. Pass "
                "what the processor returned, not truncated; in later turns of a chat, only the pixels of new images."
            )
        runs = model.config.model_type in _IMAGES_ARE_RUNS
        lengths = _runs(places) if runs else [len(entry) for entry in entries]
        rows = places.nonzero()[:, 0].split(lengths)
        if any(bool(row[0] != row[-1]) for row in rows):
            raise ValueError(
                f"Rows hold {places.sum(1).tolist()} {modality} placeholders, which images of {lengths} features do "
                "not fill. Pass what the processor returned."
            )
        grids = arguments.get(f"{modality}_grid_thw")
        layouts: list[CropLayout | None] = [None] * len(lengths)
        attention = [LayerAttention() for _ in lengths]
        if self.needs_layout or layers:
            crop_tokens = pooled.shape[1] if isinstance(pooled, Tensor) else None
            layouts = layouts_of(base, record, lengths, crop_tokens, grids)
            attention = attention_of(tower, record, layouts, grids)
        text = mask.clone()
        for name in _PIXELS:
            text &= ids != _placeholder(model, name)

        contexts, kept = [], []
        for image, image_features in enumerate(features.split(lengths)):
            row = int(rows[image][0])
            words = model.get_input_embeddings()(ids[row][text[row]]) if self.needs_text else None
            context = PruningContext(row, modality, layouts[image], attention[image], words)
            contexts.append(context)
            with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
                kept.append(_checked(self.select(image_features.detach(), context), len(image_features), self))

        def pruned(values: Any) -> Any:
            rows = torch.cat([value.reshape(-1, value.shape[-1]) for value in values]).split(lengths)
            with torch.autocast(features.device.type, enabled=False):
                chosen = [self.gather(*arguments) for arguments in zip(rows, kept, contexts, strict=True)]
            # One "image" per token lets tensors hold images of different counts, and beams still find their rows.
            return torch.cat(chosen).unsqueeze(1) if isinstance(values, Tensor) else chosen

        changes = {"pooler_output": pruned(pooled)}
        if getattr(output, "deepstack_features", None) is not None:
            changes["deepstack_features"] = [pruned(layer) for layer in output.deepstack_features]
        return replace(output, **changes), kept, lengths

    def _layers(self, model: PreTrainedModel, tower: Any, arguments: dict[str, Any]) -> tuple[int, ...]:
        """Return the vision layers to record."""
        count = len(attention_modules(tower))
        chosen = arguments.get("vision_feature_layer", getattr(model.config, "vision_feature_layer", -1))
        last = chosen if isinstance(chosen, int) else chosen[-1]
        # Hidden state 0 is what enters the first layer.
        feature_layer = (last if last >= 0 else last + count + 1) - 1
        layers = self.attention_layers(count, feature_layer)
        if layers and not count:
            raise ValueError(
                f"{type(self).__name__} needs attention maps, which {type(tower).__name__} does not offer. Use a "
                "method that needs none, such as DivPrune."
            )
        return tuple(sorted(set(layers)))

    def _positions(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], ids: Tensor, mask: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Return positions `(axes, batch, length)` of the unpruned new columns, from 0, and their span `(batch, 1)`.

        None where the model is to number the remaining tokens itself.
        """
        base: Any = model.base_model
        span = mask.sum(1, keepdim=True)
        if hasattr(base, "get_rope_index"):
            types = inputs.get("mm_token_type_ids")
            if types is None and _has_pixels(inputs):
                raise ValueError(
                    f"{type(model).__name__} finds the places of visual tokens through `mm_token_type_ids`, which the "
                    "inputs lack. Its processor returns them."
                )
            types = torch.zeros_like(ids) if types is None else types[:, -ids.shape[1] :]
            known = {"input_ids": ids, "attention_mask": mask.long(), "mm_token_type_ids": types}
            positions, deltas = base.get_rope_index(**_subset(base.get_rope_index, {**inputs, **known}))
            return positions, span + deltas.view(-1, 1)
        if self.positions == "contiguous":
            return None, span
        if is_flash_attention_requested(model.config.get_text_config()):
            raise ValueError(
                'positions="original" leaves gaps between positions, which flash attention takes for boundaries of '
                'packed sequences. Load the model with attn_implementation="sdpa", or use positions="contiguous".'
            )
        return (mask.cumsum(1) - 1)[None], span


def _check_model(model: PreTrainedModel) -> None:
    takes = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    if not takes or not hasattr(getattr(model, "base_model", None), "get_image_features"):
        raise TypeError(
            f"{type(model).__name__} takes no image features: pruning needs a vision-language model of transformers "
            "with `get_image_features` and a `forward` that accepts `mm_encoder_outputs`."
        )


def _has_pixels(inputs: Mapping[str, Any]) -> bool:
    return any(name in inputs and inputs[name] is not None for names in _PIXELS.values() for name in names)


def _by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name; the first of `generate` is the prompt."""
    bound = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    named = {**bound, **bound.pop("kwargs", {})}
    prompt = named.pop("inputs", None)
    return named if prompt is None else {**named, "input_ids": prompt}


def _subset(function: Callable[..., Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the inputs that a function names."""
    return {name: inputs[name] for name in inspect.signature(function).parameters if name in inputs}


def _placeholder(model: PreTrainedModel, modality: str) -> int:
    token = getattr(model.config, f"{modality}_token_id", None)
    return -1 if token is None else token


def _padding_token(model: PreTrainedModel) -> int:
    """Return a token for slots that hold none; never a placeholder, which would ask for a feature."""
    settings = (getattr(model, "generation_config", None), model.config.get_text_config())
    tokens = [getattr(s, name, None) for name in ("pad_token_id", "eos_token_id") for s in settings]
    taken = [_placeholder(model, modality) for modality in _PIXELS]
    return next(t for t in [*tokens, 0, 1, 2] if isinstance(t, int) and t >= 0 and t not in taken)


def _starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths))]


def _runs(places: Tensor) -> list[int]:
    """Return the lengths of the runs of True in each row `(batch, length)`, first row first."""
    begins = places.clone()
    begins[:, 1:] &= ~places[:, :-1]
    return begins.flatten().cumsum(0)[places.flatten()].bincount()[1:].tolist()


def _take(values: Tensor, columns: Tensor, fill: Any) -> Tensor:
    """Return some columns of `(..., length)`, and `fill` where the column is -1."""
    return torch.where(columns < 0, fill, values.gather(-1, columns.clamp_min(0))).to(values.dtype)


def _checked(indices: Tensor, total: int, pruner: Pruner) -> Tensor:
    """Return the indices if they are what `select` promises."""
    valid = indices.ndim == 1 and indices.dtype == torch.long and len(indices) > 0
    if not valid or int(indices[0]) < 0 or int(indices[-1]) >= total or not bool((indices.diff() > 0).all()):
        raise ValueError(
            f"{type(pruner).__name__}.select returned no ascending int64 indices below {total}: {indices.tolist()}."
        )
    return indices


def prefill_flops(model: PreTrainedModel, tokens: tuple[int, ...], cached: int = 0) -> float:
    """Estimate the operations of a prefill of prompts of `tokens` behind `cached` others, as `PruningReport` does."""
    decoder, config = model.get_decoder(), model.config.get_text_config()
    weights = sum(p.numel() for p in decoder.parameters() if p.ndim > 1)
    weights -= decoder.get_input_embeddings().weight.numel()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = sum((cached + n) ** 2 - cached**2 for n in tokens)
    return 2.0 * weights * sum(tokens) + 2.0 * config.num_hidden_layers * width * attention
