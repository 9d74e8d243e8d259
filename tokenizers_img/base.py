"""The contract of every image tokenizer: images in, `ImageTokens` out, and back."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from mmsdk.errors import TokenStreamError
from mmsdk.images import images_to_tensor
from mmsdk.modeling import PretrainedModel
from mmsdk.tokens import ImageTokens, TokenSpec


@dataclass
class ImageTokenizerOutput(BaseOutput):
    """What `decode` and `reconstruct` return.

    Attributes:
        images: float32 `(batch, 3, height, width)` in [0, 1].
    """

    images: Tensor


class ImageTokenizer(PretrainedModel):
    """Images to tokens and back. Every tokenizer is lossy.

    Subclasses say what they are (`max_tokens`, `codebook_sizes`, `grid`, `ordered`) and implement `_encode` and
    `_decode`; checks, sizes, truncation and fingerprints are done here.
    """

    lossless: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
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
    def _decode(self, tokens: ImageTokens, generator: torch.Generator | None, **sampler: Any) -> Tensor:
        """Decode to `(batch, 3, H, W)`, about [0, 1]."""

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

    def preprocess(self, images: Any) -> Tensor:
        """Turn images of any kind and size into float32 `(batch, 3, image_size, image_size)` in [0, 1].

        Takes PIL images, numpy arrays, tensors, paths, bytes, or a list of these. The shorter edge is resized, the
        centre cut out.

        Raises:
            ImageError: an image cannot be read, is too large, or holds values outside [0, 1].
        """
        size = self.config.image_size
        return images_to_tensor(images, size=(size, size)).to(self.device)

    @torch.no_grad()
    def encode(
        self, images: Any, num_tokens: int | Sequence[int] | None = None, generator: torch.Generator | None = None
    ) -> ImageTokens:
        """Turn images into tokens.

        Args:
            images: whatever `preprocess` takes.
            num_tokens: tokens to keep, one number or one per image (ordered tokenizers only; default: all).
            generator: samples the posterior of continuous tokenizers; without it they return its mean.

        Returns:
            Tokens on the model's device.

        Raises:
            ValueError: `num_tokens` is outside 1 to `max_tokens`, or given for unordered tokens.
        """
        counts = self._check_num_tokens(num_tokens)
        tokens = self._encode(self.preprocess(images), max(counts) if counts else self.max_tokens, generator)
        if isinstance(num_tokens, Sequence):
            if len(num_tokens) != len(tokens):
                raise ValueError(f"num_tokens has {len(num_tokens)} entries for {len(tokens)} images.")
            tokens = tokens.truncate(num_tokens)
        return tokens

    def _check_num_tokens(self, num_tokens: int | Sequence[int] | None) -> list[int]:
        if num_tokens is None:
            return []
        counts = list(num_tokens) if isinstance(num_tokens, Sequence) else [num_tokens]
        for count in counts:
            if not 1 <= count <= self.max_tokens:
                raise ValueError(f"num_tokens must lie in 1..{self.max_tokens} for this tokenizer, got {count}.")
        if not self.ordered and any(count != self.max_tokens for count in counts):
            raise ValueError(
                f"The tokens of {type(self).__name__} are not ordered by importance and cannot be truncated: "
                f"num_tokens must be {self.max_tokens} or None, got {num_tokens}. OneDPiece takes any number."
            )
        return counts

    # ------------------------------------------------------------ tokens to images

    @torch.no_grad()
    def decode(
        self, tokens: ImageTokens, generator: torch.Generator | None = None, **sampler: Any
    ) -> ImageTokenizerOutput:
        """Turn tokens back into images `(batch, 3, image_size, image_size)` in [0, 1].

        Raises:
            TokenStreamError: the tokens were made by another tokenizer.
        """
        fingerprint = self.fingerprint()
        if tokens.spec.fingerprint != fingerprint:
            raise TokenStreamError(
                f"These tokens were made by {tokens.spec.tokenizer!r} with fingerprint {tokens.spec.fingerprint}, but "
                f"this is {self.registry_name!r} with fingerprint {fingerprint}: decode with the one that made them."
            )
        images = self._decode(tokens.to(self.device), generator, **sampler).float()
        if not bool(torch.isfinite(images).all()):
            raise ValueError("The decoder produced NaN or infinite pixels; load the model in float32.")
        return ImageTokenizerOutput(images=images.clamp(0, 1))

    def reconstruct(
        self, images: Any, num_tokens: int | Sequence[int] | None = None, generator: torch.Generator | None = None
    ) -> ImageTokenizerOutput:
        """Encode and decode: what is left of `images` after `num_tokens` tokens."""
        return self.decode(self.encode(images, num_tokens, generator), generator)

    def decode_progressive(
        self, tokens: ImageTokens, counts: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield `(k, images)` for growing prefixes: 1, 2, 4, ... and all tokens, or the given `counts`.

        Raises:
            ValueError: the tokens are not ordered, or a count exceeds them.
        """
        if counts is None:
            counts = [2**i for i in range(tokens.num_tokens.bit_length()) if 2**i < tokens.num_tokens] + [
                tokens.num_tokens
            ]
        for count in counts:
            yield count, self.decode(tokens.truncate(count)).images
