"""Continuous speculative decoding on the embedded MAR and its draft: forwards, time and quality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from generators.annealing import StepAnnealing
from generators.continuous import ContinuousSpeculation
from generators.mar import MAR
from mmsdk.bench.figures import labelled_rows
from mmsdk.bench.prompts import STYLES, PromptSet, load_pipeline
from mmsdk.bench.runner import BenchResult


def cspd(
    model: str = "emoji-64-mar",
    draft: str = "emoji-64-mar-draft",
    num_drafts: Sequence[int] = (2, 4, 8),
    num_iter: int = 16,
    num_steps: int = 100,
    num_prompts: int = 200,
    paper_prompts: int = 16,
    split: str = "train",
    styles: Sequence[str] = STYLES,
    evaluator: str = "emoji-64",
    batch_size: int = 8,
    sheet_images: int = 12,
    seed: int = 0,
    cache_dir: str | None = None,
    output_dir: Path | None = None,
) -> BenchResult:
    """Draw the same prompts with the target, its draft, speculation, DiSA, fewer iterations, and combinations.

    Args:
        model: embedded name or folder of a pipeline with a MAR.
        draft: embedded name or folder of a small MAR of the same latents.
        num_drafts: steps between verifications.
        num_iter: steps of the generation, but where there are fewer.
        num_steps: diffusion steps of the head, for target and draft, but where DiSA sets them.
        num_prompts: prompts.
        paper_prompts: prompts that the exact mode draws, picture by picture; 0 leaves it out.
        split: `train` (emoji seen in this style), `pair` (seen in other styles only), `test` (unseen emoji).
        styles: image sets to ask for.
        evaluator: embedded name or folder.
        batch_size: pictures drawn at once.
        sheet_images: columns of the sample sheet.
        seed: of all draws.
        cache_dir: where the data set lies.
        output_dir: receives the sample sheet.

    Raises:
        DataError: the data set has too few prompts.
    """
    pipeline = load_pipeline(model)
    small = MAR.from_pretrained(draft).eval()
    prompts = PromptSet(split, [pipeline], num_prompts, styles, evaluator, seed=seed, cache_dir=cache_dir)
    full: dict[str, Any] = {"num_iter": num_iter, "annealing": StepAnnealing(num_steps, num_steps, "constant")}
    few: dict[str, Any] = {"num_iter": num_iter, "annealing": StepAnnealing()}
    methods: dict[str, tuple[Any, dict[str, Any]]] = {"target": (None, full)}
    for count in num_drafts:
        methods[f"CSpD, every {count}"] = (ContinuousSpeculation(small, count), full)
    for part in (2, 4):
        methods[f"target, {num_iter // part} iterations"] = (None, full | {"num_iter": num_iter // part})
    methods["DiSA"] = (None, few)
    methods[f"CSpD, every {num_drafts[-1]}, and DiSA"] = (ContinuousSpeculation(small, num_drafts[-1]), few)
    pipeline(prompts.prompts[0], **full)  # the first call is slower than others
    table: list[list[Any]] = []
    sheet = {"real": prompts.images[:sheet_images]}
    for name, (accelerator, settings) in methods.items():
        images, seconds = prompts.draw(pipeline, batch_size, accelerator=accelerator, **settings)
        quality = prompts.judge(images)
        stats = accelerator.stats if accelerator else None
        forwards = stats.target_forwards if stats else settings["num_iter"]
        drafted = [stats.draft_forwards, stats.acceptance_rate] if stats else [0, None]
        lossless = "yes" if name == "target" else "no"
        with FlopCounterMode(display=False) as counter:
            pipeline(prompts.prompts[:batch_size], accelerator=accelerator, **settings)
        per_image = seconds / num_prompts
        ratio = table[0][6] / per_image if table else 1.0
        flops = counter.get_total_flops() / batch_size / 1e9
        table.append([name, lossless, forwards, *drafted, flops, per_image, ratio, *quality])
        sheet[name] = images[:sheet_images]
    if paper_prompts:
        exact = ContinuousSpeculation(small, num_drafts[0], mode="paper")
        prompts.prompts = prompts.prompts[:paper_prompts]
        images, seconds = prompts.draw(pipeline, 1, accelerator=exact, **full)
        stats = exact.stats
        drafted = [stats.draft_forwards, stats.acceptance_rate]
        alone = prompts.draw(pipeline, 1, **full)[1]
        row = [f"exact, every {num_drafts[0]}", "yes", stats.target_forwards, *drafted, None, seconds / paper_prompts]
        table.append([*row, alone / seconds, None, None, None])
    figures = [labelled_rows(sheet, output_dir / "cspd.png")] if output_dir is not None else []
    return BenchResult(
        "cspd",
        [
            "method",
            "lossless",
            "forwards",
            "of draft",
            "acceptance",
            "GFLOP",
            "s/image",
            "ratio",
            "top-1",
            "top-5",
            "FD",
        ],
        table,
        [
            prompts.note,
            f"{num_iter} iterations of {num_steps} diffusion steps, in batches of {batch_size}, decoding included. "
            "Forwards of the target and of the draft, and acceptance, of the last batch. GFLOP: multiplications and "
            "additions of a picture; the target denoises every token that it verifies, as the draft has before.",
            "The exact mode draws picture by picture; its ratio is to the target drawing the same prompts so.",
        ],
        figures,
    )
