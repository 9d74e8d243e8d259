"""`mmsdk bench prune-vlm`: what the prefill of a vision-language model gains when visual tokens are dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from mmsdk.bench.measure import PeakMemory
from mmsdk.bench.runner import BenchResult
from mmsdk.errors import MMSDKError, unknown_name
from mmsdk.loading import resolve

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
_IMAGE_TOKEN = 999
_SIDE, _PATCH = 336, 14


def prune_vlm(
    method: str = "divprune",
    keep_ratios: Sequence[float] = (0.25, 0.1),
    hidden_size: int = 1024,
    intermediate_size: int = 2752,
    num_layers: int = 8,
    num_heads: int = 16,
    vision_hidden_size: int = 256,
    vision_layers: int = 6,
    crops: int = 2,
    text_tokens: int = 32,
    repeats: int = 3,
    clock: str = "wall",
    seed: int = 0,
    output_dir: Path | None = None,
) -> BenchResult:
    """Time the prefill of a LLaVA-NeXT with random weights, with all visual tokens and with few, in turn.

    Args:
        method: pruning method, by name.
        keep_ratios: shares of visual tokens to keep.
        hidden_size: width of the language model; the default has the published proportions at a quarter of the width.
        intermediate_size: width of its MLPs.
        num_layers: its layers.
        num_heads: its attention heads.
        vision_hidden_size: width of the vision tower, which has one head per 64; the default takes the share of the
            operations that it has in the published 7B model.
        vision_layers: its layers.
        crops: per side of an image of `336 * crops` pixels per side; 2 give 2,928 visual tokens.
        text_tokens: of the prompt, besides the image.
        repeats: timed prefills of each kind, after one that is not timed; the fastest is shown.
        clock: `wall`, or `processor`: time that processors work for it, for machines that do other work too.
        seed: of weights, image and prompt.
        output_dir: not used.

    Raises:
        MMSDKError: keeping all tokens changes the logits.
        ValueError: `repeats` is below 1, or the method does not take a ratio.
        UnknownNameError: no method or clock has this name.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    pruner = resolve(method)
    if clock not in CLOCKS:
        raise unknown_name("clock", clock, list(CLOCKS))
    vision_config: Any = CLIPVisionConfig(
        hidden_size=vision_hidden_size,
        intermediate_size=4 * vision_hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=max(1, vision_hidden_size // 64),
        image_size=_SIDE,
        patch_size=_PATCH,
    )
    text_config: Any = LlamaConfig(
        vocab_size=_IMAGE_TOKEN + 1,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=8192,
    )
    model, inputs = _llava_next(vision_config, text_config, crops, text_tokens, seed)
    plain = _Prefill(model, inputs, CLOCKS[clock])
    expected = plain.run()
    everything = pruner(keep_ratio=1.0)
    if not torch.equal(_Prefill(model, inputs, CLOCKS[clock], everything).run(), expected):
        raise MMSDKError("Keeping all visual tokens must leave the logits as they are, but they differ.")
    runs = [plain, *(_Prefill(model, inputs, CLOCKS[clock], pruner(keep_ratio=ratio)) for ratio in keep_ratios)]
    for repeat in range(-1, repeats):
        for place in range(len(runs)):
            runs[(place + repeat) % len(runs)].measure(timed=repeat >= 0)

    vision = _vision_operations(model, inputs)
    visual, before = everything.report.tokens_before[0], everything.report.flops_before
    known = [*model.parameters(), *model.buffers(), *inputs.values()]
    table: list[list[Any]] = []
    for ratio, run in zip((1.0, *keep_ratios), runs, strict=True):
        with PeakMemory(known) as memory:
            run.run()
        report = run.pruner.report if run.pruner else everything.report
        whole, language = vision + report.flops_after, report.flops_after
        gains = [plain.whole / run.whole, plain.language / (run.language + run.selection)]
        allowed = [(vision + before) / whole, before / language]
        table.append(
            [
                ratio,
                report.tokens_after[0],
                run.whole,
                run.selection,
                run.language,
                whole / 1e9,
                *(x for gain, limit in zip(gains, allowed, strict=True) for x in (gain, limit, 100 * gain / limit)),
                memory.peak / 2**20,
            ]
        )
    notes = [
        f"LLaVA-NeXT with random weights: {visual} visual tokens, {text_tokens} of text; language model {num_layers} x "
        f"{hidden_size}, vision tower {vision_layers} x {vision_hidden_size}; {pruner.__name__}.",
        f"s: seconds ({clock} time), the fastest of {repeats}, in turn. prefill: all of it. selection: pruning but "
        "the vision tower and the language model, so with what prepares the inputs. LM: the language model's layers.",
        "GFLOP: two per multiply-add of the vision tower and of the language model, causal attention counted by half; "
        "the selection's are not counted, but its time is.",
        "speed-up: of the prefill; LM speed-up: of the language model, its selection included; allowed: were time "
        "proportional to GFLOP; %: of that.",
        "MiB: the most that tensors took at once beyond weights and inputs. Checked: keeping all gives the same bits.",
    ]
    columns = [
        "keep_ratio", "tokens", "prefill s", "selection s", "LM s", "GFLOP", "speed-up", "allowed", "%",
        "LM speed-up", "LM allowed", "LM %", "MiB",
    ]  # fmt: skip
    return BenchResult("prune-vlm", columns, table, notes)


class _Prefill:
    """One kind of prefill, and the least seconds of its parts."""

    def __init__(self, model: Any, inputs: dict[str, Tensor], clock: Callable[[], float], pruner: Any = None) -> None:
        self.model, self.inputs, self.clock, self.pruner = model, inputs, clock, pruner
        self.whole = self.selection = self.language = float("inf")

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Return the logits of the next token, `(1, 1, vocabulary)`."""
        if self.pruner is None:
            return self.model(**self.inputs, logits_to_keep=1).logits
        with self.pruner(self.model):
            return self.model(**self.inputs, logits_to_keep=1).logits

    def measure(self, timed: bool) -> None:
        """Run once, and keep what was faster than before."""
        clock = self.clock
        marks: list[float] = []
        base = self.model.model
        parts = (base.vision_tower, base.multi_modal_projector, base.language_model)
        handles = [p.register_forward_pre_hook(lambda *_: marks.append(clock())) for p in parts]
        handles += [p.register_forward_hook(lambda *_: marks.append(clock())) for p in parts]
        try:
            started = clock()
            self.run()
            ended = clock()
        finally:
            for handle in handles:
                handle.remove()
        if timed:
            seen, language = marks[3] - marks[0], marks[5] - marks[4]
            self.whole = min(self.whole, ended - started)
            self.language = min(self.language, language)
            self.selection = min(self.selection, ended - started - seen - language)


def _llava_next(
    vision_config: Any, text_config: Any, crops: int, text_tokens: int, seed: int
) -> tuple[Any, dict[str, Tensor]]:
    """Return a model and a prompt with one image."""
    grid = _SIDE // _PATCH
    visual = grid * grid + (crops * grid) * (crops * grid + 1)
    side = _SIDE * crops
    settings: Any = {"image_token_id": _IMAGE_TOKEN, "image_grid_pinpoints": [[side, side]]}
    config = LlavaNextConfig(vision_config=vision_config, text_config=text_config, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config).eval()
        words = torch.randint(3, _IMAGE_TOKEN, (1, text_tokens))
        pixels = torch.randn(1, 1 + crops * crops, 3, _SIDE, _SIDE)
    image = torch.full((1, visual), _IMAGE_TOKEN)
    ids = torch.cat([words[:, : text_tokens // 2], image, words[:, text_tokens // 2 :]], 1)
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[side, side]]),
    }


def _vision_operations(model: Any, inputs: dict[str, Tensor]) -> int:
    """Count the operations that turn the image into visual tokens."""
    # The fused attention of CPUs is not among what the counter knows; its parts are.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    return counter.get_total_flops()
