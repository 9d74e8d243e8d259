"""`ImageTokens`, the value that travels everywhere, and its byte format.

A stream holds one batch. Integers are unsigned LEB128 varints in their shortest form unless a size is given:

    magic            2 bytes, 89 54
    version          1 byte
    flags            2 bytes, little endian (bits below); bits this version does not know are refused
    tokenizer        1 byte: an id of `TOKENIZER_IDS`, or 0, a length byte and the name in ASCII
    fingerprint      8 bytes
    image size       height, width
    max_tokens
    grid             height, width                                           only with GRID
    dim                                                                      only with LATENTS
    channels                                                                 only with CHANNELS
    codebook size    one, or with PER_CHANNEL one for each channel           not with LATENTS
    batch, tokens    the shape of the tensor
    lengths          one for each image                                      only with RAGGED, else all are full
    placements       original height, width of each image                    only with PLACED, see `placement_box`
    payload          image after image, only the tokens within its length: ids as ceil(log2(codebook size)) bits per
                     channel, most significant bit first, then zero bits up to a whole byte; latents as float32,
                     little endian; with CODED the fingerprint of the entropy model (4 bytes), then the same ids as
                     `mmsdk.entropy` codes them, where this takes fewer bytes
    CRC32            4 bytes, little endian, over all that precedes, then with CODED over the ids packed tightly

Every batch has exactly one stream: what a writer would not have written is refused.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import re
import secrets
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mmsdk.entropy import MAX_TOKENS_PER_BYTE, EntropyModel, check_entropy_model, code_ids, decode_ids
from mmsdk.errors import TokenStreamError

# Names that take one byte in a stream. They are part of the format, so ids are only ever added.
TOKENIZER_IDS = {"vq": 1, "titok": 2, "one_d_piece": 3, "flextok": 4, "tokenbridge": 5, "vae": 6}

MAX_CODEBOOK_SIZE = 2**32
MAX_CHANNELS = 4096
MAX_TOKENS = 2**20
MAX_IMAGE_SIDE = 2**16
# Of an image that is read or restored.
MAX_PIXELS = 64_000_000

_MAGIC = b"\x89T"
_VERSION = 1
_CRC_SIZE = 4
# Offset of the low byte of the flags.
_FLAGS = 3
_TOKENIZER_NAMES = {number: name for name, number in TOKENIZER_IDS.items()}

_LATENTS, _CHANNELS, _PER_CHANNEL, _ORDERED, _GRID, _RAGGED = (1 << bit for bit in range(6))
_CODED, _PLACED = 1 << 6, 1 << 7
_KNOWN_FLAGS = (1 << 8) - 1


@dataclass(frozen=True)
class TokenSpec:
    """What a tokenizer's tokens are: enough to check them, to store them and to find their decoder.

    Attributes:
        tokenizer: registry name, such as `"one_d_piece"`: 1 to 64 printable ASCII characters without spaces.
        fingerprint: 16 lower-case hexadecimal characters that identify the tokenizer's config and weights.
        codebook_size: number of ids of each channel (a 1-tuple for token ids `(batch, num_tokens)`), or None for
            continuous latents.
        ordered: whether any prefix of the tokens decodes, so that `ImageTokens.truncate` is allowed.
        grid: `(h, w)` of grid tokens, else None.
        image_size: `(height, width)` of the decoded image.
        max_tokens: most tokens that the tokenizer gives an image; unordered tokens always number this many.

    Raises:
        ValueError: if a field is malformed or contradicts another one.
    """

    tokenizer: str
    fingerprint: str
    codebook_size: tuple[int, ...] | None
    ordered: bool
    grid: tuple[int, int] | None
    image_size: tuple[int, int]
    max_tokens: int

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.tokenizer, str) or not re.fullmatch(r"[!-~]{1,64}", self.tokenizer):
            raise ValueError(
                f"tokenizer must be 1 to 64 printable ASCII characters without spaces, received {self.tokenizer!r}."
            )
        if not isinstance(self.fingerprint, str) or not re.fullmatch(r"[0-9a-f]{16}", self.fingerprint):
            raise ValueError(
                f"fingerprint must be 16 lower-case hexadecimal characters, received {self.fingerprint!r}."
            )
        if not isinstance(self.ordered, bool):
            raise ValueError(f"ordered must be True or False, received {self.ordered!r}.")
        codebook_size = self.codebook_size
        if codebook_size is not None:
            codebook_size = _integers("codebook_size", codebook_size, None, 2, MAX_CODEBOOK_SIZE)
            if not 1 <= len(codebook_size) <= MAX_CHANNELS:
                raise ValueError(
                    f"codebook_size must have 1 to {MAX_CHANNELS} entries, one per channel; "
                    f"received {len(codebook_size)}."
                )
        image_size = _integers("image_size", self.image_size, 2, 1, MAX_IMAGE_SIDE)
        (max_tokens,) = _integers("max_tokens", (self.max_tokens,), 1, 1, MAX_TOKENS)
        grid: tuple[int, ...] | None = None
        if self.grid is not None:
            grid = _integers("grid", self.grid, 2, 1, MAX_TOKENS)
            if self.ordered:
                raise ValueError(f"grid must be None for ordered tokens, received {grid}.")
            if grid[0] * grid[1] != max_tokens:
                raise ValueError(
                    f"grid {grid} has {grid[0] * grid[1]} places, but max_tokens is {max_tokens}; they must be equal."
                )
        # Lists (as JSON gives them) and numpy integers are accepted; what is kept is hashable and compares equal.
        for name, value in (
            ("codebook_size", codebook_size),
            ("image_size", image_size),
            ("max_tokens", max_tokens),
            ("grid", grid),
        ):
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as values that JSON can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenSpec:
        """Build a spec from what `to_dict` gave.

        Raises:
            ValueError: if a field is missing, unknown or malformed.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if set(values) != names:
            missing, unknown = sorted(names - set(values)), sorted(set(values) - names, key=str)
            raise ValueError(f"A token spec has the fields {sorted(names)}; missing: {missing}, unknown: {unknown}.")
        return cls(**values)


