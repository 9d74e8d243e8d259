"""Accelerators by name: what `pipe(prompt, accelerator="lantern")` and `mmsdk generate --accelerate lantern` mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsdk.errors import unknown_name
from mmsdk.loading import WEIGHTS_FOLDER, embedded_models, resolve

if TYPE_CHECKING:
    from generators.pipelines import ARImagePipeline

# Name -> what it does, for help texts.
ACCELERATORS = {
    "disa": "fewer diffusion or flow steps as the picture is completed (50 down to 5)",
    "lantern": "a draft head, and tokens that look alike count as one another (LlamaGen; other pictures)",
    "cspd": "a small model drafts continuous tokens (MAR; other pictures)",
    "recycling": "tokens drafted from earlier predictions (LlamaGen; the same pictures)",
}


def make_accelerator(name: str, pipeline: ARImagePipeline, draft: Any = None) -> Any:
    """Return the accelerator called `name`, with its defaults, for a pipeline.

    Args:
        name: one of `ACCELERATORS`.
        pipeline: what it shall accelerate.
        draft: model that drafts (`lantern`: a `FeatureHead`, `cspd`: a `MAR`), or its embedded name or folder. Default:
            the one that ships for an embedded pipeline.

    Raises:
        UnknownNameError: there is no such accelerator, or no such draft.
        TypeError: the pipeline has a transformer or tokenizer of another kind.
        ValueError: there is no draft for this pipeline, it does not fit, or none is needed.
    """
    if name not in ACCELERATORS:
        raise unknown_name("accelerator", name, list(ACCELERATORS))
    if name == "lantern":
        from generators.lantern import lantern

        return lantern(pipeline, _draft(name, pipeline, draft, "feature_head", "head"))
    if name == "cspd":
        from generators.continuous import ContinuousSpeculation

        return ContinuousSpeculation(_draft(name, pipeline, draft, "mar", "draft"))
    if draft is not None:
        raise ValueError(f"{name!r} needs no model to draft with, got {draft!r}.")
    if name == "disa":
        from generators.annealing import StepAnnealing

        return StepAnnealing()
    from mmsdk.decoding.decoder import SpeculativeDecoder
    from mmsdk.decoding.drafters.token_recycling import TokenRecycling

    sizes = pipeline.image_tokenizer.codebook_sizes
    if sizes is None or len(sizes) != 1:
        raise TypeError(f"Token ids are recycled, but {type(pipeline.image_tokenizer).__name__} has none of one book.")
    return SpeculativeDecoder(TokenRecycling(sizes[0]))


def _draft(name: str, pipeline: ARImagePipeline, draft: Any, component: str, suffix: str) -> Any:
    """Return the model that drafts, on the pipeline's device."""
    if draft is None:
        source = Path(pipeline.name_or_path or "")
        draft = f"{source.name}-{suffix}"
        if source.parent != WEIGHTS_FOLDER or draft not in embedded_models():
            having = sorted(n.removesuffix(f"-{suffix}") for n, parts in embedded_models().items()
                            if n.endswith(f"-{suffix}") and component in parts)  # fmt: skip
            raise ValueError(
                f"No model that drafts for this pipeline ships with the package (there are some for {having}): give "
                f"{name!r} its draft, a {resolve(component).__name__}."
            )
    if isinstance(draft, str | Path):
        draft = resolve(component).from_pretrained(draft)
    return draft.to(pipeline.device).eval()
