"""FlexTok's generator: writes a flexible number of FlexTok tokens, the coarse before the fine.

Bachmann et al., 2025, "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length" (arXiv 2502.13967).
"""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin  # noqa: F401 - diffusers looks here for it when it loads a pipeline

from generators.llamagen import LlamaGen


class FlexTokAR(LlamaGen):
    """LlamaGen's transformer as FlexTok's authors use it: learned positions, wider feed-forward layers, depth for size.

    It may stop after any number of tokens, and FlexTok decodes what is there to a whole image. Built by `of_depth` it
    has the published proportions; the arguments are those of `LlamaGen`.
    """

    registry_name = "flextok_ar"

    @classmethod
    def of_depth(cls, depth: int, **overrides: Any) -> FlexTokAR:
        """Build a transformer with new weights: 64 dimensions to a head, as many heads and layers as `depth`.

        Args:
            depth: published are 10 to 26.
            **overrides: configuration values to change; by default 256 tokens of 64000 codes and 1000 classes, a tenth
                of which a trainer should drop.

        Raises:
            ValueError: `depth` is below 1.
        """
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth must be an integer of at least 1, got {depth!r}.")
        width = 64 * depth
        proportions: dict[str, Any] = {"hidden_size": width, "num_layers": depth, "num_heads": depth}
        proportions |= {"intermediate_size": 4 * width, "positions": "learned", "codebook_size": 64000}
        return cls(**(proportions | {"max_tokens": 256, "condition_dropout": 0.1} | overrides))