@dataclass(frozen=True, eq=False, repr=False)
class ImageTokens:
    """A batch of tokenized images.

    Immutable: tensors are copied at construction and every method returns a new value. Positions past an image's length
    are set to 0 and carry no information. Compare with `equal`.

    Attributes:
        token_ids: int64 `(batch, num_tokens)` or `(batch, num_tokens, num_channels)`, or None.
        latents: float32 `(batch, num_tokens, dim)`, or None. Exactly one of the two is given.
        lengths: int64 `(batch,)`, number of tokens of each image, 1 to num_tokens; all of them when omitted.
        placements: int64 `(batch, 2)`, original height and width of each image, which the decoded image holds whole in
            its `placement_box`. None where every image fills the decoded one at its size; placements that say no more
            than this become None.
        spec: the tokenizer's `TokenSpec`.

    Raises:
        TypeError: if an argument is not a tensor or a spec.
        ValueError: if a shape, a dtype, a length, a placement, an id or a latent is not what the spec allows.
    """

    token_ids: Tensor | None = None
    latents: Tensor | None = None
    lengths: Tensor = field(default=None)  # type: ignore[assignment]  # never None once constructed
    placements: Tensor | None = field(default=None, kw_only=True)
    spec: TokenSpec = field(kw_only=True)

    def __post_init__(self) -> None:
        """Check the tensors and copy them with the padding set to 0."""
        if not isinstance(self.spec, TokenSpec):
            raise TypeError(f"spec must be a TokenSpec, received {type(self.spec).__name__}.")
        if (self.token_ids is None) == (self.latents is None):
            received = "neither" if self.token_ids is None else "both"
            raise ValueError(f"Give exactly one of token_ids and latents; received {received}.")
        name = "token_ids" if self.latents is None else "latents"
        values = getattr(self, name)
        _check_layout(name, values, self.spec)
        lengths = _checked_lengths(self.lengths, values, self.spec)
        placements = _checked_placements(self.placements, values, self.spec)
        mask = _mask(lengths, values.shape[1])
        values = values.masked_fill(~(mask if values.ndim == 2 else mask[..., None]), 0)
        if name == "token_ids":
            _check_range(values, self.spec)
        elif not bool(values.isfinite().all()):
            position = (~values.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"latents must be finite; received {values[tuple(position)].item()} at {position}.")
        object.__setattr__(self, name, values)
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "placements", placements)

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return self._values.shape[0]

    @property
    def num_tokens(self) -> int:
        """Width of the tensor; an image may have fewer tokens, see `lengths`."""
        return self._values.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self._values.device

    @property
    def mask(self) -> Tensor:
        """Bool `(batch, num_tokens)`: True within an image's length."""
        return _mask(self.lengths, self.num_tokens)

    @property
    def num_bits(self) -> Tensor:
        """Int64 `(batch,)`: bits of each image's tokens, packed without a header (32 per latent value)."""
        return self.lengths * sum(self._bits)

    def __len__(self) -> int:
        """Number of images."""
        return self.batch_size

    def __repr__(self) -> str:
        """Shape and origin, without the values."""
        kind = "token_ids" if self.latents is None else "latents"
        return (
            f"ImageTokens({kind}={tuple(self._values.shape)}, lengths={self.lengths.tolist()}, "
            f"tokenizer={self.spec.tokenizer!r}, device={str(self.device)!r})"
        )

    def __iter__(self) -> Iterator[ImageTokens]:
        """Yield each image as a batch of one, padding kept."""
        return (self[index] for index in range(self.batch_size))

    def __getitem__(self, index: int | slice | list[int] | list[bool] | np.ndarray | Tensor) -> ImageTokens:
        """Select images; an int keeps a batch of one, and padding is kept.

        Args:
            index: an int, a slice, a list or vector of image numbers, or a bool mask `(batch,)`.

        Raises:
            IndexError: if an image number is out of range.
            ValueError: if nothing is selected, or a mask has another shape.
        """
        chosen = torch.arange(self.batch_size)
        if isinstance(index, slice):
            chosen = chosen[index]
        elif not isinstance(index, Tensor | list | np.ndarray) or (isinstance(index, Tensor) and index.ndim == 0):
            number = operator.index(index)  # type: ignore[arg-type]
            if not -self.batch_size <= number < self.batch_size:
                raise IndexError(f"Image {number} is out of range for a batch of {self.batch_size}.")
            chosen = chosen[number][None]
        else:
            numbers = torch.as_tensor(index).cpu()
            if numbers.dtype == torch.bool:
                if numbers.shape != chosen.shape:
                    raise ValueError(
                        f"A mask must have the shape ({self.batch_size},), received {tuple(numbers.shape)}."
                    )
                chosen = chosen[numbers]
            elif numbers.numel():
                numbers = _integer_vector("index", numbers)
                wrong = numbers[(numbers < -self.batch_size) | (numbers >= self.batch_size)]
                if wrong.numel():
                    raise IndexError(f"Image {int(wrong[0])} is out of range for a batch of {self.batch_size}.")
                chosen = chosen[numbers]
            else:
                chosen = chosen[:0]
        if not chosen.numel():
            raise ValueError(f"The index selects none of the {self.batch_size} images; a batch has at least one.")
        chosen = chosen.to(self.device)
        placements = None if self.placements is None else self.placements[chosen]
        return self._rebuild(self._values[chosen], self.lengths[chosen], placements)

    def truncate(self, n: int | Sequence[int] | Tensor) -> ImageTokens:
        """Keep the first n tokens of each image and drop the columns that no image needs any more.

        `tokens.truncate(tokens.lengths)` drops padding only.

        Args:
            n: number of tokens, for all images or `(batch,)`; 1 to the image's length.

        Raises:
            ValueError: if the tokens are not ordered, or n is out of range for an image.
        """
        if not self.spec.ordered:
            raise ValueError(
                f"Tokens of {self.spec.tokenizer!r} cannot be truncated: they are not ordered, and only all "
                f"{self.spec.max_tokens} of them decode to an image."
            )
        if isinstance(n, Tensor | Sequence | np.ndarray) and not (isinstance(n, Tensor) and n.ndim == 0):
            counts = _integer_vector("n", torch.as_tensor(n))
            if counts.shape != (self.batch_size,):
                raise ValueError(
                    f"n must be an int or one int for each of the {self.batch_size} images, "
                    f"received the shape {tuple(counts.shape)}."
                )
        else:
            counts = torch.full((self.batch_size,), operator.index(n))  # type: ignore[arg-type]
        lengths = self.lengths.cpu()
        counts = counts.to(lengths.device)
        wrong = ((counts < 1) | (counts > lengths)).nonzero().flatten().tolist()
        if wrong:
            image = wrong[0]
            raise ValueError(
                f"Cannot keep {int(counts[image])} tokens of image {image}: it has {int(lengths[image])}, "
                f"so n must be 1 to {int(lengths[image])}."
            )
        return self._rebuild(self._values[:, : int(counts.max())], counts.to(self.device), self.placements)

    def pad(self, num_tokens: int) -> ImageTokens:
        """Widen the tensor to `num_tokens` on the right; lengths stay.

        Raises:
            ValueError: if `num_tokens` is below the present width, or above what the spec allows.
        """
        if num_tokens < self.num_tokens:
            raise ValueError(f"Cannot pad {self.num_tokens} tokens to {num_tokens}; use truncate to drop tokens.")
        shape = (self.batch_size, num_tokens - self.num_tokens, *self._values.shape[2:])
        values = torch.cat([self._values, self._values.new_zeros(shape)], dim=1)
        return self._rebuild(values, self.lengths, self.placements)

    @classmethod
    def cat(cls, batches: Sequence[ImageTokens]) -> ImageTokens:
        """Join batches of one spec, padded to the widest; some may have placements and others not.

        Raises:
            ValueError: if there are none, or their specs, channels or devices differ.
        """
        batches = list(batches)
        if not batches:
            raise ValueError("cat needs at least one ImageTokens, received none.")
        first = batches[0]
        for number, batch in enumerate(batches):
            if batch.spec != first.spec:
                raise ValueError(
                    f"cat needs batches of one spec; batch {number} has {batch.spec}, batch 0 has {first.spec}."
                )
            if batch._values.shape[2:] != first._values.shape[2:]:
                raise ValueError(
                    f"cat needs batches with the same channels; batch {number} has the shape "
                    f"{tuple(batch._values.shape)}, batch 0 has {tuple(first._values.shape)}."
                )
            if batch.device != first.device:
                raise ValueError(
                    f"cat needs batches on one device; batch {number} is on {batch.device}, batch 0 on {first.device}."
                )
        width = max(batch.num_tokens for batch in batches)
        padded = [batch.pad(width) for batch in batches]
        placements = None
        if any(batch.placements is not None for batch in batches):
            placements = torch.cat([b._sizes for b in batches])
        values, lengths = torch.cat([b._values for b in padded]), torch.cat([b.lengths for b in padded])
        return first._rebuild(values, lengths, placements)

    def to(self, device: torch.device | str) -> ImageTokens:
        """Give the same tokens on a device; itself if it is there already."""
        if self.device == torch.device(device):
            return self
        # A new value puts its lengths and placements on the device of its tokens.
        return self._rebuild(self._values.to(device), self.lengths, self.placements)

    def equal(self, other: ImageTokens) -> bool:
        """Tell whether spec, shape, lengths, placements and values are the same; devices may differ."""
        return (
            isinstance(other, ImageTokens)
            and self.spec == other.spec
            and (self.latents is None) == (other.latents is None)
            and torch.equal(self.lengths, other.lengths.to(self.device))
            and torch.equal(self._sizes, other._sizes.to(self.device))
            and torch.equal(self._values, other._values.to(self.device))
        )

    def to_bytes(self, entropy_model: EntropyModel | None = None) -> bytes:
        """Pack into a byte stream: exact, tight, with the fingerprint and a CRC32. The module describes the format.

        Args:
            entropy_model: predicts the ids, so that likely ones take fewer bits. Such a stream is written only where it
                is smaller, and read with the same model on the same machine only. None packs tightly.

        Raises:
            ImportError: `entropy_model` needs the extra `entropy`.
            ValueError: if the batch is so ragged that reading it back would need far more memory than its bytes
                (beyond 4 million values, 1024 values for each byte), or if `entropy_model` is for other tokens.
        """
        spec = self.spec
        lengths = self.lengths.tolist()
        values = self._values.detach()[self.mask].cpu().numpy()
        if self.latents is None:
            payload = _pack_bits(values.reshape(len(values), -1), self._bits)
        else:
            payload = values.astype("<f4").tobytes()
        coded = None if entropy_model is None else self._coded_payload(payload, entropy_model)

        sizes = spec.codebook_size
        per_channel = sizes is not None and len(set(sizes)) > 1
        flags = sum(
            flag
            for flag, is_set in (
                (_LATENTS, self.latents is not None),
                (_CHANNELS, self.latents is None and self._values.ndim == 3),
                (_PER_CHANNEL, per_channel),
                (_ORDERED, spec.ordered),
                (_GRID, spec.grid is not None),
                (_RAGGED, min(lengths) < self.num_tokens),
                (_CODED, coded is not None),
                (_PLACED, self.placements is not None),
            )
            if is_set
        )
        stream = bytearray(_MAGIC)
        stream += struct.pack("<BHB", _VERSION, flags, TOKENIZER_IDS.get(spec.tokenizer, 0))
        if spec.tokenizer not in TOKENIZER_IDS:
            stream += bytes([len(spec.tokenizer)]) + spec.tokenizer.encode("ascii")
        stream += bytes.fromhex(spec.fingerprint)
        numbers = [*spec.image_size, spec.max_tokens, *(spec.grid or ())]
        if sizes is None:
            numbers.append(self._values.shape[2])
        else:
            numbers += [len(sizes)] if flags & _CHANNELS else []
            numbers += sizes if per_channel else sizes[:1]
        numbers += [self.batch_size, self.num_tokens, *(lengths if flags & _RAGGED else [])]
        numbers += [] if self.placements is None else self.placements.flatten().tolist()
        for number in numbers:
            stream += _varint(number)
        stream += payload if coded is None else coded
        stream += struct.pack("<I", zlib.crc32(stream if coded is None else stream + payload))
        if self._values.numel() > _max_values(len(stream)):
            raise ValueError(
                f"A batch of shape {tuple(self._values.shape)} with {len(values)} tokens in all is too ragged for one "
                "stream; write images of similar lengths together."
            )
        return bytes(stream)

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        expected_fingerprint: str | None = None,
        device: torch.device | str = "cpu",
        entropy_model: EntropyModel | None = None,
    ) -> ImageTokens:
        """Read what `to_bytes` wrote.

        Every declared size is checked against the length of the data before anything is allocated, so that memory and
        time are bounded by it whatever the data holds.

        Args:
            data: the whole stream, nothing before or after it.
            expected_fingerprint: the fingerprint of the tokenizer that is to decode the tokens; None accepts any.
            device: device of the result.
            entropy_model: the one that the stream was written with; not used for streams that were packed tightly.

        Raises:
            ImportError: `entropy_model` needs the extra `entropy`.
            TokenStreamError: if the data is damaged, truncated, not a token stream, of another version, of a tokenizer
                with another fingerprint, or coded with another entropy model.
        """
        stream = bytes(memoryview(data))
        if stream[: len(_MAGIC)] != _MAGIC:
            raise TokenStreamError(
                f"This is not a token stream: it starts with {stream[:2].hex(' ') or 'nothing'} "
                f"instead of {_MAGIC.hex(' ')}."
            )
        body, stored = stream[:-_CRC_SIZE], stream[-_CRC_SIZE:]
        # The CRC32 of a coded stream needs its ids, so it is checked once they are decoded.
        coded = len(body) > _FLAGS and bool(body[_FLAGS] & _CODED)
        if len(stored) < _CRC_SIZE or not coded and struct.pack("<I", zlib.crc32(body)) != stored:
            raise TokenStreamError(
                f"The token stream is damaged or truncated: the CRC32 of its {len(stream)} bytes does not match."
            )
        try:
            return cls._parse(body, stored, expected_fingerprint, entropy_model).to(device)
        except TokenStreamError:
            raise
        except ValueError as error:
            raise TokenStreamError(f"The token stream contradicts itself: {error}") from error

    def save(self, path: str | os.PathLike[str], entropy_model: EntropyModel | None = None) -> None:
        """Write the stream to a file; an interrupted write leaves the old file, or none."""
        write_atomically(path, self.to_bytes(entropy_model))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        expected_fingerprint: str | None = None,
        device: torch.device | str = "cpu",
        entropy_model: EntropyModel | None = None,
    ) -> ImageTokens:
        """Read a file that `save` wrote.

        Raises:
            TokenStreamError: as `from_bytes` does, naming the file.
            OSError: if the file cannot be read.
        """
        data = Path(path).read_bytes()
        try:
            return cls.from_bytes(data, expected_fingerprint, device, entropy_model)
        except TokenStreamError as error:
            raise TokenStreamError(f"{os.fspath(path)}: {error}") from error

    @property
    def _values(self) -> Tensor:
        return cast(Tensor, self.token_ids if self.latents is None else self.latents)

    @property
    def _bits(self) -> list[int]:
        sizes = self.spec.codebook_size
        return [32] * self._values.shape[2] if sizes is None else [(size - 1).bit_length() for size in sizes]

    @property
    def _sizes(self) -> Tensor:
        """Original height and width of each image, int64 `(batch, 2)`, also where none was placed."""
        if self.placements is not None:
            return self.placements
        return torch.tensor(self.spec.image_size, device=self.device).expand(self.batch_size, 2)

    def _rebuild(self, values: Tensor, lengths: Tensor, placements: Tensor | None) -> ImageTokens:
        if self.latents is None:
            return ImageTokens(token_ids=values, lengths=lengths, placements=placements, spec=self.spec)
        return ImageTokens(latents=values, lengths=lengths, placements=placements, spec=self.spec)

    def _coded_payload(self, payload: bytes, entropy_model: EntropyModel) -> bytes | None:
        """Code the ids, behind the model's fingerprint; None where that is not smaller than their tight `payload`."""
        check_entropy_model(entropy_model, self.spec.codebook_size, self.num_tokens)
        ids = self._values.cpu().numpy().reshape(self.batch_size, self.num_tokens)
        coded = bytes.fromhex(entropy_model.fingerprint) + code_ids(ids, self.lengths.cpu().numpy(), entropy_model)
        fits = int(self.lengths.sum()) <= MAX_TOKENS_PER_BYTE * len(coded)
        return coded if len(coded) < len(payload) and fits else None

    @classmethod
    def _parse(
        cls, body: bytes, stored_crc: bytes, expected_fingerprint: str | None, entropy_model: EntropyModel | None
    ) -> ImageTokens:
        reader = _Reader(body, len(_MAGIC))
        version, flags, tokenizer_id = struct.unpack("<BHB", reader.take(4, "header"))
        if version != _VERSION:
            raise TokenStreamError(f"The token stream has version {version}; this package reads version {_VERSION}.")
        if flags & ~_KNOWN_FLAGS or (flags & _LATENTS and flags & (_CHANNELS | _PER_CHANNEL | _CODED)):
            raise TokenStreamError(
                f"The token stream has flags 0x{flags:04x}, which this package cannot read; "
                "a later version may have written it."
            )
        if tokenizer_id:
            if tokenizer_id not in _TOKENIZER_NAMES:
                raise TokenStreamError(f"The token stream has tokenizer id {tokenizer_id}, which is unknown.")
            tokenizer = _TOKENIZER_NAMES[tokenizer_id]
        else:
            tokenizer = reader.take(reader.take(1, "name length")[0], "tokenizer name").decode("ascii")
            if tokenizer in TOKENIZER_IDS:
                raise TokenStreamError(f"The token stream spells out {tokenizer!r}, which has an id of its own.")
        fingerprint = reader.take(8, "fingerprint").hex()
        if expected_fingerprint is not None and fingerprint != expected_fingerprint:
            raise TokenStreamError(
                f"The token stream was made by the tokenizer {tokenizer!r} with fingerprint {fingerprint}; "
                f"expected {expected_fingerprint}. Decode it with the tokenizer that made it."
            )
        image_size = reader.varint("image height"), reader.varint("image width")
        max_tokens = reader.varint("max_tokens")
        grid = (reader.varint("grid height"), reader.varint("grid width")) if flags & _GRID else None

        codebook_size: tuple[int, ...] | None = None
        dim = reader.varint("dim", high=len(body)) if flags & _LATENTS else 0
        if not dim:
            channels = reader.varint("channels", high=MAX_CHANNELS) if flags & _CHANNELS else 1
            if flags & _PER_CHANNEL:
                codebook_size = tuple(reader.varint("codebook size") for _ in range(channels))
                if len(set(codebook_size)) == 1:
                    raise TokenStreamError("The token stream repeats one codebook size for every channel.")
            else:
                codebook_size = (reader.varint("codebook size"),) * channels
        spec = TokenSpec(tokenizer, fingerprint, codebook_size, bool(flags & _ORDERED), grid, image_size, max_tokens)

        batch, num_tokens = reader.varint("batch"), reader.varint("tokens", high=max_tokens)
        bits = [32] * dim if codebook_size is None else [(size - 1).bit_length() for size in codebook_size]
        if flags & _RAGGED:
            if batch > reader.left:
                raise TokenStreamError(f"The token stream declares {batch} lengths in its last {reader.left} bytes.")
            lengths = np.array([reader.varint("length", high=num_tokens) for _ in range(batch)], dtype=np.int64)
            total = int(lengths.sum())
            if total == batch * num_tokens:
                raise TokenStreamError("The token stream lists lengths although every image has all its tokens.")
        else:
            total = batch * num_tokens
        placements: Tensor | None = None
        if flags & _PLACED:
            if 2 * batch > reader.left:
                raise TokenStreamError(f"The token stream declares {batch} placements in its last {reader.left} bytes.")
            sides = ("original height", "original width")
            placements = torch.tensor(
                [[reader.varint(side, high=MAX_IMAGE_SIDE) for side in sides] for _ in range(batch)]
            )
            if bool((placements == torch.tensor(image_size)).all()):
                raise TokenStreamError("The token stream lists placements although every image has the decoded size.")
        size = (total * sum(bits) + 7) // 8
        coded = bool(flags & _CODED)
        if coded and (reader.left >= size or total > MAX_TOKENS_PER_BYTE * reader.left):
            raise TokenStreamError(
                f"The token stream declares {total} coded tokens, which it would not have in {reader.left} bytes."
            )
        if not coded and size != reader.left:
            raise TokenStreamError(
                f"The token stream declares {total} tokens, which take {size} bytes, but has {reader.left}."
            )
        if batch * num_tokens * len(bits) > _max_values(len(body) + _CRC_SIZE):
            raise TokenStreamError(
                f"The token stream declares a batch of {batch} x {num_tokens} tokens for {total} tokens, "
                "which is more padding than this package reads."
            )
        if not flags & _RAGGED:
            lengths = np.full(batch, num_tokens, dtype=np.int64)
        if coded:
            payload = _decoded(reader, stored_crc, lengths, num_tokens, spec, entropy_model)
        else:
            payload = reader.take(size, "payload")

        mask = np.arange(num_tokens) < lengths[:, None]
        values: np.ndarray
        if codebook_size is None:
            values = np.zeros((batch, num_tokens, dim), dtype=np.float32)
            values[mask] = np.frombuffer(payload, dtype="<f4").reshape(total, dim)
            latents = torch.from_numpy(values)
            return cls(latents=latents, lengths=torch.from_numpy(lengths), placements=placements, spec=spec)
        values = np.zeros((batch, num_tokens, len(bits)), dtype=np.int64)
        values[mask] = _unpack_bits(payload, total, bits)
        token_ids = torch.from_numpy(values if flags & _CHANNELS else values[..., 0])
        return cls(token_ids=token_ids, lengths=torch.from_numpy(lengths), placements=placements, spec=spec)


