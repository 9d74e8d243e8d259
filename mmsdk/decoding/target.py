"""Models whose tokens are decoded: what they say after each node of a tree, and a cache that keeps the best path."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from mmsdk.caching import CACHE, with_cache
from mmsdk.decoding.base import Decision, Prefill
from mmsdk.decoding.tree import DraftTree

_ATTENTIONS = ("eager", "sdpa")
_CACHED = {"full_attention", "sliding_attention"}


class TargetModel(ABC):
    """What the decoder needs of a model: one forward over trees, and a state that goes on with what was accepted.

    The root of each tree is the last token of its row, which the state does not hold yet.
    """

    @property
    def room(self) -> int | None:
        """Nodes that the next trees may have, the root included; None: any number."""
        return None

    @property
    def vocab_size(self) -> int | None:
        """Number of logits; None: not known before the first forward."""
        return None

    @property
    def cost_context(self) -> Hashable:
        """What the cost of a forward depends on, besides the trees: where it is the same, it is not measured again."""
        return type(self).__name__

    @abstractmethod
    def forward_tree(self, tree: DraftTree, output_hidden_states: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return what the model says after each node, and its state there, if that is asked for.

        Args:
            tree: the drafts.
            output_hidden_states: whether to return the states of the last layer after its norm.

        Returns:
            The logits `(batch, n, vocab)` float32, and the states `(batch, n, hidden_size)` or None.
        """

    @abstractmethod
    def commit(self, decision: Decision) -> None:
        """Keep the roots and the accepted paths of the last trees; the bonus tokens are the next roots."""

    @abstractmethod
    def discard(self) -> None:
        """Forget the last trees, roots included."""

    @abstractmethod
    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in that order; the others are finished."""


class HFTarget(TargetModel):
    """A language model of transformers with its cache of keys and values.

    After a forward over trees, the accepted nodes of each row are moved behind what the row already holds, and the rest
    is cut off: a row's tokens always lie in the first slots, without gaps, so that rows may have accepted different
    numbers of tokens. A mask tells the rows what is theirs, and positions count from each row's own last token. Equals
    the model without drafts up to rounding.

    One row works in a `DynamicCache`, also with layers that have a sliding window, or in a `StaticCache` without such
    layers. Several rows always get a `DynamicCache` of their own, in which layers with a window keep everything.

    Args:
        model: a causal language model or vision-language model with eager or sdpa attention; it is not changed.

    Raises:
        TypeError: it is no model of transformers that generates.
        ValueError: the model, or its attention, cannot verify trees.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            raise TypeError(f"Expected a language model of transformers that generates, got {type(model).__name__}.")
        name = type(model).__name__
        if model.config.is_encoder_decoder:
            raise ValueError(f"{name} is an encoder-decoder model; speculative decoding works with decoder-only ones.")
        config = model.config.get_text_config(decoder=True)
        attention = config._attn_implementation  # its setter is public, but there is no other way to read it
        if attention not in _ATTENTIONS:
            reason = "aborts the process on a mask of a tree" if attention == "flex_attention" else "takes no such mask"
            raise ValueError(
                f"Trees are verified with a mask of their own, but {name} has the attention {attention!r}, which "
                f"{reason}; accepted are {', '.join(_ATTENTIONS)}: model.set_attn_implementation('sdpa')."
            )
        if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
            raise ValueError(f"{name} takes no positions, so it cannot place the nodes of a tree.")
        layers = DynamicCache(config=config).layers
        unknown = set(getattr(config, "layer_types", None) or ()) - _CACHED
        unknown |= {type(layer).__name__ for layer in layers if not _is_supported(layer)}
        windows = {layer.sliding_window for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)}
        if unknown or len(windows) > 1:
            what = ", ".join(sorted(unknown)) or f"windows of {sorted(windows)} tokens"
            raise ValueError(
                f"{name} has layers whose state cannot be cut back to a path of a tree: {what}; accepted are "
                f"{' and '.join(sorted(_CACHED))} with one size of window."
            )
        self.model: Any = model
        self._config = config
        self._is_eager = attention == "eager"
        self._window = next(iter(windows), None)
        self._is_mixed = len({isinstance(layer, DynamicSlidingWindowLayer) for layer in layers}) > 1
        self._first: tuple[Tensor, Tensor | None] | None = None
        self._capacity: int | None = None
        self._slots = 0

    @property
    def room(self) -> int | None:
        """Nodes that the next trees may have, the root included: 1 after `prefill`, which has read the first roots."""
        if self._first is not None:
            return 1
        return None if self._capacity is None else self._capacity - self._slots

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self._config.vocab_size

    @property
    def cost_context(self) -> Hashable:
        """The model, and its context up to a power of two."""
        return id(self.model), max(self._slots, 255).bit_length()

    @property
    def cache(self) -> Cache | None:
        """The cache of one row, which holds all tokens but the last one; None: there are several rows."""
        return self._cache if self._batch == 1 else None

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        **inputs: Any,
    ) -> Prefill | None:
        """Begin new sequences. Their last tokens are the roots of the first trees, which have no other nodes.

        Args:
            input_ids: `(batch, num_tokens)`, the sequences, padded on the left; or what follows those in the cache.
            attention_mask: `(batch, total)`, 0 at padding, of all tokens including those in the cache; None: all ones.
            cache: one to go on with. One row uses it; with several rows it must be empty and stays so.
            position_ids: `(..., batch, total)` as `generate` prepares them; None: counted from the mask.
            output_hidden_states: whether to return the states of the last layer after its norm.
            **inputs: what else the model takes with its prompt, such as images.

        Returns:
            The states before the roots, if they are asked for.

        Raises:
            ValueError: there are no ids, a row ends with padding, or the cache is not supported or does not fit.
        """
        batch, num_tokens = input_ids.shape
        if not input_ids.numel():
            raise ValueError(
                f"Drafts continue the ids of a prompt, but input_ids are {tuple(input_ids.shape)}: pass input_ids too "
                "where there are inputs_embeds."
            )
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask is 0 at the last token of a row: pad on the left (padding_side='left').")
        past = self._adopt(cache, batch)
        if past and output_hidden_states:
            raise ValueError(
                f"The drafter needs the states of all tokens, but {past} of them are in the cache: pass none."
            )
        if position_ids is None:
            mask = attention_mask
            if mask is None:
                mask = torch.ones(batch, past + num_tokens, dtype=torch.int64, device=input_ids.device)
            position_ids = (mask.long().cumsum(-1) - 1).clamp_min(0)
        total = position_ids.shape[-1]
        if not past < total <= past + num_tokens:
            raise ValueError(
                f"attention_mask and position_ids cover {total} tokens, but the cache holds {past} and input_ids "
                f"{num_tokens}: they must cover the whole sequence, and the cache less than that."
            )
        try:
            prepared = self.model.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=total - past,
                attention_mask=attention_mask,
                position_ids=position_ids,
                is_first_iteration=True,
                use_cache=True,
                **with_cache(inputs, self._cache),
            )
            # Some models count from 1, and others place their tokens by what they have kept from the prompt.
            last = prepared.get("position_ids")
            if last is None:
                raise ValueError(
                    f"{type(self.model).__name__} takes no positions, so it cannot place the nodes of a tree."
                )
            output = self.model(**prepared, output_hidden_states=output_hidden_states, return_dict=True)
        except BaseException:
            self.restore()
            raise
        # After the prompt, of which layers with a window need only the end.
        self._cache.activate_past_recording()
        device = self.model.device
        self._prompt_slots = self._slots = total - 1
        self._lengths = [self._slots] * batch
        self._num_nodes = 1
        self._is_prompt = None if attention_mask is None else attention_mask[:, :-1].to(device, torch.bool)
        last = last[..., -1:].to(device)
        self._last_position = last.expand(*last.shape[:-2], batch, 1)
        logits, states = output.logits[:, -1:].float().to(input_ids.device), None
        if output_hidden_states:
            states = output.hidden_states[-1]
        self._first = logits, None if states is None else states[:, -1:]
        if states is None:
            return None
        is_prompt = self._is_prompt
        if is_prompt is None:
            is_prompt = torch.ones(states[:, :-1].shape[:2], dtype=torch.bool, device=states.device)
        return Prefill(states[:, :-1], is_prompt)

    @torch.no_grad()
    def forward_tree(self, tree: DraftTree, output_hidden_states: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return what the model says after each node, and its state there, if that is asked for.

        The first trees, which are roots alone, were read by `prefill`.

        Args:
            tree: the drafts, with the last token of each row as their root.
            output_hidden_states: whether to return the states of the last layer after its norm.

        Returns:
            The logits `(batch, n, vocab)` float32, and the states `(batch, n, hidden_size)` or None.

        Raises:
            ValueError: there is no room for so many nodes.
        """
        if self.room is not None and tree.num_nodes > self.room:
            raise ValueError(f"There is room for trees of {self.room} nodes, got {tree.num_nodes}.")
        if self._first is not None:
            first, self._first = self._first, None
            return first
        device = self.model.device
        places = torch.tensor(self._lengths, device=device)[:, None] + tree.depths.to(device)
        self._num_nodes = tree.num_nodes
        output = self.model(
            input_ids=tree.tokens.to(device),
            attention_mask=self._masks(tree.mask.to(device), places),
            position_ids=self._last_position + (places - self._prompt_slots),
            use_cache=True,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **{CACHE: self._cache},
        )
        return output.logits.float().to(tree.tokens.device), output.hidden_states[-1] if output_hidden_states else None

    def commit(self, decision: Decision) -> None:
        """Keep the roots and the accepted paths of the last trees; the bonus tokens are the next roots.

        Args:
            decision: what was accepted; entries of `path` behind a row's length are ignored.
        """
        lengths = decision.lengths.tolist()
        kept = [[0, *path[:length]] for path, length in zip(decision.path.tolist(), lengths, strict=True)]
        most = max(map(len, kept))
        rows = list(zip(self._lengths, kept, strict=True))
        if any(held + i != self._slots + node for held, nodes in rows for i, node in enumerate(nodes)):
            device = self._last_position.device
            sources = torch.tensor(
                [[self._slots + node for node in nodes + [0] * (most - len(nodes))] for nodes in kept]
            )
            targets = torch.tensor([[held + i for i in range(most)] for held, _ in rows])
            for layer in self._layers:
                # Layers with a window no longer hold their first slots. The model has just made or written the tensors
                # that are changed here: nobody else holds them.
                gone = max(0, self._slots + self._num_nodes - layer.keys.shape[-2])
                for states in (layer.keys, layer.values):
                    shape = (-1, states.shape[1], -1, states.shape[-1])
                    source = (sources - gone).to(device)[:, None, :, None].expand(shape)
                    target = (targets - gone).to(device)[:, None, :, None].expand(shape)
                    states.scatter_(-2, target, states.gather(-2, source))
        self._lengths = [held + len(nodes) for held, nodes in rows]
        self._cut(self._slots + self._num_nodes)

    def discard(self) -> None:
        """Forget the last trees, roots included."""
        self._cut(self._slots + self._num_nodes)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in that order; the others are finished."""
        if list(rows) == list(range(len(self._lengths))):
            return
        index = torch.tensor(rows, device=self._last_position.device)
        self._cache.batch_select_indices(index)
        self._lengths = [self._lengths[row] for row in rows]
        self._is_prompt = None if self._is_prompt is None else self._is_prompt[index]
        self._last_position = self._last_position.index_select(-2, index)
        self._cut(self._slots)

    def release(self) -> None:
        """Let the cache go on without being cut back."""
        for layer, (_, _, _, record_past) in self._windowed.items():
            layer.record_past = record_past

    def restore(self) -> None:
        """Bring the cache back to what it held before `prefill`, whatever a forward that failed has left in it."""
        if not self._past:
            self._cache.reset()
        for layer in self._layers if self._past else ():
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.fill_(self._past)
            elif layer in self._windowed:
                layer.keys, layer.values, layer.cumulative_length, _ = self._windowed[layer]
            else:
                layer.crop(self._past - layer.get_seq_length())
        self.release()

    @property
    def _layers(self) -> list[Any]:
        """The layers of the cache, all of kinds that have keys and values: see `_is_supported`."""
        return self._cache.layers

    def _adopt(self, cache: Cache | None, batch: int) -> int:
        """Take over a cache, or make one, and return how many tokens it holds."""
        if cache is not None and not isinstance(cache, (DynamicCache, StaticCache)):
            raise ValueError(f"The cache must be a DynamicCache or a StaticCache, got {type(cache).__name__}.")
        if cache is None:
            cache = DynamicCache(config=self._config)
        unsupported = {type(layer).__name__ for layer in cache.layers if not _is_supported(layer)}
        if unsupported or cache.offloading:
            raise ValueError(
                f"A {type(cache).__name__} with {', '.join(sorted(unsupported)) or 'offloading'} cannot be cut back to "
                "a path of a tree; accepted are DynamicCache, and StaticCache for models without sliding windows."
            )
        past = int(cache.get_seq_length())
        if batch > 1:
            if past or isinstance(cache, StaticCache):
                raise ValueError(
                    f"Rows accept different numbers of tokens, so that {batch} rows cannot go on in a cache that is "
                    f"passed; got a {type(cache).__name__} of {past} tokens. Pass none, or one row at a time."
                )
            cache = DynamicCache()
        self._cache, self._past, self._batch = cache, past, batch
        self._capacity = cache.get_max_length() if isinstance(cache, StaticCache) else None
        self._windowed = {
            layer: (layer.keys, layer.values, layer.cumulative_length, layer.record_past)
            for layer in cache.layers
            if isinstance(layer, DynamicSlidingWindowLayer)
        }
        return past

    def _cut(self, slots: int) -> None:
        """Remove what lies behind the longest row, of `slots` that are in use."""
        self._slots, self._num_nodes = max(self._lengths), 0
        for layer in self._layers:
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.fill_(self._slots)
            else:
                layer.crop(self._slots - slots)

    def _masks(self, is_ancestor: Tensor, places: Tensor) -> Tensor | dict[str, Tensor]:
        """Return what each node may attend to: what its row holds, its ancestors and itself.

        Args:
            is_ancestor: the mask of the trees, bool `(batch, n, n)`.
            places: `(batch, n)`, the slot that each node would have, were it accepted.
        """
        slots = torch.arange(self._slots, device=places.device)
        held = slots < places[:, :1]
        if self._is_prompt is not None:
            held[:, : self._prompt_slots] &= self._is_prompt
        num_nodes = places.shape[1]
        mask = torch.cat([held[:, None].expand(-1, num_nodes, -1), is_ancestor], -1)
        if self._window is None:
            return self._finish(mask)
        distance = places[:, :, None] - torch.cat([slots.expand(len(places), -1), places], 1)[:, None]
        width = mask.shape[-1]
        for layer in self._windowed:
            width, _ = layer.get_mask_sizes(num_nodes)
        near = self._finish((mask & (distance < self._window))[..., -width:])
        return {"full_attention": self._finish(mask), "sliding_attention": near} if self._is_mixed else near

    def _finish(self, mask: Tensor) -> Tensor:
        """Return a mask `(batch, n, slots)` as the attention takes it."""
        if self._capacity is not None:
            mask = F.pad(mask, (0, self._capacity - mask.shape[-1]))
        mask = mask[:, None]
        if not self._is_eager:
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _is_supported(layer: Any) -> bool:
    """Return whether a layer of a cache can be cut back; subclasses may hold more than keys and values."""
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)
