"""The base class of every model here: diffusers' `ModelMixin` with embedded names and typed errors."""

from __future__ import annotations

from os import PathLike
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from safetensors import SafetensorError

from mmsdk.errors import CheckpointError
from mmsdk.loading import resolve_pretrained


class PretrainedModel(ModelMixin, ConfigMixin):
    """A `ModelMixin` whose `from_pretrained` also takes embedded names and refuses weights that do not fit.

    Attributes:
        registry_name: the name of the class in `mmsdk.loading.REGISTRY`.
    """

    registry_name: str
    config_name = "config.json"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Load an embedded model by name, a local folder or a hub repository; keywords as in diffusers.

        Raises:
            UnknownNameError: the name is none of the three.
            CheckpointError: the weights are damaged, or their keys or shapes do not fit the configuration.
        """
        source = resolve_pretrained(cls.registry_name, pretrained_model_name_or_path)
        with_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(source, output_loading_info=True, **kwargs)
        except (SafetensorError, RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(f"Cannot load {cls.__name__} from {source!r}: {error}") from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if info.get(problem):
                found = sorted(map(str, info[problem]))[:5]
                raise CheckpointError(
                    f"The weights in {source!r} do not fit {cls.__name__}: {problem.replace('_', ' ')} {found}."
                )
        return (model, info) if with_info else model
