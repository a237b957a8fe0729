"""VQAv2: open questions about COCO images (Goyal et al., 2017), ten human answers each.

Sources: ``vqaEval.py`` of GT-Vision-Lab/VQA (``original``), ``lmms_eval/tasks/vqav2/utils.py`` (``lmms``:
human answers are normalised like the prediction). VLMEvalKit does not score VQAv2. The official rule
normalises the prediction fully, the human answers in their punctuation only, and only where they differ among
themselves; an answer is left out together with those that are equal in every field, so that records without
``answer_id`` score lower. Both hold here. LLaVA's test-dev questions have no public answers: the file for the
server is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.tasks.answers.vqa import (
    evalai_answer,
    leave_one_out,
    official_answer,
    one_line,
    without_punctuation,
)
from dyvte.tasks.base import Predictions, Question, percent, read_json, read_jsonl
from dyvte.tasks.common import (
    StandardBenchmark,
    breakdown,
    number_or_text,
    strip_suffix,
)
from dyvte.tasks.readers.files import ImageFolder, find_file, find_folder, need, table_rows


class VQAv2(StandardBenchmark):
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

    def sources(self):
        """The release, LLaVA's question file, parquet."""
        return self._release, self._llava, self._table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(
            root,
            "v2_OpenEnded_mscoco_val2014_questions.json",
            "*/v2_OpenEnded_mscoco_val2014_questions.json",
            "v2_OpenEnded_mscoco_*_questions.json",
        )
        if path is None:
            return None
        split = path.name.split("_mscoco_")[1].removesuffix("_questions.json")
        folder = split.replace("test-dev", "test")
        base = root if root.is_dir() else root.parent
        annotations = _annotations(
            find_file(base, f"v2_mscoco_{split}_annotations.json", f"*/v2_mscoco_{split}_annotations.json")
        )
        images = ImageFolder(find_folder(root, folder, f"images/{folder}", "images"))
        questions = []
        for number, entry in enumerate(_list(path, "questions"), start=1):
            need(entry, ("question_id", "image_id", "question"), path, number)
            name = f"COCO_{folder}_{int(entry['image_id']):012d}.jpg"
            gold = None if annotations is None else annotations.get(str(entry["question_id"]))
            questions.append(_question(entry["question_id"], images[name], name, entry["question"], gold))
        return questions

    def _llava(self, root: Path) -> list[Question] | None:
        path = find_file(root, "llava_vqav2_mscoco_*.jsonl")
        if path is None:
            return None
        images = ImageFolder(find_folder(path, "test2015", "val2014", "images"))
        questions = []
        for number, row in enumerate(read_jsonl(path), start=1):
            need(row, ("question_id", "image", "text"), path, number)
            image = images[row["image"]]
            questions.append(
                _question(row["question_id"], image, row["image"], strip_suffix(row["text"]), None)
            )
        return questions

    def _table(self, root: Path) -> list[Question] | None:
        rows = table_rows(root, (), ("data/validation-*.parquet", "*.parquet"))
        if rows is None:
            return None
        questions = []
        for number, row in enumerate(rows, start=1):
            need(row, ("image", "question", "question_id"), root, number)
            image_id = str(row.get("image_id") or row["image"].name)
            gold = row if row.get("answers") else None
            questions.append(_question(row["question_id"], row["image"], image_id, row["question"], gold))
        return questions

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[float]:
        """Soft accuracy in [0, 1]."""
        rule = _lmms if dialect == "lmms" else _official
        return [rule(predictions.texts[q.id], q.details["answers"]) for q in questions]

    def figures(
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


def _official(prediction: str, records: Sequence[Mapping[str, Any]]) -> float:
    answers = [record["answer"] for record in records]
    if len(set(answers)) > 1:
        answers = [without_punctuation(answer) for answer in answers]
    return _count(official_answer(prediction), records, answers)


def _lmms(prediction: str, records: Sequence[Mapping[str, Any]]) -> float:
    return _count(official_answer(prediction), records, [official_answer(r["answer"]) for r in records])


def _count(prediction: str, records: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> float:
    humans = [{**record, "answer": answer} for record, answer in zip(records, answers, strict=True)]
    return leave_one_out(prediction, humans, answers)


def _list(path: Path, key: str) -> list[Any]:
    content = read_json(path)
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise DataError(f'{path}: expected {{"{key}": [...]}}')
    return entries


def _annotations(path: Path | None) -> dict[str, Mapping[str, Any]] | None:
    if path is None:
        return None
    annotations: dict[str, Mapping[str, Any]] = {}
    for number, entry in enumerate(_list(path, "annotations"), start=1):
        need(entry, ("question_id", "answers"), path, number)
        if str(entry["question_id"]) in annotations:
            raise DataError(f"{path}: duplicate question ids: {entry['question_id']}")
        annotations[str(entry["question_id"])] = entry
    return annotations


def _question(
    question_id: Any, image: Any, image_id: str, text: str, gold: Mapping[str, Any] | None
) -> Question:
    gold = gold or {}
    records = tuple(dict(record) for record in gold.get("answers") or ())
    answer = gold.get("multiple_choice_answer") or (one_line(records[0]["answer"]) if records else None)
    return Question(
        id=str(question_id),
        image=image,
        text=text,
        answer=answer,
        image_id=image_id,
        kind=str(gold.get("answer_type", "")),
        details={"answers": records, "question_type": str(gold.get("question_type", ""))},
    )
