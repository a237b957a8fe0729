"""Masks in answers and in annotations: run lengths as COCO writes them, and polygons as OpenCV fills them.

An answer's mask is COCO's compressed run lengths as JSON, ``{"size": [height, width], "counts": "..."}``, so
that it stands in ``predictions.jsonl`` and in the submission as text (``common/maskApi.c`` of the COCO API).
Polygons follow ``utils/data_processing.py`` of LISA: ``cv2.fillPoly`` and ``cv2.polylines`` on corners cut to
whole numbers. Within the image they come out pixel for pixel as OpenCV 4.8 paints them, which LISA requires.
Where corners lie outside, OpenCV's versions disagree with each other; what comes out here follows the cut
edges, as OpenCV 5 does but for its rounding.

Shapes: H height, W width, R runs, E edges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_FOUND = re.compile(r'\{[^{}]*"counts"[^{}]*\}')
_SHIFT = 16
_ONE = 1 << _SHIFT
FARTHEST = 32000
"""Corners farther out are refused: OpenCV's fixed-point numbers would overflow."""


def run_lengths(mask_HW: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask, column by column: ``size`` and ``counts``."""
    flat = np.asarray(mask_HW, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist() if flat.size else []
    if flat.size and flat[0]:
        runs.insert(0, 0)
    return {"size": [int(side) for side in np.shape(mask_HW)], "counts": _compressed(runs)}


def mask_text(mask_HW: np.ndarray) -> str:
    """A mask as an answer holds it."""
    return json.dumps(run_lengths(mask_HW))


def find_mask(text: str) -> np.ndarray | None:
    """The last mask in an answer, (H, W) bool; None without one.

    Raises
    ------
    ValueError
        If it is there and is none: not JSON, no size, runs that do not fill it.
    """
    found = _FOUND.findall(text)
    if not found:
        return None
    content = json.loads(found[-1])
    size, counts = content.get("size"), content["counts"]
    whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if not whole:
        raise ValueError(f"a mask of size {size!r}: expected [height, width]")
    if isinstance(counts, str):
        counts = _expanded(counts)
    good = isinstance(counts, list) and all(type(run) is int and run >= 0 for run in counts)
    if not good or sum(counts) != size[0] * size[1]:
        raise ValueError(f"a mask whose runs do not fill {size[0]} x {size[1]} pixels")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size, order="F")


def _compressed(runs: Sequence[int]) -> str:
    """Six bits a character, from the fourth run on as the difference to the one before the last."""
    out = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            part, value = value & 0x1F, value >> 5
            more = value != (-1 if part & 0x10 else 0)
            out.append(chr(48 + (part | 0x20 if more else part)))
    return "".join(out)


def _expanded(text: str) -> list[int]:
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        part = ord(letter) - 48
        if not 0 <= part < 64:
            raise ValueError(f"a mask's run lengths hold {letter!r}")
        value |= (part & 0x1F) << shift
        shift += 5
        if not part & 0x20:
            if part & 0x10:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("a mask's run lengths break off")
    return runs


def filled_polygon(points: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: what ``cv2.polylines`` (closed, one pixel wide) and ``cv2.fillPoly`` paint together.

    The inside is that of the even-odd rule, its outline included; a polygon without area is a line or a dot,
    and what lies outside the image is cut off.

    Parameters
    ----------
    points
        Corners (x, y) in pixels; fractions are cut off, as ``dtype=np.int32`` does.
    size
        Height and width.
    """
    height, width = size
    corners = np.trunc(np.asarray(points, dtype=np.float64)).astype(np.int64).tolist()
    mask = np.zeros(size, dtype=bool)
    edges = []
    for start, end in zip([corners[-1], *corners[:-1]], corners, strict=True):
        first, last, seen = _clipped(start, end, width - 1, height - 1)
        if seen:
            _draw(mask, first, last)
        if start[1] != end[1]:
            edges.append(_edge(start, end, first, last))
    _fill(mask, np.array(edges, dtype=np.int64).reshape(-1, 4))
    return mask


def _clipped(start: Sequence[int], end: Sequence[int], right: int, bottom: int) -> tuple[list, list, bool]:
    """Both ends of a line, moved onto the image's border where they lie outside, and whether it shows."""
    ends = [list(start), list(end)]
    for axis, far in ((1, bottom), (0, right)):
        sides = [_side(point, right, bottom) for point in ends]
        if sides[0] & sides[1] or not (sides[0] | sides[1]):
            break
        for i in (0, 1):
            point = ends[i]
            if not 0 <= point[axis] <= far:
                border = 0 if point[axis] < 0 else far
                span = ends[1][axis] - ends[0][axis], ends[1][1 - axis] - ends[0][1 - axis]
                point[1 - axis] += int(float(border - point[axis]) * span[1] / span[0])
                point[axis] = border
    return ends[0], ends[1], not any(_side(point, right, bottom) for point in ends)


def _side(point: Sequence[int], right: int, bottom: int) -> int:
    """On which sides of the image a point lies; 0 inside."""
    x, y = point
    return (x < 0) + 2 * (x > right) + 4 * (y < 0) + 8 * (y > bottom)


def _edge(start: list, end: list, first: list, last: list) -> tuple[int, int, int, int]:
    """First row, row behind the last, x there and its growth a row; the slope is that of the clipped line."""
    if first[1] == last[1]:
        first, last = start, end
    rise = (last[0] - first[0]) << _SHIFT
    rows = last[1] - first[1]
    slope = abs(rise) // abs(rows) * (1 if (rise < 0) == (rows < 0) else -1)  # as C divides, towards zero
    upper, there, below = (start, first, end) if start[1] < end[1] else (end, last, start)
    return upper[1], below[1], (there[0] << _SHIFT) + (upper[1] - there[1]) * slope, slope


def _draw(mask: np.ndarray, start: Sequence[int], end: Sequence[int]) -> None:
    """The line of OpenCV's 8-connected iterator, which goes from left to right; both ends are inside."""
    (x0, y0), (x1, y1) = (start, end) if start[0] <= end[0] else (end, start)
    dx, dy = x1 - x0, y1 - y0
    down = 1 if dy >= 0 else -1
    long, short = max(dx, abs(dy)), min(dx, abs(dy))
    steps = np.arange(long + 1)
    aside = -((long - 2 * short * steps) // (2 * long)) if long else steps
    x, y = (x0 + steps, y0 + down * aside) if dx >= abs(dy) else (x0 + aside, y0 + down * steps)
    mask[y, x] = True


def _fill(mask: np.ndarray, edges_E4: np.ndarray) -> None:
    """Row by row between pairs of edges, x in 16 bits behind the point and rounded to the nearest pixel."""
    if not len(edges_E4):
        return
    top, bottom, x, slope = edges_E4.T
    for row in range(max(0, int(top.min())), min(mask.shape[0], int(bottom.max()))):
        crossed = (top <= row) & (row < bottom)
        at = np.sort(x[crossed] + slope[crossed] * (row - top[crossed]))
        for left, right in ((at + _ONE // 2) >> _SHIFT).reshape(-1, 2).tolist():
            mask[row, max(left, 0) : max(right + 1, 0)] = True
