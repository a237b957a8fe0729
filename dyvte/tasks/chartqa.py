"""ChartQA: questions about charts (Masry et al., 2022), the test questions of people and of machines.

The rule is relaxed accuracy, see :mod:`dyvte.tasks.answers.relaxed`, on answers without outer blanks, in all
three dialects. A full stop behind a number does no harm, one behind a word makes it wrong.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.readers.files import ImageFolder, find_file, find_folder, table_image
from dyvte.readers.rows import Row, read_rows
from dyvte.tasks.answers.relaxed import relaxed_match
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.metrics import breakdown, percent
from dyvte.tasks.records import ImageSource

_SPLITS = {"human": "test_human.json", "augmented": "test_augmented.json"}
_AS_SPLIT = {
    "human_test": "human",
    "test_human": "human",
    "0": "human",
    "augmented_test": "augmented",
    "test_augmented": "augmented",
    "1": "augmented",
}


@TASKS.register
class ChartQA(Benchmark):
    """Both halves of the test split."""

    name = "chartqa"
    title = "ChartQA"
    score_name = "relaxed accuracy, %"
    submission_name = "chartqa_answers.json"
    expected_tree = (
        "  <root>/test/                     release (also <root>/ChartQA Dataset/test/, or test/ itself)\n"
        "    test_human.json, test_augmented.json\n"
        "    png/<imgname>\n"
        "  or <root>/data/test-*.parquet\n"
        "  or <root>/ChartQA_TEST.tsv"
    )
    tables = ("ChartQA_TEST.tsv", "*chartqa*.tsv")
    shards = ("data/test-*.parquet", "*.parquet")
    columns = (("question", "query"), ("answer", "label"))
    shard_columns = (("type", "human_or_machine"),)

    def sources(self):
        """The release, tables."""
        return self._release, self.table

    def _release(self, root: Path) -> list[Question] | None:
        questions: list[Question] = []
        for split, name in _SPLITS.items():
            path = find_file(root, name, f"test/{name}", f"ChartQA Dataset/test/{name}")
            if path is None:
                continue
            images = ImageFolder(find_folder(path, "png", "images"))
            for number, row in enumerate(read_rows(path)):
                image_id = row.text("imgname")
                image = images.of(row, image_id)
                questions.append(_question(row, f"{split}_{number}", image, image_id, split))
        return questions or None

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """Of the halves, which parquet names by ``type`` or ``human_or_machine``, the TSV by ``split``."""
        split = row.identity("type", "human_or_machine", "split", default="")
        identity = row.identity("index", "id", default=str(number - 1))
        image, name = table_image(row, base, identity)
        image_id = row.identity("imgname", "image_path", default=name)
        return _question(row, identity, image, image_id, _AS_SPLIT.get(split, split))

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Relaxed match; VLMEvalKit takes a gold answer that reads as a Python list for several."""
        return [
            any(relaxed_match(predictions.texts[q.id].strip(), gold) for gold in _golds(q, dialect))
            for q in questions
        ]

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """Relaxed accuracy in percent, over all and by half."""
        return {"accuracy": percent(hits), "per_split": breakdown([q.kind for q in questions], hits)}

    def stratum(self, question: Question) -> str:
        """The halves were drawn apart."""
        return question.kind


def _question(row: Row, identity: str, image: ImageSource | None, image_id: str, split: str) -> Question:
    return Question(
        id=identity,
        image=image,
        text=row.text("question", "query"),
        answer=_gold(row),
        image_id=f"{split}/{image_id}",
        kind=split,
    )


def _gold(row: Row) -> str:
    """One answer, which a parquet of the data set keeps as a list of one."""
    if not isinstance(row.need("answer", "label"), list):
        return row.text("answer", "label")
    golds = row.texts("answer", "label")
    if len(golds) != 1 or golds[0] is None:
        raise row.error(f"{len(golds)} gold answers, expected one")
    return golds[0]


def _golds(question: Question, dialect: str) -> list[str]:
    gold = str(question.answer)
    if dialect == "vlmevalkit":
        try:
            listed = ast.literal_eval(gold)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return [gold]
        if isinstance(listed, list):
            return [str(one) for one in listed]
    return [gold]
