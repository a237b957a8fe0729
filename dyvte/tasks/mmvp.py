"""MMVP: pairs of images that CLIP takes for alike (Tong et al., 2024), one question and opposite answers
each.

The figure is the share of pairs with both answers right. The authors have a language model compare answers
(``scripts/gpt_grader.py``); ``original`` wants the letter alone, in any case, brackets and a full stop
aside. ``lmms``: ``lmms_eval/tasks/mmvp/utils.py``; ``vlmevalkit``: exact matching and ``report_acc_MMVP``.
Two pairs of the release (99 and 100, 279 and 280) have their answers the wrong way round; the parquet has
them put right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.formatting import name_some
from dyvte.readers.csv import read_csv
from dyvte.readers.files import ImageFolder, find_file, find_folder, table_images
from dyvte.readers.rows import Row, read_jsonl
from dyvte.tasks.answers.choices import LETTERS, cut_options, vlmevalkit_letter, with_options
from dyvte.tasks.base import TASKS, Predictions, Question
from dyvte.tasks.choices import ChoiceBenchmark, checked_letter, lettered_options
from dyvte.tasks.metrics import percent
from dyvte.tasks.predictions import collected
from dyvte.tasks.records import ImageSource
from dyvte.tasks.statistics import Statistic, all_right, mean_statistic
from dyvte.tasks.writing import number_or_text, write_jsonl

_LETTER_PLACES = (
    r"^\s*\(?([AB])\)?\.?\s*$",
    r"^\s*\(?([AB])\)?[\.\s]",
    r"answer\s+is\s+\(?([AB])\)?",
    r"option\s+\(?([AB])\)?",
    r"\(?([AB])\)?(?:\s|$)",
)


@TASKS.register
class MMVP(ChoiceBenchmark):
    """150 pairs."""

    name = "mmvp"
    title = "MMVP"
    unit = "pair"
    score_name = "pairs, %"
    headline_metrics = ("pair_accuracy",)
    submission_name = "mmvp_answers.jsonl"
    expected_tree = (
        "  <root>/                          release\n"
        "    Questions.csv\n"
        "    MMVP Images/<n>.jpg            (or images/)\n"
        "  or <root>/data/train-*.parquet\n"
        "  or <root>/MMVP.tsv"
    )
    tables = ("MMVP.tsv", "*mmvp*.tsv")
    shards = ("data/train-*.parquet", "data/test-*.parquet", "*.parquet")
    columns = (("Question", "question"), ("Options", "A"), ("Correct Answer", "answer"))
    shard_columns = ("Correct Answer",)

    def sources(self):
        """The release, tables."""
        return self._release, self.table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "Questions.csv")
        if path is None:
            return None
        images = ImageFolder(find_folder(path, "MMVP Images", "images"), (".jpg", ".png"))
        rows = read_csv(path)
        for names in self.columns if rows else ():
            if rows[0].value(*names) is None:
                raise rows[0].error(f"no {' or '.join(map(repr, names))}")
        return _paired(
            path, [_question(row, n, images.of(row, str(n))) for n, row in enumerate(rows, start=1)]
        )

    def table(self, root: Path) -> list[Question] | None:
        """Also refuses pairs that are none."""
        questions = super().table(root)
        return None if questions is None else _paired(root, questions)

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """Parquet has the fields of the release, the TSV has columns A and B."""
        images = table_images(row, base)
        return _question(row, number, images[0] if images else None)

    def limited(self, questions: list[Question], limit: int | None) -> list[Question]:
        """The first ``limit`` questions, and the other of the last pair."""
        return questions if limit is None else questions[: limit + limit % 2]

    def read(self, text: str, question: Question, dialect: str) -> str | None:
        """See :func:`read_answer`."""
        return read_answer(text, question.details["options"], dialect)

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """Pairs with both answers right, and questions, in percent."""
        both = all_right([q.image_id for q in questions], hits)
        return {"pair_accuracy": percent(both.tolist()), "accuracy": percent(hits), "num_pairs": len(both)}

    def statistic(self, questions: Sequence[Question], hits: Sequence[float]) -> Statistic:
        """Pairs with both answers right."""
        units = [q.image_id for q in questions]
        return mean_statistic(list(dict.fromkeys(units)), all_right(units, hits).tolist())

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write the lines that ``gpt_grader.py`` reads, and the question's number."""
        rows = [
            {
                "question_id": number_or_text(q.id),
                "prompt": q.text,
                "answer": f"({str(q.answer).lower()})",
                "response": predictions.texts[q.id].strip(),
            }
            for q in questions
        ]
        return write_jsonl(Path(folder) / self.submission_name, rows)

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Also lines with ``response``."""
        path = Path(path)
        rows = read_jsonl(path) if path.suffix.lower() == ".jsonl" else []
        if rows and all("response" in row for row in rows):
            return collected(rows, ("question_id",), ("response",), converted=True)
        return super().read_predictions(path, questions)


def read_answer(text: str, options: dict[str, str], dialect: str) -> str | None:
    """The letter a tool finds; what is no letter equals none."""
    if dialect == "vlmevalkit":
        return vlmevalkit_letter(text, options)
    if dialect == "original":
        return text.strip().rstrip(".").removeprefix("(").removesuffix(")").upper()
    text = text.strip()
    found = (re.search(place, text, re.IGNORECASE) for place in _LETTER_PLACES)
    letter = next((match[1] for match in found if match), text[:1])
    return letter.upper() if letter.upper() in ("A", "B") else None


def _question(row: Row, number: int, image: ImageSource | None) -> Question:
    stated = row.text("Options", "options", default=None)
    options = cut_options(stated, r"\({}\)\s*", LETTERS.lower())[1] if stated else lettered_options(row)
    if not options:
        raise row.error(f"options {stated!r} are not of the form (a) one (b) other")
    gold = row.text("Correct Answer", "answer").strip().strip("()").upper()
    return Question(
        id=row.identity("Index", "index", default=str(number)),
        image=image,
        text=with_options(row.text("Question", "question").strip(), options),
        answer=checked_letter(row, gold, options),
        image_id=f"pair {(number + 1) // 2}",
        kind="",
        details={"options": options, "question": row.text("Question", "question").strip()},
    )


def _paired(path: Path, questions: list[Question]) -> list[Question]:
    """The questions, if every two one after the other ask the same."""
    asked: dict[str, list[str]] = {}
    for q in questions:
        asked.setdefault(q.image_id, []).append(q.details["question"])
    odd = [pair for pair, own in asked.items() if len(own) != 2 or own[0] != own[1]]
    if odd:
        raise DataError(f"{path}: {len(odd)} pairs are not two rows with the same question: {name_some(odd)}")
    return questions
