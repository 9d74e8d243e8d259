"""`emoji-vqa`: grids of emoji with questions about them, for vision-language models small enough for a CPU.

A scene is a 256 x 256 picture of 4 x 4 cells, three to eight of which hold an emoji of 48 kinds, each drawn in one of
five styles, at a random size and place within its cell. Cells are named like a spreadsheet's: columns `a` to `d`
from the left, rows `1` to `4` from the top. Scenes and questions are pure functions of `(split, index)`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmsdk.data.emoji import IMAGE_SIZE, EmojiDataset
from mmsdk.errors import unknown_name
from mmsdk.tokens import write_atomically

GRID = 4
SCENE_SIZE = GRID * IMAGE_SIZE
STYLES = ("noto", "twemoji", "fluent flat", "fluent 3d", "emojione")
# Code point -> the one word that questions and answers use.
KINDS = {
    "1f34e": "apple", "1f34c": "banana", "1f347": "grapes", "1f353": "strawberry", "1f349": "watermelon",
    "1f34b": "lemon", "1f955": "carrot", "1f33d": "corn", "1f344": "mushroom", "1f354": "hamburger",
    "1f355": "pizza", "1f369": "doughnut", "1f36a": "cookie", "1f382": "cake", "2615": "coffee", "1f431": "cat",
    "1f436": "dog", "1f430": "rabbit", "1f43c": "panda", "1f42f": "tiger", "1f437": "pig", "1f438": "frog",
    "1f435": "monkey", "1f427": "penguin", "1f41f": "fish", "1f419": "octopus", "1f40c": "snail", "1f41d": "bee",
    "1f422": "turtle", "1f33b": "sunflower", "1f339": "rose", "1f335": "cactus", "1f332": "tree", "2b50": "star",
    "26bd": "football", "1f3c0": "basketball", "1f697": "car", "1f68c": "bus", "1f680": "rocket", "1f6b2": "bicycle",
    "1f511": "key", "1f388": "balloon", "2764": "heart", "1f47b": "ghost", "1f3e0": "house", "2602": "umbrella",
    "1f451": "crown", "1f525": "fire",
}  # fmt: skip
NOTHING = "nothing"
CELLS = tuple(f"{column}{row}" for row in range(1, GRID + 1) for column in "abcd")
NUMBERS = ("one", "two", "three")
QUESTIONS = {
    "at": "what is at {cell}?",
    "where": "where is the {kind}?",
    "exist": "is there any {kind}?",
    "count": "how many {kind}?",
}
_SIZES = (40, 46, 52, 58, 64)


@dataclass(frozen=True)
class Scene:
    """A picture `(256, 256, 3)` uint8 and what its cells hold: a kind, or `nothing`, in the order of `CELLS`."""

    pixels: np.ndarray
    kinds: tuple[str, ...]

    @property
    def image(self) -> Image.Image:
        """The picture for a processor."""
        return Image.fromarray(self.pixels)


@dataclass(frozen=True)
class Question:
    """A question about one scene; the answer is always one word."""

    task: str
    text: str
    answer: str


class EmojiScenes:
    """An endless sequence of scenes, reproducible by index.

    Args:
        split: `train` or `test`. Both draw the same 240 emoji images; no scene of one occurs in the other.
        cache_dir: where the emoji data set lies; it is built there when absent.

    Raises:
        UnknownNameError: the split does not exist.
        DataError: the emoji data set is absent and cannot be built.
    """

    def __init__(self, split: str = "train", cache_dir: str | Path | None = None) -> None:
        if split not in ("train", "test"):
            raise unknown_name("split", split, ["train", "test"])
        self.split = split
        data = EmojiDataset("train", STYLES, cache_dir)
        self._drawings: dict[str, list[dict[int, np.ndarray]]] = {kind: [] for kind in KINDS.values()}
        for record, pixels in zip(data.records, data.images, strict=True):
            if record.hexcode in KINDS:
                image = Image.fromarray(pixels)
                drawing = {s: np.asarray(image.resize((s, s), Image.Resampling.LANCZOS)) for s in _SIZES}
                self._drawings[KINDS[record.hexcode]].append(drawing)

    def __getitem__(self, index: int) -> Scene:
        """Return scene number `index`."""
        rng = random.Random(f"emoji-vqa {self.split} {index}")  # noqa: S311 - not for cryptography
        kinds = _draw_kinds(rng)
        cells = rng.sample(range(GRID * GRID), len(kinds))
        pixels = np.full((SCENE_SIZE, SCENE_SIZE, 3), 255, np.uint8)
        held = [NOTHING] * (GRID * GRID)
        for kind, cell in zip(kinds, cells, strict=True):
            held[cell] = kind
            size = rng.choice(_SIZES)
            top = cell // GRID * IMAGE_SIZE + rng.randint(0, IMAGE_SIZE - size)
            left = cell % GRID * IMAGE_SIZE + rng.randint(0, IMAGE_SIZE - size)
            pixels[top : top + size, left : left + size] = rng.choice(self._drawings[kind])[size]
        return Scene(pixels, tuple(held))

    def question(self, index: int, task: str) -> Question:
        """Return the question of `task` about scene number `index` (the same one at every call)."""
        rng = random.Random(f"emoji-vqa question {task} {self.split} {index}")  # noqa: S311 - not for cryptography
        return ask(self[index], task, rng)


def write_scenes(
    folder: str | Path, split: str = "test", count: int = 132, cache_dir: str | Path | None = None
) -> Path:
    """Write scenes as PNG files, and `questions.jsonl` with one question of each task about each; return the folder.

    Raises:
        ValueError: `count` is not positive.
        UnknownNameError, DataError: as `EmojiScenes`.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, received {count}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = EmojiScenes(split, cache_dir)
    lines = []
    for index in range(count):
        name = f"{split}-{index:04d}.png"
        scenes[index].image.save(folder / name, optimize=True)
        questions = [scenes.question(index, task) for task in QUESTIONS]
        lines += [
            json.dumps({"image": name, "question": q.text, "answer": q.answer, "task": q.task}) for q in questions
        ]
    write_atomically(folder / "questions.jsonl", ("\n".join(lines) + "\n").encode())
    return folder


