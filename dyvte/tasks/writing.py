"""Files for the benchmarks' own tools and servers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.files import write_atomically


def write_json(path: Path, content: Any) -> Path:
    """Write JSON, non-ASCII characters as they are.

    Parameters
    ----------
    path
        Of the file.
    content
        JSON-ready.
    """
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return path


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line; lines end with ``\\n`` only.

    Parameters
    ----------
    path
        Of the file.
    rows
        JSON-ready.
    """
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def number_or_text(question_id: str) -> int | str:
    """An id as the release writes it: a number where it is one."""
    return int(question_id) if question_id.isdecimal() and question_id == _plain(question_id) else question_id


def _plain(digits: str) -> str:
    """The digits as Python writes that number: ASCII, no leading zero."""
    return str(int(digits)) if len(digits) < 19 else ""
