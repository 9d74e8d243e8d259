"""Open, check and convert images: whatever holds one in, float tensors `(batch, 3, height, width)` in [0, 1] out.

Images with a known range (files, PIL images, integer arrays and tensors) pass through 8-bit RGB. Float arrays and
tensors keep their values. Embedded colour profiles are not applied.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from mmsdk.errors import ImageError, unknown_name
from mmsdk.tokens import MAX_IMAGE_SIDE, MAX_PIXELS, placement_box, write_atomically

ResizeMode: TypeAlias = Literal["center_crop", "adm_crop", "stretch"]
ResampleFilter: TypeAlias = Literal["bicubic", "lanczos", "bilinear"]
ImageSource: TypeAlias = Image.Image | np.ndarray | Tensor | str | os.PathLike[str] | bytes

# Formats that people keep pictures in. Pillow knows more, but some of them start other programs (EPS), have no
# signature, so that any bytes pass for an image (TGA), or hold images larger than the size that they declare (ICO).
_READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_WRITABLE_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"quality": 95}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
}
_RESIZE = ("center_crop", "adm_crop", "stretch")
_RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
}


def open_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open one image as 8-bit RGB.

    The orientation of EXIF is applied, transparency is laid on white, 16-bit values are scaled to 8 bits, and of an
    animation the first frame is taken.

    Args:
        source: a path, the bytes of an image file, a PIL image, an array `(height, width)` or
            `(height, width, channels)` with 1, 3 or 4 channels (uint8, uint16, bool, or float in [0, 1]), or a tensor
            `(3, height, width)` (uint8, or float in [0, 1]). The source is not changed.
        max_pixels: largest accepted width * height, checked before anything is decoded. Pillow's own limit, twice
            `PIL.Image.MAX_IMAGE_PIXELS`, applies to files as well.

    Returns:
        A new RGB image.

    Raises:
        ImageError: if the image is missing, damaged, truncated, too large, or out of the accepted shapes and ranges.
        TypeError: if the source is none of these.
    """
    loaded = _load(source, max_pixels)
    return loaded if isinstance(loaded, Image.Image) else _quantize(loaded)


