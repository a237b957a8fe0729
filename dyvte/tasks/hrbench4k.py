"""HR-Bench at 4K: perception in images of high resolution (Wang et al., 2024), multiple choice, four cycles.

Every question is asked once for each order of its options; the figure is the mean over these cycles.
Sources: the first step of ``lmms_eval/tasks/hrbench/hrbench_evals.py``, HR-Bench's own evaluation
(``original``, ``lmms``); ``vlmeval/dataset/utils/hrbench.py`` with exact matching (``vlmevalkit``). Where a
language model would be asked for the option meant, the answer counts as wrong, and in ``num_unread``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.readers.files import table_images
from dyvte.readers.rows import Row
from dyvte.tasks.answers.choices import hrbench_letter, vlmevalkit_letter, with_options
from dyvte.tasks.base import TASKS, Predictions, Question
from dyvte.tasks.choices import ChoiceBenchmark, gold_letter, lettered_options
from dyvte.tasks.metrics import breakdown, percent
from dyvte.tasks.statistics import Statistic, all_right, mean_over_parts


@TASKS.register
class HRBench4K(ChoiceBenchmark):
    """Images of about 4,000 pixels a side."""

    name = "hrbench4k"
    title = "HR-Bench 4K"
    unit = "question"
    submission_name = "hrbench4k_answers.json"
    expected_tree = "  <root>/hr_bench_4k.tsv      (or HRBench4K.tsv)\n  or <root>/hr_bench_4k.parquet"
    tables = ("hr_bench_4k.tsv", "HRBench4K.tsv", "*hr*bench*4k*.tsv")
    shards = ("hr_bench_4k*.parquet", "*/hr_bench_4k*.parquet")
    columns = (("question",), ("answer",), ("A",), ("category",), ("cycle_category",))

    def _check_columns(self, row: Row, path: Path) -> None:
        super()._check_columns(row, path)
        other = "8k" if self.name.endswith("4k") else "4k"
        if other in path.name.lower():
            raise DataError(f"{path} is a table of HR-Bench {other.upper()} by its name, not of {self.title}")

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """One order of a question's options; its other orders have the same question and options."""
        images = table_images(row, base)
        options, asked = lettered_options(row), row.text("question").strip()
        return Question(
            id=row.identity("index", default=str(number - 1)),
            image=images[0] if images else None,
            text=with_options(asked, options),
            answer=gold_letter(row, options),
            image_id="\n".join([asked, *sorted(options.values())]),
            kind=row.text("category"),
            details={"options": options, "cycle": row.identity("cycle_category")},
        )

    def limited(self, questions: list[Question], limit: int | None) -> list[Question]:
        """The first ``limit`` rows, then every cycle of the questions among them."""
        if limit is None:
            return questions
        kept = {q.image_id for q in questions[:limit]}
        return [q for q in questions if q.image_id in kept]

    def read(self, text: str, question: Question, dialect: str) -> str | None:
        """See :func:`~dyvte.tasks.answers.choices.hrbench_letter`."""
        options = question.details["options"]
        if dialect == "vlmevalkit":
            return vlmevalkit_letter(text, options)
        return hrbench_letter(text.strip(), options)

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """The mean over cycles of the accuracy in percent, over all and by category."""
        cycles = [q.details["cycle"] for q in questions]
        units = [q.image_id for q in questions]
        return {
            "accuracy": _over_cycles(cycles, hits),
            **{
                f"accuracy_{kind}": _over_cycles(
                    [cycle for cycle, q in zip(cycles, questions, strict=True) if q.kind == kind],
                    [hit for hit, q in zip(hits, questions, strict=True) if q.kind == kind],
                )
                for kind in dict.fromkeys(q.kind for q in questions)
            },
            "accuracy_all_cycles": percent(all_right(units, hits).tolist()),
            "num_unread": sum(self.read(predictions.texts[q.id], q, dialect) is None for q in questions),
        }

    def statistic(self, questions: Sequence[Question], hits: Sequence[float]) -> Statistic:
        """The mean over cycles; a question is drawn with all of its own."""
        cycles = [q.details["cycle"] for q in questions]
        return mean_over_parts([q.image_id for q in questions], hits, cycles)


def _over_cycles(cycles: Sequence[str], hits: Sequence[bool]) -> float:
    own = breakdown(cycles, hits).values()
    return sum(one["accuracy"] for one in own) / len(own) if own else 0.0
