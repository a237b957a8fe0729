"""Boxes in answers: how each tool finds one and what it takes its numbers for, and the overlap of two boxes.

A box is (left, top, right, bottom). ``original`` is the rule of this project, for no tool that reads
answers was published with RefCOCO: four numbers in square brackets, else Qwen-VL's two points in round
ones; shares as LLaVA writes them, of the image padded to a square. The others:
``lmms_eval/tasks/refcoco/utils_rec.py`` and ``vlmeval/dataset/refcoco.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TypeAlias

Box: TypeAlias = tuple[float, float, float, float]
Size: TypeAlias = tuple[int, int]
"""Width and height of an image in pixels."""

NOTHING: Box = (0.0, 0.0, 0.0, 0.0)

_NUMBER = r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_LIST = re.compile(r"\[\s*" + r"\s*,\s*".join([_NUMBER] * 4) + r"\s*\]")
_POINTS = re.compile(rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)\s*,?\s*\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)")
_LMMS_NUMBER = r"(-?\d+(?:\.\d+)?)"
_LMMS_LIST = re.compile(r"\[\s*" + r",\s*".join([_LMMS_NUMBER] * 4) + r"\s*\]")
_ANY_NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
_GAP = r"(?:\s*,\s*|\s+)"
_VLMEVAL_LIST = re.compile(r"\[\s*" + _GAP.join([f"({_ANY_NUMBER})"] * 4) + r"\s*\]")


def overlap(one: Box, other: Box) -> float:
    """Intersection over union; 0 where the boxes have none, or where corners are swapped."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    union = _area(one) + _area(other) - shared
    return shared / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def of_padded_square(box: Box, size: Size) -> Box:
    """Pixels of a box in shares of the image padded to a square, as LLaVA pads: the image in the middle, half
    a pixel rounded down."""
    width, height = size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return box[0] * side - left, box[1] * side - top, box[2] * side - left, box[3] * side - top


def of_image(box: Box, size: Size) -> Box:
    """Pixels of a box in shares of the image's own width and height."""
    width, height = size
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def of_thousand(box: Box, size: Size) -> Box:
    """Pixels of a box on Qwen-VL's grid of 1000 by 1000 over the image."""
    left, top, right, bottom = of_image(box, size)
    return left / 1000, top / 1000, right / 1000, bottom / 1000


def of_pixels(box: Box, size: Size) -> Box:
    """The box as it stands."""
    return box


CONVENTIONS: dict[str, Callable[[Box, Size], Box]] = {
    "padded_square": of_padded_square,
    "image": of_image,
    "thousandths": of_thousand,
    "pixels": of_pixels,
}
"""What the numbers of an answer may be."""


def find_box(text: str) -> tuple[Box, bool] | None:
    """The first box of an answer, and whether it is two points; None where there is none."""
    for shape in (_LIST, _POINTS):
        match = shape.search(text)
        if match:
            box = _as_box(match.groups())
            return (box, shape is _POINTS) if all(map(math.isfinite, box)) else None
    return None


def original_box(text: str, size: Size) -> Box | None:
    """Pixels of an answer's first box: two points are thousandths; numbers up to 1 are shares of the padded
    square; others are pixels."""
    found = find_box(text)
    if found is None:
        return None
    box, is_points = found
    if is_points:
        return of_thousand(box, size)
    return of_padded_square(box, size) if max(map(abs, box)) <= 1 else box


def lmms_box(text: str) -> Box:
    """Shares of the image's width and height; an empty box where there are no four numbers in brackets."""
    match = _LMMS_LIST.search(text)
    return _as_box(match.groups()) if match else NOTHING


def vlmevalkit_box(text: str, size: Size) -> Box | None:
    """Pixels: four numbers in brackets, else the first four anywhere. Up to 1.5 they are shares of the image,
    up to 1000 thousandths, above that pixels; outside is cut off, swapped corners are put right."""
    match = _VLMEVAL_LIST.search(text)
    numbers = match.groups() if match else re.findall(_ANY_NUMBER, text)[:4]
    if len(numbers) < 4:
        return None
    box, (width, height) = _as_box(numbers), size
    largest = max(map(abs, box))
    if largest <= 1000:
        box = of_image(box, size) if largest <= 1.5 else _thousandth(box, size)
    left, right = sorted(min(max(value, 0.0), width) for value in (box[0], box[2]))
    top, bottom = sorted(min(max(value, 0.0), height) for value in (box[1], box[3]))
    return left, top, right, bottom


def _thousandth(box: Box, size: Size) -> Box:
    """As that tool computes it: divided first, so that no rounding differs."""
    return of_image((box[0] / 1000, box[1] / 1000, box[2] / 1000, box[3] / 1000), size)


def _as_box(numbers: tuple[str, ...] | list[str]) -> Box:
    left, top, right, bottom = map(float, numbers)
    return left, top, right, bottom
