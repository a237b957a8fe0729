"""How numbers and tables are written as text, everywhere alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

_NAMED_AT_MOST = 5


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source is aligned too."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def percentage(share: float | None) -> str:
    """A share in percent with one decimal; a dash where there is none."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 2) -> str:
    """A figure with fixed decimals; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def name_some(items: Iterable[str]) -> str:
    """The first few items and how many more there are."""
    items = list(items)
    text = ", ".join(items[:_NAMED_AT_MOST])
    return text if len(items) <= _NAMED_AT_MOST else f"{text} and {len(items) - _NAMED_AT_MOST} more"
