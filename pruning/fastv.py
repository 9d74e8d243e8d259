"""FastV: drop, inside the language model, the visual tokens that the end of the prompt hardly attends to."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import LongTensor, Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mmsdk.caching import cache_of
from pruning.base import PruningReport, prefill_flops
from pruning.vision import VisionRecord, attention_modules, recording

_IMPLEMENTATIONS = ("sdpa", "eager")
_SUPPORTED = (
    "LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL, SmolVLM, Idefics3 and PaliGemma"
)


@dataclass(kw_only=True)
class FastV:
    """Keep the visual tokens to which the last token of the prompt attends most, from some decoder layer on.

    ```python
    with FastV(keep_ratio=0.25)(model):
        model.generate(**inputs)
    ```

    Paper: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
    Vision-Language Models", ECCV 2024, https://arxiv.org/abs/2403.06764; published with `keep_ratio=0.5, layer=2`. The
    first `layer` decoder layers see all tokens. In the last of these, the attention that the last token pays, averaged
    over heads, ranks the visual tokens of a prompt; all its images compete. The others are gone for the layers that
    follow, and from their caches. What stays keeps its position. Ranked in float32; ties go to the lowest index.

    Costs the products of one query with all keys. Deterministic. Lossy; exact where nothing is dropped.

    Dropped tokens have no logits: `forward` returns those of the tokens that remain, of which the last are the prompt's
    last. Logits of a row that is padded on the right end at `report.prompt_after[row]`, where any row has padding
    there.

    Attributes:
        keep_ratio: fraction of each prompt's visual tokens to keep, in (0, 1]. Either this or `num_tokens`.
        num_tokens: visual tokens to keep of each prompt that has any, at least 1.
        layer: how many decoder layers see all tokens, at least 1.
        report: what happened to the last batch with images, None before. Its `kept` and `tokens_before` have one entry
            per row of the batch, for all its visual tokens.

    Raises:
        ValueError: both or neither of `keep_ratio` and `num_tokens` are given, or a value is out of range.
    """

    keep_ratio: float | None = None
    num_tokens: int | None = None
    layer: int = 2
    report: PruningReport | None = field(default=None, init=False, repr=False, compare=False)

    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.keep_ratio is None) == (self.num_tokens is None):
            raise ValueError(
                "Pass either keep_ratio (the fraction of tokens kept, in (0, 1]) or num_tokens (a count per prompt), "
                f"received keep_ratio={self.keep_ratio!r} and num_tokens={self.num_tokens!r}."
            )
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio is the fraction of tokens kept, in (0, 1], received {self.keep_ratio!r}.")
        for name, value in (("num_tokens", self.num_tokens), ("layer", self.layer)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is a count of at least 1, received {value!r}.")

    def budget(self, total: int) -> int:
        """Return how many of `total` visual tokens of a prompt to keep, at least 1: the ratio rounds half to even.

        Raises:
            ValueError: `num_tokens` exceeds `total`.
        """
        if self.keep_ratio is not None:
            return max(1, round(self.keep_ratio * total))
        if self.num_tokens is None or self.num_tokens > total:
            raise ValueError(f"num_tokens={self.num_tokens} tokens cannot be kept: a prompt has {total} visual ones.")
        return self.num_tokens

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[FastV]:
        """Prune in every prefill of `model.generate` and `model.forward` within a `with` block.

        A prefill is a forward of more than one column whose `input_ids` hold visual placeholders: a prompt, or a turn
        of a chat that goes on with the cache of the last one. All other forwards prune nothing, and see what is left in
        the cache. The caches of this block are of no use outside of it. Without a cache, every step of `generate` is a
        prefill and chooses anew; in assisted decoding, the first draft is part of the prefill. The model is restored at
        the end of the block, also after an exception.

        Raises:
            TypeError: no vision-language model, or its language model has no standard decoder layers.
            ValueError: the language model has too few layers, attends within windows, or uses another attention than
                `sdpa` and `eager`, as within another block of FastV.
        """
        decoder = _decoder(model, self.layer)
        with ExitStack() as stack:
            record = stack.enter_context(recording(decoder, decoder, (self.layer - 1,)))
            work = _Work(self, model, record)
            first, *others = decoder.layers[self.layer :]
            hooks = [(model, work.check), (model.base_model, work.read), (first, work.prune)]
            for module, hook in [*hooks, *((layer, work.follow) for layer in others)]:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield self


class _ShortLayer(DynamicLayer):
    """Cache of the first layer that lacks visual tokens, and which columns of the conversation it and the others hold.

    Attributes:
        columns: `(batch, held)` int64, -1 in slots that stand for no token; None while all are there.
    """

    columns: Tensor | None = None

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.columns = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens."""
        super().crop(tokens_to_remove)
        if self.columns is not None and tokens_to_remove:
            self.columns = self.columns[:, :tokens_to_remove]

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Take the rows `beam_idx` of the batch."""
        super().reorder_cache(beam_idx)
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        if self.columns is not None:
            self.columns = self.columns.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows `indices` of the batch."""
        super().batch_select_indices(indices)
        self._take_rows(indices)

    def _take_rows(self, indices: Tensor) -> None:
        if self.columns is not None:
            self.columns = self.columns[indices.to(self.columns.device)]


