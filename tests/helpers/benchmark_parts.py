"""Pieces of mini benchmarks on disk: images, JSON, tables with images inside, shared questions."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = 16
CHOICES = (
    ("what color is the circle ?", ("red", "blue", "green", "white"), "B"),
    ("how many objects are there ?", ("one", "two", "three", "four"), "A"),
    ("what is left of the square ?", ("a cat", "the dog", "one house", "tree"), "D"),
)
YES_NO = (
    ("Is there a dog in the image?", "yes"),
    ("Is there a cat in the image?", "no"),
    ("Is there a red circle in the image?", "yes"),
    ("Is there a tree in the image?", "no"),
)
HUMANS = (
    ("what does the sign say ?", ["stop"] * 8 + ["stop sign", "halt"]),
    ("what brand is it ?", ["coca cola"] * 3 + ["coke"] * 5 + ["pepsi"] * 2),
    ("what number ?", ["2"] * 10),
)
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGH"


def picture(n: int) -> bytes:
    """A PNG of its own for every n."""
    stream = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (37 * n % 256, 91 * n % 256, 11 * n % 256)).save(stream, "PNG")
    return stream.getvalue()


def put(path: Path, content: Any) -> None:
    """Write bytes, or text, or JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def put_tsv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """As VLMEvalKit stores tables: image cells are base64, written by Python's csv module."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: text64(v) if isinstance(v, bytes) else v for k, v in row.items()})


def text64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def put_parquet(path: Path, rows: Sequence[dict[str, Any]], row_group_size: int = 2) -> None:
    """As the datasets library stores images: structs of bytes and path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)

    def cell(value: Any) -> Any:
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}
        if isinstance(value, list) and value and isinstance(value[0], bytes):
            return [cell(item) for item in value]
        return value

    table = pa.Table.from_pylist([{k: cell(v) for k, v in row.items()} for row in rows])
    pq.write_table(table, path, row_group_size=row_group_size)


def lettered(options: Sequence[str]) -> dict[str, str]:
    return dict(zip(LETTERS, options))


def rendered(question: str, options: Sequence[str]) -> str:
    return "\n".join([question, *(f"{k}. {v}" for k, v in lettered(options).items())])
