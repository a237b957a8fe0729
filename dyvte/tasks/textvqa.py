"""TextVQA validation: questions about text in images (Singh et al., 2019), ten human answers each.

Sources: ``eval_textvqa.py`` and ``m4c_evaluator.py`` of LLaVA, which score as EvalAI does (``original``);
``lmms_eval/tasks/textvqa/utils.py`` (``lmms``: the same rule, without the check for ten answers);
``vlmeval/dataset/utils/vqa_eval.py``, ``vqa_score`` (``vlmevalkit``: other punctuation rules).

LLaVA's question file shows the OCR tokens of the data set to the model, the other formats do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError, ScoreError
from dyvte.tasks.answers.choices import parse_list
from dyvte.tasks.answers.vqa import evalai_answer, leave_one_out, official_answer
from dyvte.tasks.base import Predictions, Question, name_some, read_json, read_jsonl
from dyvte.tasks.common import (
    StandardBenchmark,
    joined_by_prompt,
    number_or_text,
    strip_suffix,
)
from dyvte.tasks.readers.files import ImageFolder, find_file, find_folder, need, table_rows

_OCR = "\nReference OCR token:"


class TextVQA(StandardBenchmark):
    """The validation split."""

    name = "textvqa"
    title = "TextVQA"
    submission_name = "textvqa_answers.json"
    expected_tree = (
        "  <root>/                                     release, and LLaVA's playground/data/eval/textvqa\n"
        "    TextVQA_0.5.1_val.json\n"
        "    llava_textvqa_val_v051_ocr.jsonl          (optional: questions with OCR tokens)\n"
        "    train_images/<image_id>.jpg\n"
        "  or <root>/data/validation-*.parquet\n"
        "  or <root>/TextVQA_VAL.tsv"
    )

    def sources(self):
        """The release with LLaVA's texts where they are, tables."""
        return self._release, self._table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "TextVQA_0.5.1_val.json", "TextVQA_0.5.1_test.json")
        if path is None:
            return None
        images = ImageFolder(
            find_folder(path, "train_images", "train_val_images/train_images", "images", "test_images"),
            (".jpg", ".png", ""),
        )
        content = read_json(path)
        entries = content.get("data") if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError(f'{path}: expected {{"data": [...]}}')
        texts = _llava_texts(path.parent)
        questions = []
        for number, entry in enumerate(entries, start=1):
            need(entry, ("question_id", "question", "image_id"), path, number)
            text = entry["question"]
            if texts is not None:
                text = texts.get((entry["image_id"], text.lower()))
                if text is None:
                    continue  # LLaVA's file chooses the questions; _llava_texts refuses what is not there
            image = images[entry["image_id"]]
            questions.append(_question(entry, image, entry["image_id"], text, entry.get("answers")))
        if texts is not None and len(questions) < len(texts):
            raise DataError(f"{path}: {len(texts) - len(questions)} of LLaVA's questions have no gold answer")
        return questions

    def _table(self, root: Path) -> list[Question] | None:
        rows = table_rows(root, ("TextVQA_VAL.tsv", "*.tsv"), ("data/validation-*.parquet", "*.parquet"))
        if rows is None:
            return None
        questions = []
        for number, row in enumerate(rows, start=1):
            need(row, ("image", "question"), root, number)
            entry = {**row, "question_id": row.get("question_id", row.get("index", number))}
            given = row.get("answers", row.get("answer"))
            answers = None if given is None else parse_list(given, f"question {entry['question_id']}")
            image_id = str(row.get("image_id") or row.get("image_path") or row["image"].name)
            questions.append(_question(entry, row["image"], image_id, row["question"], answers))
        return questions

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[float]:
        """Soft accuracy in [0, 1]."""
        normalise = official_answer if dialect == "vlmevalkit" else evalai_answer
        if dialect == "original":
            odd = [q.id for q in questions if len(q.details["answers"]) != 10]
            if odd:
                raise ScoreError(f"{len(odd)} questions have not ten human answers: {name_some(odd)}")
        return [
            leave_one_out(
                normalise(predictions.texts[q.id]),
                range(len(q.details["answers"])),
                [normalise(answer) for answer in q.details["answers"]],
            )
            for q in questions
        ]

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Also LLaVA's answers, whose ``question_id`` is the image's: joined by image and question."""
        path = Path(path)
        if path.suffix == ".jsonl":
            joined = joined_by_prompt(path, questions, lambda q: (q.image_id, q.text))
            if joined is not None:
                return joined
        return super().read_predictions(path, questions)

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """What the EvalAI server takes."""
        return [
            {"question_id": number_or_text(q.id), "answer": evalai_answer(predictions.texts[q.id])}
            for q in questions
        ]


def _llava_texts(folder: Path) -> dict[tuple[str, str], str] | None:
    """LLaVA's question with its OCR line, by image and question."""
    path = find_file(folder, "llava_textvqa_val_v051_ocr.jsonl")
    if path is None:
        return None
    texts: dict[tuple[str, str], str] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        need(row, ("question_id", "text"), path, number)
        text = strip_suffix(row["text"])
        question = text.split(_OCR)[0].strip().lower()
        if (str(row["question_id"]), question) in texts:
            raise DataError(f"{path}, question {number}: image {row['question_id']} has this question twice")
        texts[str(row["question_id"]), question] = text
    return texts


def _question(entry: Any, image: Any, image_id: str, text: str, answers: Any) -> Question:
    answers = tuple(str(answer) for answer in answers) if answers else ()
    common = Counter(answers).most_common(1)
    return Question(
        id=str(entry["question_id"]),
        image=image,
        text=text,
        answer=common[0][0] if common else None,
        image_id=image_id,
        kind="textvqa",
        details={"answers": answers},
    )
