from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import random
import struct
import zlib

import numpy as np
import pytest
import torch

from mmsdk.errors import TokenStreamError
from mmsdk.tokens import TOKENIZER_IDS, ImageTokens, TokenSpec

FINGERPRINT = "0123456789abcdef"
ORDERED = TokenSpec("one_d_piece", FINGERPRINT, (4096,), True, None, (256, 256), 256)
GRID = TokenSpec("vq", FINGERPRINT, (1000,), False, (4, 6), (32, 48), 24)
FIXED = TokenSpec("titok", FINGERPRINT, (8192,), False, None, (256, 256), 8)
CHANNELS = TokenSpec("tokenbridge", FINGERPRINT, (64,) * 5, False, (2, 3), (32, 48), 6)
MIXED = TokenSpec("somebody/else-v2", FINGERPRINT, (2, 5, 4096, 2**32), True, None, (17, 300), 9)
LATENT = TokenSpec("vae", FINGERPRINT, None, False, (2, 2), (16, 16), 4)
ORDERED_LATENT = TokenSpec("my_vae", FINGERPRINT, None, True, None, (16, 16), 400)


def make(
    spec: TokenSpec, batch: int = 3, num_tokens: int | None = None, seed: int = 0, lengths=None, placements=None
) -> ImageTokens:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_tokens or min(spec.max_tokens, 24)
    given = {"lengths": lengths, "placements": placements}
    fields = {"spec": spec} | {name: torch.tensor(value) for name, value in given.items() if value is not None}
    if spec.codebook_size is None:
        return ImageTokens(latents=torch.randn(batch, num_tokens, 3, generator=generator), **fields)
    ids = torch.stack(
        [torch.randint(size, (batch, num_tokens), generator=generator) for size in spec.codebook_size], dim=-1
    )
    return ImageTokens(ids[..., 0] if len(spec.codebook_size) == 1 else ids, **fields)


CASES = {
    "ordered": make(ORDERED),
    "ragged": make(ORDERED, lengths=[3, 24, 1]),
    "padded": make(ORDERED, lengths=[3, 2, 1]),
    "single": make(ORDERED, batch=1, num_tokens=1),
    "grid": make(GRID),
    "fixed": make(FIXED),
    "channels": make(CHANNELS),
    "one channel": ImageTokens(torch.arange(48).reshape(2, 24, 1), spec=GRID),
    "mixed": make(MIXED, lengths=[9, 1, 4]),
    "latent": make(LATENT),
    "placed": make(ORDERED, lengths=[3, 24, 1], placements=[[300, 1], [256, 256], [1, 65536]]),
    "placed latent": make(LATENT, placements=[[16, 16], [8, 200], [16, 15]]),
    "ragged latent": make(ORDERED_LATENT, num_tokens=200, lengths=[200, 7, 150]),
}
each_case = pytest.mark.parametrize("tokens", CASES.values(), ids=CASES.keys())


