"""Our decoding against a plain loop of the published design, over the same weights, with the same tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from generators.base import Trace
from generators.guidance import combine
from generators.llamagen import LlamaGen, TransformerBlock, rotary_table
from generators.pipelines import ARImagePipeline
from mmsdk.bench.measure import interleaved
from mmsdk.bench.prompts import prompt_fits
from mmsdk.bench.runner import BenchResult
from mmsdk.decoding.sampling import draw_uniforms, process_logits, sample_inverse_cdf
from mmsdk.errors import MMSDKError

PROMPTS = (
    "red heart, noto", "pizza, twemoji", "cat face, noto", "green apple, fluent flat", "rocket, twemoji",
    "smiling face with sunglasses, noto", "soccer ball, fluent flat", "penguin, twemoji",
)  # fmt: skip


class PlainLoop:
    """The published decoding loop, written anew over the weights of a `LlamaGen`.

    A static cache is allocated for all positions; every step attends to all of it under one precomputed mask; the batch
    is doubled for guidance from the first step to the last; the output layer runs on all of its rows. Whatever this
    design allows is done well: fused attention, a mask and rotations that are made once, slices instead of copies.

    Args:
        model: read, not changed.
    """

    def __init__(self, model: LlamaGen) -> None:
        self.model: Any = model
        config = model.config
        self.head_dim = config.hidden_size // config.num_heads
        self.rotations: Tensor | None = None
        if model.position_embedding is None:
            table = rotary_table(
                math.isqrt(config.max_tokens), self.head_dim, config.rope_base, config.num_condition_tokens
            )
            self.rotations = table[:, None, None]

    @torch.no_grad()
    def generate(
        self,
        condition: dict[str, Any],
        num_tokens: int,
        guidance_scale: float,
        uniforms: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Tensor:
        """Return token ids `(batch, num_tokens)`.

        Args:
            condition: arguments of `LlamaGen.embed_condition`.
            num_tokens: tokens of each image.
            guidance_scale: of every step.
            uniforms: `(batch, num_tokens)`, one draw for each token; without them the most probable token is taken.
            temperature: divides the logits.
            top_k: keep the k most probable ids; 0 keeps all.
            top_p: keep the most probable ids up to this sum; 1 keeps all.
        """
        model = self.model
        embedded = model.embed_condition(**condition)
        batch = len(embedded)
        hidden = torch.cat([embedded, model.cls_embedding.unconditional().expand_as(embedded)])
        start, capacity = hidden.shape[1], hidden.shape[1] + num_tokens
        shape = (len(hidden), model.config.num_heads, capacity, self.head_dim)
        caches = [(hidden.new_zeros(shape), hidden.new_zeros(shape)) for _ in model.layers]
        mask = self._mask(condition.get("caption_mask"), capacity, hidden)
        token_ids = torch.empty(batch, num_tokens, dtype=torch.int64)
        last = self._forward(hidden, 0, caches, mask)[:, -1]
        for step in range(num_tokens):
            if step > 0:
                previous = token_ids[:, step - 1 : step].repeat(2, 1)
                last = self._forward(model.tok_embeddings(previous), start + step - 1, caches, mask)[:, -1]
            logits = F.linear(last, model.output.weight).float()
            logits = combine(logits[:batch], logits[batch:], guidance_scale)
            if uniforms is None:
                token_ids[:, step] = logits.argmax(-1)
                continue
            probs = torch.softmax(process_logits(logits, temperature, top_k, top_p), -1)
            token_ids[:, step] = sample_inverse_cdf(probs, uniforms[:, step])
        return token_ids

    def _mask(self, caption_mask: Tensor | None, capacity: int, like: Tensor) -> Tensor:
        """Return what each position adds to its attention scores, `(1 or rows, 1, capacity, capacity)`."""
        allowed = torch.ones(1, capacity, capacity, dtype=torch.bool).tril()
        if caption_mask is not None:
            columns = F.pad(caption_mask.bool(), (0, capacity - caption_mask.shape[1]), value=True).repeat(2, 1)
            allowed = (allowed & columns[:, None]) | torch.eye(capacity, dtype=torch.bool)
        return torch.zeros(allowed.shape).masked_fill_(~allowed, -math.inf).to(like)[:, None]

    def _forward(self, hidden: Tensor, start: int, caches: list[tuple[Tensor, Tensor]], mask: Tensor) -> Tensor:
        end = start + hidden.shape[1]
        rotations = None
        if self.rotations is None:
            hidden = hidden + self.model.position_embedding.weight[start:end]
        else:
            rotations = self.rotations[start:end]
        rows = mask[:, :, start:end]
        for layer, (keys, values) in zip(self.model.layers, caches, strict=True):
            hidden = self._block(layer, hidden, start, end, keys, values, rows, rotations)
        return self.model.norm(hidden)

    def _block(
        self,
        layer: TransformerBlock,
        hidden: Tensor,
        start: int,
        end: int,
        keys: Tensor,
        values: Tensor,
        mask: Tensor,
        rotations: Tensor | None,
    ) -> Tensor:
        batch, length, width = hidden.shape
        heads = (batch, length, 3, self.model.config.num_heads, self.head_dim)
        attention, feed_forward = layer.attention, layer.feed_forward
        qkv = F.linear(layer.attention_norm(hidden), attention.wqkv.weight).view(heads)
        query_key = qkv[:, :, :2]
        if rotations is not None:
            pairs = torch.view_as_complex(query_key.float().unflatten(-1, (-1, 2)))
            query_key = torch.view_as_real(pairs * rotations).flatten(-2).to(qkv.dtype)
        query, key = query_key.transpose(1, 3).unbind(2)
        keys[:, :, start:end] = key
        values[:, :, start:end] = qkv[:, :, 2].transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        hidden = hidden + F.linear(attended.transpose(1, 2).reshape(batch, length, width), attention.wo.weight)
        x = layer.ffn_norm(hidden)
        gated = F.silu(F.linear(x, feed_forward.w1.weight)) * F.linear(x, feed_forward.w3.weight)
        return hidden + F.linear(gated, feed_forward.w2.weight)


def llamagen(
    model: str = "emoji-64",
    preset: str | None = None,
    image_size: int = 256,
    batch_sizes: Sequence[int] = (1, 8),
    guidance_scale: float = 2.0,
    num_tokens: int | None = None,
    do_sample: bool = False,
    repeats: int = 7,
    seed: int = 0,
    output_dir: Path | None = None,
) -> BenchResult:
    """Time both on the same conditions and draws, one after the other in turn, and check that their tokens are equal.

    Args:
        model: embedded name or folder of a text-to-image pipeline.
        preset: time a published size with random weights instead, such as `B`.
        image_size: of the preset, in pixels.
        batch_sizes: images generated at once.
        guidance_scale: of every step; above 1, so that both need unconditional rows.
        num_tokens: tokens to generate; default: all.
        do_sample: draw tokens instead of taking the most probable ones. Both sides then get the same numbers, but among
            thousands of improbable tokens rounding alone can make them draw neighbours, which ends the measurement.
        repeats: timed runs of each side, after one that is not timed.
        seed: of the draws, and of a preset's weights.
        output_dir: not used.

    Raises:
        MMSDKError: the two sides gave different tokens.
        ValueError: `guidance_scale` is 1, which needs no unconditional rows.
    """
    if guidance_scale == 1:
        raise ValueError("guidance_scale must differ from 1: the published loop doubles the batch for guidance only.")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    transformer, conditions, label = _load(model, preset, image_size, seed)
    plain = PlainLoop(transformer)
    count = num_tokens or transformer.config.max_tokens
    table = []
    for batch in batch_sizes:
        condition = conditions(batch)
        uniforms = None
        if do_sample:
            uniforms = draw_uniforms([torch.Generator().manual_seed(seed + i) for i in range(batch)], batch, count)
        trace = Trace()
        ours: Callable[..., Any] = partial(
            transformer.generate,
            **condition,
            num_tokens=count,
            guidance_scale=guidance_scale,
            do_sample=do_sample,
            uniforms=uniforms,
        )
        published = partial(plain.generate, condition, count, guidance_scale, uniforms)
        _check_equal(ours(trace=trace).token_ids, published(), batch)
        our_times, plain_times = interleaved([ours, published], repeats)
        our_speed, plain_speed = (batch * count / statistics.median(t) for t in (our_times, plain_times))
        attended = [sum(trace.positions[: i + 1]) for i in range(trace.forwards)]
        capacity = transformer.config.num_condition_tokens + count
        table.append(
            [label, batch, count, our_speed, plain_speed, our_speed / plain_speed, statistics.fmean(attended), capacity]
        )
    notes = [
        f"Medians of {repeats} runs of each side, in turn; guidance {guidance_scale:g}, "
        f"{'sampled' if do_sample else 'greedy'}; both write the same tokens, which is checked.",
        "plain: the published design over the same weights: doubled batch, a mask over the whole preallocated cache, "
        "all condition slots, output layer on all rows.",
        "slots: cache positions that a step attends to, on average. Both run one forward for each token, with 2 rows "
        "for each image.",
    ]
    columns = ["model", "batch", "tokens", "ours tok/s", "plain tok/s", "ratio", "slots ours", "slots plain"]
    return BenchResult("llamagen", columns, table, notes)


def _load(
    model: str, preset: str | None, image_size: int, seed: int
) -> tuple[LlamaGen, Callable[[int], dict[str, Any]], str]:
    """Return a transformer, what gives it conditions for a batch, and its name in the table."""
    if preset is None:
        pipeline = ARImagePipeline.from_pretrained(model)
        transformer: LlamaGen = pipeline.transformer.eval()
        if transformer.config.condition == "text":
            readable = [prompt for prompt in PROMPTS if prompt_fits(pipeline, prompt)]
            if not readable:
                raise ValueError(f"{model!r} reads none of the prompts of this benchmark, such as {PROMPTS[0]!r}.")

            def prompts(batch: int) -> dict[str, Any]:
                with torch.no_grad():
                    features, mask = pipeline.encode_prompt([readable[i % len(readable)] for i in range(batch)])
                return {"caption_features": features, "caption_mask": mask}

            return transformer, prompts, model
        label = model
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformer = LlamaGen.preset(preset, image_size=image_size).eval()
            # The output layer starts at zero, which would make every token equally probable.
            torch.nn.init.normal_(transformer.output.weight, std=0.05)
        label = f"preset {preset}, random"
    classes = transformer.config.num_classes
    return transformer, lambda batch: {"class_labels": torch.arange(batch) * 37 % classes}, label


def _check_equal(ours: Tensor, plain: Tensor, batch: int) -> None:
    if not torch.equal(ours, plain):
        row, step = (ours != plain).nonzero()[0].tolist()
        raise MMSDKError(
            f"Both sides must give the same tokens, but at batch {batch} image {row} differs from token {step} on "
            f"({int(ours[row, step])} and {int(plain[row, step])}): their speeds cannot be compared."
        )
