"""Entropy coding of token ids: a model says how probable each id is, a range coder spends that many bits on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

# Images that the model reads together. Part of the byte format: other sizes may round probabilities differently.
BATCH_SIZE = 64
# A coded stream has at most this many tokens per byte, so that its size bounds the time that reading it takes.
MAX_TOKENS_PER_BYTE = 256


class EntropyModel(Protocol):
    """What predicts token ids, image after image, from the ids before them.

    Both sides ask for the same probabilities in the same order and must get them bit for bit. So everything that the
    probabilities depend on has to be settled when the model is created, and reader and writer run on the same machine:
    other kernels round differently. They run on one thread, because so do other numbers of threads.

    Attributes:
        fingerprint: 8 lower-case hexadecimal characters that identify what the probabilities depend on.
        codebook_size: number of ids.
        max_tokens: most tokens of an image that it predicts.
    """

    fingerprint: str
    codebook_size: int
    max_tokens: int

    def start(self, batch_size: int, num_tokens: int) -> Callable[[Tensor | None], Tensor]:
        """Begin `batch_size` images of up to `num_tokens` tokens and return a function to call for each position.

        The function takes the ids `(batch_size,)` of the position before, None at first (rows that have ended give 0),
        and returns the probabilities `(batch_size, codebook_size)` of the ids to come, float32.
        """


def code_ids(token_ids: np.ndarray, lengths: np.ndarray, model: EntropyModel) -> bytes:
    """Code ids `(batch, num_tokens)` int64, of each image only those within its length."""
    coder = _Coder()

    def visit(rows: np.ndarray, position: int, probabilities: np.ndarray) -> np.ndarray:
        ids = token_ids[rows, position]
        coder.write(ids, probabilities)
        return ids

    with _one_thread():
        _walk(lengths, token_ids.shape[1], model, visit)
    return coder.data()


def decode_ids(data: bytes, lengths: np.ndarray, num_tokens: int, model: EntropyModel) -> np.ndarray | None:
    """Invert `code_ids`: ids `(batch, num_tokens)`, 0 past each length; None where `code_ids` never wrote `data`."""
    from constriction import stream

    words = np.frombuffer(data + bytes(-len(data) % 4), dtype="<u4").astype(np.uint32)
    decoder, coder = stream.queue.RangeDecoder(words), _Coder()
    token_ids = np.zeros((len(lengths), num_tokens), dtype=np.int64)

    def visit(rows: np.ndarray, position: int, probabilities: np.ndarray) -> np.ndarray:
        ids = decoder.decode(_family(), probabilities).astype(np.int64)
        coder.write(ids, probabilities)
        token_ids[rows, position] = ids
        return ids

    try:
        with _one_thread():
            _walk(lengths, num_tokens, model, visit)
    except AssertionError:  # what constriction raises for bits that no message leads to
        return None
    return token_ids if coder.data() == data else None


def cross_entropy(token_ids: np.ndarray, lengths: np.ndarray, model: EntropyModel) -> float:
    """Return the bits per token that a perfect coder would spend on ids `(batch, num_tokens)`."""
    bits: list[np.ndarray] = []

    def visit(rows: np.ndarray, position: int, probabilities: np.ndarray) -> np.ndarray:
        ids = token_ids[rows, position]
        bits.append(-np.log2(probabilities[np.arange(len(ids)), ids].astype(np.float64)))
        return ids

    with _one_thread():
        _walk(lengths, token_ids.shape[1], model, visit)
    return float(np.concatenate(bits).mean())


def check_entropy_model(model: EntropyModel, codebook_size: tuple[int, ...] | None, num_tokens: int) -> None:
    """Raise `ValueError` unless `model` can code such tokens, `ImportError` unless the range coder is installed."""
    if not re.fullmatch(r"[0-9a-f]{8}", model.fingerprint):
        raise ValueError(
            f"The fingerprint of an entropy model is 8 lower-case hexadecimal characters, received "
            f"{model.fingerprint!r}."
        )
    if codebook_size is None or len(codebook_size) != 1:
        raise ValueError("Entropy coding is for tokens of one id each; these are latents or have several channels.")
    if codebook_size[0] != model.codebook_size or num_tokens > model.max_tokens:
        raise ValueError(
            f"The entropy model codes up to {model.max_tokens} ids of a codebook of {model.codebook_size}; received "
            f"{num_tokens} of a codebook of {codebook_size[0]}."
        )
    try:
        import constriction  # noqa: F401
    except ImportError as error:
        raise ImportError("Entropy coding needs constriction: pip install 'mmsdk[entropy]'.") from error


def _walk(
    lengths: np.ndarray,
    num_tokens: int,
    model: EntropyModel,
    visit: Callable[[np.ndarray, int, np.ndarray], np.ndarray],
) -> None:
    """Let `visit` write or read every id: batches of images, position after position, row after row."""
    for first in range(0, len(lengths), BATCH_SIZE):
        part = lengths[first : first + BATCH_SIZE]
        predict = model.start(len(part), num_tokens)
        ids: Tensor | None = None
        for position in range(int(part.max())):
            probabilities = predict(ids).cpu().numpy()
            rows = np.flatnonzero(part > position)
            seen = np.zeros(len(part), dtype=np.int64)
            seen[rows] = visit(first + rows, position, np.ascontiguousarray(probabilities[rows]))
            ids = torch.from_numpy(seen)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _family() -> Any:
    from constriction import stream

    return stream.model.Categorical(perfect=False)


class _Coder:
    """A range coder that ends with its last byte that is not 0: the reader restores the others."""

    def __init__(self) -> None:
        from constriction import stream

        self.encoder = stream.queue.RangeEncoder()

    def write(self, ids: np.ndarray, probabilities: np.ndarray) -> None:
        self.encoder.encode(ids.astype(np.int32), _family(), probabilities)

    def data(self) -> bytes:
        return self.encoder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
