"""The scenes' questions as VLMEvalKit's tables."""

from __future__ import annotations

import base64
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.tasks.base import Question, get_benchmark


def write_tables(scenes: Path, folder: Path) -> dict[str, Path]:
    """``GQA_scenes.tsv`` and ``MME_scenes.tsv`` in a folder, by benchmark.

    The names hold GQA and MME, by which VLMEvalKit chooses how it scores, and are not in its tables of
    checksums. Their indices are numbers that are not counted from 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return {
        name: _write(name, get_benchmark(name).load(scenes / f"mini_{name}"), folder)
        for name in ("gqa", "mme")
    }


def _write(name: str, questions: Sequence[Question], folder: Path) -> Path:
    path = folder / f"{name.upper()}_scenes.tsv"
    rows = [_row(name, 100 + 3 * number, question) for number, question in enumerate(questions)]
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _row(name: str, index: int, question: Question) -> dict[str, Any]:
    (image,) = question.images
    encoded = base64.b64encode(image.read_bytes()).decode()
    row = {"index": index, "image": encoded, "question": question.text, "answer": question.answer}
    if name == "mme":
        named = question.image_id.replace("/", "_") + ".png"
        row |= {"category": question.kind, "image_path": named}
    return row
