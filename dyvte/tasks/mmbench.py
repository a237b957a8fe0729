"""MMBench, English (Liu et al., 2023): multiple choice with circular evaluation.

A question is asked once for every rotation of its options and counts only if all are right. The release's TSV
holds the rotations as rows of their own, index + 1,000,000 for each step; all rows are asked. Where a file
holds unrotated rows only (LLaVA asks such files once), the figure is over those and ``circular`` says so.

Sources: ``lmms_eval/tasks/mmbench/mmbench_evals.py``, whose first step is the evaluation of the MMBench paper
(``original``) and whose static mode goes on with ``mcq_extract.py`` (``lmms``);
``vlmeval/dataset/utils/multiple_choice.py``, ``mcq_circular_eval`` with exact matching (``vlmevalkit``).
Where the paper's evaluation would ask a language model for the option meant, the answer counts as wrong and
is counted in ``num_unread``: no model is asked here. Test splits have no public answers: the workbook for the
server is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.tasks.answers.choices import (
    lettered,
    lmms_letter,
    mmbench_letter,
    options_of,
    vlmevalkit_letter,
    with_options,
)
from dyvte.tasks.base import LETTER_SUFFIX, Predictions, Question, percent
from dyvte.tasks.common import StandardBenchmark, breakdown
from dyvte.tasks.readers.files import need, table_rows
from dyvte.tasks.readers.xlsx import write_xlsx
from dyvte.tasks.statistics import Statistic, all_right, mean_statistic

_ROTATION = 1_000_000


class MMBench(StandardBenchmark):
    """MMBench-EN, dev (scored here) and test (submission only)."""

    name = "mmbench"
    title = "MMBench"
    unit = "question"
    suffix = LETTER_SUFFIX
    submission_name = "mmbench_submission.xlsx"
    expected_tree = (
        "  <root>/mmbench_dev_20230712.tsv     (LLaVA's), MMBench_DEV_EN.tsv or MMBench_TEST_EN.tsv\n"
        "  or <root>/en/dev-*.parquet          (or data/)"
    )

    def sources(self):
        """Tables only: the release is one."""
        return (self._table,)

    def _table(self, root: Path) -> list[Question] | None:
        tsv = ("MMBench_DEV_EN*.tsv", "mmbench_dev_2*.tsv", "MMBench_TEST_EN*.tsv", "mmbench_test_en*.tsv")
        parquet = (
            "en/dev-*.parquet",
            "data/dev-*.parquet",
            "dev-*.parquet",
            "en/test-*.parquet",
            "*.parquet",
        )
        rows = table_rows(root, (*tsv, "*.tsv"), parquet)
        if rows is None:
            return None
        questions = []
        for number, row in enumerate(rows, start=1):
            need(row, ("index", "question", "image", "A"), root, number)
            questions.append(
                _question({**row, "l2-category": row.get("l2-category", row.get("L2-category"))})
            )
        _refuse_lost_rotations(questions, root)
        return questions

    def limited(self, questions: list[Question], limit: int | None) -> list[Question]:
        """The first ``limit`` rows, then every rotation of the questions among them."""
        if limit is None:
            return questions
        groups = {q.details["group"] for q in questions[:limit]}
        return [q for q in questions if q.details["group"] in groups]

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Each row by itself: read letter equals gold."""
        return [
            read_answer(predictions.texts[q.id], q.details["options"], dialect) == q.answer for q in questions
        ]

    def figures(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """Circular accuracy in percent, and that of the unrotated rows (``vanilla_accuracy``)."""
        groups: dict[str, list[bool]] = defaultdict(list)
        for q, hit in zip(questions, hits, strict=True):
            groups[q.details["group"]].append(hit)
        main = {q.details["group"]: q for q in questions if q.id == q.details["group"]}
        all_right = [all(groups[group]) for group in main]
        by_id = dict(zip((q.id for q in questions), hits, strict=True))
        return {
            "accuracy": percent(all_right),
            "circular": any(len(own) > 1 for own in groups.values()),
            "vanilla_accuracy": percent([by_id[group] for group in main]),
            "num_circular_groups": len(main),
            "num_unread": sum(
                read_answer(predictions.texts[q.id], q.details["options"], dialect) is None for q in questions
            ),
            "per_category": breakdown([q.kind for q in main.values()], all_right),
            "per_l2_category": breakdown([q.details["row"]["l2-category"] for q in main.values()], all_right),
        }

    def statistic(self, questions: Sequence[Question], hits: Sequence[float]) -> Statistic:
        """Circular accuracy: a question is right where all its rotations are."""
        units = [q.image_id for q in questions]
        return mean_statistic(list(dict.fromkeys(units)), all_right(units, hits).tolist())

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write the workbook for MMBench's server: index, question, options, answer, prediction."""
        columns = ["index", "question", "A", "B", "C", "D"]
        rows: list[list[Any]] = [[*columns, "answer", "prediction"]]
        for q in questions:
            cells = [q.details["row"].get(column) for column in columns]
            rows.append([int(q.id), *map(_text, cells[1:]), q.answer, predictions.texts[q.id].strip()])
        return write_xlsx(Path(folder) / self.submission_name, rows)


def read_answer(text: str, options: Sequence[str], dialect: str) -> str | None:
    """The letter a tool finds, None where it finds none."""
    chosen = lettered(options)
    if dialect == "vlmevalkit":
        return vlmevalkit_letter(text.strip(), chosen)
    letter = mmbench_letter(text.strip(), chosen)
    if letter is None and dialect == "lmms":
        return lmms_letter(text.strip(), list(chosen)) or None
    return letter


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _refuse_lost_rotations(questions: Sequence[Question], where: Path) -> None:
    there = {q.id for q in questions}
    lost = sorted({q.details["group"] for q in questions} - there)
    if lost:
        raise DataError(f"{where}: rotations of questions that are not there: {', '.join(lost[:5])}")


def _question(row: Mapping[str, Any]) -> Question:
    index = int(row["index"])
    options = options_of(row)
    hint = row.get("hint")
    hint = None if hint is None or str(hint).lower() in ("nan", "none", "") else hint
    text = with_options(f"{hint}\n{row['question']}" if hint else row["question"], options)
    group = str(int(row["g_index"]) if row.get("g_index") is not None else index % _ROTATION)
    answer = row.get("answer")
    if answer is not None and answer not in lettered(options):
        raise DataError(f"question {index}: gold answer {answer!r} is none of {len(options)} options")
    kept = ("index", "question", "A", "B", "C", "D", "l2-category")
    return Question(
        id=str(index),
        image=row["image"],
        text=text,
        answer=answer,
        image_id=group,
        kind=str(row.get("category") or ""),
        details={"options": options, "group": group, "row": {key: row.get(key) for key in kept}},
    )
