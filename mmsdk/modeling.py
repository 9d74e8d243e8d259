"""The base class of every model here: diffusers' `ModelMixin` with embedded names and typed errors."""

from __future__ import annotations

import logging
from os import PathLike
from typing import TYPE_CHECKING, Any

from diffusers import ConfigMixin, ModelMixin

from mmsdk.errors import CheckpointError
from mmsdk.loading import resolve_pretrained


def _is_justified(record: logging.LogRecord) -> bool:
    # diffusers gives this warning for models that keep no module in float32, too.
    return "should be kept in float32: []" not in record.getMessage()


class PretrainedModel(ModelMixin, ConfigMixin):
    """A `ModelMixin` whose `from_pretrained` also takes embedded names and refuses weights that do not fit.

    Saving writes the configuration, then puts the weights in place in one step: a new folder whose saving was
    interrupted has no weights and is refused.

    Attributes:
        registry_name: the name of the class in `mmsdk.loading.REGISTRY`.
    """

    registry_name: str
    config_name = "config.json"

    if TYPE_CHECKING:
        config: Any  # diffusers declares a plain dict, but its entries are attributes too

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the model, with the arguments of `torch.nn.Module.to`."""
        logger = logging.getLogger("diffusers.models.modeling_utils")
        logger.addFilter(_is_justified)
        try:
            return super().to(*args, **kwargs)
        finally:
            logger.removeFilter(_is_justified)

    @classmethod
    def from_config(cls, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Build the model of a configuration, with random weights; keywords as in diffusers.

        Raises:
            CheckpointError: the configuration is no dict.
        """
        if not isinstance(config, dict):  # diffusers would look for a model of that name
            raise CheckpointError(f"The configuration of {cls.__name__} must be an object, got {config!r}.")
        return super().from_config(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Load an embedded model by name, a local folder or a hub repository; keywords as in diffusers.

        Pickled weights are read only with `use_safetensors=False`.

        Raises:
            UnknownNameError: the name is none of the three.
            CheckpointError: the configuration or the weights are absent or damaged, or the keys or shapes of the
                weights do not fit the configuration.
        """
        source = resolve_pretrained(cls.registry_name, pretrained_model_name_or_path)
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        try:
            model, info = super().from_pretrained(source, output_loading_info=True, **kwargs)
        except Exception as error:  # a damaged configuration may make a constructor raise anything
            raise CheckpointError(f"Cannot load {cls.__name__} from {source!r}: {error}") from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if info.get(problem):
                found = sorted(map(str, info[problem]))[:5]
                raise CheckpointError(
                    f"The weights in {source!r} do not fit {cls.__name__}: {problem.replace('_', ' ')} {found}."
                )
        return (model, info) if with_info else model
