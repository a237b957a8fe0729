"""MMBench, English (Liu et al., 2023): multiple choice with circular evaluation.

A question is asked once for every rotation of its options and counts only if all are right. The release's TSV
holds the rotations as rows of their own, index + 1,000,000 for each step; all rows are asked. Where a file
holds unrotated rows only (LLaVA asks such files once), the score is over those and ``circular`` says so.

Sources: ``lmms_eval/tasks/mmbench/mmbench_evals.py``, whose first step is the evaluation of the MMBench paper
(``original``) and whose static mode goes on with ``mcq_extract.py`` (``lmms``);
``vlmeval/dataset/utils/multiple_choice.py``, ``mcq_circular_eval`` with exact matching (``vlmevalkit``).
Where the paper's evaluation would ask a language model for the option meant, the answer counts as wrong and
is counted in ``num_unread``: no model is asked here. Test splits have no public answers: the workbook for the
server is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.formatting import name_some
from dyvte.readers.files import table_images
from dyvte.readers.rows import Row
from dyvte.readers.xlsx import write_xlsx
from dyvte.tasks.answers.choices import (
    Options,
    lmms_letter,
    mmbench_letter,
    vlmevalkit_letter,
    with_options,
)
from dyvte.tasks.base import TASKS, Predictions, Question
from dyvte.tasks.choices import ChoiceBenchmark, gold_letter, lettered_options
from dyvte.tasks.metrics import breakdown, percent
from dyvte.tasks.statistics import Statistic, all_right, mean_statistic

_ROTATION = 1_000_000


@TASKS.register
class MMBench(ChoiceBenchmark):
    """MMBench-EN, dev (scored here) and test (submission only)."""

    name = "mmbench"
    title = "MMBench"
    unit = "question"
    submission_name = "mmbench_submission.xlsx"
    expected_tree = (
        "  <root>/mmbench_dev_20230712.tsv     (LLaVA's), MMBench_DEV_EN.tsv or MMBench_TEST_EN.tsv\n"
        "  or <root>/en/dev-*.parquet          (or data/)"
    )

    tables = ("MMBench_DEV_EN*.tsv", "mmbench_dev_2*.tsv", "*mmbench*.tsv")
    shards = ("en/dev-*.parquet", "data/dev-*.parquet", "dev-*.parquet", "en/test-*.parquet", "*.parquet")
    columns = (("index",), ("question",), ("A",), ("B",))
    shard_columns = (("hint", "L2-category", "l2-category"),)

    def table(self, root: Path) -> list[Question] | None:
        """Also refuses rotations whose question is not there."""
        questions = super().table(root)
        there = {q.id for q in questions or ()}
        lost = sorted({q.details["group"] for q in questions or ()} - there)
        if lost:
            raise DataError(f"{root}: rotations of questions that are not there: {name_some(lost)}")
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """One rotation of a question. The parquet writes "nan" for an option that is not there."""
        named = Row({key: None if value == "nan" else value for key, value in row.items()}, row.where)
        index = named.integer("index")
        options = lettered_options(named)
        hint = named.text("hint", default="")
        question = named.text("question")
        text = with_options(f"{hint}\n{question}" if _says_something(hint) else question, options)
        group = str(named.integer("g_index") if named.value("g_index") is not None else index % _ROTATION)
        images = table_images(named, base)
        return Question(
            id=str(index),
            image=images[0] if images else None,
            text=text,
            answer=gold_letter(named, options),
            image_id=group,
            kind=named.text("category", default=""),
            details={
                "options": options,
                # lmms-eval compares answers with these words too
                "written": {letter: str(row[letter]) for letter in "ABCD" if row.value(letter) is not None},
                "group": group,
                "question": question,
                "l2-category": named.value("l2-category", "L2-category"),
            },
        )

    def limited(self, questions: list[Question], limit: int | None) -> list[Question]:
        """The first ``limit`` rows, then every rotation of the questions among them."""
        if limit is None:
            return questions
        groups = {q.details["group"] for q in questions[:limit]}
        return [q for q in questions if q.details["group"] in groups]

    def read(self, text: str, question: Question, dialect: str) -> str | None:
        """See :func:`read_answer`; each rotation by itself."""
        options = question.details["options" if dialect == "vlmevalkit" else "written"]
        return read_answer(text, options, dialect)

    def metrics(
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
            "num_unread": sum(self.read(predictions.texts[q.id], q, dialect) is None for q in questions),
            "per_category": breakdown([q.kind for q in main.values()], all_right),
            "per_l2_category": breakdown([q.details["l2-category"] for q in main.values()], all_right),
        }

    def statistic(self, questions: Sequence[Question], hits: Sequence[float]) -> Statistic:
        """Circular accuracy: a question is right where all its rotations are."""
        units = [q.image_id for q in questions]
        return mean_statistic(list(dict.fromkeys(units)), all_right(units, hits).tolist())

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write the workbook for MMBench's server: index, question, options, answer, prediction."""
        rows: list[list[Any]] = [["index", "question", *"ABCD", "answer", "prediction"]]
        for q in questions:
            options = [q.details["options"].get(letter) for letter in "ABCD"]
            prediction = predictions.texts[q.id].strip()
            rows.append([int(q.id), q.details["question"], *options, q.answer, prediction])
        return write_xlsx(Path(folder) / self.submission_name, rows)


def read_answer(text: str, options: Options, dialect: str) -> str | None:
    """The letter a tool finds, None where it finds none.

    Parameters
    ----------
    text
        The answer.
    options
        By letter.
    dialect
        Whose rule.
    """
    if dialect == "vlmevalkit":
        return vlmevalkit_letter(text, options)
    letter = mmbench_letter(text.strip(), options)
    if letter is None and dialect == "lmms":
        return lmms_letter(text.strip(), list(options)) or None
    return letter


def _says_something(hint: str) -> bool:
    return hint.strip().lower() not in ("", "nan", "none")
