"""The contract of every image tokenizer: images in, `ImageTokens` out, and back."""

from __future__ import annotations

import hashlib
import json
import operator
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from mmsdk.errors import TokenStreamError, unknown_name
from mmsdk.images import ResampleFilter, ResizeMode, images_to_tensor, letterbox, undo_letterbox
from mmsdk.modeling import PretrainedModel
from mmsdk.tokens import ImageTokens, TokenSpec

Fit: TypeAlias = Literal["crop", "letterbox"]
_FITS = ("crop", "letterbox")


@dataclass
class ImageTokenizerOutput(BaseOutput):
    """What `decode` and `reconstruct` return.

    Attributes:
        images: float32 `(batch, 3, height, width)` in [0, 1], of the size that the tokenizer works at; letterboxed
            images with their margins.
        placements: those of the tokens, `(batch, 2)`, or None.
    """

    images: Tensor
    placements: Tensor | None = None

    def to_pil(self) -> list[Image.Image]:
        """Return 8-bit RGB images; letterboxed ones without margins and with the size of their originals."""
        return undo_letterbox(self.images, self.placements)


class ImageTokenizer(PretrainedModel):
    """Images to tokens and back. Every tokenizer is lossy.

    Subclasses say what they are (`max_tokens`, `codebook_sizes`, `grid`, `ordered`) and implement `_encode` and
    `_decode`; checks, sizes, truncation and fingerprints are done here.

    Attributes:
        quality_knob: the setting that makes unordered tokens cheaper, for messages.
        resize: how `preprocess` crops images to size, a mode of `images_to_tensor`.
        resample: the filter that `preprocess` resizes with, one of `images_to_tensor`.
    """

    lossless: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    quality_knob: ClassVar[str | None] = None
    resize: ClassVar[ResizeMode] = "center_crop"
    resample: ClassVar[ResampleFilter] = "bicubic"
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """Tokens of a full image."""

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...] | None:
        """Entries of the codebook of each channel, or None for continuous tokens."""

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the token grid, or None for 1D tokens."""
        return None

    @abstractmethod
    def _encode(self, images: Tensor, num_tokens: int, generator: torch.Generator | None) -> ImageTokens:
        """Encode float32 `images` `(batch, 3, image_size, image_size)` in [0, 1]."""

    @abstractmethod
    def _decode(self, tokens: ImageTokens, generator: torch.Generator | None) -> Tensor:
        """Decode to `(batch, 3, H, W)`, about [0, 1]. Subclasses may take further keywords, those of `decode`."""

    # ------------------------------------------------------------ identity

    def fingerprint(self) -> str:
        """Return 16 hexadecimal characters that identify configuration and weights (sampled, rounded to bfloat16).

        The same in every floating dtype that holds the weights exactly; tokens of one tokenizer are refused by another.
        """
        config = {k: v for k, v in self.config.items() if not k.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
        samples = []
        for key, value in self.state_dict().items():
            digest.update(f"{key}{tuple(value.shape)}".encode())
            flat = value.detach().flatten()
            samples.append(flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16))
        digest.update(torch.cat(samples).view(torch.int16).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def token_spec(self) -> TokenSpec:
        """Describe the tokens of this tokenizer; the description travels with them."""
        size = self.config.image_size
        return TokenSpec(
            tokenizer=self.registry_name,
            fingerprint=self.fingerprint(),
            codebook_size=self.codebook_sizes,
            ordered=self.ordered,
            grid=self.grid,
            image_size=(size, size),
            max_tokens=self.max_tokens,
        )

    # ------------------------------------------------------------ images to tokens

    def preprocess(self, images: Any, fit: Fit = "crop") -> Tensor:
        """Turn images of any kind and size into float32 `(batch, 3, image_size, image_size)` in [0, 1].

        Args:
            images: PIL images, numpy arrays, tensors, paths, bytes, or a list of these.
            fit: `"crop"` resizes the shorter edge and cuts the centre out; `"letterbox"` keeps the whole image, on
                white, where `mmsdk.tokens.placement_box` says.

        Raises:
            ImageError: an image cannot be read, is too large, or holds values outside [0, 1].
            UnknownNameError: `fit` is none of the two.
        """
        return self._preprocess(images, fit)[0]

    def _preprocess(self, images: Any, fit: Fit) -> tuple[Tensor, Tensor | None]:
        """Return what `preprocess` does, and the placements of letterboxed images."""
        if fit not in _FITS:
            raise unknown_name("fit", fit, list(_FITS))
        size = self.config.image_size, self.config.image_size
        if fit == "letterbox":
            pixels, placements = letterbox(images, size, self.resample)
            return pixels.to(self.device), placements
        return images_to_tensor(images, size, self.resize, self.resample).to(self.device), None

    @torch.no_grad()
    def encode(
        self,
        images: Any,
        num_tokens: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        fit: Fit = "crop",
    ) -> ImageTokens:
        """Turn images into tokens.

        Args:
            images: whatever `preprocess` takes.
            num_tokens: tokens to keep, one number or one per image (ordered tokenizers only; default: all).
            generator: samples the posterior of continuous tokenizers; without it they return its mean.
            fit: what becomes of images that are not square, as for `preprocess`: `"crop"`, or `"letterbox"`, which
                notes their sizes in `placements`, so that `decode(tokens).to_pil()` restores them.

        Returns:
            Tokens on the model's device.

        Raises:
            ImageError: as `preprocess` does.
            UnknownNameError: `fit` is neither `"crop"` nor `"letterbox"`.
            TypeError: `num_tokens` holds something else than integers.
            ValueError: `num_tokens` is outside 1 to `max_tokens`, or fewer than all of unordered tokens, or has not one
                entry per image.
        """
        counts = self._check_num_tokens(num_tokens)
        pixels, placements = self._preprocess(images, fit)
        if isinstance(counts, list) and len(counts) != len(pixels):
            raise ValueError(f"num_tokens has {len(counts)} entries for {len(pixels)} images.")
        tokens = self._encode(pixels, counts if isinstance(counts, int) else max(counts), generator)
        if isinstance(counts, list) and self.ordered:
            tokens = tokens.truncate(counts)
        return tokens if placements is None else replace(tokens, placements=placements)

    def _check_num_tokens(self, num_tokens: int | Sequence[int] | Tensor | None) -> int | list[int]:
        """Return one number for all images, or a list with one for each."""
        if num_tokens is None:
            return self.max_tokens
        each = isinstance(num_tokens, Sequence) or (isinstance(num_tokens, Tensor) and num_tokens.ndim > 0)
        given: list[Any] = list(num_tokens) if each else [num_tokens]  # type: ignore[arg-type]
        try:
            counts = [operator.index(count) for count in given]
        except TypeError:
            raise TypeError(f"num_tokens must be an integer or one integer per image, got {num_tokens!r}.") from None
        for count in counts:
            if not 1 <= count <= self.max_tokens:
                raise ValueError(f"num_tokens must lie in 1..{self.max_tokens} for this tokenizer, got {count}.")
        if not self.ordered and any(count != self.max_tokens for count in counts):
            knob = f"Fewer `{self.quality_knob}` make them cheaper, and " if self.quality_knob else ""
            raise ValueError(
                f"The tokens of {type(self).__name__} are not ordered by importance and cannot be truncated: "
                f"num_tokens must be {self.max_tokens} or None, got {num_tokens}. {knob}OneDPiece takes any number."
            )
        return counts if each else counts[0]

    # ------------------------------------------------------------ tokens to images

    @torch.no_grad()
    def decode(
        self, tokens: ImageTokens, generator: torch.Generator | None = None, **sampler: Any
    ) -> ImageTokenizerOutput:
        """Turn tokens back into images `(batch, 3, image_size, image_size)` in [0, 1].

        The images of a batch are one tensor whatever their placements; `decode(tokens).to_pil()` gives letterboxed
        images their own sizes back.

        Args:
            tokens: what `encode` returned, or a generator's ids in an `ImageTokens` with this tokenizer's `token_spec`.
            generator: for decoders that draw noise; the others leave it alone.
            **sampler: keywords of the decoder, where it has any.

        Raises:
            TokenStreamError: the tokens were made by another tokenizer.
            ValueError: the decoder's output is not finite.
        """
        fingerprint = self.fingerprint()
        if tokens.spec.fingerprint != fingerprint:
            raise TokenStreamError(
                f"These tokens were made by {tokens.spec.tokenizer!r} with fingerprint {tokens.spec.fingerprint}, but "
                f"this is {self.registry_name!r} with fingerprint {fingerprint}: "
                "decode them with the tokenizer that made them."
            )
        images = self._decode(tokens.to(self.device), generator, **sampler).float()
        if not bool(torch.isfinite(images).all()):
            raise ValueError("The decoder produced NaN or infinite pixels; load the model in float32.")
        return ImageTokenizerOutput(images=images.clamp(0, 1), placements=tokens.placements)

    def reconstruct(
        self,
        images: Any,
        num_tokens: int | Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        fit: Fit = "crop",
        **sampler: Any,
    ) -> ImageTokenizerOutput:
        """Encode and decode: what is left of `images` after `num_tokens` tokens."""
        return self.decode(self.encode(images, num_tokens, generator, fit=fit), generator, **sampler)

    def decode_progressive(
        self, tokens: ImageTokens, counts: Sequence[int] | None = None, **sampler: Any
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(k, images)` for growing prefixes: 1, 2, 4, ... and all tokens, or the given `counts`.

        An image with fewer than k tokens is decoded from all that it has. The images are those of `decode`:
        `mmsdk.images.undo_letterbox(images, tokens.placements)` gives letterboxed ones their own sizes back.

        Raises:
            ValueError: the tokens are not ordered, or a count exceeds those of the longest image.
        """
        if counts is None:
            counts = [2**i for i in range(tokens.num_tokens.bit_length()) if 2**i < tokens.num_tokens] + [
                tokens.num_tokens
            ]
        longest = int(tokens.lengths.max())
        for count in counts:
            prefix = tokens.truncate(tokens.lengths.clamp(max=count) if count <= longest else count)
            yield count, self.decode(prefix, **sampler).images
