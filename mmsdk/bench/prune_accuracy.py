"""`mmsdk bench prune-accuracy`: what a vision-language model still answers when visual tokens are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmsdk.bench.figures import line_plot
from mmsdk.bench.runner import BenchResult
from mmsdk.data.emoji_vqa import QUESTIONS, EmojiScenes, Question
from mmsdk.loading import PRUNERS, load_vlm, resolve

TASKS = tuple(QUESTIONS)
METHODS = (*PRUNERS, "fastv")


def prune_accuracy(
    model: str = "emoji-vqa",
    methods: Sequence[str] = METHODS,
    keep_ratios: Sequence[float] = (0.5, 0.25, 0.125, 0.0625, 0.03, 0.02),
    questions: int = 528,
    batch_size: int = 12,
    output_dir: Path | None = None,
) -> BenchResult:
    """Measure accuracy against the share of visual tokens that is kept, per method.

    Each question stands alone in its sequence and asks about a scene of its own that the model never saw. Answers are
    compared word for word.

    Args:
        model: vision-language model that answers `emoji-vqa` questions.
        methods: pruning methods.
        keep_ratios: shares of visual tokens to keep.
        questions: how many, a multiple of the four tasks; one standard error is `50 / sqrt(questions)` points at most.
        batch_size: questions that are answered together.
        output_dir: receives `prune-accuracy.png`.

    Raises:
        ValueError: `questions` is no positive multiple of four.
    """
    if questions < len(TASKS) or questions % len(TASKS):
        raise ValueError(f"questions must be a positive multiple of {len(TASKS)}, received {questions}.")
    vlm, processor = load_vlm(model)
    scenes = EmojiScenes("test")
    # One task after the other, so that the questions of a batch are equally long.
    asked = [(i, scenes.question(i, task)) for t, task in enumerate(TASKS) for i in range(t, questions, len(TASKS))]
    runs: dict[tuple[str, float], Any] = {("all tokens", 1.0): None, ("another image", 1.0): None}
    for method in methods:
        # A new draw for every image; else all would keep the same places.
        options = {"generator": torch.Generator().manual_seed(0)} if method == "random" else {}
        runs |= {(method, ratio): resolve(method)(keep_ratio=ratio, **options) for ratio in keep_ratios}
    right = {run: {task: 0 for task in TASKS} for run in runs}
    counts: dict[tuple[str, float], list[int]] = {run: [] for run in runs}
    with tqdm(total=questions, desc="prune-accuracy", unit="question") as bar:
        for first in range(0, questions, batch_size):
            rows = asked[first : first + batch_size]
            for run, pruner in runs.items():
                # A picture that has nothing to do with the question shows what guessing is worth.
                shift = questions if run[0] == "another image" else 0
                images = [scenes[i + shift].image for i, _ in rows]
                answers, kept = _answers(vlm, processor, images, [q for _, q in rows], pruner)
                counts[run] += kept
                for said, (_, question) in zip(answers, rows, strict=True):
                    right[run][question.task] += said == question.answer
            bar.update(len(rows))
    table: list[list[Any]] = []
    for (method, ratio), scores in right.items():
        tokens = sum(counts[method, ratio]) / questions
        accuracies = [100 * scores[task] / (questions // len(TASKS)) for task in TASKS]
        table.append([method, ratio, tokens, *accuracies, sum(accuracies) / len(TASKS)])
    figures = []
    if output_dir is not None:
        full = table[0][-1]
        series: dict[str, tuple[Sequence[float], Sequence[float]]] = {
            method: ([1.0, *keep_ratios], [full, *(row[-1] for row in table if row[0] == method)]) for method in methods
        }
        series["another image"] = ([1.0, min(keep_ratios)], [table[1][-1]] * 2)
        figures.append(
            line_plot(
                series,
                output_dir / "prune-accuracy.png",
                "share of visual tokens kept",
                "accuracy in percent",
                f"{model}: {questions} questions about unseen scenes",
                log2_x=True,
                ticks=[1.0, *keep_ratios],
            )
        )
    return BenchResult(
        name="prune-accuracy",
        columns=["method", "keep_ratio", "tokens", *TASKS, "all"],
        rows=table,
        notes=[
            f"Accuracy in percent; {questions // len(TASKS)} questions per task, each alone in its sequence.",
            "'another image' answers the same questions about scenes that they do not belong to.",
            "Tokens are those of the language model's last layer; 'fastv' drops the others after its second one.",
        ],
        figures=figures,
    )


def _answers(
    model: Any, processor: Any, images: Sequence[Any], questions: Sequence[Question], pruner: Any
) -> tuple[list[str], list[int]]:
    """Return the answers' words, and how many visual tokens of each image the last layer of the language model saw."""
    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        for question in questions
    ]
    prompts = [processor.apply_chat_template(message, add_generation_prompt=True) for message in messages]
    inputs = dict(processor(images=list(images), text=prompts, padding=True, return_tensors="pt"))
    kept = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    with torch.inference_mode(), nullcontext() if pruner is None else pruner(model):
        logits: Tensor = model(**inputs, logits_to_keep=1).logits[:, -1]
    if pruner is not None:
        kept = list(pruner.report.tokens_after)
    return processor.batch_decode(logits.argmax(-1, keepdim=True)), kept