class _Work:
    """FastV at work on one model: its hooks, and what they know of the forward that is running."""

    def __init__(self, method: FastV, model: PreTrainedModel, record: VisionRecord) -> None:
        self.method, self.model, self.record = method, model, record
        names = ("image_token_id", "video_token_id")
        tokens = [getattr(model.config, name, None) for name in names]
        self.placeholders = [token for token in tokens if token is not None]
        # Of a prefill: where visual tokens are, and what is no padding, `(batch, new)` and `(batch, seen)`.
        self.visual: Tensor | None = None
        self.real: Tensor | None = None
        # What the layers that prune receive in place of their keyword arguments.
        self.changes: dict[str, Any] = {}

    def check(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse what needs the logits of all tokens."""
        named = _by_name(model, args, kwargs)
        whole = named.get("labels") is not None or isinstance(named.get("logits_to_keep"), Tensor)
        if whole and self.method.keep_ratio != 1 and self._visual(named.get("input_ids")) is not None:
            raise ValueError(
                "FastV leaves no logits of the tokens that it drops, so `labels` and a tensor of `logits_to_keep` have "
                "nothing to refer to: drop them, and take the logits of the last tokens."
            )

    def read(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the visual tokens of a prefill."""
        named = _by_name(base, args, kwargs)
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        self.visual = self.real = None
        if ids is None and any(name.startswith("pixel_values") and value is not None for name, value in named.items()):
            raise ValueError("FastV finds visual tokens in `input_ids`: pass them, and drop 'inputs_embeds'.")
        if mask is not None and getattr(mask, "ndim", None) != 2:
            raise ValueError(f"`attention_mask` is (batch, length), received {getattr(mask, 'shape', type(mask))}.")
        visual = self._visual(ids)
        if visual is not None:
            self.real = None if mask is None else mask.bool()
            self.visual = visual if self.real is None else visual & self.real[:, -visual.shape[1] :]

    def _visual(self, ids: Tensor | None) -> Tensor | None:
        """Return where `(batch, new)` token ids stand for visual tokens, None where this is no prefill with any."""
        if ids is None or ids.shape[1] == 1:
            return None
        visual = torch.isin(ids, torch.tensor(self.placeholders, device=ids.device))
        return visual if bool(visual.any()) else None

    def prune(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Choose among the visual tokens, give the first layer what remains, and note it for the others."""
        hidden, *rest = args or (kwargs.pop("hidden_states"),)
        query, key = (calls.pop(self.method.layer - 1)[-1] for calls in (self.record.queries, self.record.keys))
        visual, self.visual, self.changes = self.visual, None, {}
        cache = cache_of(kwargs)
        batch, new = hidden.shape[:2]
        # The first layer of all, which has taken in the new columns, holds every one.
        seen = new if cache is None else int(cache.get_seq_length())
        known = None if cache is None else _held(cache, self.method.layer)
        held = torch.arange(seen - new, device=hidden.device).expand(batch, -1) if known is None else known
        index = None if visual is None else self._choose(query, key, visual, held.shape[1])
        if index is None and known is None:
            return (hidden, *rest), kwargs

        columns = torch.arange(new, device=hidden.device).expand(batch, -1) if index is None else index
        columns = torch.where(columns < 0, -1, columns + seen - new)
        every = torch.cat([held, columns], 1)
        if cache is not None:
            _hold(cache, self.method.layer, every)
        self.changes["attention_mask"] = _cut_mask(kwargs.get("attention_mask"), index, columns, every)
        if index is not None:
            place = index.clamp_min(0)
            hidden = hidden.take_along_dim(place[..., None], 1)
            angles = kwargs["position_embeddings"]
            self.changes["position_embeddings"] = tuple(
                x.expand(batch, -1, -1).take_along_dim(place[..., None], 1) for x in angles
            )
            if kwargs.get("position_ids") is not None:
                self.changes["position_ids"] = kwargs["position_ids"].expand(batch, -1).gather(1, place)
        return (hidden, *rest), {**kwargs, **self.changes}

    def follow(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Give a later layer what the first one got."""
        return args, {**kwargs, **self.changes}

    @torch.no_grad()
    def _choose(self, query: Tensor, key: Tensor, visual: Tensor, cached: int) -> Tensor | None:
        """Return which new columns remain, `(batch, remaining)`, -1 in slots of none; None if all do. Fill the report.

        Args:
            query: `(batch, heads, new, dim)` of the layer that ranks.
            key: `(batch, key_heads, seen, dim)`.
            visual: `(batch, new)`, where visual tokens are.
            cached: columns before the new ones in the layers that prune.
        """
        method, model = self.method, self.model
        new, seen = query.shape[2], key.shape[2]
        all_real = torch.ones(len(key), seen, dtype=torch.bool, device=key.device) if self.real is None else self.real
        real = all_real[:, -new:]
        last = new - 1 - real.flip(1).int().argmax(1)
        if bool(visual.gather(1, last[:, None]).any()):
            raise ValueError(
                "FastV ranks visual tokens by the attention of the prompt's last token, which is a visual one itself. "
                "End the prompt with text, and do not prefill in chunks."
            )
        scaling = self.record.scaling[method.layer - 1]
        attention = last_attention(query, key, scaling, last, all_real)[:, -new:]
        sizes = visual.sum(1).tolist()
        budgets = [method.budget(size) if size else 0 for size in sizes]
        order = attention.masked_fill(~visual, -torch.inf).argsort(dim=1, descending=True, stable=True)
        chosen = order.argsort(1) < torch.tensor(budgets, device=order.device)[:, None]
        keep = chosen | (real & ~visual)

        kept = tuple(row[there].nonzero()[:, 0] for row, there in zip(chosen, visual, strict=True))
        before, after = (tuple(x.sum(1).tolist()) for x in (real, keep))
        flops = prefill_flops(model, before, seen - new)
        share = method.layer / model.config.get_text_config().num_hidden_layers
        flops_after = share * flops + (1 - share) * prefill_flops(model, after, cached)
        method.report = PruningReport(kept, tuple(sizes), before, after, flops, flops_after)
        if budgets == sizes:
            return None
        right = bool((~real[:, -1]).any())
        width = max(after)
        columns = (keep ^ right).long().argsort(dim=1, stable=True)
        columns = columns[:, :width] if right else columns[:, new - width :]
        return torch.where(keep.gather(1, columns), columns, -1)


def last_attention(query: Tensor, key: Tensor, scaling: float, last: Tensor, real: Tensor) -> Tensor:
    """Return the attention `(batch, seen)` that one query of each row pays to all keys, mean over heads, in float32.

    Args:
        query: `(batch, heads, new, dim)`.
        key: `(batch, key_heads, seen, dim)`; `key_heads` divides `heads`.
        scaling: factor of the logits.
        last: `(batch,)`, which of the new queries; it sees every key that is no padding.
        real: `(batch, seen)`, False at padding.
    """
    chosen = query.take_along_dim(last[:, None, None, None], 2).squeeze(2).unflatten(1, (key.shape[1], -1))
    logits = (chosen.float() * scaling) @ key.float().mT
    return logits.masked_fill(~real[:, None, None], -torch.inf).softmax(-1).mean((1, 2))


def _decoder(model: PreTrainedModel, layer: int) -> Any:
    """Return the decoder of a model whose layers from `layer` on can be given fewer tokens.

    Raises:
        TypeError: no vision-language model, or its language model has no standard decoder layers.
        ValueError: the language model has too few layers, or another kind of attention.
    """
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(decoder, "layers", ())
    attentions = [m for each in layers for m in attention_modules(each)]
    standard = len(attentions) == len(layers) > 0 and all(m.q_proj is not None for m in attentions)
    if getattr(model.config, "image_token_id", None) is None or not standard:
        raise TypeError(
            f"FastV cannot prune within {type(model).__name__}: it needs a vision-language model of transformers with "
            "an `image_token_id`, and a decoder with `layers` of one self-attention (`q_proj`, `k_proj`) each, as in "
            f"{_SUPPORTED}."
        )
    if layer >= len(layers):
        raise ValueError(f"layer={layer} leaves no layer to prune: {type(decoder).__name__} has {len(layers)}.")
    if any(type(each) is not DynamicLayer for each in DynamicCache(config=model.config).layers):
        raise ValueError(
            f"FastV needs full attention in every layer, and some of {type(decoder).__name__}'s have a window or a "
            f"state of their own. It works with {_SUPPORTED}."
        )
    names = {m.config._attn_implementation for m in attentions}  # its setter is public, there is no other way to read
    if not names <= set(_IMPLEMENTATIONS):
        raise ValueError(
            f"FastV works with the attention {' or '.join(_IMPLEMENTATIONS)}, and not within another block of its own, "
            f"received {sorted(names)}. Use `model.set_attn_implementation`."
        )
    deep = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if layer < deep:
        raise ValueError(
            f"layer must be at least {deep} for {type(model).__name__}, which adds visual features after each of its "
            f"first {deep} decoder layers, received {layer}."
        )
    return decoder


def _by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return those arguments of a call of `module` that its `forward` names."""
    return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments


def _held(cache: Any, layer: int) -> Tensor | None:
    """Return the columns `(batch, held)` of the conversation in the cache of a layer, None where that is all.

    Raises:
        ValueError: the cache has a fixed size, or another form.
    """
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"FastV needs a DynamicCache, received a {type(cache).__name__}.")
    known = cache.layers[layer] if len(cache.layers) > layer else None
    return known.columns if isinstance(known, _ShortLayer) else None


def _hold(cache: DynamicCache, layer: int, columns: Tensor) -> None:
    """Note which columns of the conversation the cache of a layer is about to hold."""
    short = _ShortLayer()
    if len(cache.layers) == layer:
        cache.layers.append(short)
    else:
        vars(short).update(vars(cache.layers[layer]))
        cache.layers[layer] = short
    short.columns = columns


def _cut_mask(mask: Tensor | None, index: Tensor | None, columns: Tensor, every: Tensor) -> Tensor | None:
    """Cut a mask of all columns to those that remain.

    Args:
        mask: `(batch or 1, 1, new, seen)`, boolean (True: attend) or added to the logits; None: causal.
        index: `(batch, queries)`, which of the new columns remain; None: all.
        columns: `(batch, queries)`, their places in the conversation.
        every: `(batch, keys)`, places of all that remain; -1, as in the others, in slots that stand for no token.
    """
    there = (every >= 0)[:, None, None]
    if mask is None:
        # Only sdpa is ever called without a mask, and it takes booleans.
        return None if bool(there.all()) else there & (every[:, None, None] <= columns[:, None, :, None])
    mask = mask.expand(len(every), -1, -1, -1)
    if index is not None:
        mask = mask.take_along_dim(index.clamp_min(0)[:, None, :, None], 2)
    mask = mask.take_along_dim(every.clamp_min(0)[:, None, None], 3)
    return mask & there if mask.dtype == torch.bool else mask.masked_fill(~there, torch.finfo(mask.dtype).min)