def with_crc(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


# --- TokenSpec


@pytest.mark.parametrize("spec", [ORDERED, GRID, FIXED, CHANNELS, MIXED, LATENT])
def test_spec_round_trips_through_json(spec):
    again = TokenSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": ""}, "tokenizer must be 1 to 64 printable ASCII"),
        ({"tokenizer": "a b"}, "received 'a b'"),
        ({"tokenizer": "é"}, "tokenizer must be"),
        ({"tokenizer": "x\n"}, "tokenizer must be"),
        ({"tokenizer": None}, "tokenizer must be"),
        ({"tokenizer": "x" * 65}, "tokenizer must be"),
        ({"fingerprint": "0123456789ABCDEF"}, "fingerprint must be 16 lower-case hexadecimal"),
        ({"fingerprint": FINGERPRINT + "\n"}, "fingerprint must be 16"),
        ({"fingerprint": "01"}, "received '01'"),
        ({"codebook_size": ()}, "codebook_size must have 1 to 4096 entries.*received 0"),
        ({"codebook_size": (2,) * 4097}, "received 4097"),
        ({"codebook_size": (1,)}, "codebook_size must be 2 to 4294967296, received 1"),
        ({"codebook_size": (2**32 + 1,)}, "codebook_size must be 2 to"),
        ({"codebook_size": 4096}, "codebook_size must hold integers, received 4096"),
        ({"codebook_size": (4096.0,)}, "codebook_size must hold integers"),
        ({"ordered": 1}, "ordered must be True or False"),
        ({"grid": (16, 16)}, "grid must be None for ordered tokens"),
        ({"grid": (4, 4), "ordered": False}, "16 places, but max_tokens is 256"),
        ({"grid": (256,), "ordered": False}, "grid must have 2 entries"),
        ({"image_size": (0, 256)}, "image_size must be 1 to 65536, received 0"),
        ({"image_size": (1, 2, 3)}, "image_size must have 2 entries"),
        ({"max_tokens": 0}, "max_tokens must be 1 to 1048576, received 0"),
        ({"max_tokens": 2**20 + 1}, "max_tokens must be 1 to"),
        ({"max_tokens": "8"}, "max_tokens must hold integers"),
    ],
)
def test_spec_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ORDERED, **changes)


def test_spec_from_dict_names_missing_and_unknown_fields():
    values = ORDERED.to_dict()
    del values["grid"]
    values["colour"] = 1
    with pytest.raises(ValueError, match=r"missing: \['grid'\], unknown: \['colour'\]"):
        TokenSpec.from_dict(values)


# --- construction


def test_defaults_and_properties():
    tokens = ImageTokens(torch.tensor([[1, 2, 3], [4, 5, 6]]), spec=ORDERED)
    assert (tokens.batch_size, tokens.num_tokens, len(tokens)) == (2, 3, 2)
    assert tokens.lengths.tolist() == [3, 3]
    assert tokens.mask.all()
    assert tokens.device == torch.device("cpu")
    assert repr(tokens) == "ImageTokens(token_ids=(2, 3), lengths=[3, 3], tokenizer='one_d_piece', device='cpu')"


def test_padding_is_zeroed_and_inputs_are_left_alone():
    ids, lengths = torch.tensor([[1, 2, -7], [4, 99999, 6]]), torch.tensor([2, 1])
    tokens = ImageTokens(ids, lengths=lengths, spec=ORDERED)
    assert tokens.token_ids.tolist() == [[1, 2, 0], [4, 0, 0]]
    assert tokens.mask.tolist() == [[True, True, False], [True, False, False]]
    assert ids.tolist() == [[1, 2, -7], [4, 99999, 6]]
    ids.fill_(5)
    lengths.fill_(3)
    assert tokens.token_ids.tolist() == [[1, 2, 0], [4, 0, 0]]
    assert tokens.lengths.tolist() == [2, 1]


def test_nan_in_padding_is_no_error():
    latents = torch.full((1, 3, 2), torch.nan)
    latents[:, :2] = 1.5
    tokens = ImageTokens(latents=latents, lengths=torch.tensor([2]), spec=ORDERED_LATENT)
    assert tokens.latents.tolist() == [[[1.5, 1.5], [1.5, 1.5], [0.0, 0.0]]]


def test_num_bits():
    assert make(ORDERED, lengths=[3, 24, 1]).num_bits.tolist() == [36, 288, 12]
    assert make(GRID).num_bits.tolist() == [240, 240, 240]
    assert make(CHANNELS).num_bits.tolist() == [180, 180, 180]
    assert make(MIXED, lengths=[9, 1, 4]).num_bits.tolist() == [9 * 48, 48, 4 * 48]
    assert make(LATENT).num_bits.tolist() == [4 * 3 * 32] * 3


