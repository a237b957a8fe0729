"""OCRBench: reading text in images (Liu et al., 2024), 1,000 questions of ten kinds.

An answer is right if it contains a gold answer. Sources: ``OCRBench/example.py`` of MultimodalOCR
(``original``);
``lmms_eval/tasks/ocrbench/utils.py`` (``lmms``: full-width letters are folded first);
``vlmeval/dataset/image_vqa.py``, ``OCRBench`` (``vlmevalkit``: knows handwritten formulas, in which blanks do
not count, by the kind of question and not by the data set they came from).

The benchmark's figure is the number of right answers of 1,000: ten times ``accuracy`` on the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.readers.files import ImageFolder, find_file, find_folder, table_image
from dyvte.readers.rows import Row, read_rows
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.metrics import breakdown, percent
from dyvte.tasks.predictions import read_submitted
from dyvte.tasks.records import ImageSource

FORMULAS = "Handwritten Mathematical Expression Recognition"
_FORMULA_SET = "HME100k"
RECOGNITION = (
    *("Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition"),
    *("Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition"),
)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


@TASKS.register
class OCRBench(Benchmark):
    """All ten kinds."""

    name = "ocrbench"
    title = "OCRBench"
    suffix = ""
    max_new_tokens = 128
    submission_name = "ocrbench_results.json"
    expected_tree = (
        "  <root>/                          release\n"
        "    OCRBench.json                  (or OCRBench/OCRBench.json)\n"
        "    OCRBench_Images/<image_path>\n"
        "  or <root>/data/test-*.parquet\n"
        "  or <root>/OCRBench.tsv"
    )
    tables = ("OCRBench.tsv", "*ocrbench*.tsv")
    shards = ("data/test-*.parquet", "*.parquet")
    columns = (("question",), ("answer",), ("question_type", "category"))
    shard_columns = ("dataset", "question_type")

    def sources(self):
        """The release, tables."""
        return self._release, self.table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "OCRBench.json", "OCRBench/OCRBench.json")
        if path is None:
            return None
        folders = ("OCRBench_Images", "../OCRBench_Images", "images")
        images = ImageFolder(find_folder(path.parent, *folders))
        questions = []
        for number, row in enumerate(read_rows(path)):
            name = row.text("image_path")
            identity = row.identity("id", default=str(number))
            questions.append(_question(row, identity, images.of(row, name), name))
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """Parquet names the data set, the TSV the kind alone."""
        identity = row.identity("index", "id", default=str(number - 1))
        return _question(row, identity, *table_image(row, base, identity))

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Contains a gold answer."""
        return [contains(predictions.texts[q.id], q, dialect) for q in questions]

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """Accuracy in percent, the number of right answers, and both over kinds."""
        kinds = [q.kind for q in questions]
        recognised = [hit for kind, hit in zip(kinds, hits, strict=True) if kind in RECOGNITION]
        return {
            "accuracy": percent(hits),
            "num_right": sum(hits),
            "text_recognition": percent(recognised),
            "per_kind": breakdown(kinds, hits),
        }

    def stratum(self, question: Question) -> str:
        """The number of questions of each kind was set."""
        return question.kind

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """The release's records with the field ``predict`` that its example fills in."""
        return [
            {
                "id": q.id,
                "dataset_name": q.details["dataset"],
                "type": q.kind,
                "question": q.text,
                "answers": list(q.details["answers"]),
                "predict": predictions.texts[q.id].strip(),
            }
            for q in questions
        ]

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Records with ``predict``."""
        return read_submitted(path, "id", "predict", "answer")


def contains(text: str, question: Question, dialect: str) -> bool:
    """Whether an answer holds one of the gold answers, as the tool of ``dialect`` looks for them."""
    in_formula = question.details["dataset"] == _FORMULA_SET
    if dialect == "vlmevalkit":
        in_formula = question.kind == FORMULAS
    found = _plain(text, in_formula, dialect)
    return any(_plain(answer, in_formula, dialect) in found for answer in question.details["answers"])


def _plain(text: str, in_formula: bool, dialect: str) -> str:
    if in_formula:
        return text.strip().replace("\n", " ").replace(" ", "")
    folded = text.translate(_FULL_WIDTH) if dialect == "lmms" else text
    return folded.lower().strip().replace("\n", " ")


def _question(row: Row, identity: str, image: ImageSource | None, image_id: str) -> Question:
    kind = row.text("question_type", "type", "category")
    answers = tuple(gold for gold in row.several("answers", "answer") if gold is not None and gold.strip())
    if not answers:
        raise row.error("no gold answer but empty ones, which every text contains")
    default = _FORMULA_SET if kind == FORMULAS else ""
    return Question(
        id=identity,
        image=image,
        text=row.text("question"),
        answer=answers[0],
        image_id=image_id,
        kind=kind,
        details={"answers": answers, "dataset": row.text("dataset", "dataset_name", default=default)},
    )
