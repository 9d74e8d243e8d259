"""What a byte buys: our tokenizers beside JPEG, WebP and AVIF."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, features
from torch import Tensor

from mmsdk.bench.evaluator import evaluation_prompt, frechet_distance
from mmsdk.bench.figures import labelled_rows, line_plot
from mmsdk.bench.runner import BenchResult
from mmsdk.data.emoji import EmojiDataset
from mmsdk.errors import DataError
from mmsdk.images import images_to_tensor, tensor_to_pil
from mmsdk.loading import embedded_models, resolve
from mmsdk.training.tokenizer_recipes import psnr
from tokenizers_img.base import ImageTokenizer

# Name -> Pillow's format and what makes its files smallest. All files are complete: headers count.
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "JPEG": ("JPEG", {"optimize": True}),
    "WebP": ("WEBP", {"method": 6}),
    "AVIF": ("AVIF", {"speed": 4}),
}
QUALITIES = (0, 1, 2, 5, *range(10, 101, 10))


@dataclass(frozen=True)
class _Setting:
    """One way to store the images: its label and knob, mean bytes of a file, and the decoded images."""

    label: str
    knob: str
    size: float
    images: Tensor


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Return the structural similarity of each image `(batch, 3, H, W)` in [0, 1], at most 1 (Wang et al., 2004).

    Mean over channels and over the positions of a Gaussian window of 11 pixels (sigma 1.5).
    """
    offsets = torch.arange(11, dtype=images.dtype, device=images.device) - 5
    kernel = torch.softmax(-offsets.square() / (2 * 1.5**2), 0)

    def blurred(x: Tensor) -> Tensor:
        x = F.conv2d(x.flatten(0, 1)[:, None], kernel.view(1, 1, -1, 1))
        return F.conv2d(x, kernel.view(1, 1, 1, -1))

    mean_a, mean_b = blurred(images), blurred(references)
    variance_a = blurred(images.square()) - mean_a.square()
    variance_b = blurred(references.square()) - mean_b.square()
    covariance = blurred(images * references) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).view(len(images), -1).mean(1)


def rate_distortion(
    tokenizers: Mapping[str, str] | None = None,
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256),
    bits: Sequence[int] = tuple(range(2, 9)),
    codecs: Sequence[str] = tuple(CODECS),
    qualities: Sequence[int] = QUALITIES,
    evaluator: str = "emoji-64",
    num_images: int | None = 256,
    split: str = "test",
    candidates: int = 100,
    batch_size: int = 64,
    seed: int = 0,
    sheet_images: int = 10,
    cache_dir: str | None = None,
    output_dir: Path | None = None,
) -> BenchResult:
    """Measure bytes against PSNR, SSIM, Frechet distance and retrieval on emoji that no training saw.

    A file of ours is what `mmsdk tokenize` writes for one image, header and checksum included; one of a codec is what
    Pillow writes.

    Args:
        tokenizers: registered name -> embedded name or folder; default: those of `emoji-64`.
        counts: numbers of tokens, for ordered tokenizers; those above a tokenizer's own are left out.
        bits: bits of an index, for tokenizers whose quality knob they are.
        codecs: some of JPEG, WebP, AVIF.
        qualities: of each codec, 0 to 100.
        evaluator: embedded name or folder.
        num_images: measure so many of the split, drawn with `seed`; None for all.
        split: `test` (unseen emoji), `pair` or `train`.
        candidates: prompts to retrieve from, at most as many as there are different ones.
        batch_size: images encoded at once.
        seed: of all draws.
        sheet_images: columns of the sample sheet.
        cache_dir: where the data set lies.
        output_dir: receives the plots and the sheet.
    """
    if tokenizers is None:
        known = ("one_d_piece", "flextok", "tokenbridge", "vq")
        tokenizers = {name: "emoji-64" for name in known if name in embedded_models().get("emoji-64", {})}
    for codec in codecs:
        if codec not in CODECS or not features.check(codec.lower().replace("jpeg", "jpg")):
            raise DataError(f"This Pillow cannot write {codec!r}; codecs must be some of {list(CODECS)}.")
    data = EmojiDataset(split, cache_dir=cache_dir)
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:num_images].sort().values
    images = torch.from_numpy(data.images)[rows].permute(0, 3, 1, 2).float() / 255
    prompts = [evaluation_prompt(data.records[i]) for i in rows.tolist()]
    most = min(candidates, len(set(prompts)))
    judge = resolve("evaluator").from_pretrained(evaluator).eval()
    real = judge.features(images)

    def settings() -> Iterator[_Setting]:
        for name, source in tokenizers.items():
            yield from _tokenized(name, source, images, counts, bits, batch_size)
        for codec in codecs:
            for quality in qualities:
                yield _compressed(codec, quality, images)

    shown = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + 1))[:sheet_images]
    sheet = {"original": images[shown]}
    found = judge.retrieval_of_features(real, prompts, most, seed)
    table: list[list[Any]] = [["real images", None, None, None, None, 0.0, found.top1, None, None]]
    for setting in settings():
        extracted = judge.features(setting.images)
        quality = float(psnr(setting.images, images).mean())
        similarity = float(ssim(setting.images, images).mean())
        distance = frechet_distance(real, extracted)
        top1 = judge.retrieval_of_features(extracted, prompts, most, seed).top1
        table.append([setting.label, setting.knob, setting.size, quality, similarity, distance, top1, None, None])
        if setting.label in tokenizers or setting.knob in ("quality 0", "quality 30"):
            sheet[f"{setting.label}, {setting.knob}: {setting.size:.0f} B"] = setting.images[shown]
    for row in table[1:]:
        if row[0] in tokenizers:
            row[-2:] = [_times_smaller(table, row, codec) if codec in codecs else None for codec in ("WebP", "AVIF")]

    columns = ["images", "knob", "bytes", "PSNR", "SSIM", "FD", "top-1", "WebP/ours", "AVIF/ours"]
    notes = [
        f"{len(images)} images of the split {split!r}, 64 x 64 pixels; bytes: mean size of a complete file, headers "
        "included on both sides.",
        f"FD: Frechet distance to the real images over EfficientNet-Lite0 features; top-1: retrieval of `label, style` "
        f"among {most} prompts. Both compare within this table only.",
        "WebP/ours, AVIF/ours: how many times as many bytes the smallest measured file of the codec takes whose FD is "
        "no worse. Where it is below 1, the codec wins.",
    ]
    figures = [] if output_dir is None else _figures(table, output_dir, len(images), split, sheet)
    return BenchResult("rate-distortion", columns, table, notes, figures)