IDS = torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of token_ids and latents; received neither"),
        ({"token_ids": IDS, "latents": torch.zeros(2, 6, 3)}, ValueError, "received both"),
        ({"token_ids": [[1]]}, TypeError, "token_ids must be a torch.Tensor, received list"),
        ({"token_ids": IDS, "spec": None}, TypeError, "spec must be a TokenSpec, received NoneType"),
        ({"token_ids": IDS.int()}, ValueError, "token_ids must be torch.int64, received torch.int32"),
        ({"token_ids": IDS[0]}, ValueError, r"received \(6,\)"),
        ({"token_ids": IDS[:0]}, ValueError, r"at least one image.*\(0, 6\)"),
        ({"token_ids": IDS[:, :0]}, ValueError, "at least one image, one token"),
        ({"token_ids": IDS[..., None].expand(2, 6, 2)}, ValueError, "have 2 channels, but the spec has 1 codebook"),
        ({"token_ids": IDS, "spec": CHANNELS}, ValueError, "have 1 channels, but the spec has 5 codebook"),
        ({"token_ids": torch.zeros(2, 257, dtype=torch.int64)}, ValueError, "have 257 tokens.* 1 to 256"),
        ({"token_ids": IDS, "spec": FIXED}, ValueError, "have 6 tokens.*exactly 8"),
        ({"latents": torch.zeros(2, 6, 3)}, ValueError, "has a codebook: give token_ids"),
        ({"token_ids": IDS, "spec": ORDERED_LATENT}, ValueError, "has no codebook: give latents"),
        ({"latents": torch.zeros(2, 6), "spec": ORDERED_LATENT}, ValueError, r"latents must be \(batch, num_tokens, d"),
        ({"latents": torch.zeros(2, 6, 0), "spec": ORDERED_LATENT}, ValueError, "at least one image, one token"),
        ({"latents": torch.zeros(2, 6, 3).half(), "spec": ORDERED_LATENT}, ValueError, "received torch.float16"),
        ({"token_ids": IDS, "lengths": [6, 6]}, TypeError, "lengths must be a torch.Tensor, received list"),
        ({"token_ids": IDS, "lengths": torch.tensor([6])}, ValueError, r"int64 of shape \(2,\), received.* \(1,\)"),
        ({"token_ids": IDS, "lengths": torch.tensor([6.0, 6.0])}, ValueError, "received torch.float32"),
        ({"token_ids": IDS, "lengths": torch.tensor([6, 0])}, ValueError, r"lengths\[1\] is 0; it must be 1 to 6"),
        ({"token_ids": IDS, "lengths": torch.tensor([7, 1])}, ValueError, r"lengths\[0\] is 7; it must be 1 to 6"),
        (
            {"token_ids": torch.zeros(1, 8, dtype=torch.int64), "lengths": torch.tensor([7]), "spec": FIXED},
            ValueError,
            r"lengths\[0\] is 7; it must be 8, as its tokens are not ordered",
        ),
    ],
)
def test_construction_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        ImageTokens(**{"spec": ORDERED, **arguments})


def test_id_out_of_range_names_the_position():
    ids = torch.zeros(2, 24, dtype=torch.int64)
    ids[1, 3] = 1000
    with pytest.raises(ValueError, match=r"id 1000 at \[batch, token\] = \[1, 3\].*accepted are 0 to 999"):
        ImageTokens(ids, spec=GRID)
    ids[1, 3] = 999
    ids[0, 23] = -1
    with pytest.raises(ValueError, match=r"id -1 at \[batch, token\] = \[0, 23\]"):
        ImageTokens(ids, spec=GRID)
    ids = torch.zeros(1, 2, 4, dtype=torch.int64)
    ids[0, 1, 1] = 5
    with pytest.raises(ValueError, match=r"id 5 at \[batch, token, channel\] = \[0, 1, 1\].*accepted are 0 to 4"):
        ImageTokens(ids, spec=MIXED)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_latents_must_be_finite(value):
    latents = torch.zeros(2, 4, 3)
    latents[1, 2, 0] = value
    with pytest.raises(ValueError, match=rf"latents must be finite; received {value} at \[1, 2, 0\]"):
        ImageTokens(latents=latents, spec=LATENT)


