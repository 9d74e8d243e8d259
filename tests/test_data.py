"""The emoji data set: fetched by hash, split by emoji, captioned; built here from tiny packages of the same format."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmsdk.data import emoji
from mmsdk.data.captions import train_caption_tokenizer
from mmsdk.data.emoji import EmojiDataset, EmojiRecord, base_code_point, caption_of, on_white, split_of
from mmsdk.errors import DataError, UnknownNameError

RECORD = EmojiRecord("2764", "2764", "red heart", ("emotion", "love"), "smileys-emotion", "noto", "train")


def tarball(path: Path, files: Mapping[str, bytes]) -> str:
    """Write an npm tarball and return its SHA-512."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return hashlib.sha512(path.read_bytes()).hexdigest()


def square(colour: str) -> str:
    return f'<path fill="{colour}" d="M0 0h8v16H0z"/>'


@pytest.fixture
def tiny_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sets and the captions, as the real packages hold them: by code point, by slug, and as webp files."""
    cache = tmp_path / "npm"
    cache.mkdir()
    webp = io.BytesIO()
    Image.new("RGBA", (32, 32), (0, 255, 0, 255)).save(webp, "webp", lossless=True)
    icons = {"red-heart": {"body": square("red")}, "heart-hidden": {"body": square("red"), "hidden": True}}
    unknown = {"no-such-emoji": {"body": square("blue")}}
    contents: dict[str, dict[str, bytes]] = {
        "noto": {
            "icons.json": json.dumps({"icons": icons, "width": 16, "height": 16}).encode(),
            "chars.json": json.dumps({"2764-fe0f": "red-heart"}).encode(),
        },
        "firefox": {"icons.json": json.dumps({"icons": icons | unknown, "width": 16, "height": 16}).encode()},
        "fluent-3d": {"assets/2764-fe0f.webp": webp.getvalue(), "assets/1f4a9.webp": webp.getvalue()},
        "captions": {
            "en/data.json": json.dumps(
                [
                    {"hexcode": "2764-FE0F", "label": "red heart", "tags": ["love"], "group": 0},
                    {"hexcode": "1F3FB", "label": "light skin tone", "group": 2},
                ]
            ).encode(),
            "meta/groups.json": json.dumps({"groups": {"0": "smileys-emotion", "2": "component"}}).encode(),
            "meta/unicode-names.json": json.dumps({"2764": "HEAVY BLACK HEART"}).encode(),
            **{f"en/shortcodes/{n}.json": b'{"2764-FE0F": ["heart"]}' for n in ("cldr", "emojibase", "github")},
            **{f"en/shortcodes/{n}.json": b'{"2764-FE0F": "red_heart"}' for n in ("iamcal", "joypixels")},
        },
    }
    packages = {}
    for name, files in contents.items():
        package = replace(emoji.PACKAGES[name], npm_name=f"tiny-{name}", version="1.0.0", sha512="")
        packages[name] = replace(package, sha512=tarball(cache / f"tiny-{name}-1.0.0.tgz", files))
    monkeypatch.setattr(emoji, "PACKAGES", packages)
    return tmp_path


def test_build_from_packages(tiny_packages: Path) -> None:
    pytest.importorskip("resvg_py")
    folder = emoji.build_emoji_dataset(tiny_packages)
    images = np.load(folder / "images.npy")
    records = [EmojiRecord(**r) for r in json.loads((folder / "records.json").read_text())]
    # Hidden icons, icons of no known emoji, and emoji without a caption are left out.
    assert [(r.label, r.style) for r in records] == [("red heart", s) for s in ("noto", "firefox", "fluent 3d")]
    assert images.shape == (3, 64, 64, 4)
    assert tuple(images[0, 32, 10]) == (255, 0, 0, 255)
    assert images[0, 32, 60, 3] == 0
    assert tuple(images[2, 32, 32]) == (0, 255, 0, 255)
    split = records[0].split
    dataset = EmojiDataset(split, styles=["noto"], cache_dir=tiny_packages)
    assert tuple(dataset.images[0, 32, 60]) == (255, 255, 255)
    assert dataset.caption(0) == "red heart, noto"


def test_an_interrupted_build_leaves_nothing(tiny_packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        emoji.build_emoji_dataset(tiny_packages)
    assert not (tiny_packages / "emoji-64").exists()


def test_a_replaced_package_is_refused_and_removed(tiny_packages: Path) -> None:
    path = tiny_packages / "npm" / "tiny-noto-1.0.0.tgz"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="SHA-512"):
        emoji.build_emoji_dataset(tiny_packages)
    assert not path.exists()


def test_without_npm_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm is needed to fetch @iconify-json/noto"):
        emoji.build_emoji_dataset(tmp_path)


def test_every_package_is_pinned() -> None:
    for package in emoji.PACKAGES.values():
        assert len(package.sha512) == 128
        assert package.version[0].isdigit()
        assert package.licence in ("Apache-2.0", "MIT", "CC-BY-4.0")
    assert len({package.sha512 for package in emoji.PACKAGES.values()}) == len(emoji.PACKAGES)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1f44d-1f3fb", "1f44d"),
        ("1f468-200d-1f33e", "1f469-200d-1f33e"),
        ("1f468-200d-1f33e", "1f9d1-1f3ff-200d-1f33e"),
        ("1f481-200d-2640-fe0f", "1f481"),
        ("1f6b6-200d-27a1-fe0f", "1F6B6"),
    ],
)
def test_variants_share_their_base_and_split(one: str, other: str) -> None:
    assert base_code_point(one) == base_code_point(other)
    assert (split_of(one, "noto") == "test") == (split_of(other, "twemoji") == "test")


def test_different_emoji_have_different_bases() -> None:
    assert base_code_point("1f1e9-1f1ea") != base_code_point("1f1eb-1f1f7")
    assert base_code_point("1f468-200d-1f33e") != base_code_point("1f468-200d-1f373")


def test_splits_have_about_their_share() -> None:
    splits = [split_of(f"{i:x}", style) for i in range(3000) for style in ("noto", "twemoji")]
    assert 0.03 < splits.count("test") / len(splits) < 0.07
    assert 0.03 < splits.count("pair") / len(splits) < 0.07
    # An unseen emoji is unseen in every style.
    for one, other in zip(splits[::2], splits[1::2], strict=True):
        assert (one == "test") == (other == "test")


def test_captions() -> None:
    assert caption_of(RECORD) == "red heart, noto"
    rng = random.Random(0)
    captions = [caption_of(RECORD, rng) for _ in range(500)]
    assert {"red heart", "red heart, noto", "red heart, love, emotion, noto", "red heart, emotion, love"} <= set(
        captions
    )
    assert 0.6 < sum("noto" in c for c in captions) / 500 < 0.8
    assert all(set(c.split(", ")) <= {"red heart", "noto", "love", "emotion"} for c in captions)
    assert [caption_of(RECORD, random.Random(4)) for _ in range(3)] == [caption_of(RECORD, random.Random(4))] * 3


def test_compositing_by_hand() -> None:
    rgba = np.array([[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 255, 51]], dtype=np.uint8)
    assert on_white(rgba).tolist() == [[10, 20, 30], [255, 255, 255], [204, 224, 255]]


@pytest.mark.parametrize(("arguments", "hint"), [({"split": "tset"}, "test"), ({"styles": ["twemojis"]}, "twemoji")])
def test_unknown_names(arguments: dict, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=f"Did you mean '{hint}'"):
        EmojiDataset(**arguments)


def test_caption_vocabulary_is_the_same_every_time() -> None:
    captions = ["red heart love", "green apple, red", "Café 1", "zebra apple"]
    one, other = (train_caption_tokenizer(captions, 90) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    # Specials, letters and digits first; then words by frequency, ties by alphabet.
    words = sorted(one.get_vocab().items(), key=lambda item: item[1])[76:]
    assert [word for word, _ in words] == ["apple", "red", "cafe", "green", "heart", "love", "zebra"]


def test_caption_tokenizer_normalises_and_spells() -> None:
    tokenizer = train_caption_tokenizer(["red heart"], 100, max_length=5)
    assert tokenizer.tokenize("Rêd, HEART!") == ["red", "heart"]
    assert tokenizer.tokenize("ab") == ["a", "##b"]
    batch = tokenizer(["red", "red heart"], padding="max_length", max_length=4)
    assert batch["attention_mask"] == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert tokenizer.pad_token_id == 0
