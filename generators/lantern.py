"""LANTERN for a pipeline: drafts of a feature head, accepted with the help of what looks alike in the codebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from generators.feature_head import FeatureDrafter, FeatureHead
from generators.llamagen import LlamaGen
from mmsdk.decoding.decoder import SpeculativeDecoder
from mmsdk.decoding.rules.lantern import Lantern
from tokenizers_img.quantizers import VectorQuantizer

if TYPE_CHECKING:
    from generators.pipelines import ARImagePipeline
    from generators.speculation import ConditionedDrafter


def lantern(
    pipeline: ARImagePipeline,
    drafter: FeatureHead | ConditionedDrafter,
    delta: float = 0.1,
    k: int = 1000,
    do_sample: bool = True,
    mode: str = "paper",
    **settings: Any,
) -> SpeculativeDecoder:
    """Return a decoder that accepts drafts by the probability of their neighbours in the codebook, too.

    Papers: "LANTERN" (Jang et al. 2024, arXiv 2410.03355), "LANTERN++" (Park et al. 2025, arXiv 2502.06352). Not
    lossless: the larger `delta` is, the fewer forwards, and the further pictures stray. The neighbours are computed
    once and kept in memory with the tokenizer. What is accepted depends on what is drafted: for pictures that a seed
    alone decides, give `num_candidates`, as otherwise the measured speed of the machine does.

    Args:
        pipeline: with a LlamaGen, and a tokenizer with a learned codebook.
        drafter: a head for its transformer, or any drafter of its tokens.
        delta: up to 1, the largest probability that neighbours add (LANTERN); above 1, they add up to `delta - 1` times
            the token's own (LANTERN++).
        k: neighbours of each code that are considered; of small codebooks all.
        do_sample: False for generations that take the most probable tokens.
        mode: `"paper"` or `"official"`, see `Lantern`.
        **settings: of `SpeculativeDecoder`, such as `num_candidates`.

    Raises:
        TypeError: the transformer or the tokenizer is of another kind.
        ValueError: a number is out of its range, or the head was made for another transformer.

    Example:
        ```py
        head = FeatureHead.from_pretrained("emoji-64-head")
        pipe("red heart", accelerator=lantern(pipe, head, delta=0.2))
        ```
    """
    quantize = getattr(pipeline.image_tokenizer, "quantize", None)
    if not isinstance(pipeline.transformer, LlamaGen):
        raise TypeError(f"LANTERN drafts for a LlamaGen, not for {type(pipeline.transformer).__name__}.")
    if not isinstance(quantize, VectorQuantizer):
        raise TypeError(
            f"LANTERN needs a learned codebook, whose codes have neighbours; {type(pipeline.image_tokenizer).__name__} "
            "has none here."
        )
    if isinstance(drafter, FeatureHead):
        drafter = FeatureDrafter(drafter, pipeline.transformer)
    neighbours = quantize.nearest_codes(min(k, quantize.codebook_size - 1))
    rule = Lantern(neighbours, delta, neighbours.shape[1], do_sample, mode)
    return SpeculativeDecoder(drafter, rule, **settings)