def load_images(images: ImageSource | Sequence[ImageSource], max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
    """Open one or many images as 8-bit RGB, each as `open_image` does.

    Args:
        images: one source of `open_image`, a batch as an array `(batch, height, width, channels)` or a tensor
            `(batch, 3, height, width)`, or a list or tuple of these.
        max_pixels: largest accepted width * height of each image.

    Raises:
        ImageError: as `open_image` does, or if there are no images.
    """
    return [open_image(source, max_pixels) for source in _flatten(images)]


def images_to_tensor(
    images: ImageSource | Sequence[ImageSource],
    size: tuple[int, int] | None = None,
    resize: ResizeMode = "center_crop",
    resample: ResampleFilter = "bicubic",
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Bring images to one size in one float32 tensor `(batch, 3, height, width)` with values in [0, 1].

    Images that have the size already keep their exact values. Deterministic; gradients do not pass.

    Args:
        images: as for `load_images`.
        size: `(height, width)` of the result; None if the images have one size, which they then keep.
        resize: `"center_crop"` scales until both sides cover `size` and cuts what is over equally on both ends;
            `"adm_crop"` does so as ADM (Dhariwal and Nichol, 2021) and the models that follow it: large images are
            first halved by averaging, and sizes and cuts are whole pixels; `"stretch"` ignores the aspect ratio.
        resample: the filter; all of them are antialiased.
        max_pixels: largest accepted width * height of each image.

    Returns:
        A new tensor, on the device of the first tensor among the images, else on the CPU.

    Raises:
        ImageError: as `open_image` does; if there are no images; or if sizes differ and `size` is None.
        UnknownNameError: if `resize` or `resample` is unknown.
        ValueError: if `size` is not two positive integers.
    """
    if resize not in _RESIZE:
        raise unknown_name("resize mode", resize, list(_RESIZE))
    if resample not in _RESAMPLE:
        raise unknown_name("resampling filter", resample, list(_RESAMPLE))
    if size is not None:
        if not isinstance(size, tuple | list) or len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
            raise ValueError(f"size must be two positive integers (height, width), received {size!r}.")
    sources = _flatten(images)
    device = next((source.device for source in sources if isinstance(source, Tensor)), torch.device("cpu"))
    batch: list[Tensor] = []
    for source in sources:
        loaded = _load(source, max_pixels)
        if isinstance(loaded, Image.Image):
            if size is not None:
                loaded = _fit(loaded, size, resize, _RESAMPLE[resample])
            pixels = torch.from_numpy(np.array(loaded)).permute(2, 0, 1).float() / 255
        elif size is None or loaded.shape[1:] == size:
            pixels = loaded
        else:
            planes = [_fit(Image.fromarray(plane), size, resize, _RESAMPLE[resample]) for plane in loaded.cpu().numpy()]
            # Bicubic and Lanczos filters overshoot at edges; on 8-bit images PIL clips by itself.
            pixels = torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).clamp(0, 1)
        if batch and pixels.shape != batch[0].shape:
            raise ImageError(
                f"Image {len(batch)} is {pixels.shape[2]} x {pixels.shape[1]} pixels and image 0 is "
                f"{batch[0].shape[2]} x {batch[0].shape[1]}; give a size to bring them to."
            )
        batch.append(pixels.to(device))
    return torch.stack(batch).contiguous()


def tensor_to_pil(images: Tensor) -> list[Image.Image]:
    """Convert model outputs to 8-bit RGB images, rounding to the nearest value.

    Args:
        images: float `(batch, 3, height, width)`; [0, 1] is black to white, and what a model gave beyond it is clamped.

    Raises:
        ImageError: if the shape or dtype is another, or a value is NaN or infinite.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, received {type(images).__name__}.")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ImageError(
            "images must be a float tensor (batch, 3, height, width), "
            f"received {images.dtype} of shape {tuple(images.shape)}."
        )
    images = images.detach()
    finite = images.isfinite()
    if not bool(finite.all()):
        number = int((~finite).nonzero()[0, 0])
        raise ImageError(f"Image {number} of the batch has NaN or infinite values.")
    return [_quantize(image) for image in images.float().clamp(0, 1)]


def letterbox(
    images: ImageSource | Sequence[ImageSource],
    size: tuple[int, int],
    resample: ResampleFilter = "bicubic",
    max_pixels: int = MAX_PIXELS,
) -> tuple[Tensor, Tensor]:
    """Bring whole images to one size: each is scaled into its `placement_box`, on white. `undo_letterbox` inverts it.

    Args:
        images: as for `load_images`, of any sizes.
        size: `(height, width)` of the result.
        resample: the filter; all of them are antialiased.
        max_pixels: largest accepted width * height of each image.

    Returns:
        Float32 `(batch, 3, height, width)` in [0, 1], on the device of the first image where that is a tensor, else on
        the CPU; and the placements for `ImageTokens`, int64 `(batch, 2)`, the height and width that each image had.

    Raises:
        ImageError: as `open_image` does; if there are no images; or if a side is longer than `MAX_IMAGE_SIDE`.
        UnknownNameError: if `resample` is unknown.
    """
    canvases: list[ImageSource] = []
    placements: list[tuple[int, ...]] = []
    for source in _flatten(images):
        loaded = _load(source, max_pixels)
        original = (loaded.height, loaded.width) if isinstance(loaded, Image.Image) else tuple(loaded.shape[1:])
        if max(original) > MAX_IMAGE_SIDE:
            raise ImageError(
                f"Image {len(placements)} is {original[1]} x {original[0]} pixels; letterboxed images have sides of at "
                f"most {MAX_IMAGE_SIDE}."
            )
        top, left, height, width = placement_box(original, size)
        scaled = images_to_tensor(loaded, (height, width), "stretch", resample, max_pixels)
        margins = (left, size[1] - width - left, top, size[0] - height - top)
        canvases.append(F.pad(scaled[0], margins, value=1.0))
        placements.append(original)
    return images_to_tensor(canvases, max_pixels=size[0] * size[1]), torch.tensor(placements)


def undo_letterbox(images: Tensor, placements: Tensor | None) -> list[Image.Image]:
    """Convert model outputs to 8-bit RGB images of the sizes that the originals had.

    Each `placement_box` is cut out and resized (bicubic, antialiased). Without placements the images stay as they are,
    as `tensor_to_pil` gives them.

    Args:
        images: float `(batch, 3, height, width)`, as for `tensor_to_pil`.
        placements: int64 `(batch, 2)`, height and width of each original, as `ImageTokens.placements` holds them.

    Raises:
        ImageError: as `tensor_to_pil` does.
        ValueError: if there are not as many placements as images.
    """
    converted = tensor_to_pil(images)
    if placements is None:
        return converted
    if len(placements) != len(converted):
        raise ValueError(f"Got {len(placements)} placements for {len(converted)} images.")
    restored = []
    for image, (height, width) in zip(converted, placements.tolist(), strict=True):
        top, left, box_height, box_width = placement_box((height, width), images.shape[2:])
        # Cut out first: given as the `box` of the resampling, its margins would bleed into the edges.
        cut = image.crop((left, top, left + box_width, top + box_height))
        restored.append(_fit(cut, (height, width), "stretch", Image.Resampling.BICUBIC))
    return restored


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write an image; the format follows from the extension. An interrupted write leaves the old file, or none.

    Raises:
        ImageError: if the extension is unknown, or the format cannot hold the image's mode.
        OSError: if the file cannot be written.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a PIL image, received {type(image).__name__}; tensor_to_pil converts tensors.")
    extension = Path(path).suffix.lower()
    if extension not in _WRITABLE_FORMATS:
        raise ImageError(
            f"Cannot write {os.fspath(path)!r}: the extension {extension!r} is unknown. "
            f"Accepted are {', '.join(_WRITABLE_FORMATS)}."
        )
    image_format, options = _WRITABLE_FORMATS[extension]
    buffer = io.BytesIO()
    try:
        image.save(buffer, image_format, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(f"Cannot write {os.fspath(path)!r} as {image_format}: {error}") from error
    write_atomically(path, buffer.getvalue())


def image_grid(images: Sequence[Image.Image], columns: int, padding: int = 2) -> Image.Image:
    """Lay images of one size out row by row on white, with `padding` pixels around each.

    Raises:
        ImageError: if there are no images or their sizes differ.
        ValueError: if `columns` is below 1 or `padding` below 0.
    """
    if columns < 1 or padding < 0:
        raise ValueError(f"columns must be at least 1 and padding at least 0, received {columns} and {padding}.")
    if not images:
        raise ImageError("A grid needs at least one image, received none.")
    width, height = images[0].size
    for number, image in enumerate(images):
        if image.size != (width, height):
            raise ImageError(
                f"A grid needs images of one size; image {number} is {image.width} x {image.height}, "
                f"image 0 is {width} x {height}."
            )
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    sheet = Image.new(
        "RGB", (columns * (width + padding) + padding, rows * (height + padding) + padding), (255, 255, 255)
    )
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        place = (column * (width + padding) + padding, row * (height + padding) + padding)
        sheet.paste(_pil_to_rgb(image, "the image"), place)
    return sheet


def _flatten(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """Give single images; batches as tensors or arrays are split."""
    if isinstance(images, list | tuple):
        flat = [single for source in images for single in _flatten(source)]
    elif isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        flat = list(images)
    else:
        flat = [images]  # type: ignore[list-item]  # anything that is no source is refused when it is loaded
    if not flat:
        raise ImageError("At least one image is needed, received none.")
    return flat


def _load(source: ImageSource, max_pixels: int) -> Image.Image | Tensor:
    """Give an RGB image, or of a float source its values as a float32 tensor `(3, height, width)` in [0, 1]."""
    if isinstance(source, Image.Image):
        _check_pixels(source.width, source.height, max_pixels, "the PIL image")
        return _pil_to_rgb(source, "the PIL image")
    if isinstance(source, Tensor):
        return _load_tensor(source, max_pixels)
    if isinstance(source, np.ndarray):
        return _load_array(source, max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _load_file(io.BytesIO(source), "the image bytes", max_pixels)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        what = f"the image file {str(path)!r}"
        try:
            with open(path, "rb") as file:
                return _load_file(file, what, max_pixels)
        except ImageError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ImageError(f"Cannot open {what}: {reason}.") from error
    raise TypeError(
        "An image must be a path, bytes, a PIL image, a numpy array or a torch tensor, "
        f"received {type(source).__name__}."
    )


@contextmanager
def _decoding(what: str) -> Iterator[None]:
    """Turn whatever a decoder raises into an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"Cannot read {what}: {error}") from error
    except Exception as error:
        # On damaged data Pillow's plugins raise nearly anything: OSError, SyntaxError, struct.error, IndexError ...
        reason = str(error) or type(error).__name__
        raise ImageError(f"Cannot read {what}; it may be damaged or truncated: {reason}") from error


def _load_file(file: Any, what: str, max_pixels: int) -> Image.Image:
    with _decoding(what):
        try:
            image = Image.open(file, formats=_READABLE_FORMATS)
        except (Image.UnidentifiedImageError, KeyError):  # KeyError: Pillow was built without the last format
            raise ImageError(
                f"Cannot read {what}: it is damaged or in none of the formats {', '.join(_READABLE_FORMATS)}."
            ) from None
        with image:
            _check_pixels(image.width, image.height, max_pixels, what)
            return _pil_to_rgb(image, what)


def _check_pixels(width: int, height: int, max_pixels: int, what: str) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{_capital(what)} has no pixels: it is {width} x {height}.")
    if width * height > max_pixels:
        raise ImageError(
            f"{_capital(what)} is {width} x {height} = {width * height} pixels; accepted are at most {max_pixels} "
            "(max_pixels)."
        )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _pil_to_rgb(image: Image.Image, what: str) -> Image.Image:
    """Decode, orient and convert a PIL image to a new RGB image."""
    with _decoding(what):
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            return _grey_to_rgb(image, what)
        if image.mode == "La":
            image = image.convert("LA")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            white.alpha_composite(image.convert("RGBA"))
            image = white
        return image.convert("RGB")


def _grey_to_rgb(image: Image.Image, what: str) -> Image.Image:
    """Convert 16-bit (modes I;16 and I) or float (F, in [0, 1]) grey values, which PIL itself clips at 255."""
    values = np.asarray(image)
    high = 1 if image.mode == "F" else 65535
    # The minimum or maximum is NaN if any value is, and no comparison with NaN holds.
    if not (values.min() >= 0 and values.max() <= high):
        raise ImageError(
            f"{_capital(what)} has mode {image.mode} and values from {values.min()} to {values.max()}; "
            f"accepted are 0 to {high}."
        )
    grey = np.rint(values * np.float64(255 / high)).astype(np.uint8)
    if image.mode != "F" and isinstance(image.info.get("transparency"), int):
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _load_tensor(tensor: Tensor, max_pixels: int) -> Image.Image | Tensor:
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ImageError(
            "An image tensor must be (3, height, width), or (batch, 3, height, width) where batches are accepted; "
            f"received the shape {tuple(tensor.shape)}."
        )
    _check_pixels(tensor.shape[2], tensor.shape[1], max_pixels, "the image tensor")
    if tensor.dtype == torch.uint8:
        return Image.fromarray(tensor.permute(1, 2, 0).contiguous().cpu().numpy())
    if not tensor.is_floating_point():
        raise ImageError(f"An image tensor must be uint8, or float in [0, 1]; received {tensor.dtype}.")
    tensor = tensor.detach().float()
    _check_range(float(tensor.amin()), float(tensor.amax()), "tensor")
    return tensor


def _load_array(array: np.ndarray, max_pixels: int) -> Image.Image | Tensor:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(
            "An image array must be (height, width) or (height, width, channels) with 1, 3 or 4 channels; "
            f"received the shape {array.shape}."
        )
    _check_pixels(array.shape[1], array.shape[0], max_pixels, "the image array")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)
    if array.dtype == np.uint8:
        return _pil_to_rgb(Image.fromarray(array), "the image array")
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(
            f"An image array must be uint8, uint16, bool, or float in [0, 1]; received {array.dtype.name}."
        )
    _check_range(float(array.min()), float(array.max()), "array")
    array = array.astype(np.float32)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    elif array.shape[2] == 4:
        alpha = array[..., 3:]
        array = array[..., :3] * alpha + (1 - alpha)
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def _check_range(low: float, high: float, what: str) -> None:
    # Written so that NaN, which the minimum and maximum pass on, fails as well.
    if not (low >= 0 and high <= 1):
        raise ImageError(
            f"A float image {what} must be in [0, 1]; received values from {low:g} to {high:g}"
            + (", so some are NaN." if math.isnan(low) else ".")
        )


def _quantize(image: Tensor) -> Image.Image:
    """Round a float tensor `(3, height, width)` in [0, 1] to 8 bits."""
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy())


def _fit(image: Image.Image, size: tuple[int, int], resize: str, resample: Image.Resampling) -> Image.Image:
    """Resample an image of any mode to `(height, width)`."""
    height, width = size
    if image.size == (width, height):
        return image
    box = (0.0, 0.0, float(image.width), float(image.height))
    if resize == "center_crop":
        # Only the part that is kept is resampled: scaling a long thin image whole could take any amount of memory.
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
        box = (left, top, min(left + width * scale, image.width), min(top + height * scale, image.height))
    elif resize == "adm_crop":
        while image.width >= 2 * width and image.height >= 2 * height:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = max(width / image.width, height / image.height)
        scaled = round(image.width * scale), round(image.height * scale)
        across, down = image.width / scaled[0], image.height / scaled[1]
        left, top = (scaled[0] - width) // 2 * across, (scaled[1] - height) // 2 * down
        box = (left, top, min(left + width * across, image.width), min(top + height * down, image.height))
    return image.resize((width, height), resample, box=box)
