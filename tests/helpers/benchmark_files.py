"""Mini benchmarks on disk, in every format that the loaders read, with the same questions in each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.helpers.benchmark_parts import (
    CHOICES,
    HUMANS,
    LETTER,
    LETTERS,
    SHORT,
    SIZE,
    YES_NO,
    lettered,
    lines,
    picture,
    put,
    put_parquet,
    put_tsv,
    rendered,
    text64,
)
from tests.helpers.minis import boxes, choices, clips, details, documents, words, yes_no
from tests.helpers.minis.choices import mmbench_rows
from tests.helpers.minis.clips import put_frames, put_gif
from tests.helpers.minis.yes_no import ASK, MME_PAIRS, MME_SPLIT

__all__ = [
    "ASK",
    "CASES",
    "CHOICES",
    "HUMANS",
    "LETTER",
    "LETTERS",
    "MME_PAIRS",
    "MME_SPLIT",
    "SHORT",
    "SIZE",
    "WRITERS",
    "YES_NO",
    "lettered",
    "lines",
    "mmbench_rows",
    "picture",
    "put",
    "put_frames",
    "put_gif",
    "put_parquet",
    "put_tsv",
    "rendered",
    "text64",
    "write_benchmark",
]

WRITERS: dict[str, dict[str, Callable[[Path], None]]] = {
    name: forms
    for kind in (words, choices, yes_no, clips, documents, details, boxes)
    for name, forms in kind.WRITERS.items()
}
"""By benchmark and format."""

CASES = [(name, form) for name, forms in WRITERS.items() for form in forms]


def write_benchmark(root: Path, name: str, form: str) -> Path:
    """Write a mini benchmark and return where it is."""
    root.mkdir(parents=True, exist_ok=True)
    WRITERS[name][form](root)
    return root
