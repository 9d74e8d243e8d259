"""PrefixKV: a key-value cache that forgets what the prompt's attention has no use for, with a budget per layer.

Wang et al., 2024, "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient
Generation" (arXiv 2412.03409).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mmsdk.caching import cache_of, with_cache

# Queries per step when the attention map of a prompt is summed up.
_QUERY_BLOCK = 256
# Halvings of [0, 1] after which the search has used up float32.
_MAX_HALVINGS = 64
# How far, in tokens over all layers, the search may stay off its target.
_TOLERANCE = 5


def received_attention(
    query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """Sum over queries the attention that each token receives, heads averaged, in float32.

    Costs one product of queries and keys; memory is linear in the length.

    Args:
        query: `(batch, heads, length, dim)`.
        key: `(batch, key_heads, length, dim)`; `key_heads` divides `heads`.
        scaling: factor of the logits.
        mask: `(batch or 1, heads or 1, length, length)`, boolean (True: attend) or added to the logits; default:
            causal.
        real: `(batch, length)`, False at padding, whose queries do not count; default: everywhere True.

    Returns:
        `(batch, length)`.
    """
    batch, heads, length, _ = query.shape
    keys = key.float().repeat_interleave(heads // key.shape[1], dim=1).mT
    total = torch.zeros(batch, length, device=query.device)
    for start in range(0, length, _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        logits = (query[:, :, rows].float() * scaling) @ keys
        if mask is None:
            positions = torch.arange(length, device=query.device)
            logits = logits.masked_fill(positions > positions[rows, None], -torch.inf)
        elif mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask[:, :, rows], -torch.inf)
        else:
            logits = logits + mask[:, :, rows]
        attention = logits.softmax(-1).mean(1)
        # Rows of padding may attend to nothing at all.
        total += (attention if real is None else attention.where(real[:, rows, None], 0.0)).sum(1)
    return total


def search_forget_counts(importance: Tensor, forget_ratio: float, start_size: int = 1) -> Tensor:
    """Find, by bisection, the share of attention that every layer should keep to meet a budget over all of them.

    Args:
        importance: attention received by each token in each layer, `(layers, length)`.
        forget_ratio: fraction of all tokens to forget, in [0, 1).
        start_size: first tokens, which are never forgotten; nor is the last.

    Returns:
        Tokens that each layer forgets, int64 `(layers,)`; their sum is about `forget_ratio * layers * length`.
    """
    layers, length = importance.shape
    mass = importance.float().sort(dim=-1, descending=True).values
    mass = (mass / mass.sum(-1, keepdim=True)).cumsum(-1)
    target = layers * length * forget_ratio
    low, high = 0.0, 1.0
    counts = torch.zeros(layers, dtype=torch.int64)
    for _ in range(_MAX_HALVINGS):
        middle = (low + high) / 2
        kept = torch.searchsorted(mass, mass.new_full((layers, 1), middle)).squeeze(-1) + 1
        counts = (length - kept - (start_size + 1)).clamp(min=0)
        missing = target - int(counts.sum())
        if abs(missing) < _TOLERANCE:
            break
        low, high = (low, middle) if missing > 0 else (middle, high)
    return counts


def layer_forget_ratios(importance: Tensor, forget_ratio: float, start_size: int = 1) -> list[float]:
    """Return the fraction of the tokens that each layer forgets: `search_forget_counts`, scaled to meet the budget.

    Args and shapes are those of `search_forget_counts`.
    """
    layers, length = importance.shape
    counts = search_forget_counts(importance, forget_ratio, start_size).tolist()
    target = layers * length * forget_ratio
    return [int(count * target / max(sum(counts), 1)) / length for count in counts]


@dataclass
class _Row:
    """One sequence in one layer.

    Attributes:
        ratio: fraction to forget.
        total: tokens seen, without padding.
        stored: tokens still there.
        slot: index, among those there, of the one that is forgotten next.
    """

    ratio: float
    total: int
    stored: int
    slot: int


class PrefixKVLayer(DynamicLayer):
    """The cache of one layer. It reports the length of all that it has seen, and remembers where what it kept stood.

    So positions and masks come out as if nothing had been forgotten, and the mask is cut to what is there.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forget the bookkeeping."""
        self.seen = 0
        self.rows: list[_Row] = []
        # Where each slot stood, `(batch, slots)`, -1 in empty ones, which come first; None while everything is there.
        self.positions: Tensor | None = None
        self.importance: Tensor | None = None

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.clear()

    def get_seq_length(self) -> int:
        """Return how many tokens were seen, padding included."""
        return self.seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values `(batch, heads, new, dim)`; return all that are there."""
        batch, _, new, _ = key_states.shape
        if self.positions is not None:
            appended = torch.arange(self.seen, self.seen + new, device=self.positions.device).expand(batch, -1)
            self.positions = torch.cat([self.positions, appended], 1)
        self.seen += new
        return super().update(key_states, value_states, *args, **kwargs)

    def cut_mask(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Cut the model's mask over all positions, `(batch or 1, heads or 1, new, seen)`, to the slots."""
        if self.positions is None:
            return mask
        new, slots = query.shape[2], self.positions.shape[1]
        there = (self.positions >= 0)[:, None, None]
        if mask is None:
            if new == 1 and all(row.stored == slots - 1 for row in self.rows):
                return None
            # Only sdpa is ever called without a mask, and it takes booleans.
            times = torch.arange(self.seen - new, self.seen, device=query.device)
            return there & (self.positions[:, None, None] <= times[:, None])
        index = self.positions.clamp(min=0)[:, None, None].expand(-1, mask.shape[1], new, -1)
        mask = mask.expand(len(index), -1, -1, -1).gather(-1, index)
        return mask & there if mask.dtype == torch.bool else mask.masked_fill(~there, torch.finfo(mask.dtype).min)

    def forget_prompt(self, ratios: Sequence[float], start_size: int, distance: int, real: Tensor) -> None:
        """Drop the least important tokens of the prompt, and its padding.

        Args:
            ratios: fraction to forget, for each sequence.
            start_size: first tokens that stay.
            distance: how far before the end of the kept prompt tokens are dropped later.
            real: False at padding, `(batch, seen)`.
        """
        totals = real.sum(-1).tolist()
        counts = [
            min(round(ratio * total), max(total - start_size - 1, 0))
            for ratio, total in zip(ratios, totals, strict=True)
        ]
        self.rows = []
        for ratio, total, count in zip(ratios, totals, counts, strict=True):
            stored = total - count
            slot = stored - distance if stored - distance >= 1 else max(stored // 2, 1)
            self.rows.append(_Row(ratio, total, stored, slot))
        importance, self.importance = self.importance, None
        if importance is None or not any(ratios):
            return
        rank = real.cumsum(-1) - 1
        last = torch.tensor(totals, device=real.device)[:, None] - 1
        candidates = real & (rank >= start_size) & (rank < last)
        order = importance.masked_fill(~candidates, torch.inf).argsort(dim=-1, stable=True)
        dropped = order.argsort(-1) < torch.tensor(counts, device=real.device)[:, None]
        self._keep(torch.arange(self.seen, device=real.device).repeat(len(real), 1), real & ~dropped)

    def forget_excess(self, real: Tensor | None, new: int) -> None:
        """Drop what exceeds the budgets after `new` tokens, at most as many, at a fixed distance from the prompt's end.

        Args:
            real: False at padding among the new tokens, `(batch, new)`; None: there is none.
            new: number of new tokens.
        """
        added = [new] * len(self.rows) if real is None else real.sum(-1).tolist()
        excess = []
        for row, count in zip(self.rows, added, strict=True):
            row.total += count
            row.stored += count
            too_many = int(row.stored - row.total * (1 - row.ratio))
            # Of a prompt of a token or two there is nothing before the newest token to push out.
            excess.append(max(0, min(too_many, count, row.stored - 1 - row.slot)))
            row.stored -= excess[-1]
        if self.positions is None:
            return
        keep = self.positions >= 0
        if real is not None:
            keep[:, -new:] &= real
        elif not any(excess):
            return
        slots = torch.tensor([row.slot for row in self.rows], device=keep.device)[:, None]
        rank = keep.cumsum(-1) - 1
        keep &= (rank < slots) | (rank >= slots + torch.tensor(excess, device=keep.device)[:, None])
        self._keep(self.positions, keep)

    def _keep(self, positions: Tensor, keep: Tensor) -> None:
        """Keep the slots, of these positions, where `keep` is True, in their order and at the end."""
        order = keep.int().argsort(dim=-1, stable=True)[:, -max(row.stored for row in self.rows) :]
        self.positions = positions.masked_fill(~keep, -1).gather(1, order)
        index = order[:, None, :, None]
        self.keys, self.values = (cast(Tensor, x).take_along_dim(index, 2) for x in (self.keys, self.values))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` of the batch."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows `indices` of the batch."""
        super().batch_select_indices(indices)
        if self.rows:
            self.rows = [replace(self.rows[i]) for i in indices.tolist()]
        if self.positions is not None:
            self.positions = self.positions[indices.to(self.positions.device)]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back.

        Raises:
            ValueError: tokens are to be removed; what was forgotten for them cannot be restored.
        """
        if tokens_to_remove:
            raise ValueError("PrefixKV cannot take tokens back, as assisted decoding does: what it forgot is gone.")


class PrefixKVCache(DynamicCache):
    """A cache with a budget per layer, for one batch of conversations. Works only within `with PrefixKV(...)(model):`.

    The first forward is the prompt: after it the layers forget. Later tokens, one at a time or a new turn of a chat,
    are appended, and the layers stay within their budgets. Every sequence of a batch has its own. Layers with a
    sliding window forget by themselves and are left alone.

    Args:
        method: the hyper-parameters.
        config: the model's configuration.

    Raises:
        ValueError: a layer keeps something else than keys and values of its own, none has full attention, or
            `layer_forget_ratios` has not one entry per layer that does.
    """

    def __init__(self, method: PrefixKV, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.method = method
        kinds = {type(layer) for layer in self.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
        if kinds:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"PrefixKV manages full and sliding attention only, and this model also needs {names}.")
        self.layers = [PrefixKVLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        given, managed = method.layer_forget_ratios, len(self.managed)
        if not managed:
            raise ValueError("PrefixKV manages full attention only, and all layers of this model have a window.")
        if given is not None and len(given) != managed:
            raise ValueError(f"layer_forget_ratios must have {managed} entries for this model, got {len(given)}.")
        self._unattended: PrefixKVLayer | None = None

    @property
    def managed(self) -> list[PrefixKVLayer]:
        """The layers that forget."""
        return [layer for layer in self.layers if isinstance(layer, PrefixKVLayer)]

    @property
    def kept_lengths(self) -> list[list[int]]:
        """Tokens that each managed layer holds for each sequence, without padding; empty before the prompt."""
        return [[row.stored for row in layer.rows] for layer in self.managed]

    @property
    def forget_ratios(self) -> list[list[float]]:
        """Fraction that each managed layer forgets of each sequence; empty before the prompt."""
        return [[row.ratio for row in layer.rows] for layer in self.managed]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values to one layer, as every cache does.

        Raises:
            RuntimeError: the model's attention does not ask this cache for its mask.
        """
        if self._unattended is not None:
            _UPDATED.set(None)
            raise RuntimeError(
                "A PrefixKVCache works only within `with PrefixKV(...)(model):`, for the attention must use its masks."
            )
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if isinstance(layer, PrefixKVLayer):
            self._unattended = layer
            _UPDATED.set(self)
        return keys, values

    def claim(self, key: Tensor) -> PrefixKVLayer | None:
        """Return the managed layer whose update gave `key` and whose attention has not run yet, if there is one."""
        layer = self._unattended
        if layer is None or layer.keys is not key:
            return None
        self._unattended = None
        return layer

    @torch.no_grad()
    def forget(self, layer: PrefixKVLayer, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Let a layer forget after it has attended, or all of them once the prompt has passed the last.

        Args:
            layer: the layer.
            query: its queries `(batch, heads, new, dim)`.
            key: what its update returned.
            mask: the model's mask, over all positions seen.
            scaling: factor of the logits.
        """
        new, method = query.shape[2], self.method
        # The last query, which stands before no other token, attends to all that is no padding.
        real = None if mask is None or new == 1 else _is_open(mask[:, 0, -1, -new:]).expand(len(query), -1)
        if layer.seen > new:
            layer.forget_excess(real, new)
            return
        real = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool) if real is None else real
        if not method.lossless:
            layer.importance = received_attention(query, key, scaling, mask, real)
        given = method.layer_forget_ratios
        if given is not None:
            ratio = given[self.managed.index(layer)]
            layer.forget_prompt([ratio] * len(real), method.start_size, method.distance, real)
        elif layer is self.managed[-1]:
            for each, ratios in zip(self.managed, self._search(real), strict=True):
                each.forget_prompt(ratios, method.start_size, method.distance, real)

    def _search(self, real: Tensor) -> list[list[float]]:
        """Return the ratios of every layer for every sequence."""
        method, layers = self.method, self.managed
        if method.lossless:
            return [[0.0] * len(real)] * len(layers)
        importance = torch.stack([layer.importance for layer in layers if layer.importance is not None], 1).cpu()
        per_row = [
            layer_forget_ratios(scores[:, there], method.forget_ratio, method.start_size)
            for scores, there in zip(importance, real.cpu(), strict=True)
        ]
        return [list(ratios) for ratios in zip(*per_row, strict=True)]


def _is_open(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


# The cache that a layer has just updated: transformers calls its attention right after, without the cache.
_UPDATED: ContextVar[PrefixKVCache | None] = ContextVar("_UPDATED", default=None)


def _attention(base: str) -> Callable[..., Any]:
    """Return an attention function that serves a PrefixKVCache, and is that of `base` for every other."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        # The eager function, and those that an architecture overrides, live in the file of the model.
        file: Any = sys.modules[type(module).__module__]
        function = file.ALL_ATTENTION_FUNCTIONS.get_interface(base, file.eager_attention_forward)

        cache = _UPDATED.get()
        _UPDATED.set(None)
        layer = None if cache is None else cache.claim(key)
        if cache is None or layer is None:
            return function(module, query, key, value, attention_mask, **kwargs)
        output = function(module, query, key, value, layer.cut_mask(attention_mask, query), **kwargs)
        cache.forget(layer, query, key, attention_mask, kwargs.get("scaling") or query.shape[-1] ** -0.5)
        return output

    return attend


# Names under which transformers knows these functions, by the implementation that each of them extends.
_IMPLEMENTATIONS = {base: f"prefixkv_{base}" for base in ("sdpa", "eager")}
for _base, _name in _IMPLEMENTATIONS.items():
    AttentionInterface.register(_name, _attention(_base))
    AttentionMaskInterface.register(_name, AttentionMaskInterface()[_base])


@dataclass
class PrefixKV:
    """Keeps a fraction of the key-value cache, shared out so that every layer keeps the same mass of attention.

    The mass, and so the budgets of all layers, comes from a bisection. A kept token keeps its position.

        with PrefixKV(keep_ratio=0.5)(model):
            model.generate(**inputs)

    Lossy below a ratio of 1, exact at it. Deterministic. Costs the attention map of the prompt once more, in parts;
    the prompt itself still needs the full cache.

    Args:
        keep_ratio: fraction of the cache of a prompt that is kept, over all layers, in (0, 1].
        layer_forget_ratios: instead, the fraction that each layer forgets, in [0, 1), as `profile` finds them.
        start_size: first tokens of a prompt, which are never forgotten with it; nor is the last.
        distance: new tokens push out the one this far before the end of what was kept of the prompt.

    Raises:
        ValueError: both or neither of the ratios are given, or a value is out of range.
    """

    keep_ratio: float | None = None
    layer_forget_ratios: Sequence[float] | None = None
    start_size: int = 1
    distance: int = 25

    def __post_init__(self) -> None:
        if (self.keep_ratio is None) == (self.layer_forget_ratios is None):
            raise ValueError(
                "Give either keep_ratio or layer_forget_ratios, got "
                f"keep_ratio={self.keep_ratio} and layer_forget_ratios={self.layer_forget_ratios}."
            )
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must lie in (0, 1], got {self.keep_ratio}.")
        if any(not 0 <= ratio < 1 for ratio in self.layer_forget_ratios or ()):
            raise ValueError(f"layer_forget_ratios must lie in [0, 1), got {list(self.layer_forget_ratios or ())}.")
        for name, value in (("start_size", self.start_size), ("distance", self.distance)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    @property
    def forget_ratio(self) -> float:
        """Fraction of the cache that is forgotten where `keep_ratio` is given."""
        # 0.7 is to forget 0.3, not 0.30000000000000004.
        return round(1 - (1.0 if self.keep_ratio is None else self.keep_ratio), 12)

    @property
    def lossless(self) -> bool:
        """Whether nothing is ever forgotten."""
        return not any(self.layer_forget_ratios or (self.forget_ratio,))

    def cache(self, model: Any) -> PrefixKVCache:
        """Make an empty cache for `model`, to look into or to use for a chat.

        It is passed as `cache`, or as `past_key_values` before transformers 5.24.

        Raises:
            ValueError: as `PrefixKVCache`.
        """
        return PrefixKVCache(self, model.config)

    @torch.no_grad()
    def profile(self, model: Any, prompts: Iterable[Mapping[str, Any]]) -> PrefixKV:
        """Average the ratios of every layer over prompts, as the paper does once per model, so that no search is left.

        Args:
            model: a transformers model.
            prompts: what its forward takes, one mapping per batch.

        Returns:
            A copy of this method with `layer_forget_ratios`.

        Raises:
            ValueError: there are no prompts, or this method has no `keep_ratio`.
        """
        if self.keep_ratio is None:
            raise ValueError("There is nothing to profile: layer_forget_ratios are given already.")
        found: list[list[float]] = []
        with self(model):
            for prompt in prompts:
                cache = self.cache(model)
                model(**with_cache(prompt, cache), use_cache=True)
                found += map(list, zip(*cache.forget_ratios, strict=True))
        if not found:
            raise ValueError("profile needs at least one prompt, got none.")
        means = [sum(ratios) / len(found) for ratios in zip(*found, strict=True)]
        return replace(self, keep_ratio=None, layer_forget_ratios=means)

    @contextmanager
    def __call__(self, model: Any) -> Iterator[Any]:
        """Give every forward and `generate` of `model` within the block such a cache, instead of an empty plain one.

        The model is as before when the block ends.

        Raises:
            ValueError: the model's attention is neither `sdpa` nor `eager`, PrefixKV is active on it already, or its
                cache has layers that PrefixKV does not manage.
        """
        decoder = model.get_decoder()
        base = decoder.config._attn_implementation  # its setter is public, but there is no other way to read it
        if base in _IMPLEMENTATIONS.values():
            raise ValueError("PrefixKV is active on this model already: leave the other context manager first.")
        if base not in _IMPLEMENTATIONS:
            accepted = " or ".join(_IMPLEMENTATIONS)
            raise ValueError(f"PrefixKV works with the attention {accepted}, got {base!r}: set_attn_implementation.")
        self.cache(model)
        decoder.set_attn_implementation(_IMPLEMENTATIONS[base])
        handle = model.register_forward_pre_hook(self._give_cache, with_kwargs=True)
        try:
            yield model
        finally:
            handle.remove()
            decoder.set_attn_implementation(base)

    def _give_cache(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        past, use_cache = cache_of(kwargs), kwargs.get("use_cache")
        if isinstance(past, PrefixKVCache):
            return args, kwargs
        if past is None:
            if use_cache is None:
                use_cache = getattr(model.config.get_text_config(decoder=True), "use_cache", True)
            return args, with_cache(kwargs, self.cache(model)) if use_cache else kwargs
        if type(past) is not DynamicCache or past.get_seq_length():
            state = f"with {past.get_seq_length()} tokens" if type(past) is DynamicCache else ""
            raise ValueError(
                f"PrefixKV takes no cache but its own or an empty one, got a {type(past).__name__} {state}."
            )
        return args, with_cache(kwargs, self.cache(model))
