"""How many bytes an image takes, and how fast it gets there and back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmsdk.bench.runner import BenchResult
from mmsdk.data.emoji import EmojiDataset
from mmsdk.loading import resolve
from mmsdk.tokens import ImageTokens
from tokenizers_img.base import ImageTokenizer


def tokens(
    one_d_piece: str | None = "emoji-64",
    vq: str | None = "emoji-64",
    counts: Sequence[int] = (1, 8, 16, 32, 64),
    num_images: int = 32,
    repeats: int = 5,
    cache_dir: str | None = None,
    output_dir: Path | None = None,
) -> BenchResult:
    """Measure `ImageTokens.to_bytes` and the speed of tokenizers.

    Args:
        one_d_piece: embedded name or folder of an ordered tokenizer; None leaves it out.
        vq: embedded name or folder of a grid tokenizer; None leaves it out.
        counts: numbers of tokens; those above the tokenizer's own are left out.
        num_images: images encoded and decoded at once.
        repeats: timed runs, after one that is not timed; medians are shown.
        cache_dir: where the data set lies.
        output_dir: not used.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}.")
    pixels = EmojiDataset("test", cache_dir=cache_dir).images[:num_images]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    table: list[list[Any]] = []
    for name, source in (("one_d_piece", one_d_piece), ("vq", vq)):
        if source is None:
            continue
        tokenizer: ImageTokenizer = resolve(name).from_pretrained(source).eval()
        prepared = tokenizer.preprocess(images)
        full = tokenizer.encode(prepared)
        wanted = [k for k in counts if k <= tokenizer.max_tokens] if tokenizer.ordered else [tokenizer.max_tokens]
        for count in wanted:
            kept = full.truncate(count) if tokenizer.ordered else full
            one, stream = kept[0], kept.to_bytes()
            payload = -(-int(one.num_bits[0]) // 8)
            size = len(one.to_bytes())
            encode = _median(partial(tokenizer.encode, prepared, count), repeats)
            decode = _median(partial(tokenizer.decode, kept), repeats)
            write = _median(kept.to_bytes, repeats)
            read = _median(partial(ImageTokens.from_bytes, stream), repeats)
            table.append(
                [
                    name,
                    count,
                    size,
                    payload,
                    size - payload,
                    len(stream) / len(kept),
                    len(images) / encode,
                    len(images) / decode,
                    1e6 * write / len(kept),
                    1e6 * read / len(kept),
                ]  # fmt: skip
            )
    notes = [
        "bytes: a stream of one image, of which payload for its tokens and the rest for a header that says what they "
        f"are, with a checksum. in a batch: per image of a stream of {len(images)}.",
        f"encode and decode: images per second in a batch of {len(images)}; to_bytes and from_bytes: microseconds per "
        f"image. Medians of {repeats} runs.",
    ]
    columns = [
        "tokenizer", "tokens", "bytes", "payload", "header", "in a batch", "encode/s", "decode/s", "to_bytes us",
        "from_bytes us",
    ]  # fmt: skip
    return BenchResult("tokens", columns, table, notes)


def _median(run: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of `repeats` runs after one that is not timed."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