def test_frozen_copied_and_pickled():
    tokens = CASES["ragged"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        tokens.token_ids = None
    assert copy.deepcopy(tokens).equal(tokens)
    assert pickle.loads(pickle.dumps(tokens)).equal(tokens)  # noqa: S301 - our own bytes


# --- methods


def test_truncate_by_hand():
    tokens = ImageTokens(torch.arange(1, 9).reshape(2, 4), lengths=torch.tensor([4, 3]), spec=ORDERED)
    both = tokens.truncate(2)
    assert both.token_ids.tolist() == [[1, 2], [5, 6]]
    assert both.lengths.tolist() == [2, 2]
    for n in ([1, 3], torch.tensor([1, 3]), np.array([1, 3])):
        each = tokens.truncate(n)
        assert each.token_ids.tolist() == [[1, 0, 0], [5, 6, 7]]
        assert each.lengths.tolist() == [1, 3]
    assert tokens.truncate(torch.tensor(2)).equal(both)
    assert tokens.pad(9).truncate(tokens.lengths).equal(tokens)
    assert tokens.lengths.tolist() == [4, 3]


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (0, "Cannot keep 0 tokens of image 0: it has 4, so n must be 1 to 4"),
        (4, "Cannot keep 4 tokens of image 1: it has 3"),
        ([4, 4], "Cannot keep 4 tokens of image 1"),
        ([4], r"one int for each of the 2 images, received the shape \(1,\)"),
        (torch.tensor([1.0, 1.0]), "n must be a list or vector of integers, received torch.float32"),
        ([[1, 1]], "n must be a list or vector"),
    ],
)
def test_truncate_refuses(n, message):
    tokens = ImageTokens(torch.zeros(2, 4, dtype=torch.int64), lengths=torch.tensor([4, 3]), spec=ORDERED)
    with pytest.raises(ValueError, match=message):
        tokens.truncate(n)


def test_truncate_needs_ordered_tokens():
    with pytest.raises(ValueError, match="Tokens of 'vq' cannot be truncated: they are not ordered.* all 24"):
        make(GRID).truncate(24)


def test_pad():
    tokens = make(ORDERED, batch=2, num_tokens=3)
    wide = tokens.pad(5)
    assert wide.token_ids.shape == (2, 5)
    assert torch.equal(wide.token_ids[:, :3], tokens.token_ids)
    assert not wide.token_ids[:, 3:].any()
    assert torch.equal(wide.lengths, tokens.lengths)
    with pytest.raises(ValueError, match="Cannot pad 3 tokens to 2"):
        tokens.pad(2)
    with pytest.raises(ValueError, match="have 257 tokens"):
        tokens.pad(257)


def test_cat():
    a, b = make(ORDERED, batch=2, num_tokens=3), make(ORDERED, batch=1, num_tokens=5, seed=1)
    joined = ImageTokens.cat([a, b])
    assert joined.lengths.tolist() == [3, 3, 5]
    assert joined[:2].truncate(3).equal(a)
    assert joined[2].equal(b)
    latents = ImageTokens.cat([make(LATENT), make(LATENT, seed=1)])
    assert latents[3:].equal(make(LATENT, seed=1))


def test_cat_refuses():
    other = dataclasses.replace(ORDERED, fingerprint="f" * 16)
    with pytest.raises(ValueError, match="batches of one spec; batch 1 has .*f{16}"):
        ImageTokens.cat([make(ORDERED), make(other)])
    with pytest.raises(ValueError, match=r"same channels; batch 1 has the shape \(2, 24, 1\)"):
        ImageTokens.cat([CASES["grid"], CASES["one channel"]])
    with pytest.raises(ValueError, match="received none"):
        ImageTokens.cat([])