def placement_box(original: Sequence[int], image_size: Sequence[int]) -> tuple[int, int, int, int]:
    """Say where a whole image lies within the decoded one: `(top, left, height, width)` in pixels.

    The box is the largest of the image's aspect ratio that fits: it has the full height or the full width, the other
    side is rounded to the nearest pixel (half up, at least 1), and it is centred, up and left by half a pixel where it
    cannot be. Around it the decoded image is white. The rule is part of the byte format.

    Args:
        original: height and width of the image.
        image_size: height and width of the decoded image.
    """
    (height, width), (full_height, full_width) = map(int, original), map(int, image_size)
    if height * full_width >= width * full_height:
        box_height, box_width = full_height, max(1, (2 * width * full_height + height) // (2 * height))
    else:
        box_height, box_width = max(1, (2 * height * full_width + width) // (2 * width)), full_width
    return (full_height - box_height) // 2, (full_width - box_width) // 2, box_height, box_width


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: into a temporary file beside it, which then takes its name.

    Raises:
        FileNotFoundError: if the folder does not exist.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {path}: there is no folder {path.parent}.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Reader:
    """Reads the fields of a stream; running out of data is a `TokenStreamError`."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data = data
        self.position = position

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise TokenStreamError(f"The token stream ends within its {what}.")
        self.position += count
        return self.data[self.position - count : self.position]

    def varint(self, what: str, high: int = 2**32) -> int:
        """Read a number from 1 to `high`: no field of the format can be 0."""
        value = shift = 0
        while True:
            byte = self.take(1, what)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
            if shift > 28:
                raise TokenStreamError(f"The token stream's {what} takes more than 5 bytes.")
        if not 1 <= value <= high or (shift and byte == 0):
            raise TokenStreamError(f"The token stream's {what} is {value} in {shift // 7 + 1} bytes; at most {high}.")
        return value


def _decoded(
    reader: _Reader,
    stored_crc: bytes,
    lengths: np.ndarray,
    num_tokens: int,
    spec: TokenSpec,
    entropy_model: EntropyModel | None,
) -> bytes:
    """Decode a coded payload and return it packed tightly, as the checksum expects it."""
    fingerprint = reader.take(4, "fingerprint of the entropy model").hex()
    if entropy_model is None:
        raise TokenStreamError(
            f"The token stream is entropy coded: pass the `entropy_model` with the fingerprint {fingerprint}."
        )
    if entropy_model.fingerprint != fingerprint:
        raise TokenStreamError(
            f"The token stream was coded with the entropy model {fingerprint}; received another one, "
            f"{entropy_model.fingerprint}."
        )
    check_entropy_model(entropy_model, spec.codebook_size, num_tokens)
    ids = decode_ids(reader.take(reader.left, "coded ids"), lengths, num_tokens, entropy_model)
    if ids is not None:
        mask = np.arange(num_tokens) < lengths[:, None]
        payload = _pack_bits(ids[mask][:, None], [(entropy_model.codebook_size - 1).bit_length()])
        if struct.pack("<I", zlib.crc32(reader.data + payload)) == stored_crc:
            return payload
    raise TokenStreamError(
        "The ids of the token stream do not match its CRC32: it is damaged, or was coded on a machine that rounds "
        "differently."
    )


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _max_values(stream_size: int) -> int:
    # Padding is not stored, so a short stream could ask for a huge tensor; tokenizers with up to 1024 tokens never
    # come near this bound.
    return 2**22 + 1024 * stream_size


def _pack_bits(ids: np.ndarray, bits: Sequence[int]) -> bytes:
    """Pack ids `(total, channels)` into `bits[channel]` bits each, most significant bit first."""
    matrix = np.empty((len(ids), sum(bits)), dtype=np.uint8)
    column = 0
    for channel, width in enumerate(bits):
        for shift in reversed(range(width)):
            matrix[:, column] = (ids[:, channel] >> shift) & 1
            column += 1
    return np.packbits(matrix).tobytes()


def _unpack_bits(payload: bytes, total: int, bits: Sequence[int]) -> np.ndarray:
    """Invert `_pack_bits`: ids int64 `(total, channels)`."""
    flat = np.unpackbits(np.frombuffer(payload, dtype=np.uint8))
    used = total * sum(bits)
    if flat[used:].any():
        raise TokenStreamError("The token stream has bits set after its last token.")
    matrix = flat[:used].reshape(total, -1)
    ids = np.zeros((total, len(bits)), dtype=np.int64)
    column = 0
    for channel, width in enumerate(bits):
        for _ in range(width):
            ids[:, channel] = ids[:, channel] << 1 | matrix[:, column]
            column += 1
    return ids


def _mask(lengths: Tensor, num_tokens: int) -> Tensor:
    return torch.arange(num_tokens, device=lengths.device) < lengths[:, None]


def _integers(name: str, values: Any, count: int | None, low: int, high: int) -> tuple[int, ...]:
    """Check that `values` are integers from low to high, `count` of them if it is given."""
    try:
        numbers = tuple(operator.index(value) for value in values)
    except TypeError:
        raise ValueError(f"{name} must hold integers, received {values!r}.") from None
    if count is not None and len(numbers) != count:
        raise ValueError(f"{name} must have {count} entries, received {values!r}.")
    wrong = [number for number in numbers if not low <= number <= high]
    if wrong:
        raise ValueError(f"{name} must be {low} to {high}, received {wrong[0]}.")
    return numbers


def _integer_vector(name: str, values: Tensor) -> Tensor:
    if values.ndim != 1 or values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise ValueError(
            f"{name} must be a list or vector of integers, received {values.dtype} of shape {tuple(values.shape)}."
        )
    return values.long()


def _check_layout(name: str, values: Tensor, spec: TokenSpec) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, received {type(values).__name__}.")
    dtype = torch.int64 if name == "token_ids" else torch.float32
    if values.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, received {values.dtype}.")
    shape, sizes = tuple(values.shape), spec.codebook_size
    if name == "token_ids":
        if values.ndim not in (2, 3):
            raise ValueError(
                f"token_ids must be (batch, num_tokens) or (batch, num_tokens, num_channels), received {shape}."
            )
        if sizes is None:
            raise ValueError(f"The spec of {spec.tokenizer!r} has no codebook: give latents instead of token_ids.")
        channels = shape[2] if len(shape) == 3 else 1
        if channels != len(sizes):
            raise ValueError(
                f"token_ids of shape {shape} have {channels} channels, but the spec has {len(sizes)} codebook sizes."
            )
    else:
        if values.ndim != 3:
            raise ValueError(f"latents must be (batch, num_tokens, dim), received {shape}.")
        if sizes is not None:
            raise ValueError(f"The spec of {spec.tokenizer!r} has a codebook: give token_ids instead of latents.")
    if 0 in shape:
        raise ValueError(f"{name} must have at least one image, one token and one value; received the shape {shape}.")
    if shape[1] > spec.max_tokens or (not spec.ordered and shape[1] != spec.max_tokens):
        accepted = f"1 to {spec.max_tokens}" if spec.ordered else f"exactly {spec.max_tokens}, as they are not ordered"
        raise ValueError(f"{name} have {shape[1]} tokens per image; {spec.tokenizer!r} has {accepted}.")


def _checked_lengths(lengths: Tensor | None, values: Tensor, spec: TokenSpec) -> Tensor:
    batch, num_tokens = values.shape[:2]
    if lengths is None:
        return torch.full((batch,), num_tokens, device=values.device)
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a torch.Tensor, received {type(lengths).__name__}.")
    if lengths.dtype != torch.int64 or lengths.shape != (batch,):
        raise ValueError(
            f"lengths must be int64 of shape ({batch},), received {lengths.dtype} of shape {tuple(lengths.shape)}."
        )
    low = 1 if spec.ordered else num_tokens
    wrong = ((lengths < low) | (lengths > num_tokens)).nonzero().flatten().tolist()
    if wrong:
        accepted = f"1 to {num_tokens}" if spec.ordered else f"{num_tokens}, as its tokens are not ordered"
        raise ValueError(f"lengths[{wrong[0]}] is {int(lengths[wrong[0]])}; it must be {accepted}.")
    return lengths.to(values.device, copy=True)


def _checked_placements(placements: Tensor | None, values: Tensor, spec: TokenSpec) -> Tensor | None:
    if placements is None:
        return None
    if not isinstance(placements, Tensor):
        raise TypeError(f"placements must be a torch.Tensor, received {type(placements).__name__}.")
    if placements.dtype != torch.int64 or placements.shape != (len(values), 2):
        raise ValueError(
            f"placements must be int64 of shape ({len(values)}, 2), received {placements.dtype} of shape "
            f"{tuple(placements.shape)}."
        )
    wrong = ((placements < 1) | (placements > MAX_IMAGE_SIDE)).any(1) | (placements.prod(1) > MAX_PIXELS)
    if bool(wrong.any()):
        image = int(wrong.nonzero()[0])
        raise ValueError(
            f"placements[{image}] is {placements[image].tolist()}; the original height and width must be 1 to "
            f"{MAX_IMAGE_SIDE} and have at most {MAX_PIXELS} pixels."
        )
    if bool((placements == torch.tensor(spec.image_size, device=placements.device)).all()):
        return None
    return placements.to(values.device, copy=True)


def _check_range(token_ids: Tensor, spec: TokenSpec) -> None:
    sizes = torch.tensor(spec.codebook_size, device=token_ids.device)
    wrong = (token_ids < 0) | (token_ids >= sizes)
    if bool(wrong.any()):
        position = wrong.nonzero()[0].tolist()
        names = ["batch", "token", "channel"][: len(position)]
        size = int(sizes[position[2] if len(position) == 3 else 0])
        raise ValueError(
            f"Token id {int(token_ids[tuple(position)])} at [{', '.join(names)}] = {position} is out of range: "
            f"accepted are 0 to {size - 1}."
        )
