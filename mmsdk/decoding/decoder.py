"""Speculative decoding: drafts of several tokens, verified by one forward of the target."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MaxLengthCriteria,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from mmsdk.caching import CACHE, OLD_NAME, cache_of
from mmsdk.decoding.base import AcceptanceRule, Decision, Drafter, Prefill, Verified
from mmsdk.decoding.cost import NODES, CostModel
from mmsdk.decoding.drafters.rows import check_at_least, new_tokens
from mmsdk.decoding.rules import Greedy, Matching
from mmsdk.decoding.sampling import draw_uniforms
from mmsdk.decoding.target import HFTarget, TargetModel
from mmsdk.decoding.tree import DraftTree

# Turns logits `(rows, n, vocab)` after each node into those to choose from, given the indices of the rows in the batch,
# all new tokens of every row of the batch, and the trees.
Process = Callable[[Sequence[int], Sequence[Sequence[int]], DraftTree, Tensor], Tensor]

# These count their calls, or keep states of a model, so that they cannot go from branch to branch.
_STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
# These look at nothing but scores, so that all nodes are processed at once.
_OF_SCORES = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


@dataclass
class DecodingStats:
    """What one run of the decoder took and brought.

    Attributes:
        forwards: forwards of the target over trees; with `generate`, the first one is that over the prompts. What the
            cost model measures does not count.
        row_forwards: the same, counted once for each row that took part.
        drafted: candidates.
        accepted: candidates that were accepted, also those behind an end.
        tokens: tokens that were kept, of all rows.
        drafted_at: for each depth of a tree, 1 first, how many trees reached it.
        accepted_at: how many trees were accepted to this depth.
        costs: C(k), the cost of verifying k tokens relative to one, where it was measured or given.
    """

    forwards: int = 0
    row_forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    costs: dict[int, float] = field(default_factory=dict)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens that a forward brings a row; 1 in plain decoding."""
        return self.tokens / self.row_forwards if self.row_forwards else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the candidates that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def count(self, tree: DraftTree, accepted: Tensor, tokens: int) -> None:
        """Add a round of accepted lengths `(batch,)`, which brought so many tokens."""
        reached = torch.where(tree.is_candidate, tree.depths, 0).amax(1)
        self.forwards += 1
        self.row_forwards += len(accepted)
        self.drafted += int(tree.is_candidate.sum())
        self.accepted += int(accepted.sum())
        self.tokens += tokens
        for counts, depths in ((self.drafted_at, reached), (self.accepted_at, accepted)):
            for depth in depths.tolist():
                counts += [0] * (int(reached.max()) - len(counts))
                for i in range(depth):
                    counts[i] += 1


@dataclass(frozen=True)
class Round:
    """What one forward of the target has brought.

    Attributes:
        rows: the rows of the batch that took part; the others were finished.
        tokens: the new tokens of each of these rows, at least one.
        finished: which of them are now finished.
        verified: the trees, what the target said, and what was kept: where a row ends within a path, the rest is cut
            off, and the bonus token is its last one.
        scores: `(rows, n, vocab)`, the logits after each node that the rule chose from.
    """

    rows: list[int]
    tokens: list[list[int]]
    finished: list[bool]
    verified: Verified
    scores: Tensor