@each_case
def test_indexing(tokens):
    values = tokens.token_ids if tokens.latents is None else tokens.latents

    def check(selected, rows):
        got = selected.token_ids if selected.latents is None else selected.latents
        assert torch.equal(got, values[rows])
        assert torch.equal(selected.lengths, tokens.lengths[rows])
        assert torch.equal(selected._sizes, tokens._sizes[rows])
        assert selected.spec == tokens.spec

    last = len(tokens) - 1
    check(tokens[0], [0])
    check(tokens[-1], [last])
    check(tokens[np.int64(last)], [last])
    check(tokens[torch.tensor(last)], [last])
    check(tokens[:1], [0])
    check(tokens[[last, 0, last]], [last, 0, last])
    check(tokens[torch.tensor([-1, 0])], [last, 0])
    check(tokens[np.array([0])], [0])
    mask = torch.arange(len(tokens)) == last
    check(tokens[mask], [last])
    check(tokens[mask.tolist()], [last])
    singles = list(tokens)
    assert [single.batch_size for single in singles] == [1] * len(tokens)
    assert ImageTokens.cat(singles).equal(tokens)


def test_indexing_refuses():
    tokens = make(ORDERED)
    for index in (3, -4, [0, 3], torch.tensor([-4])):
        with pytest.raises(IndexError, match="Image (3|-4) is out of range for a batch of 3"):
            tokens[index]
    for index in (slice(3, None), [], torch.zeros(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="selects none of the 3 images"):
            tokens[index]
    with pytest.raises(ValueError, match=r"mask must have the shape \(3,\), received \(2,\)"):
        tokens[[True, False]]
    with pytest.raises(ValueError, match="index must be a list or vector of integers"):
        tokens[torch.tensor([0.0])]
    with pytest.raises(TypeError):
        tokens[0, 1]


def test_equal():
    tokens = make(ORDERED, lengths=[3, 24, 1])
    assert tokens.equal(make(ORDERED, lengths=[3, 24, 1]))
    assert not tokens.equal(make(ORDERED, lengths=[3, 24, 2]))
    assert not tokens.equal(make(ORDERED, lengths=[3, 24, 1], seed=1))
    assert not tokens.equal(make(dataclasses.replace(ORDERED, fingerprint="f" * 16), lengths=[3, 24, 1]))
    assert not tokens.equal(tokens[:2])
    assert not CASES["grid"].equal(CASES["one channel"])
    assert not CASES["grid"].equal(CASES["latent"])


def test_to_the_same_device_copies_nothing():
    tokens = CASES["ragged"]
    assert tokens.to("cpu") is tokens


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_case
def test_gpu_gives_the_same(tokens):
    moved = tokens.to("cuda")
    assert moved.device.type == "cuda" and moved.lengths.device.type == "cuda" and moved.mask.device.type == "cuda"
    assert moved.placements is None or moved.placements.device.type == "cuda"
    assert moved.to_bytes() == tokens.to_bytes()
    assert moved.equal(tokens)
    assert ImageTokens.from_bytes(tokens.to_bytes(), device="cuda").equal(tokens)
    assert moved[0].equal(tokens[0])
    if tokens.spec.ordered:
        assert moved.truncate([1] * len(tokens)).equal(tokens.truncate(1))


# --- bytes


@each_case
def test_bytes_round_trip(tokens):
    data = tokens.to_bytes()
    again = ImageTokens.from_bytes(data)
    assert again.equal(tokens)
    assert again.to_bytes() == data
    assert ImageTokens.from_bytes(bytearray(data), FINGERPRINT).equal(tokens)


def test_stream_by_hand():
    spec = TokenSpec("vq", FINGERPRINT, (5,), False, (1, 3), (8, 300), 3)
    tokens = ImageTokens(torch.tensor([[1, 4, 2]]), spec=spec)
    body = bytes.fromhex("8954 01 1000 01 0123456789abcdef 08 ac02 03 01 03 05 01 03") + bytes([0b00110001, 0])
    assert tokens.to_bytes() == with_crc(body)
    spec = TokenSpec("ab", FINGERPRINT, None, True, None, (8, 8), 2)
    latents = torch.tensor([[[1.0], [-0.0]], [[0.5], [7.0]]])
    tokens = ImageTokens(latents=latents, lengths=torch.tensor([2, 1]), spec=spec)
    body = bytes.fromhex("8954 01 2900 00 02 6162 0123456789abcdef 08 08 02 01 02 02 02 01 0000803f 00000080 0000003f")
    assert tokens.to_bytes() == with_crc(body)


def test_size_of_a_stream():
    spec = TokenSpec("one_d_piece", FINGERPRINT, (4096,), True, None, (256, 256), 256)
    tokens = make(spec, batch=1, num_tokens=32)
    assert tokens.num_bits.tolist() == [48 * 8]
    assert len(tokens.to_bytes()) <= 48 + 32
    for name in TOKENIZER_IDS:
        assert len(make(dataclasses.replace(spec, tokenizer=name), 1, 256).to_bytes()) <= 256 * 12 // 8 + 32


@pytest.mark.parametrize("size", [2, 3, 4, 5, 255, 256, 257, 64000, 2**31, 2**32])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8])
def test_largest_and_smallest_ids_survive(size, num_tokens):
    spec = TokenSpec("x", FINGERPRINT, (size,), True, None, (1, 1), 8)
    for value in (0, 1, size - 1):
        tokens = ImageTokens(torch.full((2, num_tokens), value), spec=spec)
        assert ImageTokens.from_bytes(tokens.to_bytes()).equal(tokens)


