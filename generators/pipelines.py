"""Text or a class label to an image: an autoregressive generator, its image tokenizer, and a text encoder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Generator, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from generators.base import Trace
from generators.guidance import Guidance
from generators.llamagen import LlamaGen
from mmsdk.errors import CheckpointError, unknown_name
from mmsdk.images import tensor_to_pil
from mmsdk.loading import REGISTRY, resolve, resolve_pretrained
from mmsdk.tokens import ImageTokens
from tokenizers_img.base import ImageTokenizer

OUTPUT_TYPES = ("pil", "np", "pt", "latent", "tokens")
_UNFINISHED = 0.5  # grey of grid cells that have no token yet


@dataclass
class ARImagePipelineOutput(BaseOutput):
    """What the pipeline returns.

    Attributes:
        images: PIL images, a numpy array `(batch, height, width, 3)`, a tensor `(batch, 3, height, width)`, quantized
            latents `(batch, num_tokens, dim)`, or the `ImageTokens`, as `output_type` says.
        tokens: the tokens that were generated.
        trace: what was executed.
    """

    images: Any
    tokens: ImageTokens
    trace: Trace


@dataclass
class ARImageStep(BaseOutput):
    """What `stream` yields.

    Attributes:
        num_tokens: tokens generated so far.
        images: partial images, as `output_type` says.
        tokens: the tokens of the images, once all are there or where any prefix decodes; else None.
    """

    num_tokens: int
    images: Any
    tokens: ImageTokens | None


class ARImagePipeline(DiffusionPipeline):
    """Generates images token by token.

    Args:
        transformer: writes token ids from a condition.
        image_tokenizer: decodes them; its codebook and number of tokens must be the transformer's.
        text_encoder: transformers encoder of the prompts (text-conditional models).
        tokenizer: its tokenizer, which pads on the left.
        guidance_scale: default of the call.
        temperature: default of the call.
        top_k: default of the call; 0 keeps all.
        top_p: default of the call; 1 keeps all.

    Example:
        ```py
        pipe = ARImagePipeline.from_pretrained("emoji-64")
        pipe("red heart", generator=torch.Generator().manual_seed(0)).images[0].save("heart.png")
        ```
    """

    model_cpu_offload_seq = "text_encoder->transformer->image_tokenizer"
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 - diffusers reads this name

    def __init__(
        self,
        transformer: LlamaGen,
        image_tokenizer: ImageTokenizer,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        guidance_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        super().__init__()
        if image_tokenizer.codebook_sizes != (transformer.config.codebook_size,):
            raise ValueError(
                f"The transformer writes tokens of one codebook with {transformer.config.codebook_size} entries, but "
                f"the image tokenizer {type(image_tokenizer).__name__} has {image_tokenizer.codebook_sizes}: they do "
                "not belong together."
            )
        if not _lengths_fit(transformer.config.max_tokens, image_tokenizer):
            raise ValueError(
                f"The transformer writes up to {transformer.config.max_tokens} tokens, but an image of "
                f"{type(image_tokenizer).__name__} has {image_tokenizer.max_tokens}."
            )
        if transformer.config.condition == "text" and (text_encoder is None or tokenizer is None):
            raise ValueError("A text-conditional transformer needs a text_encoder and its tokenizer.")
        self.register_modules(
            transformer=transformer, image_tokenizer=image_tokenizer, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)

    # ------------------------------------------------------------ loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Load an embedded pipeline by name, a local folder or a hub repository; keywords as in diffusers.

        Raises:
            UnknownNameError: the name is none of the three.
            CheckpointError: the folder is no pipeline, names classes that do not belong into one, or holds damaged
                weights.
        """
        source = resolve_pretrained("ar_image_pipeline", pretrained_model_name_or_path)
        # transformers would keep the float16 in which weights are stored: slow on a CPU, and coarser than intended.
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        try:
            _import_components(Path(source))
            return super().from_pretrained(source, **kwargs)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"Cannot load {cls.__name__} from {source!r}: {error}") from error

    # ------------------------------------------------------------ conditions

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return text features `(batch, length, dim)` and their mask `(batch, length)`, padded on the left.

        Raises:
            ValueError: a prompt is empty, holds nothing that the tokenizer knows, or is too long.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        length = self.transformer.config.num_condition_tokens
        for text in prompts:
            if not isinstance(text, str):
                raise TypeError(f"A prompt must be a string, got {type(text).__name__}.")
            count = len(self.tokenizer(text)["input_ids"])
            if count == 0:
                raise ValueError(f"The prompt {text!r} is empty or holds no letters or digits; describe what to draw.")
            if count > length:
                raise ValueError(f"The prompt has {count} tokens, this model reads {length}: shorten {text[:80]!r}.")
        batch = self.tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt").to(
            self._execution_device
        )
        features = self.text_encoder(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        return features, batch["attention_mask"]

    def _condition(
        self, prompt: str | Sequence[str] | None, class_labels: int | Sequence[int] | None, num_images_per_prompt: int
    ) -> tuple[dict[str, Any], int]:
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}.")
        if self.transformer.config.condition == "text":
            if prompt is None or class_labels is not None:
                raise ValueError("This pipeline is text-conditional: pass a prompt (and no class_labels).")
            features, mask = self.encode_prompt(prompt)
            features, mask = (x.repeat_interleave(num_images_per_prompt, 0) for x in (features, mask))
            return {"caption_features": features, "caption_mask": mask}, len(features)
        if class_labels is None or prompt is not None:
            raise ValueError("This pipeline is class-conditional: pass class_labels (and no prompt).")
        labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        labels = labels.repeat_interleave(num_images_per_prompt)
        return {"class_labels": labels}, len(labels)

    # ------------------------------------------------------------ generation

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | Guidance | None = None,
        num_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool = True,
        generator: Generator | Sequence[Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None] | None = None,
    ) -> ARImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            prompt: one text or several (text-conditional models).
            class_labels: one label or several (class-conditional models).
            num_images_per_prompt: images for each prompt or label.
            guidance_scale: classifier-free guidance; 1 turns it off and halves the cost. A `Guidance` varies it.
            num_tokens: stop after this many tokens (ordered tokenizers): fewer are faster and coarser.
            temperature: divides the logits.
            top_k: keep the k most probable tokens; 0 keeps all.
            top_p: keep the most probable tokens up to this probability; 1 keeps all.
            do_sample: False always takes the most probable token.
            generator: one for the whole call, or one for each image; then an image does not depend on its batch.
            output_type: `pil`, `np`, `pt`, `latent` or `tokens`.
            return_dict: False returns `(images,)`.
            callback_on_step_end: called as `callback(pipeline, step, num_tokens, {"token_ids": ids})` after each
                token; set `pipeline._interrupt = True` in it to stop with the tokens that are there (ordered
                tokenizers).

        Raises:
            ValueError: an argument is missing, out of range, or does not fit the model.
        """
        steps = self._steps(
            prompt, class_labels, num_images_per_prompt, guidance_scale, num_tokens, temperature, top_k, top_p,
            do_sample, generator, output_type,
        )  # fmt: skip
        self._interrupt = False
        total, trace, iterator = steps
        with self.progress_bar(total=total) as bar:
            for step, token_ids in iterator:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, total, {"token_ids": token_ids})
                if self._interrupt and self.image_tokenizer.ordered:
                    break
        tokens = self._tokens(token_ids)
        images = self._postprocess(tokens, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ARImagePipelineOutput(images=images, tokens=tokens, trace=trace)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | Guidance | None = None,
        num_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool = True,
        generator: Generator | Sequence[Generator] | None = None,
        output_type: str = "pil",
        every: int | None = None,
    ) -> Iterator[ARImageStep]:
        """Generate like a call, yielding partial images; the last one is what the call returns.

        Tokens of an ordered tokenizer give the whole image, coarse to fine; of a grid tokenizer the finished cells,
        the rest grey.

        Args:
            prompt: as in a call, like all other arguments but the last.
            class_labels: see `__call__`.
            num_images_per_prompt: see `__call__`.
            guidance_scale: see `__call__`.
            num_tokens: see `__call__`.
            temperature: see `__call__`.
            top_k: see `__call__`.
            top_p: see `__call__`.
            do_sample: see `__call__`.
            generator: see `__call__`.
            output_type: `pil`, `np` or `pt`.
            every: tokens between images; by default 1, 2, 4, 8, ... tokens (ordered), or one row of the grid.
        """
        if output_type not in OUTPUT_TYPES[:3]:
            raise ValueError(f"stream gives output_type {', '.join(OUTPUT_TYPES[:3])}; got {output_type!r}.")
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        total, _, iterator = self._steps(
            prompt, class_labels, num_images_per_prompt, guidance_scale, num_tokens, temperature, top_k, top_p,
            do_sample, generator, output_type,
        )  # fmt: skip
        ordered, grid = self.image_tokenizer.ordered, self.image_tokenizer.grid
        for step, token_ids in iterator:
            count = step + 1
            if every is not None:
                due = count % every == 0
            else:
                due = count & (count - 1) == 0 if ordered or grid is None else count % grid[1] == 0
            if count == total or ordered and due:
                tokens = self._tokens(token_ids.clone())
                yield ARImageStep(num_tokens=count, images=self._postprocess(tokens, output_type), tokens=tokens)
            elif due and grid is not None:
                yield ARImageStep(num_tokens=count, images=self._partial_grid(token_ids, output_type), tokens=None)

    def _steps(
        self,
        prompt: str | Sequence[str] | None,
        class_labels: int | Sequence[int] | None,
        num_images_per_prompt: int,
        guidance_scale: float | Guidance | None,
        num_tokens: int | None,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        do_sample: bool,
        generator: Generator | Sequence[Generator] | None,
        output_type: str,
    ) -> tuple[int, Trace, Iterator[tuple[int, Tensor]]]:
        """Check everything, then return the number of tokens, the trace to be filled, and the steps."""
        if output_type not in OUTPUT_TYPES:
            raise unknown_name("output_type", output_type, list(OUTPUT_TYPES))
        total = self._check_num_tokens(num_tokens)
        condition, batch = self._condition(prompt, class_labels, num_images_per_prompt)
        if isinstance(generator, Sequence) and len(generator) != batch:
            raise ValueError(f"Got {len(generator)} generators for {batch} images; pass one, or one for each image.")
        defaults = self.config
        trace = Trace()
        iterator = self.transformer.iter_generate(
            **condition,
            num_tokens=total,
            guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
            temperature=defaults.temperature if temperature is None else temperature,
            top_k=min(defaults.top_k if top_k is None else top_k, self.transformer.config.codebook_size),
            top_p=defaults.top_p if top_p is None else top_p,
            do_sample=do_sample,
            generator=generator,
            trace=trace,
        )
        return total, trace, iterator

    def _check_num_tokens(self, num_tokens: int | None) -> int:
        most = self.transformer.config.max_tokens
        if num_tokens is None:
            return most
        if not 1 <= num_tokens <= most:
            raise ValueError(f"num_tokens must lie in 1..{most} for this model, got {num_tokens}.")
        if num_tokens < most and not self.image_tokenizer.ordered:
            raise ValueError(
                f"{type(self.image_tokenizer).__name__} needs all {most} tokens of an image, got num_tokens="
                f"{num_tokens}: grid tokens are not ordered by importance. A pipeline over One-D-Piece tokens can stop "
                "anywhere."
            )
        return num_tokens

    # ------------------------------------------------------------ outputs

    def _tokens(self, token_ids: Tensor) -> ImageTokens:
        return ImageTokens(token_ids=token_ids, spec=self.image_tokenizer.token_spec())

    def _postprocess(self, tokens: ImageTokens, output_type: str) -> Any:
        if output_type == "tokens":
            return tokens
        if output_type == "latent":
            return self.image_tokenizer.quantize.dequantize(tokens.token_ids)
        return _convert(self.image_tokenizer.decode(tokens).images, output_type)

    def _partial_grid(self, token_ids: Tensor, output_type: str) -> Any:
        """Decode the cells that have a token and paint the others grey."""
        rows, columns = self.image_tokenizer.grid or (0, 0)
        count = token_ids.shape[1]
        # Convolutions look beyond a cell: missing tokens repeat the last one, so that the border is not disturbed by a
        # wild guess.
        padded = torch.cat([token_ids, token_ids[:, -1:].expand(-1, rows * columns - count)], 1)
        images = self.image_tokenizer.decode(self._tokens(padded)).images
        done = (torch.arange(rows * columns, device=images.device) < count).view(1, 1, rows, columns)
        done = done.repeat_interleave(images.shape[2] // rows, 2).repeat_interleave(images.shape[3] // columns, 3)
        return _convert(torch.where(done, images, torch.full_like(images, _UNFINISHED)), output_type)


def _lengths_fit(count: int, image_tokenizer: ImageTokenizer) -> bool:
    """A transformer over ordered tokens may write a prefix only; over a grid it must write all."""
    return count <= image_tokenizer.max_tokens if image_tokenizer.ordered else count == image_tokenizer.max_tokens


def _convert(images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    if output_type == "pil":
        return tensor_to_pil(images)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def _import_components(folder: Path) -> None:
    """Import our classes that a pipeline names: diffusers takes classes from imported modules only."""
    index = folder / "model_index.json"
    named = json.loads(index.read_text()).values() if folder.is_dir() else None
    for name, target in REGISTRY.items():
        if named is None or target.split(":") in named:
            resolve(name)