class SpeculativeDecoder:
    """Lets a drafter propose several tokens, and the target verify them in one forward.

    Papers: "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al. 2022, arXiv 2211.17192);
    "SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative Inference and Verification" (Miao
    et al. 2023, arXiv 2305.09781).

    With language models of transformers:

        decoder = SpeculativeDecoder(PromptLookup())
        model.generate(**inputs, custom_generate=decoder)

    Everything that `generate` knows of greedy decoding and sampling holds, for any number of rows: logits processors
    see the rows of the batch and the ids that they would see without drafts, stopping criteria one row at a time. A row
    that ends within an accepted path is cut where it ends, and its cache too. The tokens are those of the model alone,
    up to ties within rounding, or follow its distribution: see `lossless`. See `HFTarget` for models and caches.
    Instead of `stop_strings` and a `streamer`, whose objects `generate` keeps to itself, pass `StopStringCriteria` with
    the `stopping_criteria`, and a `callback`.

    Other targets are driven with `decode`.

    Randomness comes from `generator` alone. With `Matching`, the tokens depend on nothing else: neither on the drafter,
    nor on the number of candidates, nor on the other rows.

    Args:
        drafter: where candidates come from.
        acceptance: the rule; None: `Greedy` without sampling, else `Matching`. Drafters that draw their candidates are
            accepted more often by `Rejection`.
        num_candidates: candidates of each tree, at most; None: as many as `cost_model` chooses.
        cost_model: chooses; None: one that measures.
        generator: for sampling: one for each row, or one that seeds them; None: seeds from the system.

    Attributes:
        stats: what the last run took and brought.

    Raises:
        TypeError: the drafter or the rule is none.
        ValueError: the rule does not take such candidates; `num_candidates` is negative, or there is a `cost_model`
            that nobody asks.
    """

    setting: ClassVar[str] = "speculation"  # the argument of image generators that takes a decoder

    def __init__(
        self,
        drafter: Drafter,
        acceptance: AcceptanceRule | None = None,
        num_candidates: int | None = None,
        cost_model: CostModel | None = None,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> None:
        if not isinstance(drafter, Drafter):
            raise TypeError(f"drafter must be a Drafter, got {type(drafter).__name__}.")
        if not isinstance(acceptance, AcceptanceRule | None):
            raise TypeError(f"acceptance must be an AcceptanceRule or None, got {type(acceptance).__name__}.")
        if num_candidates is not None:
            check_at_least("num_candidates", num_candidates, 0)
            if cost_model is not None:
                raise ValueError(f"cost_model chooses num_candidates: pass one of them, got {num_candidates} too.")
        if acceptance is not None and drafter.drawing not in acceptance.drawings:
            raise ValueError(
                f"{type(acceptance).__name__} takes candidates that are {' or '.join(acceptance.drawings)}, but those "
                f"of this {type(drafter).__name__} are {drafter.drawing}; Matching takes any."
            )
        self.drafter = drafter
        self.acceptance = acceptance
        self.num_candidates = num_candidates
        self.cost_model = cost_model or CostModel()
        self.generator = generator
        self.stats = DecodingStats()

    @property
    def lossless(self) -> bool:
        """Whether the tokens are those of the target alone, or follow its distribution."""
        return self.acceptance is None or self.acceptance.lossless

    def decode(
        self,
        target: TargetModel,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        *,
        do_sample: bool,
        prefill: Prefill | None = None,
        process: Process | None = None,
        is_finished: Callable[[int, list[int]], bool] | None = None,
        generators: Generator | Sequence[Generator] | None = None,
        uniforms: Tensor | None = None,
    ) -> Iterator[Round]:
        """Continue sequences, and yield what each forward brings, until all are finished.

        Args:
            target: the model, whose state holds the prompts but their last tokens.
            prompts: the tokens of each row, 1-D int64 without padding.
            max_new_tokens: tokens after which a row ends.
            do_sample: which rule to use where none was chosen.
            prefill: what the target made of the prompts, for drafters that need it.
            process: applied to the logits of every node before the rule; must not depend on the order of calls.
            is_finished: asked with the index of a row and all its new tokens, after each of them in turn, whether the
                last one ends the row.
            generators: one for each row, or one that seeds them; None: those of the decoder.
            uniforms: `(batch, max_new_tokens)` in [0, 1), which draw the tokens of a rule `by_position`; None: drawn
                from the generators. Other rules draw as many numbers in each round as a tree may have nodes.

        Yields:
            The rounds. The state of the target and the drafter are ready for the next one.

        Raises:
            ValueError: the drafter's vocabulary is not the target's, or numbers do not fit.
        """
        check_at_least("max_new_tokens", max_new_tokens, 1)
        self._check_vocabulary(target)
        rule, plain = self._rule(do_sample), _plain_rule(do_sample)
        batch = len(prompts)
        generators = _row_generators(self.generator if generators is None else generators, batch)
        if uniforms is None and rule.by_position:
            uniforms = draw_uniforms(generators, batch, max_new_tokens)
        elif uniforms is not None and uniforms.shape != (batch, max_new_tokens):
            raise ValueError(f"uniforms must be {(batch, max_new_tokens)}, got {tuple(uniforms.shape)}.")
        # Of their own, so that drafts do not change what the rule draws.
        draft_generators = [_row_generators(generator, 1)[0] for generator in generators]
        self.stats = stats = DecodingStats()
        self.drafter.reset(prompts, prefill)
        rows = list(range(batch))
        tokens: list[list[int]] = [[] for _ in prompts]
        roots = torch.stack([prompt[-1] for prompt in prompts])

        def forward(tree: DraftTree) -> tuple[Tensor, Tensor | None, Tensor]:
            logits, states = target.forward_tree(tree, self.drafter.needs_hidden_states)
            return logits, states, logits if process is None else process(rows, tokens, tree, logits)

        def measure(num_nodes: int) -> Tensor:
            scores = forward(_star(roots, num_nodes))[2]
            target.discard()
            return scores

        while rows:
            left = [max_new_tokens - len(tokens[row]) for row in rows]
            room = target.room
            limit = 0 if max(left) == 1 else None if room is None else max(room - 1, 0)
            if self.num_candidates is None and limit != 0 and not stats.costs:
                stats.costs = self._costs(measure, (target.cost_context, batch, process is None), limit)
            size = self._size(limit)
            started = time.perf_counter()
            if size:
                tree = self.drafter.propose(size, [draft_generators[row] for row in rows])
                tree = _trim(tree, torch.tensor(left, device=tree.tokens.device))
            else:
                tree = _star(roots, 1)
            seconds = time.perf_counter() - started
            logits, states, scores = forward(tree)
            if rule.by_position and uniforms is not None:
                numbers = _upcoming(uniforms, rows, tokens, tree.num_nodes)
            else:
                # The first one for the bonus token, and as many of others whatever the other rows draft.
                numbers = draw_uniforms([generators[row] for row in rows], len(rows), size + 1)
                numbers = torch.cat([numbers[:, 1 : tree.num_nodes], numbers[:, :1]], 1)
            # Some rules take no tree without candidates.
            decision = (rule if tree.num_nodes > 1 else plain).verify(tree, scores, numbers)

            new = new_tokens(Verified(tree, logits, decision))
            finished = []
            for i, row in enumerate(rows):
                count, is_last = 0, False
                while count < len(new[i]) and not is_last:
                    tokens[row].append(new[i][count])
                    count += 1
                    is_last = is_finished is not None and is_finished(row, tokens[row])
                    is_last = is_last or len(tokens[row]) == max_new_tokens
                new[i] = new[i][:count]
                finished.append(is_last)
            verified = Verified(tree, logits, _cut(decision, new), states)
            target.commit(verified.decision)
            started = time.perf_counter()
            self.drafter.observe(verified)
            seconds += time.perf_counter() - started

            stats.count(tree, decision.lengths, sum(map(len, new)))
            if self.num_candidates is None and limit != 0:
                self.cost_model.record(size, tree.num_nodes, float(decision.lengths.double().mean()), seconds)
            result = Round(rows, new, finished, verified, scores)
            going = [i for i, is_last in enumerate(finished) if not is_last]
            if going and len(going) < len(rows):
                target.select_rows(going)
                self.drafter.select_rows(going)
            roots = verified.decision.bonus[going]
            rows = [rows[i] for i in going]
            yield result

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        callback: Callable[[list[list[int]]], None] | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate with a model of transformers: `model.generate(**inputs, custom_generate=decoder)` calls this.

        Args:
            model: as `HFTarget` takes it.
            input_ids: `(batch, num_tokens)`, the prompts, padded on the left.
            logits_processor: applied to the logits of every node, with the ids that lead to it.
            stopping_criteria: asked for each row on its own, after each of its tokens.
            generation_config: greedy decoding or sampling; `return_dict_in_generate` with scores and logits.
            callback: called after each forward with the new tokens of every row, to stream them; it may be passed to
                `generate`.
            **model_kwargs: what the model takes.

        Returns:
            The ids `(batch, length)`, finished rows filled up with the padding token; or the output that
            `return_dict_in_generate` asks for, of several rows without a cache.

        Raises:
            ValueError: the model, its cache, the way of decoding, a processor or the drafter does not fit. Whatever is
                raised, the cache is left as it came.
        """
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(f"Drafts serve greedy decoding and sampling, but generate was asked for {mode.value}.")
        if generation_config.output_attentions or generation_config.output_hidden_states:
            raise ValueError("Attentions and hidden states are not returned: pass no output_attentions, ..._states.")
        do_sample = mode is GenerationMode.SAMPLE
        target = HFTarget(model)
        self._check_vocabulary(target)
        self._rule(do_sample)
        text = _Text(input_ids, generation_config, logits_processor, stopping_criteria)
        prompts = text.prompts(model_kwargs.get("attention_mask"))
        cache = cache_of(model_kwargs)
        for name in ("use_cache", CACHE, OLD_NAME):  # without a cache there is nothing to go on with
            model_kwargs.pop(name, None)
        prefill = target.prefill(
            input_ids, cache=cache, output_hidden_states=self.drafter.needs_hidden_states, **model_kwargs
        )
        try:
            for result in self.decode(
                target,
                prompts,
                text.max_new_tokens,
                do_sample=do_sample,
                prefill=prefill,
                process=text.process if logits_processor else None,
                is_finished=text.is_finished,
            ):
                text.add(result)
                if callback is not None:
                    new = dict(zip(result.rows, result.tokens, strict=True))
                    callback([new.get(row, []) for row in range(len(prompts))])
        except BaseException:
            target.restore()
            raise
        target.release()
        return text.output(target)

    def _rule(self, do_sample: bool) -> AcceptanceRule:
        """Return the rule.

        Raises:
            ValueError: it samples and should not, or the other way round.
        """
        if self.acceptance is None:
            return _plain_rule(do_sample)
        samples = getattr(self.acceptance, "do_sample", not isinstance(self.acceptance, Greedy))
        if samples != do_sample:
            raise ValueError(
                f"{type(self.acceptance).__name__} {'samples' if samples else 'does not sample'}, but do_sample is "
                f"{do_sample}; acceptance=None fits both."
            )
        return self.acceptance

    def _check_vocabulary(self, target: TargetModel) -> None:
        """Raise `ValueError` if the drafter knows another vocabulary than the target."""
        size = getattr(self.drafter, "vocab_size", None)
        if None not in (size, target.vocab_size) and size != target.vocab_size:
            raise ValueError(
                f"{type(self.drafter).__name__} knows {size} tokens, but the target has {target.vocab_size}: they must "
                "have the same tokenizer and the same number of logits."
            )

    def _size(self, limit: int | None) -> int:
        """Return how many candidates to ask for."""
        if limit == 0:
            return 0
        if self.num_candidates is None:
            return self.cost_model.choose(limit)
        return self.num_candidates if limit is None else min(self.num_candidates, limit)

    def _costs(self, forward: Callable[[int], Tensor], context: Hashable, limit: int | None) -> dict[int, float]:
        """Return C(k), measured if need be for trees of up to `limit` candidates."""
        if self.cost_model.is_given:
            return self.cost_model.costs
        ks = [k for k in NODES if limit is None or k <= limit + 1]
        return self.cost_model.calibrate(forward, ks, (context, len(ks)))


class _Call(NamedTuple):
    """Which nodes of which trees processors see at once, as which rows of the batch, and the ids `(batch, length)`."""

    trees: Tensor
    nodes: Tensor
    rows: Tensor
    ids: Tensor


class _Text:
    """The ids of a batch as `generate` has them without drafts, padding included, and what looks at them.

    Args:
        input_ids: `(batch, num_tokens)`.
        config: as `generate` has prepared it.
        processor: applied to logits.
        criteria: say when a row ends.
    """

    def __init__(
        self,
        input_ids: Tensor,
        config: GenerationConfig,
        processor: Any,
        criteria: Any,
    ) -> None:
        batch, self.start = input_ids.shape
        self.max_new_tokens = config.max_length - self.start
        for entry in processor:
            if isinstance(entry, _STATEFUL):
                raise ValueError(
                    f"{type(entry).__name__} counts its calls, so it cannot look at branches of a tree; leave it out."
                )
        eos = config.eos_token_id
        pad = config.pad_token_id if config.pad_token_id is not None else eos[0] if isinstance(eos, list) else eos
        if batch > 1 and pad is None and any(not isinstance(entry, MaxLengthCriteria) for entry in criteria):
            raise ValueError("Rows may end before others, but there is no pad_token_id to fill them up with.")
        self._config = config
        self._processor = processor
        self._criteria = criteria
        self._ids = F.pad(input_ids, (0, self.max_new_tokens), value=0 if pad is None else pad)
        self._num_tokens = [0] * batch
        self._scores: list[list[Tensor]] = [[] for _ in range(batch)]
        self._logits: list[list[Tensor]] = [[] for _ in range(batch)]

    def prompts(self, attention_mask: Tensor | None) -> list[Tensor]:
        """Return the ids of each row without padding."""
        prompts = self._ids[:, : self.start]
        if attention_mask is None:
            return list(prompts)
        mask = attention_mask[:, -self.start :].bool()
        return [ids[is_token] for ids, is_token in zip(prompts, mask, strict=True)]

    def process(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], tree: DraftTree, logits: Tensor) -> Tensor:
        """Process the logits after every node."""
        scores = logits.clone()
        calls: list[_Call] | None = None
        for processor in self._processor:
            if type(processor) in _OF_SCORES:
                scores = processor(tree.tokens.flatten()[:, None], scores.flatten(0, 1)).view_as(logits)
                continue
            if calls is None:
                calls = self._calls(rows, tokens, tree)
            for call in calls:
                known = scores[call.trees, call.nodes]
                batch = known[:1].repeat(len(call.ids), 1)
                batch[call.rows] = known
                scores[call.trees, call.nodes] = processor(call.ids, batch)[call.rows]
        return scores

    def _calls(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], tree: DraftTree) -> list[_Call]:
        """Return calls that show each row in its place of the batch, with ids of the same length, to all nodes."""
        members: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
        prefixes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for i, (row, parents) in enumerate(zip(rows, tree.parents.tolist(), strict=True)):
            known = {0: self._ids[row, : self.start + len(tokens[row])]}
            turns: Counter[int] = Counter()
            for node, parent in enumerate(parents):
                if parent >= 0:
                    known[node] = torch.cat([known[parent], tree.tokens[i, node : node + 1]])
                elif node:
                    continue
                length = len(known[node])
                members[length, turns[length]].append((i, node, row))
                prefixes[length, turns[length]].append(known[node])
                turns[length] += 1
        calls = []
        for key, places in members.items():
            trees, nodes, own = torch.tensor(places, device=self._ids.device).T
            ids = prefixes[key][0].repeat(len(self._ids), 1)
            ids[own] = torch.stack(prefixes[key])
            calls.append(_Call(trees, nodes, own, ids))
        return calls

    def is_finished(self, row: int, tokens: list[int]) -> bool:
        """Write down the last of the new tokens of a row, and say whether it ends it."""
        end = self.start + len(tokens)
        self._ids[row, end - 1] = tokens[-1]
        self._num_tokens[row] = len(tokens)
        return bool(self._criteria(self._ids[row : row + 1, :end], None)[0])

    def add(self, result: Round) -> None:
        """Note scores and logits, where `generate` returns them."""
        if not self._config.return_dict_in_generate:
            return
        verified = result.verified
        for i, (row, length) in enumerate(zip(result.rows, verified.decision.lengths.tolist(), strict=True)):
            nodes = F.pad(verified.decision.path[i, :length], (1, 0))
            if self._config.output_scores:
                self._scores[row] += result.scores[i, nodes]
            if self._config.output_logits:
                self._logits[row] += verified.logits[i, nodes]

    def output(self, target: HFTarget) -> Tensor | GenerateDecoderOnlyOutput:
        """Return what `generate` returns."""
        sequences: Any = self._ids[:, : self.start + max(self._num_tokens)]
        if not self._config.return_dict_in_generate:
            return sequences
        cache: dict[str, Any] = {CACHE: target.cache}
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_by_step(self._scores) if self._config.output_scores else None,
            logits=_by_step(self._logits) if self._config.output_logits else None,
            **cache,
        )


def _by_step(rows: list[list[Tensor]]) -> Any:
    """Return the entries `(vocab,)` of each row as `(batch, vocab)` of each step, 0 behind the end of a row."""
    return pad_sequence([torch.stack(row) for row in rows], batch_first=True).unbind(1)


def _plain_rule(do_sample: bool) -> AcceptanceRule:
    return Matching() if do_sample else Greedy()


def _row_generators(generators: Generator | Sequence[Generator] | None, batch: int) -> list[Generator]:
    """Return a generator for each row; from a single one, new ones with seeds that it draws."""
    if generators is None:
        generators = Generator()
        generators.seed()
    if isinstance(generators, Generator):
        device = generators.device
        seeds = torch.randint(2**63 - 1, (batch,), generator=generators, device=device).tolist()
        return [Generator(device=device).manual_seed(seed) for seed in seeds]
    if len(generators) != batch:
        raise ValueError(f"Expected one generator, or one for each of {batch} rows, got {len(generators)}.")
    return list(generators)


def _star(roots: Tensor, num_nodes: int) -> DraftTree:
    """Return trees whose candidates are children of the root, and equal to it."""
    parents = torch.zeros(len(roots), num_nodes, dtype=torch.int64, device=roots.device)
    parents[:, 0] = -1
    return DraftTree(roots[:, None].expand(-1, num_nodes), parents)


def _trim(tree: DraftTree, left: Tensor) -> DraftTree:
    """Return a tree without the candidates that only the bonus token, or nothing, can follow at the end of a row.

    Args:
        tree: the drafts.
        left: `(batch,)`, tokens that each row may still have.
    """
    if tree.num_nodes <= int(left.min()):
        return tree
    is_kept = tree.is_candidate & (tree.depths < left[:, None])
    end = 1 + int((is_kept.any(0) * torch.arange(tree.num_nodes, device=left.device)).max())
    parents = torch.where(is_kept, tree.parents, -1)[:, :end]
    probs = None if tree.probs is None else tree.probs[:, :end]
    return DraftTree(tree.tokens[:, :end], parents, probs, tree.with_replacement)


def _upcoming(uniforms: Tensor, rows: list[int], tokens: list[list[int]], count: int) -> Tensor:
    """Return the next `count` numbers of each row, 0 behind the last one."""
    numbers = [F.pad(part := uniforms[row, len(tokens[row]) :][:count], (0, count - len(part))) for row in rows]
    return torch.stack(numbers)


def _cut(decision: Decision, new: list[list[int]]) -> Decision:
    """Return the decision that leaves these new tokens, the last of each row as its bonus token."""
    lengths = torch.tensor([len(ids) - 1 for ids in new], device=decision.lengths.device)
    is_kept = torch.arange(decision.path.shape[1], device=lengths.device) < lengths[:, None]
    bonus = torch.tensor([ids[-1] for ids in new], device=lengths.device)
    return Decision(torch.where(is_kept, decision.path, -1), lengths, bonus)