def test_fingerprint_is_checked():
    data = make(ORDERED).to_bytes()
    with pytest.raises(TokenStreamError, match=f"with fingerprint {FINGERPRINT}; expected {'f' * 16}"):
        ImageTokens.from_bytes(data, expected_fingerprint="f" * 16)


def test_every_truncation_and_every_flipped_bit_is_refused():
    data = make(ORDERED, batch=2, num_tokens=5, lengths=[5, 2], placements=[[300, 200], [256, 256]]).to_bytes()
    for length in range(len(data)):
        with pytest.raises(TokenStreamError):
            ImageTokens.from_bytes(data[:length])
    for position in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(TokenStreamError):
            ImageTokens.from_bytes(bytes(damaged))


# Offsets in the header of one ordered image whose numbers take one byte each.
SMALL = TokenSpec("titok", FINGERPRINT, (5,), True, None, (8, 9), 7)
SMALL_BODY = make(SMALL, batch=1, num_tokens=3).to_bytes()[:-4]
VERSION, FLAGS, TOKENIZER = 2, 3, 5
HEIGHT, WIDTH, MAX_TOKENS, CODEBOOK, BATCH, TOKENS, PAYLOAD = range(14, 21)


def edited(position: int, *values: int, length: int = 1) -> bytes:
    return SMALL_BODY[:position] + bytes(values) + SMALL_BODY[position + length :]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not a token stream: it starts with nothing"),
        (b"PK" + SMALL_BODY[2:], "not a token stream: it starts with 50 4b instead of 89 54"),
        (SMALL_BODY[:2], "ends within its header"),
        (SMALL_BODY[:12], "ends within its fingerprint"),
        (SMALL_BODY[:15], "ends within its image width"),
        (SMALL_BODY + b"\0", "declares 3 tokens, which take 2 bytes, but has 3"),
        (SMALL_BODY[:-1], "declares 3 tokens, which take 2 bytes, but has 1"),
        (edited(VERSION, 2), "has version 2; this package reads version 1"),
        (edited(FLAGS, 0x48), "declares 3 coded tokens, which it would not have in 2 bytes"),
        (edited(FLAGS + 1, 1), "flags 0x0108, which this package cannot read"),
        (edited(FLAGS, 0x0B), "flags 0x000b"),
        (edited(TOKENIZER, 99), "tokenizer id 99, which is unknown"),
        (edited(TOKENIZER, 0, 5, *b"titok"), "spells out 'titok', which has an id"),
        (edited(TOKENIZER, 0, 0), "contradicts itself: tokenizer must be"),
        (edited(TOKENIZER, 0, 1, 200), "contradicts itself"),
        (edited(TOKENIZER, 0, 255), "ends within its tokenizer name"),
        (edited(HEIGHT, 0), "image height is 0"),
        (edited(HEIGHT, 0x88, 0), "image height is 8 in 2 bytes"),
        (edited(HEIGHT, 0x81, 0x80, 0x04), "contradicts itself: image_size must be 1 to 65536, received 65537"),
        (edited(HEIGHT, *[0x80] * 5, 1), "image height takes more than 5 bytes"),
        (edited(MAX_TOKENS, 2), "tokens is 3 in 1 bytes; at most 2"),
        (edited(CODEBOOK, 1), "contradicts itself: codebook_size must be 2"),
        (edited(BATCH, 0), "batch is 0"),
        (edited(BATCH, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F), "declares 12884901885 tokens"),
        (edited(TOKENS, 8), "tokens is 8 in 1 bytes; at most 7"),
        (edited(PAYLOAD, 0xFF, 0xFF, length=2), "bits set after its last token"),
        (edited(PAYLOAD, 0xE0, 0, length=2), r"contradicts itself: Token id 7 at \[batch, token\] = \[0, 0\]"),
        # Ragged, with a batch of 2^28 and with lengths that are all full.
        (
            SMALL_BODY[:FLAGS] + b"\x28" + edited(BATCH, 0x80, 0x80, 0x80, 0x80, 1)[FLAGS + 1 :],
            "declares 268435456 len",
        ),
        (SMALL_BODY[:FLAGS] + b"\x28" + edited(TOKENS, 3, 3)[FLAGS + 1 :], "lists lengths although"),
        (SMALL_BODY[:FLAGS] + b"\x28" + edited(TOKENS, 3, 4)[FLAGS + 1 :], "length is 4 in 1 bytes; at most 3"),
        # Latents with a dim of 2^32 - 1, with a dim of 5 and no values, and with one NaN.
        (
            SMALL_BODY[:FLAGS] + b"\x09" + edited(CODEBOOK, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F)[FLAGS + 1 :],
            "dim is 4294967295 in 5 bytes; at most 26",
        ),
        (SMALL_BODY[:FLAGS] + b"\x09" + SMALL_BODY[FLAGS + 1 :], "declares 3 tokens, which take 60 bytes"),
        (
            SMALL_BODY[:FLAGS] + b"\x09" + edited(CODEBOOK, 1, 1, 1, *b"\0\0\xc0\x7f", length=9)[FLAGS + 1 :],
            "contradicts itself: latents must be finite",
        ),
        # Channels: 4097 of one size, and equal sizes spelled out.
        (SMALL_BODY[:FLAGS] + b"\x0a" + edited(CODEBOOK, 0x81, 0x20, 5)[FLAGS + 1 :], "channels is 4097"),
        (SMALL_BODY[:FLAGS] + b"\x0e" + edited(CODEBOOK, 2, 5, 5)[FLAGS + 1 :], "repeats one codebook size"),
    ],
)
def test_streams_that_lie_are_refused(body, message):
    with pytest.raises(TokenStreamError, match=message):
        ImageTokens.from_bytes(with_crc(body) if body else body)


