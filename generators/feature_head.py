"""A draft head over a generator's hidden states, and the drafter that grows trees with it.

Jang et al., 2024, "LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding" (arXiv
2410.03355), after Li et al., 2024, "EAGLE" and "EAGLE-2" (arXiv 2401.15077, 2406.16858).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Generator, Tensor, nn

from generators.guidance import combine
from generators.llamagen import (
    PRESETS,
    LlamaGen,
    LlamaGenState,
    TransformerBlock,
    check_sizes,
    convert_llama_keys,
    rotary_table,
    translate_llama_config,
)
from generators.speculation import ConditionedDrafter, Conditions
from mmsdk.decoding.base import CHOSEN, WITHOUT_REPLACEMENT, Prefill, Verified
from mmsdk.decoding.drafters.rows import check_at_least, check_prompts, check_verified
from mmsdk.decoding.sampling import check_sampling, process_logits
from mmsdk.decoding.tree import DraftTree
from mmsdk.errors import CheckpointError
from mmsdk.loading import load_into, load_original
from mmsdk.modeling import PretrainedModel

# Paths of ranks of the static tree that EAGLE publishes as mc_sim_7b_63: (0, 1) is the second best successor of the
# best successor of the root.
MC_SIM_7B_63: tuple[tuple[int, ...], ...] = tuple(
    tuple(int(rank) for rank in path)
    for path in ("0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001").split()
)


class FeatureHead(PretrainedModel):
    """Predicts the next hidden state of a LlamaGen from the last one and the token that was drawn from it.

    The generator's output layer makes logits of the prediction, so that the head drafts with a single layer what the
    generator writes with many. A pair `(hidden state i, token i + 1)` stands at the position of its token; where that
    is a condition token, the pair carries token 0, as published. Token embeddings and output layer are the generator's,
    frozen, and neither stored nor trained here.

    Args:
        hidden_size: width of the generator.
        num_layers: number of blocks; the first has no norm before its attention.
        num_heads: attention heads.
        intermediate_size: width of the feed-forward layers.
        codebook_size: number of different image tokens of the generator.
        max_tokens: image tokens of a full image; a square number with rotary positions.
        num_condition_tokens: positions of the generator before the image.
        positions: `"rope2d"` or `"learned"`, as in `LlamaGen`.
        rope_base: base of the rotary frequencies.
        norm_eps: epsilon of the RMS norms.
        reads_padding: whether the states of a caption's padding are read, which the published heads were trained with;
            the generator then needs `padding_attends`.
        initializer_range: standard deviation of the initial weights.

    Raises:
        ValueError: sizes are not positive or do not fit each other.
    """

    registry_name = "feature_head"

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 1280,
        num_layers: int = 1,
        num_heads: int = 20,
        intermediate_size: int = 3584,
        codebook_size: int = 16384,
        max_tokens: int = 256,
        num_condition_tokens: int = 120,
        positions: str = "rope2d",
        rope_base: float = 10000.0,
        norm_eps: float = 1e-6,
        reads_padding: bool = False,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        check_sizes(
            positions,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            intermediate_size=intermediate_size,
            codebook_size=codebook_size,
            max_tokens=max_tokens,
            num_condition_tokens=num_condition_tokens,
        )
        self.fc = nn.Linear(2 * hidden_size, hidden_size)
        self.position_embedding = (
            nn.Embedding(num_condition_tokens + max_tokens, hidden_size) if positions == "learned" else None
        )
        self.layers = nn.ModuleList(
            TransformerBlock(hidden_size, num_heads, intermediate_size, norm_eps, 0.0, 0.0) for _ in range(num_layers)
        )
        self.layers[0].attention_norm = nn.Identity()
        self._rotary_table: Tensor | None = None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=initializer_range)
        nn.init.zeros_(self.fc.bias)

    @classmethod
    def for_generator(cls, generator: LlamaGen, **overrides: Any) -> FeatureHead:
        """Build a head with new weights that fits a generator.

        Args:
            generator: the model to draft for.
            **overrides: configuration values to change, such as `num_layers`.

        Raises:
            ValueError: the generator writes several tokens at once, or a value does not fit.
        """
        names = ("hidden_size", "num_heads", "codebook_size", "max_tokens", "num_condition_tokens", "positions")
        config: dict[str, Any] = {name: generator.config[name] for name in (*names, "rope_base", "norm_eps")}
        block: Any = generator.layers[0]
        config["intermediate_size"] = block.feed_forward.w1.out_features
        config["reads_padding"] = generator.padding_attends
        head = cls(**(config | overrides))
        head.check_generator(generator)
        return head

    @classmethod
    def from_original(cls, checkpoint: Any, config: Mapping[str, Any] | None = None) -> FeatureHead:
        """Load a draft head in LANTERN's format.

        Its `embed_tokens` must be there, but is left out: it is the generator's, which was frozen in training.

        Args:
            checkpoint: path, or state dict.
            config: values that the shapes do not tell, as in the published `config.json`: `num_attention_heads` (by
                default that of the published LlamaGen of this width), `block_size` (256 tokens), `cls_token_num` (119
                condition tokens, without the first, which begins no pair), `rms_norm_eps` (1e-6).

        Raises:
            CheckpointError: keys or shapes do not fit, or a needed value is neither given nor known.
        """
        state_dict = convert_llama_keys(load_original(checkpoint))
        try:
            embedding = state_dict.pop("embed_tokens.weight")
            values = {
                "codebook_size": embedding.shape[0],
                "hidden_size": embedding.shape[1],
                "num_layers": 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("layers.")),
                "intermediate_size": state_dict["layers.0.feed_forward.w1.weight"].shape[0],
                "num_heads": next((h for _, h, width in PRESETS.values() if width == embedding.shape[1]), None),
                "reads_padding": True,
            }
        except (KeyError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"This is no draft head of LANTERN: {error} is missing or has no fitting shape."
            ) from error
        values |= translate_llama_config(config or {})
        if config is not None and "cls_token_num" in config:
            values["num_condition_tokens"] = config["cls_token_num"] + 1
        if values["num_heads"] is None:
            raise CheckpointError(
                "The checkpoint does not tell num_attention_heads; pass it, as in config={'num_attention_heads': 20}."
            )
        head = cls(**values)
        load_into(head, state_dict)
        return head.eval()

    def check_generator(self, generator: LlamaGen) -> None:
        """Check that this head can draft for a generator.

        Raises:
            TypeError: it is no LlamaGen.
            ValueError: it has other sizes, writes several tokens at once, or gives padding no states to read.
        """
        if not isinstance(generator, LlamaGen):
            raise TypeError(f"A FeatureHead drafts for a LlamaGen, got {type(generator).__name__}.")
        if generator.tokens_per_step != 1:
            raise ValueError(
                f"A FeatureHead predicts one token after the other, but {type(generator).__name__} writes "
                f"{generator.tokens_per_step} at once."
            )
        for name in ("hidden_size", "codebook_size", "num_condition_tokens"):
            if self.config[name] != generator.config[name]:
                raise ValueError(
                    f"The head was made for a generator with {name}={self.config[name]}, but this one has "
                    f"{generator.config[name]}: they do not belong together."
                )
        if self.config.max_tokens < generator.config.max_tokens:
            raise ValueError(
                f"The head has positions for {self.config.max_tokens} tokens, but the generator writes up to "
                f"{generator.config.max_tokens}."
            )
        if self.config.reads_padding and generator.config.condition == "text" and not generator.padding_attends:
            raise ValueError(
                "The head reads the states of padding (reads_padding), so it needs a generator with "
                "padding_attends=True, as LlamaGen.from_original makes it of LANTERN's version."
            )

    def forward(
        self,
        embeddings: Tensor,
        hidden_states: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        state: LlamaGenState | None = None,
    ) -> Tensor:
        """Predict the hidden state at each token from the one before it.

        Args:
            embeddings: `(rows, length, hidden_size)` of the tokens, as the generator embeds them.
            hidden_states: `(rows, length, hidden_size)` of the generator's last layer after its norm, each one position
                before its token.
            positions: `(length,)` or `(rows, length)`, of the tokens in the generator's sequence, the condition
                included; 1, 2, 3, ... by default.
            mask: bool `(rows, length, held + length)`, which pairs each one attends to; causal by default.
            state: pairs that precede these; they are appended to it.

        Returns:
            `(rows, length, hidden_size)`.
        """
        hidden = self.fc(torch.cat([embeddings, hidden_states], -1))
        if positions is None:
            positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        rotary = None
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(positions)
        else:
            rotary = self._rotations(hidden.device)[positions].unsqueeze(-2).unsqueeze(-2)
        mask = None if mask is None else mask[:, None]
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, rotary, mask, mask is None, None if state is None else state.layer(i))
        if state is not None:
            state.append(hidden.shape[1])
        return hidden

    def _rotations(self, device: torch.device) -> Tensor:
        if self._rotary_table is None or self._rotary_table.device != device:
            config = self.config
            # No buffer, and made outside of inference mode, for the reasons given in LlamaGen.
            with torch.inference_mode(False):
                self._rotary_table = rotary_table(
                    math.isqrt(config.max_tokens),
                    config.hidden_size // config.num_heads,
                    config.rope_base,
                    config.num_condition_tokens,
                ).to(device)
        return self._rotary_table


class _Level(NamedTuple):
    """What a static tree does at one depth; nodes are counted over the whole tree, slots over its expanded nodes.

    Attributes:
        expanded: `(w,)`, nodes that have children.
        sources: `(w,)`, which of the nodes expanded at the depth before are their parents.
        ancestors: bool `(w, slots)`, which slots below the root they attend to, their own included.
        children: `(c,)`, their children.
        slots: `(c,)`, which of the expanded nodes each child has as its parent.
        ranks: `(c,)`, rank of each child among its siblings.
        most: most children of a node.
    """

    expanded: Tensor
    sources: Tensor
    ancestors: Tensor
    children: Tensor
    slots: Tensor
    ranks: Tensor
    most: int


class _Pairs(NamedTuple):
    """Tokens `(batch, n)`, the states before them `(rows, n, hidden_size)`, how many count in each row `(batch,)`."""

    ids: Tensor
    hidden_states: Tensor
    counts: Tensor


@dataclass(eq=False)
class FeatureDrafter(ConditionedDrafter):
    """Grows trees of candidates with a `FeatureHead`, from the hidden states of the generator that verifies them.

    Papers: EAGLE for static trees, EAGLE-2 for dynamic ones, LANTERN for images. The head goes on from the true states
    of what was accepted, and below the root from its own predictions. Drafts are guided as the generation is: logits
    `u + (c - u) s` of rows with and without the condition.

    A dynamic tree expands at each depth the `tree_top_k` nodes with the largest sums of log-probabilities, and keeps
    the best `total_tokens` of all nodes. A static tree has the shape of `tree_choices`, with the most probable
    children; or with `do_sample`, with children drawn without replacement, from distributions that the tree tells
    (`DraftTree.probs`). A row's draws depend on nothing but its generator. A smaller budget keeps the nodes of a static
    tree with the most others behind them. Deterministic but for `do_sample`.

    Stores keys and values of the head for each row, twice that where guided; after a rejection they are those of what
    was accepted. Cost: one forward of the head over all rows for each depth, the deepest excepted, and one over what
    was accepted.

    Attributes:
        head: the draft head, in evaluation mode.
        generator: the model to draft for, of which embeddings and output layer are used.
        total_tokens: nodes of a dynamic tree, the root included.
        depth: how often a dynamic tree is expanded below the root; its deepest nodes are one deeper.
        tree_top_k: nodes to expand at each depth of a dynamic tree, and children of each.
        tree_choices: paths of ranks, without the root, of a static tree such as `MC_SIM_7B_63`; None: dynamic.
        do_sample: draw the children of a static tree.
        temperature: divides the logits that are drawn from.
        top_k: keeps this many ids to draw from; 0 keeps all.
        top_p: keeps the most probable ids up to this sum to draw from.

    Raises:
        TypeError: the generator is no LlamaGen.
        ValueError: the head was made for another generator, or a setting is out of its range.
    """

    needs_hidden_states: ClassVar[bool] = True

    head: FeatureHead = field(repr=False)
    generator: LlamaGen = field(repr=False)
    total_tokens: int = 59
    depth: int = 4
    tree_top_k: int = 10
    tree_choices: Sequence[Sequence[int]] | None = field(default=None, repr=False)
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    # Last token of each row, and the head's prediction there, `(rows, 1, hidden_size)`.
    _root: Tensor = field(init=False, repr=False)
    _features: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.head.check_generator(self.generator)
        check_at_least("total_tokens", self.total_tokens, 2)
        check_at_least("depth", self.depth, 0)
        check_at_least("tree_top_k", self.tree_top_k, 1)
        check_sampling(self.temperature, self.top_k, self.top_p)
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError("temperature, top_k and top_p change nothing without do_sample=True.")
        if self.do_sample and self.tree_choices is None:
            raise ValueError("A dynamic tree keeps its most probable nodes; do_sample=True needs tree_choices.")
        self.vocab_size = self.generator.config.codebook_size
        self._paths = [] if self.tree_choices is None else _check_paths(self.tree_choices, self.vocab_size)
        self._width = min(self.tree_top_k, self.vocab_size)
        self._scales: Sequence[float] = (1.0,)
        self._batch = 0
        self._plans: dict[int, tuple[Tensor, list[_Level]]] = {}

    @property
    def drawing(self) -> str:
        """How candidates are found."""
        return WITHOUT_REPLACEMENT if self.do_sample else CHOSEN

    # ------------------------------------------------------------------------------------------------ sequences

    def condition(self, conditions: Conditions) -> None:
        """Take the guidance scales of the images that are to be written next; without, they are not guided."""
        self._scales = conditions.scales

    @torch.no_grad()
    def reset(self, prompts: Sequence[Tensor], prefill: Prefill | None = None) -> None:
        """Begin new sequences.

        Args:
            prompts: for each row the image tokens so far, 1-D int64, the last one included; as many in each row.
            prefill: the generator's states at all positions before the last token, from the condition on. Padding that
                the captions share may be left out.

        Raises:
            ValueError: there is no `prefill`, or the shapes do not fit each other or the generator.
        """
        config = self.generator.config
        check_prompts(prompts, self.vocab_size)
        if len({len(prompt) for prompt in prompts}) > 1:
            raise ValueError(f"The rows must have equally many tokens, got {[len(prompt) for prompt in prompts]}.")
        if prefill is None:
            raise ValueError("A FeatureDrafter goes on from the generator's hidden states: pass prefill.")
        tokens, states = torch.stack(list(prompts)), prefill.hidden_states
        batch, most = len(prompts), config.num_condition_tokens + tokens.shape[1] - 1
        is_guided = any(scale != 1.0 for scale in self._scales)
        rows, width = batch * (1 + is_guided), config.hidden_size
        if (*states.shape[:1], *states.shape[2:]) != (rows, width) or not tokens.shape[1] <= states.shape[1] <= most:
            raise ValueError(
                f"prefill.hidden_states must be ({rows}, {tokens.shape[1]} to {most}, {width}) for {batch} rows of "
                f"{tokens.shape[1]} tokens {'with' if is_guided else 'without'} guidance, got {tuple(states.shape)}."
            )
        if prefill.mask.shape != states.shape[:2]:
            raise ValueError(f"prefill.mask must be {tuple(states.shape[:2])}, got {tuple(prefill.mask.shape)}.")
        length = states.shape[1]
        self._batch, self._times = batch, 1 + is_guided
        self._skipped = most - length
        self._valid = prefill.mask.bool() | self.head.config.reads_padding
        self._scale_table = torch.tensor(self._scales, device=states.device)
        # Room for every token, for a tree, and for what it brings to the longest row.
        slots = max(self._width * self.depth, len(self._paths)) + self.depth + len(self._paths) + 2
        head_dim = self.head.config.hidden_size // self.head.config.num_heads
        shape = (self.head.config.num_layers, 2, len(states), self.head.config.num_heads)
        cache = states.new_empty(*shape, length + config.max_tokens + slots, head_dim)
        self._state = LlamaGenState(cache, length, self._skipped, None)
        self._lengths = torch.zeros(batch, dtype=torch.int64, device=states.device)
        self._pending: list[_Pairs] = []
        ids = F.pad(tokens, (length - tokens.shape[1], 0))
        self._state.condition_hidden_states = self._read(_Pairs(ids, states, torch.full_like(self._lengths, length)))

    @torch.no_grad()
    def observe(self, verified: Verified) -> None:
        """Note the accepted path and the bonus token of each row, which now end the sequences.

        Raises:
            RuntimeError: `reset` was not called before.
            ValueError: the number of rows or the vocabulary differs, or the hidden states are missing.
        """
        check_verified(verified, self._batch, self.vocab_size)
        tree, states = verified.tree, verified.hidden_states
        expected = (self._batch * self._times, tree.num_nodes, self.generator.config.hidden_size)
        if states is None or tuple(states.shape) != expected:
            raise ValueError(
                f"A FeatureDrafter needs the generator's hidden states of all nodes, {expected}, got "
                f"{None if states is None else tuple(states.shape)}."
            )
        lengths = verified.decision.lengths
        path = verified.decision.path.clamp_min(0)[:, : int(lengths.max())]
        ids = F.pad(tree.tokens.gather(1, path), (0, 1)).scatter(1, lengths[:, None], verified.decision.bonus[:, None])
        # Read when the next tree is wanted: rounds without one cost nothing here.
        self._pending.append(_Pairs(ids, self._rows_of(states, F.pad(path, (1, 0))), lengths + 1))

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in that order; the others are finished."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._lengths.device)
        both = torch.cat([index + part * self._batch for part in range(self._times)])
        self._state.select_rows(both)
        self._root, self._lengths = self._root[index], self._lengths[index]
        self._features, self._valid = self._features[both], self._valid[both]
        self._pending = [_Pairs(ids[index], states[both], counts[index]) for ids, states, counts in self._pending]
        self._batch = len(rows)

    @torch.no_grad()
    def _catch_up(self) -> None:
        """Read what was accepted since the last tree; at once, as far as all rows accepted equally many."""
        run: list[_Pairs] = []
        for i, pairs in enumerate(self._pending):
            run.append(pairs)
            if i == len(self._pending) - 1 or bool((pairs.counts != pairs.ids.shape[1]).any()):
                ids, states, counts = zip(*run, strict=True)
                before = sum(part.shape[1] for part in ids[:-1])
                self._read(_Pairs(torch.cat(ids, 1), torch.cat(states, 1), before + counts[-1]))
                run = []
        self._pending = []

    def _read(self, pairs: _Pairs) -> Tensor:
        """Append pairs to the sequences and return the head's predictions, of which the last of each row is kept."""
        ids, states, counts = pairs
        steps = torch.arange(ids.shape[1], device=ids.device)
        causal = (steps[:, None] >= steps).expand(len(states), -1, -1)
        if not self._state.length:
            # Padding attends to itself, so that no row is empty.
            causal = causal & (self._valid[:, None] | (steps[:, None] == steps))
        positions = (self._skipped + 1 + self._lengths[:, None] + steps).repeat(self._times, 1)
        start = self._state.length
        features = self._forward(ids, states, positions, causal)
        if bool((counts != counts[0]).any() | (self._lengths != start).any()):
            self._state.commit_rows(steps.expand(len(states), -1), self._lengths.repeat(self._times))
        self._lengths = self._lengths + counts
        self._state.rollback(int(self._lengths.max()))
        last = (counts - 1)[:, None]
        self._root = ids.gather(1, last)[:, 0]
        self._features = self._rows_of(features, last)
        return features

    # ------------------------------------------------------------------------------------------------ trees

    @torch.no_grad()
    def propose(self, budget: int, generators: Sequence[Generator] | None = None) -> DraftTree:
        """Return a tree for each row, with the row's last token as its root and at most `budget` candidates.

        Raises:
            RuntimeError: `reset` was not called before.
            ValueError: the budget is negative, or there is not one generator for each row.
        """
        check_at_least("budget", budget, 0)
        if not self._batch:
            raise RuntimeError("The drafter has no sequences: call `reset(prompts, prefill)` first.")
        if generators is not None and len(generators) != self._batch:
            raise ValueError(f"Expected one generator for each of {self._batch} rows, got {len(generators)}.")
        self._catch_up()
        if budget == 0:
            return DraftTree(self._root[:, None], torch.full_like(self._root[:, None], -1))
        start = self._state.length
        tree = self._dynamic(budget) if self.tree_choices is None else self._static(budget, generators)
        self._state.rollback(start)
        return tree

    def _dynamic(self, budget: int) -> DraftTree:
        """Return the nodes with the largest sums of log-probabilities."""
        width, size = self._width, min(self.total_tokens - 1, budget)
        best = torch.log_softmax(self._logits(self._features, 0), -1)[:, 0].topk(width)
        ids, scores = best.indices, best.values
        tokens, totals, parents = [ids], [scores], [torch.zeros_like(ids)]
        # What is expanded next: its tokens, scores, numbers in the tree, the states before it, and its ancestors.
        nodes = torch.arange(1, width + 1, device=ids.device).expand_as(ids)
        states = self._features.expand(-1, width, -1)
        own = torch.eye(width, dtype=torch.bool, device=ids.device).expand(self._batch, -1, -1)
        ancestors = own
        # A node is no better than its ancestors, so that none of the best `size` is deeper than that.
        for depth in range(1, min(self.depth + 1, size)):
            features = self._expand(ids, states, ancestors, depth)
            best = torch.log_softmax(self._logits(features, depth), -1).topk(width)
            children = (best.values + scores[..., None]).flatten(1)
            tokens.append(best.indices.flatten(1))
            totals.append(children)
            parents.append(nodes.repeat_interleave(width, 1))
            scores, chosen = children.topk(width)
            sources = chosen // width
            ids = tokens[-1].gather(1, chosen)
            nodes = 1 + width + (depth - 1) * width**2 + chosen
            states = self._rows_of(features, sources)
            ancestors = torch.cat([ancestors.gather(1, sources[..., None].expand(-1, -1, ancestors.shape[2])), own], -1)
        # Of equal scores the first, so that a parent comes before a child that is certain.
        order = torch.cat(totals, 1).sort(dim=1, descending=True, stable=True).indices
        kept = order[:, :size].sort(dim=1).values + 1
        places = torch.zeros(self._batch, 1 + order.shape[1], dtype=torch.int64, device=ids.device)
        places.scatter_(1, kept, torch.arange(1, kept.shape[1] + 1, device=ids.device).expand_as(kept))
        above = places.gather(1, torch.cat(parents, 1).gather(1, kept - 1))
        return DraftTree(
            torch.cat([self._root[:, None], torch.cat(tokens, 1).gather(1, kept - 1)], 1),
            F.pad(above, (1, 0), value=-1),
        )

    def _static(self, budget: int, generators: Sequence[Generator] | None) -> DraftTree:
        """Return a tree of the given shape."""
        if self.do_sample and generators is None:
            generators = [Generator() for _ in range(self._batch)]
            for generator in generators:
                generator.seed()
        order, levels = self._plan(budget)
        parents = order.repeat(self._batch, 1)
        tokens = F.pad(self._root[:, None], (0, len(order) - 1))
        probs = None
        features = self._features
        for depth, level in enumerate(levels):
            if depth:
                states = features[:, level.sources]
                ancestors = level.ancestors.expand(self._batch, -1, -1)
                features = self._expand(tokens[:, level.expanded], states, ancestors, depth)
            logits = self._logits(features, depth)
            if not self.do_sample:
                ids = logits.topk(level.most).indices
            else:
                drawn_from = torch.softmax(self._process(logits), -1)
                ids = self.draw(drawn_from, level.most, generators or ())
                if probs is None:
                    probs = torch.zeros(self._batch, len(order), logits.shape[-1], device=logits.device)
                probs[:, level.expanded] = drawn_from
                # There may be fewer ids to draw than children; those left over are no candidates, nor what follows.
                possible = drawn_from.gather(-1, ids)[:, level.slots, level.ranks] > 0
                lost = ~possible | ((parents[:, level.expanded] < 0) & (level.expanded > 0))[:, level.slots]
                parents[:, level.children] = parents[:, level.children].masked_fill(lost, -1)
            tokens[:, level.children] = ids[:, level.slots, level.ranks]
        return DraftTree(tokens, parents, probs)

    def draw(self, probs: Tensor, count: int, generators: Sequence[Generator]) -> Tensor:
        """Draw ids without replacement.

        The ids with the largest ratio of probability and exponential noise are such a draw, in its order. It is the way
        of `torch.multinomial`, and gives the same ids for a row as that with its generator.

        Args:
            probs: `(batch, n, vocab)`.
            count: ids to draw from each distribution.
            generators: one for each row.

        Returns:
            `(batch, n, count)`; ids of probability 0 come last, where there are not enough others.
        """
        noise = [
            torch.empty(probs.shape[1:], device=generator.device).exponential_(generator=generator)
            for generator in generators
        ]
        return (probs / torch.stack(noise).to(probs.device)).topk(count).indices

    def _process(self, logits: Tensor) -> Tensor:
        return process_logits(logits, self.temperature, self.top_k, self.top_p)

    def _plan(self, budget: int) -> tuple[Tensor, list[_Level]]:
        """Return the parents `(n,)` of a static tree within a budget, and what to do at each depth."""
        if budget not in self._plans:
            nodes = [(), *_most_important(self._paths, budget)]
            where = {path: i for i, path in enumerate(nodes)}
            inner = [path for path in nodes if (*path, 0) in where]
            device = self._lengths.device
            levels = []
            for depth in range(len(nodes[-1])):
                expanded = [path for path in inner if len(path) == depth]
                before = [path for path in inner if len(path) == depth - 1]
                slots = [path for path in inner if 0 < len(path) <= depth]
                children = [path for path in nodes if len(path) == depth + 1]
                levels.append(
                    _Level(
                        torch.tensor([where[path] for path in expanded], device=device),
                        torch.tensor([before.index(path[:-1]) for path in expanded if path], device=device),
                        torch.tensor([[path[: len(s)] == s for s in slots] for path in expanded], device=device),
                        torch.tensor([where[path] for path in children], device=device),
                        torch.tensor([expanded.index(path[:-1]) for path in children], device=device),
                        torch.tensor([path[-1] for path in children], device=device),
                        1 + max(path[-1] for path in children),
                    )
                )
            self._plans[budget] = torch.tensor([where[p[:-1]] if p else -1 for p in nodes], device=device), levels
        return self._plans[budget]

    # ------------------------------------------------------------------------------------------------ the head

    def _expand(self, ids: Tensor, states: Tensor, ancestors: Tensor, depth: int) -> Tensor:
        """Return the head's predictions `(rows, w, hidden_size)` at nodes `ids` `(batch, w)` of one depth.

        Args:
            ids: their tokens.
            states: `(rows, w, hidden_size)`, the predictions at their parents.
            ancestors: bool `(batch, w, slots)`, which nodes that were expanded they attend to, themselves included.
            depth: steps from the root.
        """
        positions = (self._skipped + self._lengths + depth)[:, None].repeat(self._times, 1)
        return self._forward(ids, states, positions, ancestors.repeat(self._times, 1, 1))

    def _forward(self, ids: Tensor, states: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Append pairs, which attend to those of each row's sequence and as `mask` says to what came after these."""
        later = mask.shape[2] - ids.shape[1]
        slots = torch.arange(self._state.length - later, device=ids.device)
        held = (slots < self._lengths[:, None]).repeat(self._times, 1)
        held[:, : self._valid.shape[1]] &= self._valid[:, : held.shape[1]]
        mask = torch.cat([held[:, None].expand(-1, ids.shape[1], -1), mask], -1)
        embeddings = self.generator.embed_tokens(ids).repeat(self._times, 1, 1)
        # Nodes behind the last token of an image are never kept; they need any position.
        last = self.head.config.num_condition_tokens + self.head.config.max_tokens - 1
        return self.head(embeddings, states, positions.clamp_max(last), mask, self._state)

    def _logits(self, features: Tensor, depth: int) -> Tensor:
        """Return the guided logits `(batch, w, vocab)` float32 of predictions `(rows, w, hidden_size)` at a depth."""
        if self._times > 1:
            places = self._lengths + self._skipped - self.generator.config.num_condition_tokens + 1 + depth
            scales = self._scale_table[places.clamp_max(len(self._scale_table) - 1)][:, None, None]
            cond, uncond = features.float().chunk(2)
            features = combine(cond, uncond, scales).to(features.dtype)
        return self.generator.predict(features).float()

    def _rows_of(self, states: Tensor, index: Tensor) -> Tensor:
        """Return `states` `(rows, n, hidden_size)` at `index` `(batch, k)`, the same for both parts of the rows."""
        return states.gather(1, index.repeat(self._times, 1)[..., None].expand(-1, -1, states.shape[2]))


def _check_paths(choices: Sequence[Sequence[int]], vocab: int) -> list[tuple[int, ...]]:
    """Return paths in the order of depth, then of ranks; raise `ValueError` unless they are those of a tree."""
    paths = sorted({tuple(path) for path in choices}, key=lambda path: (len(path), path))
    if not paths or len(paths) != len(choices):
        raise ValueError("tree_choices must name each node once, and at least one.")
    known = {(), *paths}
    for path in paths:
        if not path or path[:-1] not in known:
            raise ValueError(f"tree_choices has the node {path} without its parent; the root (empty path) is implied.")
        if not 0 <= path[-1] < vocab or (path[-1] and (*path[:-1], path[-1] - 1) not in known):
            raise ValueError(f"tree_choices has the node {path}, but siblings must have the ranks 0, 1, 2, ...")
    return paths


def _most_important(paths: Sequence[tuple[int, ...]], count: int) -> list[tuple[int, ...]]:
    """Return `count` of the paths in their order: those with the most others below them and their later siblings."""

    def importance(path: tuple[int, ...]) -> int:
        depth = len(path) - 1
        return sum(len(p) > depth and p[:depth] == path[:depth] and p[depth] >= path[depth] for p in paths)

    kept = set(sorted(paths, key=importance, reverse=True)[:count])
    return [path for path in paths if path in kept]