def _draw_kinds(rng: random.Random) -> list[str]:
    """Draw what a scene holds: three to eight things, one of them up to three times, the others once."""
    total = rng.randint(3, 8)
    repeated = min(rng.choice((1, 2, 3)), total - 1)
    different = rng.sample(list(KINDS.values()), total - repeated + 1)
    return different + [different[0]] * (total - len(different))


def ask(scene: Scene, task: str, rng: random.Random) -> Question:
    """Ask about `scene`, with the answers of each task balanced: guessing without looking does not pay.

    Args:
        scene: what is asked about.
        task: `at` (what a cell holds: one in five holds nothing), `where` (the cell of a thing that is there once),
            `exist` (half of the answers are yes) or `count` (one to three).
        rng: source of the question.

    Raises:
        UnknownNameError: the task does not exist.
    """
    if task not in QUESTIONS:
        raise unknown_name("task", task, list(QUESTIONS))
    held = [(cell, kind) for cell, kind in zip(CELLS, scene.kinds, strict=True) if kind != NOTHING]
    counts = {kind: sum(other == kind for _, other in held) for _, kind in held}
    if task == "at":
        empty = [cell for cell, kind in zip(CELLS, scene.kinds, strict=True) if kind == NOTHING]
        cell, answer = (rng.choice(empty), NOTHING) if rng.random() < 0.2 else rng.choice(held)
        return Question(task, QUESTIONS[task].format(cell=cell), answer)
    if task == "where":
        cell, kind = rng.choice([(cell, kind) for cell, kind in held if counts[kind] == 1])
        return Question(task, QUESTIONS[task].format(kind=kind), cell)
    if task == "exist":
        there = rng.random() < 0.5
        kind = rng.choice(list(counts) if there else [k for k in KINDS.values() if k not in counts])
        return Question(task, QUESTIONS[task].format(kind=kind), "yes" if there else "no")
    # Every scene has things that are there once; asking for them rarely makes the three answers about as frequent.
    number = max(counts.values()) if rng.random() < 0.85 else 1
    kind = rng.choice([kind for kind, count in counts.items() if count == number])
    return Question(task, QUESTIONS[task].format(kind=kind), NUMBERS[number - 1])
