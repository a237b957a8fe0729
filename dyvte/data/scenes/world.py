"""What a scene holds and how one is drawn at random.

A scene is a 4x4 grid of cells on a coloured background. Cells hold coloured shapes, two handwritten
digits, and a trail of arrows: one orange arrow starts it, teal arrows go on, a shape ends it. How many
hops the trail has, what the background is, where things are: all decided by the image, never by the
wording of a question, so that the depth a question needs varies with the IMAGE.

Every scene is a function of (seed, split, index) alone; splits also own disjoint handwritten digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from dyvte.errors import DataError

GRID = 4
NUM_CELLS = GRID * GRID
SHAPES = ("circle", "square", "triangle", "cross", "star")
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
    "star": "stars",
}
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "cyan": (60, 210, 225),
}
BACKGROUNDS = {
    "black": (15, 15, 15),
    "white": (240, 240, 240),
    "gray": (125, 125, 125),
    "brown": (95, 60, 30),
    "pink": (250, 180, 195),
}
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
START_RGB = (245, 130, 20)  # the orange arrow
TRAIL_RGB = (0, 105, 105)  # teal arrows

EMPTY, SHAPE, DIGIT, START, ARROW = "nothing", "shape", "digit", "start", "arrow"
MAX_HOPS = 3
SPLITS = ("train", "calibration", "validation", "test")
# Share of the handwritten digit images that each split owns, by image index.
_DIGIT_SHARE = {"train": 0.7, "calibration": 0.1, "validation": 0.1, "test": 0.1}


@dataclass(frozen=True, kw_only=True)
class Item:
    """What one cell holds. `name` is a shape, a digit's value or an arrow's direction, as text."""

    kind: str
    name: str
    color: str = ""
    digit_index: int = -1
    size: int = 0
    shift: tuple[int, int] = (0, 0)
    tint: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One scene: 16 cells in reading order (None where empty), its background and its trail of cells."""

    split: str
    index: int
    background: str
    background_tint: tuple[int, int, int]
    cells: tuple[Item | None, ...]
    trail: tuple[int, ...]

    @property
    def hops(self) -> int:
        """Arrows on the trail: 1 when the orange arrow points at the end itself."""
        return len(self.trail) - 1

    def signature(self) -> tuple:
        """What makes this scene this scene; two scenes with one signature look alike."""
        return (self.background, tuple((i.kind, i.name, i.color) if i else None for i in self.cells))


@lru_cache(maxsize=1)
def handwritten_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's `load_digits`: images (1797, 8, 8) in 0..16 and labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the synthetic scenes need scikit-learn's handwritten digits; install `pip install dyvte[scenes]`"
        ) from error
    digits = load_digits()
    return digits.images.astype(np.float32), digits.target.astype(np.int64)


@lru_cache(maxsize=len(SPLITS))
def digits_of_split(split: str) -> tuple[np.ndarray, ...]:
    """Indices of the digit images that `split` owns, one array per value 0..9; splits share none."""
    _, labels = handwritten_digits()
    order = np.random.default_rng(20260101).permutation(len(labels))
    start = 0
    for name in SPLITS:
        stop = len(labels) if name == SPLITS[-1] else start + int(_DIGIT_SHARE[name] * len(labels))
        if name == split:
            own = np.sort(order[start:stop])
            return tuple(own[labels[own] == value] for value in range(10))
        start = stop
    raise DataError(f"unknown split {split!r}; known splits: {', '.join(SPLITS)}")


def cell_of(index: int) -> tuple[int, int]:
    """Row and column, both from 0, of cell `index` in reading order."""
    return divmod(index, GRID)


def _draw_trail(rng: np.random.Generator, hops: int) -> list[int]:
    """A random self-avoiding walk of `hops` steps: hops + 1 cells."""
    while True:
        path = [int(rng.integers(NUM_CELLS))]
        for _ in range(hops):
            row, col = cell_of(path[-1])
            steps = [(row + dr, col + dc) for dr, dc in DIRECTIONS.values()]
            free = [
                r * GRID + c for r, c in steps if 0 <= r < GRID and 0 <= c < GRID and r * GRID + c not in path
            ]
            if not free:
                break
            path.append(free[int(rng.integers(len(free)))])
        if len(path) == hops + 1:
            return path


def _direction(source: int, target: int) -> str:
    (r0, c0), (r1, c1) = cell_of(source), cell_of(target)
    return next(name for name, step in DIRECTIONS.items() if step == (r1 - r0, c1 - c0))


def draw_scene(split: str, index: int, seed: int = 0) -> Scene:
    """The scene number `index` of `split`; the same arguments always give the same scene.

    Parameters
    ----------
    split
        "train", "val" or "test": other scenes each.
    index
        From 0.
    seed
        Of the whole world.
    """
    own_digits = digits_of_split(split)
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    color_names, background_names = list(COLORS), list(BACKGROUNDS)

    def look() -> dict:
        return {
            "size": int(rng.integers(3)),
            "shift": (int(rng.integers(-1, 2)), int(rng.integers(-1, 2))),
            "tint": tuple(int(v) for v in rng.integers(-12, 13, size=3)),
        }

    def any_shape() -> Item:
        shape, color = SHAPES[int(rng.integers(len(SHAPES)))], color_names[int(rng.integers(len(COLORS)))]
        return Item(kind=SHAPE, name=shape, color=color, **look())

    cells: list[Item | None] = [None] * NUM_CELLS
    trail = _draw_trail(rng, int(rng.integers(1, MAX_HOPS + 1)))
    for step, (source, target) in enumerate(pairwise(trail)):
        kind = START if step == 0 else ARROW
        cells[source] = Item(kind=kind, name=_direction(source, target), **look())
    cells[trail[-1]] = any_shape()
    free = [int(c) for c in rng.permutation([i for i in range(NUM_CELLS) if cells[i] is None])]
    for color in rng.permutation(color_names)[:2]:
        value = int(rng.integers(10))
        digit = int(rng.choice(own_digits[value]))
        cells[free.pop()] = Item(kind=DIGIT, name=str(value), color=str(color), digit_index=digit, **look())
    if rng.random() < 0.5:  # an arrow that is not on the trail
        name = list(DIRECTIONS)[int(rng.integers(4))]
        cells[free.pop()] = Item(kind=ARROW, name=name, **look())
    for _ in range(int(rng.integers(3, 7))):
        cells[free.pop()] = any_shape()
    return Scene(
        split=split,
        index=index,
        background=background_names[int(rng.integers(len(BACKGROUNDS)))],
        background_tint=tuple(int(v) for v in rng.integers(-10, 11, size=3)),
        cells=tuple(cells),
        trail=tuple(trail),
    )
