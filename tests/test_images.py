from __future__ import annotations

import io
import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from mmsdk.errors import ImageError, UnknownNameError
from mmsdk.images import image_grid, images_to_tensor, load_images, open_image, save_image, tensor_to_pil


def encode(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(height: int = 12, width: int = 10, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def smooth(height: int = 40, width: int = 30) -> Image.Image:
    """Colours that lossy formats keep within a few units."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([y * 5, x * 7, 200 - x * 2 - y * 2], axis=-1).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG file that declares a size and has no pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"")


# --- open_image: every kind of source


def test_sources_of_one_image_agree(tmp_path):
    image = noise()
    array = np.asarray(image)
    image.save(tmp_path / "image.png")
    sources = [
        image,
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
        encode(image),
        bytearray(encode(image)),
        Image.open(io.BytesIO(encode(image))),
        array,
        array.astype(np.uint16) * 257,
        array.astype(np.float64) / 255,
        array.astype(np.float32) / 255,
        torch.tensor(array).permute(2, 0, 1),
        torch.tensor(array).permute(2, 0, 1).float() / 255,
        torch.tensor(array).permute(2, 0, 1).double() / 255,
    ]
    for source in sources:
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert opened.tobytes() == image.tobytes()
    for opened in load_images(sources):
        assert opened.tobytes() == image.tobytes()
    batch = images_to_tensor(sources)
    assert batch.shape == (len(sources), 3, 12, 10)
    torch.testing.assert_close(batch, batch[:1].expand_as(batch), atol=1e-7, rtol=0)


def test_sources_are_not_changed():
    image = noise()
    opened = open_image(image)
    opened.paste((0, 0, 0), (0, 0, 10, 12))
    assert image.tobytes() == noise().tobytes()
    tensor = torch.rand(3, 4, 4)
    before = tensor.clone()
    images_to_tensor(tensor).zero_()
    images_to_tensor([tensor, tensor], size=(2, 2)).zero_()
    assert torch.equal(tensor, before)


def test_grey_arrays():
    grey = np.array([[0, 51], [102, 255]], dtype=np.uint8)
    for array in (grey, grey[..., None], grey / 255, (grey / 255)[..., None].astype(np.float16)):
        assert pixels(open_image(array))[..., 1].tolist() == grey.tolist()
    assert pixels(open_image(grey > 60))[..., 2].tolist() == [[0, 0], [255, 255]]


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "GIF"])
def test_file_formats(image_format):
    image = smooth()
    difference = np.abs(pixels(open_image(encode(image, image_format))) - pixels(image))
    assert difference.mean() < 8


def test_one_pixel():
    for mode, colour in (("RGB", (7, 8, 9)), ("L", 7), ("RGBA", (7, 8, 9, 255)), ("1", 1)):
        opened = open_image(encode(Image.new(mode, (1, 1), colour)))
        assert opened.size == (1, 1)
    assert images_to_tensor(Image.new("RGB", (1, 1), (255, 0, 51)), size=(3, 2))[0, :, 2, 1].tolist() == [
        1.0,
        0.0,
        pytest.approx(0.2),
    ]


# --- open_image: modes


def test_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert pixels(open_image(encode(image))).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    transparent = encode(image, transparency=0)
    assert pixels(open_image(transparent)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    half = encode(image, transparency=bytes([128, 255]))
    assert pixels(open_image(half)).tolist() == [[[255, 127, 127], [0, 0, 255]]]


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (200, 100, 0, 255), [200, 100, 0]),
        ("RGBA", (200, 100, 0, 0), [255, 255, 255]),
        ("RGBA", (200, 100, 0, 51), [244, 224, 204]),
        ("LA", (100, 255), [100, 100, 100]),
        ("LA", (100, 51), [224, 224, 224]),
        ("PA", (0, 0), [255, 255, 255]),
        ("RGBa", (40, 20, 0, 51), [244, 224, 204]),
        ("La", (20, 51), [224, 224, 224]),
        ("L", 100, [100, 100, 100]),
        ("1", 1, [255, 255, 255]),
        ("1", 0, [0, 0, 0]),
        ("RGBX", (1, 2, 3, 0), [1, 2, 3]),
        ("CMYK", (0, 0, 0, 0), [255, 255, 255]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("CMYK", (0, 0, 0, 255), [0, 0, 0]),
        ("YCbCr", (255, 128, 128), [255, 255, 255]),
        ("HSV", (0, 255, 255), [255, 0, 0]),
        ("F", 0.2, [51, 51, 51]),
        ("I", 51 * 257, [51, 51, 51]),
        ("I;16", 51 * 257, [51, 51, 51]),
    ],
)
def test_modes(mode, colour, expected):
    assert pixels(open_image(Image.new(mode, (2, 3), colour))).tolist() == [[expected] * 2] * 3


def test_lab():
    lab = Image.new("LAB", (1, 1), (255, 128, 128))
    assert pixels(open_image(lab)).min() >= 250


def test_16_bit_arrays_are_rounded():
    values = np.array([[0, 128, 129, 385, 386, 65535]], dtype=np.uint16)
    assert pixels(open_image(values))[0, :, 1].tolist() == [0, 0, 1, 1, 2, 255]


def test_alpha_arrays():
    array = np.array([[[200, 100, 0, 51]]], dtype=np.uint8)
    assert pixels(open_image(array)).tolist() == [[[244, 224, 204]]]
    assert pixels(open_image(array / 255)).tolist() == [[[244, 224, 204]]]


def test_grey_and_rgb_colour_keys():
    image = Image.fromarray(np.array([[10, 20]], dtype=np.uint8))
    assert pixels(open_image(encode(image, transparency=10)))[0, :, 0].tolist() == [255, 20]
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    opened = open_image(encode(image, transparency=(1, 2, 3)))
    assert pixels(opened).tolist() == [[[255, 255, 255], [4, 5, 6]]]
    image = Image.fromarray(np.array([[2570, 5140]], dtype=np.uint16))
    assert pixels(open_image(encode(image, transparency=2570)))[0, :, 0].tolist() == [255, 20]


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(image_format):
    values = np.array([[0, 128, 129, 257], [300, 32768, 65406, 65535]], dtype=np.uint16)
    opened = pixels(open_image(encode(Image.fromarray(values), image_format)))
    assert opened[..., 0].tolist() == [[0, 0, 1, 1], [1, 128, 254, 255]]
    assert opened[..., 2].tolist() == opened[..., 0].tolist()


def test_16_bit_rgb_png():
    rows = b"".join(b"\0" + struct.pack(">6H", 0, 0x8000, 0xFFFF, 0x1234, 0x00FF, 0xFF00) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.abs(pixels(open_image(data))[0] - [[0, 128, 255], [0x12, 1, 255]]).max() <= 1


def test_cmyk_jpeg():
    opened = open_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(pixels(opened) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("I", (1, 1), -1), "mode I and values from -1 to -1; accepted are 0 to 65535"),
        (Image.new("I", (1, 1), 65536), "accepted are 0 to 65535"),
        (Image.new("F", (1, 1), 255.0), "mode F and values from 255.0 to 255.0; accepted are 0 to 1"),
        (Image.new("F", (1, 1), float("nan")), "values from nan to nan"),
    ],
)
def test_grey_values_without_a_known_scale_are_refused(image, message):
    with pytest.raises(ImageError, match=message):
        open_image(image)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation(orientation):
    image = noise()
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = TURNS[orientation](pixels(image))
    data = encode(image, exif=exif)
    once = open_image(data)
    assert np.array_equal(pixels(once), expected)
    assert np.array_equal(pixels(open_image(Image.open(io.BytesIO(data)))), expected)
    assert np.array_equal(pixels(open_image(once)), expected)


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_its_first_frame(image_format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert pixels(open_image(data)).tolist() == [[[255, 0, 0]] * 8] * 8


def test_colour_profile_is_no_obstacle():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = noise()
    assert open_image(encode(image, icc_profile=profile)).tobytes() == image.tobytes()


# --- open_image: what is refused


@pytest.mark.filterwarnings("ignore")  # Pillow warns before it raises
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "GIF"])
def test_truncated_files(image_format):
    data = encode(noise(40, 30), image_format)
    whole = open_image(data).tobytes()
    for length in sorted({0, 1, 8, *range(0, len(data), 37), *range(len(data) - 20, len(data))}):
        try:
            opened = open_image(data[:length])
        except ImageError as error:
            assert "the image bytes" in str(error)
        else:
            # What is missing is only a trailer after the last pixel.
            assert opened.tobytes() == whole
            assert length >= len(data) - 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "GIF"])
def test_damaged_files_raise_nothing_else(image_format):
    rng = random.Random(0)  # noqa: S311 - no secrets here
    data = encode(noise(40, 30), image_format)
    refused = 0
    for number in range(300):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(min(len(data), 120 if number % 2 else len(data)))] = rng.randrange(256)
        try:
            assert open_image(bytes(damaged), max_pixels=10_000).mode == "RGB"
        except ImageError:
            refused += 1
    assert refused


def test_damaged_png_pixels():
    data = bytearray(encode(noise(40, 30)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="Cannot read the image bytes; it may be damaged or truncated"):
        open_image(bytes(data))


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS"])
def test_no_image_at_all(data, tmp_path):
    with pytest.raises(ImageError, match="Cannot read the image bytes"):
        open_image(data)
    (tmp_path / "file.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"the image file '.*file\.png'"):
        open_image(tmp_path / "file.png")


@pytest.mark.parametrize("image_format", ["EPS", "TGA", "ICO"])
def test_formats_that_are_not_read(image_format):
    with pytest.raises(ImageError, match="damaged or in none of the formats PNG, JPEG"):
        open_image(encode(noise(16, 16), image_format))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ImageError, match=r"Cannot open the image file '.*none\.png': No such file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="Is a directory"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="Cannot open the image file.*null"):
        open_image("a\0b.png")


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    message = "is 8001 x 8000 = 64008000 pixels; accepted are at most 64000000"
    data = png_header(8001, 8000)
    with pytest.raises(ImageError, match="The image bytes " + message):
        open_image(data)
    (tmp_path / "big.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"big\.png' " + message):
        open_image(tmp_path / "big.png")
    # A file of the accepted size reaches the decoder, which misses the pixels.
    with pytest.raises(ImageError, match="damaged or truncated"):
        open_image(png_header(8000, 8000))


@pytest.mark.parametrize("action", ["default", "error"])
@pytest.mark.parametrize("side", [10_000, 20_000, 100_000])
def test_decompression_bombs(side, action, recwarn):
    # Pillow warns above 89 million pixels and raises above twice that.
    warnings.simplefilter(action, Image.DecompressionBombWarning)
    with pytest.raises(ImageError, match="pixels"):
        open_image(png_header(side, side))


def test_max_pixels_holds_for_every_source():
    image = noise(4, 5)
    array = np.asarray(image)
    sources = [image, encode(image), array, array / 255, torch.tensor(array).permute(2, 0, 1), torch.rand(3, 4, 5)]
    for source in sources:
        assert open_image(source, max_pixels=20).size == (5, 4)
        for function in (open_image, load_images):
            with pytest.raises(ImageError, match="is 5 x 4 = 20 pixels; accepted are at most 19"):
                function(source, max_pixels=19)
        with pytest.raises(ImageError, match="accepted are at most 19"):
            images_to_tensor(source, max_pixels=19)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"with 1, 3 or 4 channels; received the shape \(3, 8, 8\)"),
        (np.zeros(8, np.uint8), r"received the shape \(8,\)"),
        (np.zeros((0, 8, 3), np.uint8), "has no pixels: it is 8 x 0"),
        (np.zeros((8, 8, 3), np.int64), "must be uint8, uint16, bool, or float.*received int64"),
        (np.zeros((8, 8), np.complex64), "received complex64"),
        (np.zeros((8, 8), object), "received object"),
        (np.full((8, 8, 3), 255.0), r"array must be in \[0, 1\]; received values from 255 to 255"),
        (np.full((8, 8), -0.5), "received values from -0.5 to -0.5"),
        (np.full((8, 8), np.nan), "so some are NaN"),
        (np.full((8, 8), np.inf), "from inf to inf"),
        (torch.zeros(8, 8, 3), r"must be \(3, height, width\).*received the shape \(8, 8, 3\)"),
        (torch.zeros(1, 8, 8), r"received the shape \(1, 8, 8\)"),
        (torch.zeros(3, 8, 0), "has no pixels: it is 0 x 8"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "must be uint8, or float.*received torch.int64"),
        (torch.full((3, 8, 8), -1.0), r"tensor must be in \[0, 1\]; received values from -1 to -1"),
        (torch.tensor([0.5, 0.5, torch.nan]).reshape(3, 1, 1), "so some are NaN"),
        (torch.full((3, 8, 8), torch.inf), "from inf to inf"),
        (Image.new("RGB", (0, 4)), "has no pixels: it is 0 x 4"),
    ],
)
def test_refused_sources(source, message):
    with pytest.raises(ImageError, match=message):
        open_image(source)
    with pytest.raises(ImageError, match=message):
        images_to_tensor([source], size=(4, 4))


def test_other_types():
    with pytest.raises(TypeError, match="must be a path, bytes, a PIL image.*received NoneType"):
        open_image(None)
    with pytest.raises(TypeError, match="received int"):
        load_images([noise(), 3])
    with pytest.raises(TypeError, match="received list"):
        open_image([noise()])


# --- images_to_tensor


def test_batches_and_lists():
    images = [noise(seed=seed) for seed in range(3)]
    array = np.stack([np.asarray(image) for image in images])
    expected = torch.tensor(array).permute(0, 3, 1, 2).float() / 255
    for source in (images, tuple(images), array, array / 255, [array[:2], images[2]], expected, expected.double()):
        result = images_to_tensor(source)
        assert result.dtype == torch.float32 and result.is_contiguous()
        torch.testing.assert_close(result, expected, atol=1e-7, rtol=0)
    assert torch.equal(images_to_tensor(expected), expected)
    assert [image.tobytes() for image in load_images(expected)] == [image.tobytes() for image in images]


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: np.asarray(x) / 255])
def test_batch_equals_single(kind):
    images = [kind(noise(9, 14, 1)), kind(noise(20, 11, 2)), kind(noise(8, 8, 3))]
    batch = images_to_tensor(images, size=(8, 8))
    for image, row in zip(images, batch, strict=True):
        assert torch.equal(images_to_tensor(image, size=(8, 8))[0], row)


def test_mixed_sizes_need_a_size():
    with pytest.raises(ImageError, match="Image 1 is 14 x 9 pixels and image 0 is 10 x 12; give a size"):
        images_to_tensor([noise(), noise(9, 14)])
    for empty in ([], (), [[]], torch.zeros(0, 3, 4, 4)):
        with pytest.raises(ImageError, match="At least one image is needed"):
            images_to_tensor(empty)


def test_center_crop_by_hand():
    # Four columns of which the middle two remain, unscaled.
    row = np.array([[[10] * 3, [20] * 3, [30] * 3, [40] * 3]], dtype=np.uint8)
    wide = np.repeat(row, 2, axis=0)
    for source in (wide, wide / 255):
        result = (images_to_tensor(source, size=(2, 2)) * 255).round()
        assert result[0, 0].tolist() == [[20, 30], [20, 30]]
        tall = (images_to_tensor(source.transpose(1, 0, 2), size=(2, 2)) * 255).round()
        assert tall[0, 0].tolist() == [[20, 20], [30, 30]]
        stretched = images_to_tensor(source, size=(2, 2), resize="stretch", resample="bilinear") * 255
        assert 10 < stretched[0, 0, 0, 0] < 20 and 30 < stretched[0, 0, 0, 1] < 40


@pytest.mark.parametrize("resample", ["bicubic", "lanczos", "bilinear"])
@pytest.mark.parametrize("resize", ["center_crop", "adm_crop", "stretch"])
def test_float_and_8_bit_images_are_resampled_alike(resize, resample):
    # Medium contrast: Pillow clips 8-bit images between the two passes of a filter that overshoots.
    image = noise(33, 47).point(lambda value: 64 + value // 2)
    eight_bit = images_to_tensor(image, (16, 12), resize, resample)
    floats = images_to_tensor(np.asarray(image) / 255, (16, 12), resize, resample)
    assert eight_bit.shape == (1, 3, 16, 12)
    assert (eight_bit - floats).abs().max() < 1.5 / 255
    assert floats.min() >= 0 and floats.max() <= 1


def test_resize_equals_pillow_for_a_square():
    image = noise(40, 40)
    expected = torch.tensor(np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    assert torch.equal(images_to_tensor(image, (16, 16))[0], expected)


@pytest.mark.parametrize("shape", [(40, 30), (31, 77), (160, 129), (9, 13), (8, 200), (16, 16)])
def test_adm_crop_equals_the_published_steps(shape):
    image = expected = noise(*shape)
    while min(expected.size) >= 2 * 16:
        expected = expected.resize((expected.width // 2, expected.height // 2), Image.Resampling.BOX)
    scale = 16 / min(expected.size)
    whole = round(expected.width * scale), round(expected.height * scale)
    array = np.asarray(expected.resize(whole, Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - 16) // 2, (array.shape[1] - 16) // 2
    array = array[top : top + 16, left : left + 16]
    result = images_to_tensor(image, (16, 16), "adm_crop")[0].permute(1, 2, 0) * 255
    # Only the part that is kept is scaled, which may round another way.
    difference = (result - torch.tensor(array)).abs()
    assert difference.max() < 1.5 and difference.mean() < 0.05


def test_downscaling_is_antialiased():
    checkers = np.indices((64, 64)).sum(0) % 2
    result = images_to_tensor(checkers.astype(np.float32), size=(8, 8))[0, :, 2:6, 2:6]
    assert (result - 0.5).abs().max() < 0.05


def test_overshoot_is_clamped():
    edge = np.zeros((8, 8), dtype=np.float32)
    edge[:, 4:] = 1
    result = images_to_tensor(edge, size=(32, 32), resample="lanczos")
    assert result.min() == 0 and result.max() == 1


def test_extreme_aspect_ratio_stays_small():
    long = Image.new("L", (200_000, 1), 51)
    for resize in ("center_crop", "adm_crop"):
        assert images_to_tensor(long, (64, 64), resize).unique().tolist() == [pytest.approx(0.2)]


def test_bad_arguments():
    with pytest.raises(UnknownNameError, match="Unknown resize mode 'center-crop'. Did you mean 'center_crop'"):
        images_to_tensor(noise(), (4, 4), resize="center-crop")
    with pytest.raises(UnknownNameError, match="Unknown resampling filter 'nearest'"):
        images_to_tensor(noise(), (4, 4), resample="nearest")
    for size in (64, (64,), (64, 0), (64, 1.5), (1, 2, 3)):
        with pytest.raises(ValueError, match="size must be two positive integers"):
            images_to_tensor(noise(), size)


# --- tensor_to_pil


def test_tensor_to_pil_rounds_and_clamps():
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 127.6 / 255, 254.6 / 255, 1.0, -3.0, 1.2])
    (image,) = tensor_to_pil(values.reshape(1, 1, 1, 8).expand(1, 3, 1, 8))
    assert pixels(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255, 0, 255]


def test_tensor_to_pil_inverts_images_to_tensor():
    images = [noise(seed=seed) for seed in range(3)]
    back = tensor_to_pil(images_to_tensor(images))
    assert [image.tobytes() for image in back] == [image.tobytes() for image in images]
    ramp = torch.arange(256).reshape(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    assert pixels(tensor_to_pil(ramp.requires_grad_())[0])[..., 0].flatten().tolist() == list(range(256))
    assert tensor_to_pil(torch.rand(2, 3, 4, 4).bfloat16())[1].size == (4, 4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 4, 4), r"received torch.float32 of shape \(3, 4, 4\)"),
        (torch.rand(1, 1, 4, 4), r"of shape \(1, 1, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "received torch.uint8"),
        (torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), torch.nan)]), "Image 1 of the batch has NaN"),
        (torch.full((1, 3, 4, 4), torch.inf), "Image 0 of the batch has NaN or infinite"),
    ],
)
def test_tensor_to_pil_refuses(images, message):
    with pytest.raises(ImageError, match=message):
        tensor_to_pil(images)


def test_tensor_to_pil_needs_a_tensor():
    with pytest.raises(TypeError, match="received ndarray"):
        tensor_to_pil(np.zeros((1, 3, 4, 4)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors_stay_there():
    images = torch.rand(2, 3, 8, 8)
    for size in (None, (8, 8), (4, 4)):
        result = images_to_tensor([images.cuda(), noise(8, 8)], size)
        assert result.device.type == "cuda"
        assert torch.equal(result.cpu(), images_to_tensor([images, noise(8, 8)], size))
    assert tensor_to_pil(images.cuda())[1].tobytes() == tensor_to_pil(images)[1].tobytes()


# --- save_image, image_grid


@pytest.mark.parametrize("extension", [".png", ".PNG", ".bmp", ".tif", ".tiff"])
def test_save_lossless(extension, tmp_path):
    path = tmp_path / f"image{extension}"
    save_image(noise(), path)
    assert open_image(path).tobytes() == noise().tobytes()
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("extension", [".jpg", ".jpeg", ".webp"])
def test_save_lossy(extension, tmp_path):
    path = tmp_path / f"image{extension}"
    save_image(smooth(), str(path))
    assert np.abs(pixels(open_image(path)) - pixels(smooth())).mean() < 4


def test_save_refuses(tmp_path):
    with pytest.raises(ImageError, match=r"the extension '.xyz' is unknown. Accepted are .png, .jpg"):
        save_image(noise(), tmp_path / "image.xyz")
    with pytest.raises(ImageError, match="the extension '' is unknown"):
        save_image(noise(), tmp_path / "image")
    with pytest.raises(ImageError, match="as JPEG: cannot write mode RGBA"):
        save_image(noise().convert("RGBA"), tmp_path / "image.jpg")
    with pytest.raises(TypeError, match="received Tensor; tensor_to_pil"):
        save_image(torch.zeros(3, 4, 4), tmp_path / "image.png")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_image(noise(), tmp_path / "none" / "image.png")
    assert os.listdir(tmp_path) == []


def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_image(noise(), tmp_path / "image.png")
    assert os.listdir(tmp_path) == []


def test_grid_by_hand():
    images = [Image.new("RGB", (2, 1), colour) for colour in ("red", "lime", "blue")]
    grid = pixels(image_grid(images, columns=2, padding=1))
    w, r, g, b = [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]
    assert grid.tolist() == [[w] * 7, [w, r, r, w, g, g, w], [w] * 7, [w, b, b, w, w, w, w], [w] * 7]
    assert image_grid(images, columns=9, padding=0).size == (6, 1)
    assert image_grid(images, columns=1).size == (6, 11)
    grey = [Image.new("L", (1, 1), 7), Image.new("RGBA", (1, 1), (0, 0, 0, 0))]
    assert pixels(image_grid(grey, columns=2, padding=0)).tolist() == [[[7] * 3, w]]


def test_grid_refuses():
    with pytest.raises(ImageError, match="image 1 is 3 x 3, image 0 is 2 x 2"):
        image_grid([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))], columns=2)
    with pytest.raises(ImageError, match="at least one image"):
        image_grid([], columns=2)
    with pytest.raises(ValueError, match="received 0 and 2"):
        image_grid([noise()], columns=0)
    with pytest.raises(ValueError, match="received 1 and -1"):
        image_grid([noise()], columns=1, padding=-1)
