"""Scenes to pixels: 64x64 RGB, one 16-pixel cell per grid cell, no randomness beyond what the scene holds."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dyvte.data.scenes.world import (
    ARROW,
    BACKGROUNDS,
    COLORS,
    DIGIT,
    GRID,
    SHAPE,
    START,
    START_RGB,
    TRAIL_RGB,
    Item,
    Scene,
    handwritten_digits,
)

CELL = 16
IMAGE_SIZE = CELL * GRID
_OVER = 8  # supersampling of the drawn masks


def _polygon_mask(points: list[tuple[float, float]], radius: float, shift: tuple[int, int]) -> np.ndarray:
    """Antialiased mask of a polygon given in [-1, 1] coordinates, scaled to `radius` pixels."""
    image = Image.new("L", (CELL * _OVER, CELL * _OVER))
    centre_x, centre_y = CELL / 2 + shift[1], CELL / 2 + shift[0]
    scaled = [((centre_x + x * radius) * _OVER, (centre_y + y * radius) * _OVER) for x, y in points]
    ImageDraw.Draw(image).polygon(scaled, fill=255)
    return _shrink(image)


def _shrink(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((CELL, CELL), Image.Resampling.BOX), dtype=np.float32) / 255.0


def _ring(corners: int, inner: float, turn: float) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star when `inner` < 1."""
    count = corners * 2 if inner < 1 else corners
    angles = [turn + 2 * np.pi * i / count for i in range(count)]
    radii = [inner if inner < 1 and i % 2 else 1.0 for i in range(count)]
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


_W = 0.36
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _ring(48, 1.0, 0.0),
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
    "cross": [
        *[(-_W, -1), (_W, -1), (_W, -_W), (1, -_W), (1, _W), (_W, _W)],
        *[(_W, 1), (-_W, 1), (-_W, _W), (-1, _W), (-1, -_W), (-_W, -_W)],
    ],
    "star": _ring(5, 0.42, -np.pi / 2),
}
_ARROW_RIGHT = [(-1.0, -0.3), (0.1, -0.3), (0.1, -0.85), (1.0, 0.0), (0.1, 0.85), (0.1, 0.3), (-1.0, 0.3)]
_QUARTER_TURNS = {"right": 0, "down": 1, "left": 2, "up": 3}


def _turned(points: list[tuple[float, float]], quarters: int) -> list[tuple[float, float]]:
    for _ in range(quarters):
        points = [(-y, x) for x, y in points]
    return points


@lru_cache(maxsize=4096)
def _digit_mask(index: int, size: int, shift: tuple[int, int]) -> np.ndarray:
    pixels = np.clip(handwritten_digits()[0][index] * (255.0 / 16.0) * 1.25, 0, 255).astype(np.uint8)
    side = 12 + size
    big = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    mask = np.zeros((CELL, CELL), dtype=np.float32)
    top, left = (CELL - side) // 2 + shift[0], (CELL - side) // 2 + shift[1]
    top, left = min(max(top, 0), CELL - side), min(max(left, 0), CELL - side)
    mask[top : top + side, left : left + side] = big / 255.0
    return mask


def _radius(size: int) -> float:
    return 5.2 + 0.6 * size


@lru_cache(maxsize=4096)
def _drawn_mask(kind: str, name: str, size: int, shift: tuple[int, int]) -> np.ndarray:
    radius = _radius(size)
    if kind == SHAPE:
        return _polygon_mask(_OUTLINES[name], radius, shift)
    return _polygon_mask(_turned(_ARROW_RIGHT, _QUARTER_TURNS[name]), radius + 0.4, shift)


def _mask(item: Item) -> np.ndarray:
    if item.kind == DIGIT:
        return _digit_mask(item.digit_index, item.size, item.shift)
    return _drawn_mask(item.kind, item.name, item.size, item.shift)


def _rgb(item: Item) -> tuple[int, int, int]:
    return {START: START_RGB, ARROW: TRAIL_RGB}.get(item.kind) or COLORS[item.color]


def render(scene: Scene) -> np.ndarray:
    """The scene's image, (64, 64, 3) uint8."""
    ground = np.clip(np.add(BACKGROUNDS[scene.background], scene.background_tint), 0, 255).astype(np.float32)
    pixels = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    pixels[:] = ground
    for index, item in enumerate(scene.cells):
        if item is None:
            continue
        row, col = divmod(index, GRID)
        alpha = _mask(item)[:, :, None]
        ink = np.clip(np.add(_rgb(item), item.tint), 0, 255).astype(np.float32)
        window = pixels[row * CELL : (row + 1) * CELL, col * CELL : (col + 1) * CELL]
        window += alpha * (ink - window)
    return np.round(pixels).astype(np.uint8)


def save(scene: Scene, path: Path) -> None:
    """Write the scene's image as a file; folders are made.

    Parameters
    ----------
    scene
        What is drawn.
    path
        Its ending says the format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(scene)).save(path)


def item_box(cell: int, item: Item) -> tuple[float, float, float, float]:
    """Corners (x1, y1, x2, y2) of what `item` covers in cell number `cell`, as shares of the image's side.

    A pixel counts where the item covers at least half of it; x2 and y2 are the far edges.
    """
    row, col = divmod(cell, GRID)
    rows, cols = np.nonzero(_mask(item) >= 0.5)
    left, top = col * CELL, row * CELL
    corners = (left + cols.min(), top + rows.min(), left + cols.max() + 1, top + rows.max() + 1)
    return tuple(float(v) / IMAGE_SIZE for v in corners)


def item_outline(cell: int, item: Item) -> list[tuple[float, float]]:
    """Corners (x, y), in pixels of the image, of the shape `item` in cell number `cell`."""
    row, col = divmod(cell, GRID)
    centre_x, centre_y = (col + 0.5) * CELL + item.shift[1], (row + 0.5) * CELL + item.shift[0]
    radius = _radius(item.size)
    return [(centre_x + x * radius, centre_y + y * radius) for x, y in _OUTLINES[item.name]]
