"""Text or a class label to an image: an autoregressive generator, its image tokenizer, and a text encoder."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Generator, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from generators.accelerators import ACCELERATORS, make_accelerator
from generators.annealing import StepAnnealing
from generators.base import Trace
from generators.continuous import ContinuousSpeculation
from generators.guidance import Guidance
from mmsdk.decoding.decoder import SpeculativeDecoder
from mmsdk.errors import CheckpointError, unknown_name
from mmsdk.images import load_images, tensor_to_pil
from mmsdk.loading import REGISTRY, resolve, resolve_pretrained
from mmsdk.tokens import ImageTokens
from tokenizers_img.base import ImageTokenizer

OUTPUT_TYPES = ("pil", "np", "pt", "latent", "tokens")
# Names the components of an embedded pipeline that lie with other models.
SHARED_FILE = "shared.json"
_UNFINISHED = 0.5  # grey of grid cells that have no token yet
_WHITE = 127  # grey values above it are masked
# What accelerators need, by the argument of `iter_generate` that they are.
_FITS = {
    "annealing": "shortens the steps of a diffusion or flow head, as MAR, XAR and FlowAR have one",
    "speculation": "drafts tokens of LlamaGen, FlexTokAR or MAR",
}
# Arguments of `iter_generate` that the pipeline passes itself, or that only tests of a transformer need.
_NOT_SETTINGS = (
    "class_labels", "caption_features", "caption_mask", "batch_size", "latents", "mask", "prefix", "generator",
    "uniforms", "orders", "noise", "trace",
)  # fmt: skip


class _Run(NamedTuple):
    steps: Iterator[tuple[int, Tensor]]
    trace: Trace
    num_tokens: int
    num_steps: int


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
        transformer: the generator: writes token ids or latents from a condition.
        image_tokenizer: decodes them; its tokens must be the transformer's.
        text_encoder: transformers encoder of the prompts (text-conditional models).
        tokenizer: its tokenizer, which pads on the left.
        presets: named settings of the generation; `"default"` holds for all calls that name no other.

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
        transformer: Any,
        image_tokenizer: ImageTokenizer,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        presets: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        transformer.check_tokenizer(image_tokenizer)
        if transformer.config.get("condition") == "text" and (text_encoder is None or tokenizer is None):
            raise ValueError("A text-conditional transformer needs a text_encoder and its tokenizer.")
        self.register_modules(
            transformer=transformer, image_tokenizer=image_tokenizer, text_encoder=text_encoder, tokenizer=tokenizer
        )
        presets = {"default": {}} | {name: dict(settings) for name, settings in (presets or {}).items()}
        self.register_to_config(presets=presets)
        self._accelerators: dict[tuple[str, torch.device], Any] = {}
        for name in presets:
            self._settings(name, None, {})

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
            return super().from_pretrained(source, **(_shared_components(Path(source)) | kwargs))
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"Cannot load {cls.__name__} from {source!r}: {error}") from error

    # ------------------------------------------------------------ conditions

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return text features `(batch, length, dim)` and their mask `(batch, length)`, padded on the left.

        Raises:
            ValueError: a prompt is empty, holds nothing that the tokenizer knows, or is too long.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        length = self.transformer.prompt_length
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
        if self.transformer.config.get("condition") == "text":
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
        generator: Generator | Sequence[Generator] | None = None,
        preset: str = "default",
        accelerator: str | StepAnnealing | SpeculativeDecoder | ContinuousSpeculation | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int | None, dict[str, Any]], dict[str, Any] | None] | None = None,
        **settings: Any,
    ) -> ARImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            prompt: one text or several (text-conditional models).
            class_labels: one label or several (class-conditional models).
            num_images_per_prompt: images for each prompt or label.
            guidance_scale: classifier-free guidance; 1 turns it off and halves the cost. A `Guidance` varies it.
            num_tokens: stop after this many tokens (ordered tokenizers): fewer are faster and coarser.
            temperature: divides the logits, or multiplies the noise of diffusion steps.
            generator: one for the whole call, or one for each image; then an image does not depend on its batch.
            preset: name of settings that were saved with the pipeline; arguments go before them.
            accelerator: what makes the generation cheaper: a `StepAnnealing`, a `SpeculativeDecoder`, a
                `ContinuousSpeculation`, or a name of `ACCELERATORS` for one with its defaults.
            output_type: `pil`, `np`, `pt`, `latent` or `tokens`.
            return_dict: False returns `(images,)`.
            callback_on_step_end: called as `callback(pipeline, step, num_steps, {"token_ids": ids})` (or `"latents"`)
                after each step; set `pipeline._interrupt = True` in it to stop with the tokens that are there (ordered
                tokenizers).
            **settings: further arguments of the transformer's `generate`, such as `top_k`, `top_p` and `do_sample`, or
                `num_iter` and `num_steps`.

        Raises:
            TypeError: the transformer has no such setting.
            ValueError: an argument is missing, out of range, or does not fit the model.
        """
        given = settings | {"guidance_scale": guidance_scale, "num_tokens": num_tokens, "temperature": temperature}
        condition, batch = self._condition(prompt, class_labels, num_images_per_prompt)
        run = self._start(condition, batch, self._settings(preset, accelerator, given), generator, output_type)
        return self._finish(run, output_type, return_dict, callback_on_step_end)

    @torch.no_grad()
    def inpaint(
        self,
        image: Any,
        mask_image: Any,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        preset: str = "default",
        accelerator: str | StepAnnealing | SpeculativeDecoder | ContinuousSpeculation | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **settings: Any,
    ) -> ARImagePipelineOutput | tuple[Any]:
        """Generate a part of images anew.

        All tokens that the mask touches are regenerated. A causal transformer writes on from a prefix: it regenerates
        every token from the first that is touched. The rest is what the tokenizer reconstructs.

        Args:
            image: what the image tokenizer takes, one or several.
            mask_image: white (or true) where to regenerate, as high and wide as the images: one for each, or one.
            prompt: see a call; a text for each image.
            class_labels: see a call; one for each image.
            generator: see a call.
            preset: see a call.
            accelerator: see a call.
            output_type: see a call.
            return_dict: see a call.
            **settings: see a call; `guidance_scale` and `temperature` as well.

        Raises:
            ValueError: the tokens have no place in the image, the mask touches no token, or see a call.
        """
        tokens = self.image_tokenizer.encode(image)
        condition, batch = self._condition(prompt, class_labels, 1)
        _check_counts(batch, len(tokens))
        mask = self._token_mask(mask_image, load_images(image))
        edit = self.transformer.inpainting(self._values(tokens), mask)
        run = self._start(condition, batch, self._settings(preset, accelerator, settings), generator, output_type, edit)
        return self._finish(run, output_type, return_dict)

    @torch.no_grad()
    def vary(
        self,
        image: Any,
        num_kept_tokens: int,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        preset: str = "default",
        accelerator: str | StepAnnealing | SpeculativeDecoder | ContinuousSpeculation | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **settings: Any,
    ) -> ARImagePipelineOutput | tuple[Any]:
        """Keep what the first tokens of images say, and sample the rest anew: the fewer, the freer.

        Args:
            image: what the image tokenizer takes, one or several.
            num_kept_tokens: tokens to keep, 0 up to one less than the transformer writes.
            prompt: see a call; a text for each image.
            class_labels: see a call; one for each image.
            generator: see a call.
            preset: see a call.
            accelerator: see a call.
            output_type: see a call.
            return_dict: see a call.
            **settings: see a call; `guidance_scale`, `num_tokens` and `temperature` as well.

        Raises:
            ValueError: the tokens are not ordered, or see a call.
        """
        if not self.image_tokenizer.ordered:
            raise ValueError(
                f"The tokens of {type(self.image_tokenizer).__name__} are not ordered by importance, so that the first "
                "are not the gist of an image; use inpaint, or a pipeline over One-D-Piece or FlexTok tokens."
            )
        given = self._settings(preset, accelerator, settings)
        most = self._num_tokens(given.get("num_tokens")) - 1
        if (
            isinstance(num_kept_tokens, bool)
            or not isinstance(num_kept_tokens, int)
            or not 0 <= num_kept_tokens <= most
        ):
            raise ValueError(f"num_kept_tokens must be 0 to {most}, got {num_kept_tokens!r}.")
        tokens = self.image_tokenizer.encode(image)
        condition, batch = self._condition(prompt, class_labels, 1)
        _check_counts(batch, len(tokens))
        edit = {"prefix": tokens.token_ids[:, :num_kept_tokens]} if num_kept_tokens else {}
        return self._finish(
            self._start(condition, batch, given, generator, output_type, edit), output_type, return_dict
        )

    @torch.no_grad()
    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | Guidance | None = None,
        num_tokens: int | None = None,
        temperature: float | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        preset: str = "default",
        accelerator: str | StepAnnealing | SpeculativeDecoder | ContinuousSpeculation | None = None,
        output_type: str = "pil",
        every: int | None = None,
        **settings: Any,
    ) -> Iterator[ARImageStep]:
        """Generate like a call, yielding partial images; the last one is what the call returns.

        Tokens of an ordered tokenizer give the whole image, coarse to fine; of a grid tokenizer the finished cells,
        the rest grey.

        Args:
            prompt: see `__call__`, like all other arguments but these.
            class_labels: see `__call__`.
            num_images_per_prompt: see `__call__`.
            guidance_scale: see `__call__`.
            num_tokens: see `__call__`.
            temperature: see `__call__`.
            generator: see `__call__`.
            preset: see `__call__`.
            accelerator: see `__call__`.
            output_type: `pil`, `np` or `pt`.
            every: steps between images; by default 1, 2, 4, 8, ... tokens (ordered), one row of the grid (token by
                token), or every step (several tokens at once).
            **settings: see `__call__`.
        """
        if output_type not in OUTPUT_TYPES[:3]:
            raise ValueError(f"stream gives output_type {', '.join(OUTPUT_TYPES[:3])}; got {output_type!r}.")
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        given = settings | {"guidance_scale": guidance_scale, "num_tokens": num_tokens, "temperature": temperature}
        condition, batch = self._condition(prompt, class_labels, num_images_per_prompt)
        run = self._start(condition, batch, self._settings(preset, accelerator, given), generator, output_type)
        grid, ordered = self.image_tokenizer.grid, self.image_tokenizer.ordered
        last, before = None, 0
        for index, (_, result) in enumerate(run.steps):
            done = self._done(result)
            count = done if isinstance(done, int) else int(done[0].sum())
            if every is not None:
                due = (index + 1) % every == 0
            elif not isinstance(done, int):
                due = True
            else:
                # Drafts may bring several tokens at once, and step over the count that is waited for.
                passed = count.bit_length(), before.bit_length()
                if not ordered and grid is not None:
                    passed = count // grid[1], before // grid[1]
                due = passed[0] > passed[1]
            last, before = result, count
            if count == run.num_tokens or not due:
                continue
            tokens = self._tokens(result.clone()) if ordered else None
            images = self._partial(result, done) if tokens is None else self.image_tokenizer.decode(tokens).images
            yield ARImageStep(num_tokens=count, images=_convert(images, output_type), tokens=tokens)
        tokens = self._tokens(cast(Tensor, last).clone())
        yield ARImageStep(num_tokens=run.num_tokens, images=self._postprocess(tokens, output_type), tokens=tokens)

    def _settings(self, preset: str, accelerator: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the generation: those of the preset, what the accelerator changes, those given."""
        if preset not in self.config.presets:
            raise unknown_name("preset", preset, list(self.config.presets))
        name = type(self.transformer).__name__
        known = [k for k in inspect.signature(self.transformer.iter_generate).parameters if k not in _NOT_SETTINGS]
        saved = dict(self.config.presets[preset])
        if isinstance(saved.get("annealing"), Mapping):
            saved["annealing"] = StepAnnealing(**saved["annealing"])
        given = {key: value for key, value in given.items() if value is not None}
        if isinstance(accelerator, str):
            key = (accelerator, self.device)
            if key not in self._accelerators:
                self._accelerators[key] = make_accelerator(accelerator, self)
            accelerator = self._accelerators[key]
        if accelerator is not None:
            setting = getattr(type(accelerator), "setting", None)
            if setting not in _FITS:
                raise TypeError(
                    "accelerator must be a StepAnnealing, a SpeculativeDecoder, a ContinuousSpeculation or one of "
                    f"{', '.join(ACCELERATORS)}, got {type(accelerator).__name__}."
                )
            if setting not in known:
                raise ValueError(f"{type(accelerator).__name__} {_FITS[setting]}; {name} is not such a generator.")
            given[setting] = accelerator
        for one, other in (("num_steps", "annealing"), ("annealing", "num_steps")):
            if one in given:
                saved.pop(other, None)
        settings = saved | given
        if "num_tokens" not in known:
            self._num_tokens(settings.pop("num_tokens", None))
        for key in settings:
            if key not in known:
                raise TypeError(f"{name} has no setting {key!r}; it has {', '.join(sorted(known))}.")
        if "top_k" in settings and isinstance(settings["top_k"], int):
            # Keeping more tokens than there are is keeping all.
            settings["top_k"] = min(settings["top_k"], max(self.image_tokenizer.codebook_sizes or (0,)))
        return settings

    def _start(
        self,
        condition: dict[str, Any],
        batch: int,
        settings: dict[str, Any],
        generator: Generator | Sequence[Generator] | None,
        output_type: str,
        edit: Mapping[str, Any] | None = None,
    ) -> _Run:
        """Check everything, before the first step."""
        if output_type not in OUTPUT_TYPES:
            raise unknown_name("output_type", output_type, list(OUTPUT_TYPES))
        if isinstance(generator, Sequence) and len(generator) != batch:
            raise ValueError(f"Got {len(generator)} generators for {batch} images; pass one, or one for each image.")
        num_tokens = self._num_tokens(settings.get("num_tokens"))
        trace = Trace()
        steps = self.transformer.iter_generate(
            **condition, **settings, **(edit or {}), generator=generator, trace=trace
        )
        kept = edit["prefix"].shape[1] if edit and "prefix" in edit else 0
        total = self.transformer.count_steps(**settings, num_kept_tokens=kept)
        return _Run(steps, trace, num_tokens, total)

    def _finish(
        self,
        run: _Run,
        output_type: str,
        return_dict: bool,
        callback: Callable[..., Any] | None = None,
    ) -> ARImagePipelineOutput | tuple[Any]:
        self._interrupt = False
        name = "latents" if self.transformer.generates == "latents" else "token_ids"
        last = None
        with self.progress_bar(total=run.num_steps) as bar:
            for step, result in run.steps:
                bar.update(1 if last is None else step - last)  # drafts may bring several steps at once
                last = step
                if callback is not None:
                    callback(self, step, run.num_steps, {name: result})
                if self._interrupt and self.image_tokenizer.ordered:
                    break
        tokens = self._tokens(result)
        images = self._postprocess(tokens, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return ARImagePipelineOutput(images=images, tokens=tokens, trace=run.trace)

    def _num_tokens(self, num_tokens: int | None) -> int:
        most = self.image_tokenizer.max_tokens
        if self.image_tokenizer.ordered:
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

    def _token_mask(self, mask_image: Any, images: list[Image.Image]) -> Tensor:
        """Return which tokens of the grid a mask touches, bool `(batch, num_tokens)`."""
        grid = self.image_tokenizer.grid
        if grid is None:
            raise ValueError(
                f"The tokens of {type(self.image_tokenizer).__name__} have no place in the image; use vary, which "
                "keeps the first of them, or a pipeline over grid tokens."
            )
        masks = load_images(mask_image)
        if len(masks) not in (1, len(images)):
            raise ValueError(f"Got {len(masks)} masks for {len(images)} images; pass one, or one for each image.")
        rows = []
        for mask, image in zip(masks * (len(images) // len(masks)), images, strict=True):
            if mask.size != image.size:
                raise ValueError(f"A mask must have its image's size {image.size}, got {mask.size}.")
            white = torch.from_numpy(np.asarray(mask.convert("L")).copy()) > _WHITE
            # Tokenizers see the middle square.
            top, left = ((side - min(white.shape)) // 2 for side in white.shape)
            square = white[top : top + min(white.shape), left : left + min(white.shape)]
            rows.append(F.adaptive_max_pool2d(square[None].float(), grid).flatten() > 0)
        return torch.stack(rows).to(self._execution_device)

    # ------------------------------------------------------------ outputs

    def _tokens(self, result: Tensor) -> ImageTokens:
        spec = self.image_tokenizer.token_spec()
        if self.transformer.generates == "latents":
            return ImageTokens(latents=result.flatten(2).mT, spec=spec)
        return ImageTokens(token_ids=result, spec=spec)

    def _values(self, tokens: ImageTokens) -> Tensor:
        """Undo `_tokens`."""
        if tokens.latents is not None:
            return tokens.latents.mT.unflatten(2, self.image_tokenizer.grid)
        return cast(Tensor, tokens.token_ids)

    def _postprocess(self, tokens: ImageTokens, output_type: str) -> Any:
        if output_type == "tokens":
            return tokens
        if output_type == "latent":
            return tokens.latents if tokens.latents is not None else self._dequantize(tokens)
        return _convert(self.image_tokenizer.decode(tokens).images, output_type)

    def _dequantize(self, tokens: ImageTokens) -> Tensor:
        if hasattr(self.image_tokenizer, "dequantize_ids"):  # to the scale of the VAE
            return self.image_tokenizer.dequantize_ids(tokens.token_ids).flatten(2).mT
        return self.image_tokenizer.quantize.dequantize(tokens.token_ids)

    def _done(self, result: Tensor) -> int | Tensor:
        """Return how many tokens there are, or where they are, bool `(batch, num_tokens)`."""
        if self.transformer.generates == "latents":
            return (result != 0).any(1).flatten(1)
        if result.ndim == 3 or bool((result < 0).any()):  # ids of all positions, -1 where there is none yet
            return (result >= 0).all(-1) if result.ndim == 3 else result >= 0
        return result.shape[1]

    def _partial(self, result: Tensor, done: int | Tensor) -> Tensor:
        """Decode the cells that have a token and paint the others grey."""
        rows, columns = self.image_tokenizer.grid or (0, 0)
        if isinstance(done, int):
            # Convolutions look beyond a cell: missing tokens repeat the last one, so that the border is not disturbed
            # by a wild guess.
            result = torch.cat([result, result[:, -1:].expand(-1, rows * columns - done)], 1)
            done = (torch.arange(rows * columns, device=result.device) < done).expand(len(result), -1)
        elif done.shape[1] != rows * columns:  # a coarser scale
            result = F.interpolate(result, size=(rows, columns))
            done = torch.ones(len(result), rows * columns, dtype=torch.bool, device=result.device)
        elif not result.is_floating_point():
            result = result.clamp_min(0)
        images = self.image_tokenizer.decode(self._tokens(result)).images
        cells = done.view(-1, 1, rows, columns)
        cells = cells.repeat_interleave(images.shape[2] // rows, 2).repeat_interleave(images.shape[3] // columns, 3)
        return torch.where(cells, images, torch.full_like(images, _UNFINISHED))


def _check_counts(conditions: int, images: int) -> None:
    if conditions != images:
        raise ValueError(f"Got {conditions} prompts or labels for {images} images; pass one for each image.")


def _convert(images: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    if output_type == "pil":
        return tensor_to_pil(images)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def _shared_components(folder: Path) -> dict[str, Any]:
    """Load what an embedded pipeline has in common with other embedded models, which ships once."""
    path = folder / SHARED_FILE
    if not path.is_file():
        return {}
    return {
        name: resolve(part["component"]).from_pretrained(part["source"], **part.get("options", {}))
        for name, part in json.loads(path.read_text()).items()
    }


def _import_components(folder: Path) -> None:
    """Import our classes that a pipeline names: diffusers takes classes from imported modules only."""
    index = folder / "model_index.json"
    named = json.loads(index.read_text()).values() if folder.is_dir() else None
    for name, target in REGISTRY.items():
        if named is None or target.split(":") in named:
            resolve(name)