def test_padding_bomb_is_refused_by_reader_and_writer():
    # 4000 images of one token beside one of 2^20 tokens: 132 KB that would unpack to 34 GB.
    spec = TokenSpec("titok", FINGERPRINT, (2,), True, None, (8, 8), 2**20)
    head = make(spec, batch=1, num_tokens=1).to_bytes()[:-7]
    payload = bytes((4000 + 2**20 + 7) // 8)
    lengths = b"\x80\x80\x40" + b"\x01" * 4000
    body = head[:FLAGS] + b"\x28" + head[FLAGS + 1 :] + b"\xa1\x1f" + b"\x80\x80\x40" + lengths + payload
    with pytest.raises(TokenStreamError, match="batch of 4001 x 1048576 tokens.*more padding"):
        ImageTokens.from_bytes(with_crc(body))
    ragged = ImageTokens(torch.zeros(6, 2**20, dtype=torch.int64), lengths=torch.tensor([1, 1, 1, 1, 1, 2]), spec=spec)
    with pytest.raises(ValueError, match="too ragged for one stream"):
        ragged.to_bytes()
    assert ImageTokens.from_bytes(ragged.truncate(ragged.lengths).to_bytes()).equal(ragged.truncate(ragged.lengths))


def mutate(rng: random.Random, streams: list[bytes], data: bytes) -> bytes:
    """Damage a stream in one of six ways, sometimes in several places."""
    damaged = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.randrange(1, 5)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del damaged[rng.randrange(len(damaged)) :]
    elif kind == 2:
        position = rng.randrange(len(damaged) + 1)
        damaged[position:position] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 3:
        start = rng.randrange(len(damaged))
        end = min(len(damaged), start + rng.randrange(1, 17))
        damaged[start:end] = rng.randbytes(end - start)
    elif kind == 4:
        other = rng.choice(streams)
        damaged = damaged[: rng.randrange(len(damaged))] + other[rng.randrange(len(other)) :]
    else:
        damaged = bytearray(rng.randbytes(rng.randrange(120)))
        if rng.randrange(2):
            damaged[:3] = data[:3]
    return bytes(damaged)


def test_mutated_streams_never_give_other_tokens():
    rng = random.Random(0)  # noqa: S311 - no secrets here
    cases = [tokens for name, tokens in CASES.items() if name != "ragged latent"]
    streams = [tokens.to_bytes() for tokens in cases]
    refused = 0
    for number in range(100_000):
        which = number % len(streams)
        data = mutate(rng, streams, streams[which])
        try:
            tokens = ImageTokens.from_bytes(data)
        except TokenStreamError:
            refused += 1
        else:
            # Splices may join two halves of the same stream, or an empty part and the whole of another one.
            assert data in streams and tokens.equal(cases[streams.index(data)])
    assert refused > 95_000


def test_mutated_streams_with_a_right_crc_give_consistent_tokens_or_are_refused():
    rng = random.Random(1)  # noqa: S311 - no secrets here
    bodies = [tokens.to_bytes()[:-4] for name, tokens in CASES.items() if name != "ragged latent"]
    read = 0
    for number in range(20_000):
        body = bodies[number % len(bodies)]
        if number % 2:
            # Aimed at the header: one byte of it.
            damaged = bytearray(body)
            damaged[rng.randrange(2, min(len(body), 40))] = rng.randrange(256)
            data = with_crc(bytes(damaged))
        else:
            data = with_crc(mutate(rng, bodies, body))
        try:
            tokens = ImageTokens.from_bytes(data)
        except TokenStreamError:
            continue
        read += 1
        assert tokens.to_bytes() == data
        assert tokens.token_ids is None or tokens.token_ids.numel() <= 8 * len(data) + 2**22
    assert 1_000 < read < 19_000


# --- files


@each_case
def test_files_round_trip(tokens, tmp_path):
    tokens.save(tmp_path / "image.tok")
    assert ImageTokens.load(tmp_path / "image.tok", expected_fingerprint=FINGERPRINT).equal(tokens)
    assert os.listdir(tmp_path) == ["image.tok"]


def test_load_names_the_file(tmp_path):
    path = tmp_path / "image.tok"
    path.write_bytes(make(ORDERED).to_bytes()[:-1])
    with pytest.raises(TokenStreamError, match=r"image\.tok: The token stream is damaged or truncated"):
        ImageTokens.load(path)
    with pytest.raises(FileNotFoundError):
        ImageTokens.load(tmp_path / "none.tok")


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_interrupted_write_leaves_nothing(function, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    path = tmp_path / "image.tok"
    with monkeypatch.context() as patch:
        patch.setattr(os, function, interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(ORDERED).save(path)
    assert os.listdir(tmp_path) == []
    old = make(ORDERED, seed=1)
    old.save(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(ORDERED).save(path)
    assert ImageTokens.load(path).equal(old)


def test_saved_files_have_the_usual_permissions(tmp_path):
    make(ORDERED).save(tmp_path / "image.tok")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "image.tok").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_save_into_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="image.tok: there is no folder"):
        make(ORDERED).save(tmp_path / "none" / "image.tok")