def _times_smaller(table: Sequence[Sequence[Any]], row: Sequence[Any], codec: str) -> float | None:
    sizes = [other[2] for other in table if other[0] == codec and other[5] <= row[5]]
    return min(sizes) / row[2] if sizes else None


def _figures(
    table: Sequence[Sequence[Any]], folder: Path, count: int, split: str, sheet: Mapping[str, Tensor]
) -> list[Path]:
    def series(column: int) -> dict[str, tuple[list[float], list[float]]]:
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for row in sorted(table[1:], key=lambda row: row[2]):
            x, y = lines.setdefault(row[0], ([], []))
            x.append(row[2])
            y.append(row[column])
        return lines

    ticks = [2**i for i in range(4, 14)]
    title = f"{count} images of the split {split!r}, whole files"
    plots = (("fd", 5, "Frechet distance (lower is better)"), ("psnr", 3, "PSNR in dB"), ("retrieval", 6, "top-1"))
    paths = [
        line_plot(series(column), folder / f"rate-distortion-{name}.png", "bytes", label, title, True, ticks)
        for name, column, label in plots
    ]
    return [*paths, labelled_rows(sheet, folder / "rate-distortion-samples.png")]


def _tokenized(
    name: str, source: str, images: Tensor, counts: Sequence[int], bits: Sequence[int], batch_size: int
) -> Iterator[_Setting]:
    """Yield what a tokenizer makes of the images at each value of its knob."""
    tokenizer_class = resolve(name)
    if tokenizer_class.quality_knob == "bits":
        for value in bits:
            tokenizer = tokenizer_class.from_pretrained(source, bits=value).eval()
            yield _stored(name, f"{value} bits", tokenizer, images, None, batch_size)
        return
    tokenizer = tokenizer_class.from_pretrained(source).eval()
    wanted = [k for k in counts if k <= tokenizer.max_tokens] if tokenizer.ordered else [tokenizer.max_tokens]
    for count in wanted:
        yield _stored(name, f"{count} tokens", tokenizer, images, count, batch_size)


def _stored(
    label: str, knob: str, tokenizer: ImageTokenizer, images: Tensor, num_tokens: int | None, batch_size: int
) -> _Setting:
    decoded: list[Tensor] = []
    sizes: list[int] = []
    for batch in images.split(batch_size):
        tokens = tokenizer.encode(batch, num_tokens)
        sizes += [len(one.to_bytes()) for one in tokens]
        # Generative decoders draw what the tokens leave open, for each image anew.
        generator = torch.Generator().manual_seed(len(decoded))
        decoded.append(tokenizer.decode(tokens, generator).images.cpu())
    return _Setting(label, knob, sum(sizes) / len(sizes), torch.cat(decoded))


def _compressed(codec: str, quality: int, images: Tensor) -> _Setting:
    """Return what a codec makes of the images."""
    kind, options = CODECS[codec]
    files = []
    for image in tensor_to_pil(images):
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=quality, **options)
        files.append(buffer.getvalue())
    decoded = images_to_tensor([Image.open(io.BytesIO(file)) for file in files])
    return _Setting(codec, f"quality {quality}", sum(map(len, files)) / len(files), decoded)
