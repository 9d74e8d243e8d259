"""LANTERN on an embedded LlamaGen: forwards, time and quality, beside plain generation and exact speculation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from generators.feature_head import FeatureDrafter, FeatureHead
from generators.lantern import lantern as make_lantern
from mmsdk.bench.figures import labelled_rows, line_plot
from mmsdk.bench.prompts import STYLES, PromptSet, load_pipeline
from mmsdk.bench.runner import BenchResult
from mmsdk.decoding.decoder import SpeculativeDecoder


def lantern(
    model: str = "emoji-64",
    head: str = "emoji-64-head",
    deltas: Sequence[float] = (0.2, 0.5, 0.8, 0.95),
    k: int = 4095,
    num_candidates: int = 16,
    guidance_scale: float = 3.0,
    temperature: float = 1.0,
    top_k: int = 0,
    num_prompts: int = 200,
    split: str = "pair",
    styles: Sequence[str] = STYLES,
    evaluator: str = "emoji-64",
    batch_size: int = 1,
    sheet_images: int = 12,
    seed: int = 0,
    cache_dir: str | None = None,
    output_dir: Path | None = None,
) -> BenchResult:
    """Draw the same prompts plainly, with exact speculation, and with LANTERN at several bounds.

    Args:
        model: embedded name or folder of a pipeline with a LlamaGen.
        head: embedded name or folder of its draft head.
        deltas: bounds of the probability that neighbours add.
        k: neighbours of each code that count; of a codebook of 4096, 4095 are all.
        num_candidates: candidates of a draft; one more row has the cost model choose.
        guidance_scale: classifier-free guidance.
        temperature: divides the logits.
        top_k: choose among so many tokens; 0: all.
        num_prompts: prompts.
        split: `train` (emoji seen in this style), `pair` (seen in other styles only), `test` (unseen emoji).
        styles: image sets to ask for.
        evaluator: embedded name or folder.
        batch_size: pictures drawn at once.
        sheet_images: columns of the sample sheet.
        seed: of all draws.
        cache_dir: where the data set lies.
        output_dir: receives the plot and the sample sheet.

    Raises:
        DataError: the data set has too few prompts.
    """
    pipeline = load_pipeline(model)
    prompts = PromptSet(split, [pipeline], num_prompts, styles, evaluator, seed=seed, cache_dir=cache_dir)
    settings: dict[str, Any] = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k}
    trained = FeatureHead.from_pretrained(head).eval()

    def drafter() -> FeatureDrafter:
        return FeatureDrafter(trained, pipeline.transformer, num_candidates + 1, depth=3, tree_top_k=4)

    methods: dict[str, SpeculativeDecoder | None] = {
        "plain": None,
        "exact": SpeculativeDecoder(drafter(), num_candidates=num_candidates),
        "exact, size by cost": SpeculativeDecoder(drafter()),
    }
    for delta in deltas:
        methods[f"LANTERN {delta:g}"] = make_lantern(pipeline, drafter(), delta, k, num_candidates=num_candidates)
    middle = deltas[len(deltas) // 2]
    methods[f"LANTERN {middle:g}, official"] = make_lantern(
        pipeline, drafter(), middle, k, mode="official", num_candidates=num_candidates
    )
    methods[f"LANTERN {deltas[-1]:g}, size by cost"] = make_lantern(pipeline, drafter(), deltas[-1], k)
    pipeline(prompts.prompts[0], **settings)  # the first call is slower than others
    table: list[list[Any]] = []
    sheet = {"real": prompts.images[:sheet_images]}
    for name, decoder in methods.items():
        forwards = _Forwards(pipeline.transformer)
        with forwards:
            images, seconds = prompts.draw(pipeline, batch_size, accelerator=decoder, **settings)
        quality = prompts.judge(images)
        taken = forwards.count * batch_size / num_prompts
        exact = table[1][2] if len(table) > 1 else None
        ratios = [exact / taken if exact else None, table[0][4] / seconds if table else 1.0]
        accepted = decoder.stats.acceptance_rate if decoder else None
        lossless = "yes" if decoder is None or decoder.lossless else "no"
        table.append([name, lossless, taken, ratios[0], seconds, ratios[1], accepted, *quality])
        sheet[name] = images[:sheet_images]
    figures = []
    if output_dir is not None:
        points = [table[1], *table[3 : 3 + len(deltas)]]
        figures.append(
            line_plot(
                {
                    "LANTERN": ([r[2] for r in points], [r[8] for r in points]),
                    "plain": ([table[0][2]], [table[0][8]]),
                    "as its published code refuses": ([table[-2][2]], [table[-2][8]]),
                },
                output_dir / "lantern.png",
                "forwards of the generator per picture",
                "retrieval, top-5",
                f"LANTERN, delta 0 to {deltas[-1]:g}, split {split!r}",
            )
        )
        figures.append(labelled_rows(sheet, output_dir / "lantern-samples.png"))
    return BenchResult(
        "lantern",
        ["method", "lossless", "forwards", "fewer than exact", "s", "ratio", "acceptance", "top-1", "top-5", "FD"],
        table,
        [
            prompts.note,
            f"Guidance {guidance_scale:g}, temperature {temperature:g}, top-k {top_k}, {k} neighbours, batches of "
            f"{batch_size}. Forwards: of the generator for a picture, those of trees of {num_candidates} candidates "
            "included; forwards of the head come on top, in the time.",
            "Exact speculation draws the very pictures of plain generation. Where the size follows the cost, its "
            "measurement is part of the time, and no candidates at all are a choice. Official: refuses as published "
            "code does, not as the paper says.",
            f"The limit on this machine: C({num_candidates + 1}) = " + _limit(methods, num_candidates + 1),
        ],
        figures,
    )


class _Forwards:
    """Counts the forwards of a transformer over rows of a batch within a block."""

    def __init__(self, transformer: Any) -> None:
        self.transformer, self.count = transformer, 0

    def __enter__(self) -> None:
        self._hook = self.transformer.layers[0].register_forward_hook(self._note)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _note(self, *_: Any) -> None:
        self.count += 1


def _limit(methods: dict[str, SpeculativeDecoder | None], nodes: int) -> str:
    """Return how much a forward over so many tokens costs, and the break-even."""
    decoder = next(d for d in methods.values() if d is not None and d.num_candidates is None)
    cost = decoder.cost_model.cost(nodes)
    return f"{cost:.2f} forwards over one token: fewer tokens than that for a forward cannot pay."
