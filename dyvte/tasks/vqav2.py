"""VQAv2: open questions about COCO images (Goyal et al., 2017), ten human answers each.

Sources: ``vqaEval.py`` of GT-Vision-Lab/VQA (``original``), ``lmms_eval/tasks/vqav2/utils.py`` (``lmms``:
human answers are normalised like the prediction). VLMEvalKit does not score VQAv2. The official rule
normalises the prediction fully, the human answers in their punctuation only, and only where they differ among
themselves; an answer is omitted together with those that are equal in every field, so that records without
``answer_id`` score lower. Both hold here. LLaVA's test-dev questions have no public answers: the file for the
server is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from sys import intern
from typing import Any

from dyvte.readers.files import ImageFolder, find_file, find_folder, table_image
from dyvte.readers.rows import Row, read_jsonl, read_rows, shown
from dyvte.tasks.answers.vqa import (
    evalai_answer,
    official_answer,
    one_line,
    remembering,
    soft_accuracy,
    without_punctuation,
)
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.metrics import breakdown, percent
from dyvte.tasks.prompts import strip_suffix
from dyvte.tasks.records import ImageSource
from dyvte.tasks.writing import number_or_text


@dataclass(frozen=True, slots=True)
class HumanAnswers:
    """The human answers of a question, small enough for 214,354 of them.

    Attributes
    ----------
    texts : tuple of str
    records : tuple of int, or None
        Equal numbers where all fields beside the answer are equal; None where no two are (``answer_id``).
    """

    texts: tuple[str, ...]
    records: tuple[int, ...] | None


@TASKS.register
class VQAv2(Benchmark):
    """Validation (scored here) and the test splits (submission only)."""

    name = "vqav2"
    title = "VQAv2"
    dialects = ("original", "lmms")
    submission_name = "vqav2_results.json"
    expected_tree = (
        "  <root>/                                            release\n"
        "    v2_OpenEnded_mscoco_val2014_questions.json\n"
        "    v2_mscoco_val2014_annotations.json\n"
        "    val2014/COCO_val2014_000000000042.jpg\n"
        "  or <root>/llava_vqav2_mscoco_test-dev2015.jsonl and test2015/    (no public answers)\n"
        "  or <root>/data/validation-*.parquet"
    )

    shards = ("data/validation-*.parquet", "*.parquet")
    columns = (("question",), ("question_id",), ("answers",))

    def sources(self):
        """The release, LLaVA's question file, parquet."""
        return self._release, self._llava, self.table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(
            root,
            "v2_OpenEnded_mscoco_val2014_questions.json",
            "*/v2_OpenEnded_mscoco_val2014_questions.json",
            "v2_OpenEnded_mscoco_*_questions.json",
        )
        if path is None:
            return None
        split = path.name.removeprefix("v2_OpenEnded_mscoco_").removesuffix("_questions.json")
        folder = split.replace("test-dev", "test")
        base = root if root.is_dir() else root.parent
        golds = _annotations(
            find_file(base, f"v2_mscoco_{split}_annotations.json", f"*/v2_mscoco_{split}_annotations.json")
        )
        images = ImageFolder(find_folder(root, folder, f"images/{folder}", "images"))
        questions = []
        for row in read_rows(path, "questions"):
            name, identity = f"COCO_{folder}_{row.integer('image_id'):012d}.jpg", row.identity("question_id")
            questions.append(
                _question(identity, images.of(row, name), name, row.text("question"), golds.get(identity))
            )
        return questions

    def _llava(self, root: Path) -> list[Question] | None:
        path = find_file(root, "llava_vqav2_mscoco_*.jsonl")
        if path is None:
            return None
        images = ImageFolder(find_folder(path, "test2015", "val2014", "images"))
        questions = []
        for row in read_jsonl(path):
            name, text = row.text("image"), strip_suffix(row.text("text"))
            questions.append(_question(row.identity("question_id"), images.of(row, name), name, text, None))
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """As the release joins question and annotation."""
        identity = row.identity("question_id")
        image, name = table_image(row, base, identity)
        image_id = row.identity("image_id", default=name)
        gold = _gold(row) if row.value("answers") else None
        return _question(identity, image, image_id, row.text("question"), gold)

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[float]:
        """Soft accuracy in [0, 1]."""
        prediction_of = remembering(partial(official_answer, dialect=dialect))
        human_of = prediction_of if dialect == "lmms" else remembering(without_punctuation)
        hits = []
        for q in questions:
            humans: HumanAnswers = q.details["answers"]
            as_they_stand = dialect != "lmms" and len(set(humans.texts)) == 1
            answers = humans.texts if as_they_stand else [human_of(text) for text in humans.texts]
            hits.append(soft_accuracy(prediction_of(predictions.texts[q.id]), answers, humans.records))
        return hits

    def metrics(
        self, questions: Sequence[Question], hits: Sequence[float], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """Accuracy in percent, per answer type and per question type."""
        return {
            "accuracy": percent(hits),
            "per_answer_type": breakdown([q.kind for q in questions], hits),
            "per_question_type": breakdown([q.details["question_type"] for q in questions], hits),
        }

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """What the server and the official tool take, answers as LLaVA's converter leaves them."""
        return [
            {"question_id": number_or_text(q.id), "answer": evalai_answer(predictions.texts[q.id])}
            for q in questions
        ]


def _annotations(path: Path | None) -> dict[str, Mapping[str, Any]]:
    """Golds by question id; empty where there is no file."""
    golds: dict[str, Mapping[str, Any]] = {}
    if path is None:
        return golds
    for row in read_rows(path, "annotations", compact=_compact):
        identity = row.identity("question_id")
        if identity in golds:
            raise row.error(f"duplicate question ids: {identity}")
        golds[identity] = _gold(row)
    return golds


def _compact(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the annotations; ten answers become one small record as soon as they are read."""
    content = dict(pairs)
    if "answers" in content:
        content["answers"] = _humans(content["answers"]) or content["answers"]
    return content


def _humans(records: Any) -> HumanAnswers | None:
    """Answers from their records; None where these are not as they should be."""
    if not isinstance(records, list) or not records:
        return None
    try:
        texts = tuple(intern(record["answer"]) for record in records)
        ids = {record["answer_id"] for record in records if "answer_id" in record}
    except (TypeError, KeyError):
        return None
    if len(ids) == len(records):
        return HumanAnswers(texts, None)
    beside = [{key: value for key, value in record.items() if key != "answer"} for record in records]
    return HumanAnswers(texts, tuple(map(beside.index, beside)))


def _gold(row: Row) -> dict[str, Any]:
    """What an annotation says of a question."""
    given = row.need("answers")
    humans = given if isinstance(given, HumanAnswers) else _humans(given)
    if humans is None:
        raise row.error(f"'answers' is {shown(given)}, expected a list of objects with 'answer'")
    return {
        "answer": row.text("multiple_choice_answer", default=None) or one_line(humans.texts[0]),
        "answer_type": row.text("answer_type", default=""),
        "question_type": row.text("question_type", default=""),
        "humans": humans,
    }


def _question(
    identity: str, image: ImageSource | None, image_id: str, text: str, gold: Mapping[str, Any] | None
) -> Question:
    gold = gold or {}
    return Question(
        id=identity,
        image=image,
        text=text,
        answer=gold.get("answer"),
        image_id=image_id,
        kind=gold.get("answer_type", ""),
        details={"answers": gold.get("humans"), "question_type": gold.get("question_type", "")},
    )
