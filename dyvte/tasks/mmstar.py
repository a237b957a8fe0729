"""MMStar: multiple choice that cannot be answered without the image (Chen et al., 2024), 1,500 questions.

Sources: ``eval/vlmeval/evaluate/mmstar.py`` of MMStar (``original``: the letter at the very start, also
after "(", "option " or "the answer is "); ``lmms_eval/tasks/mmstar/utils.py`` (``lmms``);
``vlmeval/utils/matching_util.py`` with exact matching (``vlmevalkit``). lmms-eval's figure is the mean over
the finer categories, here ``accuracy_over_categories``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.readers.files import table_images
from dyvte.readers.rows import Row
from dyvte.tasks.answers.choices import cut_options, lmms_letter, vlmevalkit_letter, with_options
from dyvte.tasks.base import TASKS, Predictions, Question
from dyvte.tasks.choices import ChoiceBenchmark, gold_letter, lettered_options
from dyvte.tasks.metrics import breakdown, percent

_MARK = r"(?:\bOptions:\s*|,\s+|\n){}: "
_START = re.compile(r"(?:\(|option |the answer is )?(.)", re.DOTALL)


@TASKS.register
class MMStar(ChoiceBenchmark):
    """The val split, six categories of three finer ones."""

    name = "mmstar"
    title = "MMStar"
    unit = "question"
    submission_name = "mmstar_answers.json"
    expected_tree = "  <root>/mmstar.parquet       (or val/*.parquet)\n  or <root>/MMStar.tsv"
    tables = ("MMStar.tsv", "*mmstar*.tsv")
    shards = ("mmstar.parquet", "val/*.parquet", "data/val-*.parquet", "*.parquet")
    columns = (("question",), ("answer",), ("category",), ("l2_category", "l2-category"))

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """Parquet states the options in the question ("Options: A: ..., B: ..."), the TSV in columns."""
        images = table_images(row, base)
        identity = row.identity("index", default=str(number - 1))
        stem, options = cut_options(row.text("question").strip(), _MARK)
        if not options and row.value("A") is not None:
            options = lettered_options(row)
        read = options or dict.fromkeys("ABCD", "")  # written in a way of its own: the letters remain
        return Question(
            id=identity,
            image=images[0] if images else None,
            text=with_options(stem, options),
            answer=gold_letter(row, read),
            image_id=identity,
            kind=row.text("category"),
            details={"options": read, "category": row.text("l2_category", "l2-category")},
        )

    def read(self, text: str, question: Question, dialect: str) -> str | None:
        """See :func:`read_answer`."""
        return read_answer(text, question.details["options"], dialect)

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """Accuracy in percent, over questions, over the finer categories, and by category."""
        finer = breakdown([q.details["category"] for q in questions], hits)
        return {
            "accuracy": percent(hits),
            "accuracy_over_categories": sum(one["accuracy"] for one in finer.values()) / max(len(finer), 1),
            "per_category": breakdown([q.kind for q in questions], hits),
            "per_l2_category": finer,
        }

    def stratum(self, question: Question) -> str:
        """Every category was filled to the same number."""
        return question.kind


def read_answer(text: str, options: dict[str, str], dialect: str) -> str | None:
    """The letter a tool finds; what is no letter equals none."""
    if dialect == "vlmevalkit":
        return vlmevalkit_letter(text, options)
    if dialect == "lmms":
        return lmms_letter(text, "ABCD") or None
    found = _START.match(text.lower().strip().replace("\n", " "))
    return found[1].upper() if found else None
