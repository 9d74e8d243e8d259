"""Plots and sample sheets of the benchmarks."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmsdk.images import image_grid, save_image, tensor_to_pil

_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def _enlarged(images: Tensor, size: int) -> list[Image.Image]:
    """Turn `images` `(batch, 3, H, W)` in [0, 1] into pictures of `size` pixels a side."""
    return [i.resize((size, size), Image.Resampling.LANCZOS) for i in tensor_to_pil(images)]


def captioned_sheet(images: Tensor, captions: Sequence[str], path: Path, columns: int = 8, size: int = 128) -> Path:
    """Write `images` `(batch, 3, H, W)` in [0, 1] as one sheet, each with its caption below, and return its path."""
    font = ImageFont.load_default(11)
    strip = 30
    cells = []
    for image, caption in zip(_enlarged(images, size), captions, strict=True):
        cell = Image.new("RGB", (size, size + strip), _PAPER)
        cell.paste(image)
        text = "\n".join(textwrap.wrap(caption, width=size // 6, max_lines=2, placeholder="..."))
        ImageDraw.Draw(cell).multiline_text((size // 2, size + 2), text, _INK, font, anchor="ma", align="center")
        cells.append(cell)
    save_image(image_grid(cells, columns, padding=6), path)
    return path


def labelled_rows(rows: Mapping[str, Tensor], path: Path, size: int = 96) -> Path:
    """Write one row of pictures for each label, `(batch, 3, H, W)` in [0, 1], and return the path."""
    font = ImageFont.load_default(14)
    margin = 24 + max(int(font.getlength(label)) for label in rows)
    strips = []
    for label, images in rows.items():
        grid = image_grid(_enlarged(images, size), len(images), padding=3)
        strip = Image.new("RGB", (margin + grid.width, grid.height), _PAPER)
        strip.paste(grid, (margin, 0))
        ImageDraw.Draw(strip).text((margin - 12, grid.height // 2), label, _INK, font, anchor="rm")
        strips.append(strip)
    save_image(image_grid(strips, 1, padding=0), path)
    return path


def line_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    x_label: str,
    y_label: str,
    title: str,
    log2_x: bool = False,
    ticks: Sequence[float] | None = None,
) -> Path:
    """Write a plot of `label -> (x, y)`; a series of one point becomes a marker. Returns the path.

    A logarithmic axis has its ticks at `ticks`, by default at every x.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, (x, y) in series.items():
        axes.plot(x, y, marker="o" if len(x) > 1 else "D", linestyle="-" if len(x) > 1 else "none", label=label)
    if log2_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for values, _ in series.values() for x in values}) if ticks is None else ticks
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    return path
