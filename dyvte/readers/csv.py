"""Comma-separated files with a header, as spreadsheets write them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from dyvte.errors import DataError
from dyvte.readers.rows import Row, read_text


def read_csv(path: Path) -> list[Row]:
    """The records of a file; empty cells are None, quoted ones may hold commas and line breaks.

    Raises
    ------
    DataError
        Unreadable, or a row of another width than the header.
    """
    try:
        lines = [line for line in csv.reader(io.StringIO(read_text(path), newline="")) if line]
    except csv.Error as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not lines:
        return []
    header, rows = lines[0], []
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise DataError(f"{path}, record {number}: {len(line)} columns, expected {len(header)}")
        values = {name: cell or None for name, cell in zip(header, line, strict=True)}
        rows.append(Row(values, f"{path}, record {number}"))
    return rows
