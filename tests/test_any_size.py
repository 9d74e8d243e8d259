"""Images of any aspect ratio: letterboxing, what tokens note of it, and its undoing."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmsdk.errors import ImageError, TokenStreamError, UnknownNameError
from mmsdk.images import letterbox, open_image, undo_letterbox
from mmsdk.tokens import ImageTokens, TokenSpec, placement_box
from tests.test_tokenizers import ORDERED, TINY, every_kind, pictures, values
from tests.tiny import tiny_flextok, tiny_one_d_piece

SIZES = [(40, 12), (9, 33), (16, 16), (20, 20), (1, 70)]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mixed() -> list[np.ndarray]:
    return [noise(*size) for size in SIZES]


def placed(placements: object, batch: int = 2, image_size: tuple[int, int] = (16, 16)) -> ImageTokens:
    spec = TokenSpec("one_d_piece", "0123456789abcdef", (32,), True, None, image_size, 8)
    ids = torch.arange(3).expand(batch, 3)
    return ImageTokens(ids, placements=torch.tensor(placements), spec=spec)


# --- the box


@pytest.mark.parametrize(
    ("original", "image_size", "box"),
    [
        ((16, 16), (16, 16), (0, 0, 16, 16)),
        ((5, 5), (16, 16), (0, 0, 16, 16)),
        ((32, 16), (16, 16), (0, 4, 16, 8)),
        ((16, 32), (16, 16), (4, 0, 8, 16)),
        ((100, 30), (16, 16), (0, 5, 16, 5)),  # 4.8 wide, and of 11 columns 5 are on the left
        ((30, 100), (16, 16), (5, 0, 5, 16)),
        ((32, 5), (16, 16), (0, 6, 16, 3)),  # 2.5 wide: half a pixel is rounded up
        ((5, 32), (16, 16), (6, 0, 3, 16)),
        ((1, 1000), (16, 16), (7, 0, 1, 16)),
        ((65536, 1), (16, 16), (0, 7, 16, 1)),
        ((10, 10), (8, 20), (0, 6, 8, 8)),
        ((10, 25), (8, 20), (0, 0, 8, 20)),
    ],
)
def test_box_by_hand(original: tuple[int, int], image_size: tuple[int, int], box: tuple[int, ...]) -> None:
    assert placement_box(original, image_size) == box
    assert placement_box(torch.tensor(original), torch.Size(image_size)) == box


def test_boxes_lie_within_the_image() -> None:
    for height in range(1, 40):
        for width in range(1, 40):
            top, left, box_height, box_width = placement_box((height, width), (7, 9))
            assert box_height == 7 or box_width == 9
            assert box_height >= 1 and box_width >= 1
            assert top >= 0 and 0 <= 7 - top - box_height - top <= 1
            assert left >= 0 and 0 <= 9 - left - box_width - left <= 1


# --- letterboxing images


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_letterbox_by_hand(dtype: type) -> None:
    wide, tall = np.zeros((2, 4, 3), dtype), np.zeros((8, 2, 3), dtype)
    images, placements = letterbox([wide, tall], (4, 4))
    assert images.dtype == torch.float32
    assert images[0, 0].tolist() == [[1] * 4, [0] * 4, [0] * 4, [1] * 4]
    assert images[1, 2].tolist() == [[1, 0, 1, 1]] * 4
    assert placements.tolist() == [[2, 4], [8, 2]]


@pytest.mark.parametrize("size", [(5, 16), (16, 7), (16, 16), (16, 1)])
def test_what_needs_no_scaling_returns_exactly(size: tuple[int, int]) -> None:
    images, placements = letterbox(noise(*size), (16, 16))
    (restored,) = undo_letterbox(images, placements)
    assert np.array_equal(np.asarray(restored), noise(*size))


@pytest.mark.parametrize("size", [(100, 37), (37, 100), (3, 2), (1, 1), (1, 900)])
def test_margins_do_not_bleed_in(size: tuple[int, int]) -> None:
    images, placements = letterbox(np.zeros((*size, 3), np.uint8), (16, 16))
    (restored,) = undo_letterbox(images, placements)
    assert restored.size == size[::-1]
    assert not np.asarray(restored).any()


def test_a_smooth_image_survives() -> None:
    ramp = np.linspace(0, 255, 48)[None, :, None] * np.ones((24, 1, 3))
    (restored,) = undo_letterbox(*letterbox(ramp.astype(np.uint8), (32, 32)))
    assert np.abs(np.asarray(restored).astype(float) - ramp).max() < 4


def test_without_placements_images_stay() -> None:
    images = pictures(2)
    assert [i.size for i in undo_letterbox(images, None)] == [(16, 16)] * 2
    with pytest.raises(ValueError, match="Got 1 placements for 2 images"):
        undo_letterbox(images, torch.tensor([[16, 8]]))


def test_the_orientation_of_exif_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    buffer = io.BytesIO()
    Image.fromarray(noise(9, 33)).save(buffer, "PNG", exif=exif)
    images, placements = letterbox(buffer.getvalue(), (16, 16))
    assert placements.tolist() == [[33, 9]]
    assert torch.equal(images, letterbox(open_image(buffer.getvalue()), (16, 16))[0])


def test_sides_that_no_stream_holds_are_refused() -> None:
    with pytest.raises(ImageError, match="Image 1 is 65537 x 1 pixels; letterboxed images have sides of at most 65536"):
        letterbox([noise(2, 2), np.zeros((1, 65537, 3), np.uint8)], (16, 16))


# --- tokenizers


@every_kind
def test_an_image_of_the_right_size_gives_the_same_tokens(kind: str) -> None:
    tokenizer = TINY[kind]()
    tokens = tokenizer.encode(pictures(), fit="letterbox")
    assert tokens.placements is None
    assert tokens.to_bytes() == tokenizer.encode(pictures()).to_bytes()


@every_kind
def test_images_return_with_their_own_sizes(kind: str) -> None:
    tokenizer = TINY[kind]()
    tokens = tokenizer.encode(mixed(), fit="letterbox")
    assert tokens.placements.tolist() == [list(size) for size in SIZES]
    output = tokenizer.decode(ImageTokens.from_bytes(tokens.to_bytes()))
    assert output.images.shape == (5, 3, 16, 16)
    restored = output.to_pil()
    assert [image.size for image in restored] == [(width, height) for height, width in SIZES]
    # What was encoded is the letterboxed image, and one of a batch is as it is alone.
    prepared = tokenizer.preprocess(mixed(), "letterbox")
    assert torch.equal(prepared, letterbox(mixed(), (16, 16), tokenizer.resample)[0])
    assert torch.equal(values(tokens), values(tokenizer.encode(prepared)))
    alone = tokenizer.encode(mixed()[1], fit="letterbox")
    assert torch.allclose(values(alone).float(), values(tokens[1]).float(), atol=1e-4)
    (single,) = tokenizer.decode(alone).to_pil()
    assert np.abs(np.asarray(single).astype(int) - np.asarray(restored[1])).max() <= 1


def test_crop_is_the_default() -> None:
    tokenizer = tiny_one_d_piece()
    tokens = tokenizer.encode(mixed())
    assert tokens.placements is None
    assert tokens.equal(tokenizer.encode(mixed(), fit="crop"))
    assert not torch.equal(tokens.token_ids, tokenizer.encode(mixed(), fit="letterbox").token_ids)
    assert [image.size for image in tokenizer.decode(tokens).to_pil()] == [(16, 16)] * 5


def test_flextok_scales_bilinearly() -> None:
    prepared = tiny_flextok().preprocess(noise(32, 16), "letterbox")
    expected = Image.fromarray(noise(32, 16)).resize((8, 16), Image.Resampling.BILINEAR)
    assert torch.equal(prepared[0, :, :, 4:12], torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255)


def test_reconstruct() -> None:
    tokenizer = tiny_one_d_piece()
    output = tokenizer.reconstruct(mixed(), 3, fit="letterbox")
    expected = tokenizer.decode(tokenizer.encode(mixed(), 3, fit="letterbox"))
    assert torch.equal(output.images, expected.images)
    assert torch.equal(output.placements, expected.placements)


@pytest.mark.parametrize("kind", ORDERED)
def test_prefixes_keep_their_placements(kind: str) -> None:
    tokenizer = TINY[kind]()
    tokens = tokenizer.encode(mixed(), [1, 8, 3, 4, 5], fit="letterbox")
    assert tokens.lengths.tolist() == [1, 8, 3, 4, 5]
    for count, images in tokenizer.decode_progressive(tokens):
        restored = undo_letterbox(images, tokens.placements)
        assert [image.size for image in restored] == [(width, height) for height, width in SIZES]
        prefix = tokens.truncate(tokens.lengths.clamp(max=count))
        assert torch.equal(images, tokenizer.decode(prefix).images)


def test_an_unknown_fit_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Unknown fit 'letter-box'. Did you mean 'letterbox'"):
        tiny_one_d_piece().encode(noise(4, 4), fit="letter-box")


# --- tokens


def test_placements_follow_their_images() -> None:
    tokens = placed([[40, 12], [16, 16], [9, 33]], batch=3)
    assert tokens[1].placements is None
    assert tokens[2].placements.tolist() == [[9, 33]]
    assert tokens[[2, 0]].placements.tolist() == [[9, 33], [40, 12]]
    for changed in (tokens.truncate(2), tokens.truncate([1, 2, 3]), tokens.pad(5)):
        assert torch.equal(changed.placements, tokens.placements)
    joined = ImageTokens.cat([tokens[1], tokens[0], tokens[2]])
    assert joined.placements.tolist() == [[16, 16], [40, 12], [9, 33]]
    assert joined[[1, 0, 2]].equal(tokens)


def test_placements_are_compared_and_copied() -> None:
    given = torch.tensor([[40, 12], [9, 33]])
    tokens = ImageTokens(torch.zeros(2, 3, dtype=torch.int64), placements=given, spec=placed(given.tolist()).spec)
    given.fill_(1)
    assert tokens.placements.tolist() == [[40, 12], [9, 33]]
    assert not placed([[40, 12], [9, 33]]).equal(placed([[40, 12], [9, 34]]))
    assert not placed([[40, 12], [9, 33]]).equal(placed([[16, 16], [16, 16]]))


@pytest.mark.parametrize(
    ("placements", "error", "message"),
    [
        ([[4, 4], [4, 4]], TypeError, "placements must be a torch.Tensor, received list"),
        (torch.ones(2, 2), ValueError, r"int64 of shape \(2, 2\), received torch.float32"),
        (torch.ones(1, 2).long(), ValueError, r"received torch.int64 of shape \(1, 2\)"),
        (torch.tensor([[4, 4], [0, 4]]), ValueError, r"placements\[1\] is \[0, 4\].* must be 1 to 65536"),
        (torch.tensor([[4, 65537], [4, 4]]), ValueError, r"placements\[0\] is \[4, 65537\]"),
        (torch.tensor([[2**62, 4], [4, 4]]), ValueError, r"placements\[0\]"),
        (torch.tensor([[4, 4], [8000, 8001]]), ValueError, "at most 64000000 pixels"),
    ],
)
def test_placements_are_checked(placements: object, error: type[Exception], message: str) -> None:
    spec = placed([[4, 4], [4, 4]]).spec
    with pytest.raises(error, match=message):
        ImageTokens(torch.zeros(2, 3, dtype=torch.int64), placements=placements, spec=spec)


def with_crc(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


HEAD = bytes.fromhex("8954 01 8800 03 0123456789abcdef 10 10 08 20")


def test_stream_by_hand() -> None:
    # Ids 0, 1, 2 in 5 bits each, twice.
    payload = int("000000000100010" * 2 + "00", 2).to_bytes(4, "big")
    body = HEAD + bytes.fromhex("02 03 ac02 0c 10 10") + payload
    tokens = placed([[300, 12], [16, 16]])
    assert tokens.to_bytes() == with_crc(body)
    assert ImageTokens.from_bytes(with_crc(body)).equal(tokens)
    plain = HEAD.replace(b"\x88", b"\x08", 1) + bytes.fromhex("02 03") + payload
    assert placed([[16, 16], [16, 16]]).to_bytes() == with_crc(plain)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ("02 03 00 0c 10 10", "original height is 0"),
        ("02 03 0c 00 10 10", "original width is 0"),
        ("02 03 8c00 0c 10 10", "original height is 12 in 2 bytes"),
        ("02 03 818004 0c 10 10", "original height is 65537 in 3 bytes; at most 65536"),
        ("02 03 ffffffff7f 0c 10 10", "original height is .* at most 65536"),
        ("02 03 808004 808004 10 10", r"contradicts itself: placements\[0\] is \[65536, 65536\].*64000000 pixels"),
        ("02 03 10 10 10 10", "lists placements although every image has the decoded size"),
        ("02 03 0c 0c 10 10 10", "declares 6 tokens, which take 4 bytes, but has 5"),
        ("8080808001 03 0c 0c 10 10", "declares 268435456 placements in its last"),
    ],
)
def test_streams_that_lie_are_refused(numbers: str, message: str) -> None:
    with pytest.raises(TokenStreamError, match=message):
        ImageTokens.from_bytes(with_crc(HEAD + bytes.fromhex(numbers) + bytes(4)))
