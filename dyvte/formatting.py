"""How numbers and tables are written as text, everywhere alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

GIB = 2**30
"""Bytes of a GiB, in which settings give memory."""
_NAMED_AT_MOST = 5


class Difference(Protocol):
    """A difference with its interval."""

    difference: float
    low: float
    high: float


class Spread(Protocol):
    """Mean, standard deviation, least and most of a few values, such as those of seeds."""

    mean: float
    std: float
    min: float
    max: float


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source is aligned too.

    Parameters
    ----------
    header
        Of the columns.
    rows
        Text cells.
    """
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def percentage(share: float | None) -> str:
    """A share in percent with one decimal; a dash where there is none."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 2) -> str:
    """A value with fixed decimals; a dash where there is none.

    Parameters
    ----------
    value
        None and nan have no digits.
    digits
        Behind the point.
    """
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def name_some(items: Iterable[str]) -> str:
    """The first few items and how many more there are."""
    items = list(items)
    text = ", ".join(items[:_NAMED_AT_MOST])
    return text if len(items) <= _NAMED_AT_MOST else f"{text} and {len(items) - _NAMED_AT_MOST} more"


def difference_text(found: Difference, digits: int = 2, *, scale: float = 1.0) -> str:
    """A difference with its interval: "+1.72 [+0.67, +2.78]".

    Parameters
    ----------
    found : the difference.
    digits : decimals.
    scale : what values are multiplied with before: 100 for shares in percent.
    """
    low, high = scale * found.low, scale * found.high
    return f"{scale * found.difference:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def spread_text(found: Spread, digits: int = 2, *, scale: float = 1.0) -> str:
    """A mean over seeds with its standard deviation, "98.42 ± 0.07"; the mean alone where nothing varies.

    Parameters
    ----------
    found
        Mean and deviation.
    digits
        Behind the point.
    scale
        Multiplies both, 100 for percent.
    """
    text = f"{scale * found.mean:.{digits}f}"
    return f"{text} ± {scale * found.std:.{digits}f}" if found.min < found.max else text


def significant(value: float | None, digits: int = 3) -> str:
    """A value with so many significant digits and no exponent: 0.401, 4.68, 1230; a dash where there is none.

    Digits before the point are never cut.
    """
    if value is None or math.isnan(value):
        return "-"
    if value == 0:
        return "0"
    before = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}")))) + 1
    return f"{value:.{max(0, digits - before)}f}"


@dataclass(frozen=True)
class Unit:
    """A unit in which a column of a table is written: divide by ``size``."""

    name: str
    size: float

    def text(self, value: float | None) -> str:
        """The value in this unit, three significant digits."""
        return significant(None if value is None else value / self.size)


def flops_unit(flops: Iterable[float]) -> Unit:
    """The unit for a column of FLOPs: TFLOPs where the largest is at least one of them, else GFLOPs."""
    largest = max((one for one in flops if not math.isnan(one)), default=0.0)
    return Unit("TFLOPs", 1e12) if largest >= 1e12 else Unit("GFLOPs", 1e9)
