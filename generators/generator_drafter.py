"""A small image generator drafts for a large one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from generators.base import Trace
from generators.llamagen import LlamaGen
from generators.speculation import DRAFT_SLOTS, ConditionedDrafter, Conditions, LlamaGenTarget
from mmsdk.decoding.base import CHAIN, CHOSEN, Decision, Prefill, Verified
from mmsdk.decoding.drafters.rows import check_at_least, check_prompts, check_verified, new_tokens
from mmsdk.decoding.sampling import check_sampling, draw_uniforms, process_logits, sample_ids
from mmsdk.decoding.tree import DraftTree


@dataclass(eq=False)
class GeneratorDrafter(ConditionedDrafter):
    """Lets a LlamaGen of the same tokens and conditions say the next tokens of all images, one by one.

    Papers: "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al. 2022, arXiv 2211.17192);
    "Accelerating Large Language Model Decoding with Speculative Sampling" (Chen et al. 2023, arXiv 2302.01318). It is
    guided as the generation is, and reads the same text features. Sampled tokens come with their distributions
    (`DraftTree.probs`), so that rejection keeps the target's. Chosen ones are deterministic and come without.

    Stores a key-value cache of the draft generator; after a rejection it is cut back to what was accepted. Cost:
    `num_tokens` forwards of the draft generator for each proposal.

    Attributes:
        generator: the draft generator, in evaluation mode.
        num_tokens: candidates of a proposal, at most.
        do_sample: draw the tokens instead of taking the most probable ones.
        temperature: divides the logits that are drawn from.
        top_k: keeps this many ids to draw from; 0 keeps all.
        top_p: keeps the most probable ids up to this sum to draw from.

    Raises:
        TypeError: the generator is no LlamaGen.
        ValueError: it writes several tokens at a step, or a setting is out of its range.
    """

    generator: LlamaGen = field(repr=False)
    num_tokens: int = 4
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    _target: LlamaGenTarget | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.generator, LlamaGen):
            raise TypeError(f"A GeneratorDrafter drafts with a LlamaGen, got {type(self.generator).__name__}.")
        if self.generator.tokens_per_step != 1:
            raise ValueError(
                f"Drafts are trees of single tokens, but {type(self.generator).__name__} writes "
                f"{self.generator.tokens_per_step} at a step."
            )
        check_at_least("num_tokens", self.num_tokens, 1)
        check_sampling(self.temperature, self.top_k, self.top_p)
        self.vocab_size = self.generator.config.codebook_size

    @property
    def drawing(self) -> str:
        """How candidates are found."""
        return CHAIN if self.do_sample else CHOSEN

    def condition(self, conditions: Conditions) -> None:
        """Read the conditions of the images that are to be written next."""
        scales = conditions.scales
        guided = any(scale != 1.0 for scale in scales)
        state = self.generator.prefill(
            **conditions.arguments, max_new_tokens=len(scales), guided=guided, draft_slots=DRAFT_SLOTS
        )
        self._target = LlamaGenTarget(self.generator, state, state.num_rows // (1 + guided), scales, Trace())

    def reset(self, prompts: Sequence[Tensor], prefill: Prefill | None = None) -> None:
        """Begin new images; see `Drafter`.

        Raises:
            RuntimeError: `condition` was not called before.
            ValueError: a prompt is not as it should be.
        """
        check_prompts(prompts, self.vocab_size)
        if self._target is None:
            raise RuntimeError("The drafter knows no conditions: it drafts for the generators of this package only.")
        # Tokens that the draft generator has not read; the last one of each row is the root of the next tree.
        self._unread = [prompt.tolist() for prompt in prompts]
        self._num_read = 0

    def propose(self, budget: int, generators: Sequence[Generator] | None = None) -> DraftTree:
        """Return a chain for each row, of at most `budget` candidates."""
        target = self._target
        check_at_least("budget", budget, 0)
        if target is None:
            raise RuntimeError("The drafter has no sequences: call `reset(prompts)` first.")
        device = target.state.condition_hidden.device
        batch, count = len(self._unread), min(self.num_tokens, budget)
        roots = torch.tensor([tokens[-1] for tokens in self._unread], device=device)
        uniforms = draw_uniforms(generators, batch, count).to(device) if self.do_sample and count else None
        tree = DraftTree.stack([self._chain(tokens, device) for tokens in self._unread])
        lengths = torch.tensor([len(tokens) - 1 for tokens in self._unread], device=device)
        tokens, probs = [], []
        for i in range(count):
            logits, _ = target.forward_tree(tree)
            path = torch.arange(1, tree.num_nodes, device=device).expand(batch, -1)
            target.commit(Decision(path, lengths, roots))
            logits = logits[torch.arange(batch, device=device), lengths]
            sampling = (self.temperature, self.top_k, self.top_p)
            if uniforms is not None:
                probs.append(torch.softmax(process_logits(logits, *sampling), -1))
            tokens.append(sample_ids(logits, sampling, None if uniforms is None else uniforms[:, i]))
            tree, lengths = DraftTree.chain(tokens[-1], roots.new_empty(batch, 0)), torch.zeros_like(lengths)
        self._num_read = count
        candidates = torch.stack(tokens, 1) if tokens else roots.new_empty(batch, 0)
        return DraftTree.chain(roots, candidates, torch.stack(probs, 1) if probs else None)

    def observe(self, verified: Verified) -> None:
        """Cut the cache back to what was accepted, and note what it does not hold yet."""
        check_verified(verified, len(self._unread), self.vocab_size)
        assert self._target is not None  # noqa: S101 - rows exist after `reset` only
        lost = []
        for row, tokens in enumerate(new_tokens(verified)):
            if not self._num_read:  # nothing was drafted, so that the root was not read either
                self._unread[row] += tokens
                lost.append(0)
                continue
            # Read are the root and all candidates but the last.
            read = min(len(tokens) - 1, self._num_read - 1)
            lost.append(self._num_read - 1 - read)
            self._unread[row] = tokens[read:]
        self._target.rewind(lost)
        self._num_read = 0

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in that order; the others are finished."""
        assert self._target is not None  # noqa: S101 - rows exist after `reset` only
        self._target.select_rows(rows)
        self._unread = [self._unread[row] for row in rows]

    @staticmethod
    def _chain(tokens: list[int], device: torch.device) -> DraftTree:
        ids = torch.tensor([tokens], device=device)
        return DraftTree.chain(ids[:, 0], ids[:, 1:])
