"""TextVQA validation: questions about text in images (Singh et al., 2019), ten human answers each.

Sources: ``eval_textvqa.py`` and ``m4c_evaluator.py`` of LLaVA, which score as EvalAI does (``original``);
``lmms_eval/tasks/textvqa/utils.py`` (``lmms``: the same rule, without the check for ten answers);
``vlmeval/dataset/utils/vqa_eval.py``, ``vqa_score`` (``vlmevalkit``: other punctuation rules).

LLaVA's question file shows the OCR tokens of the data set to the model, the other formats do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dyvte.errors import DataError, ScoreError
from dyvte.formatting import name_some
from dyvte.readers.files import ImageFolder, find_file, find_folder, table_image
from dyvte.readers.rows import Row, read_jsonl, read_rows
from dyvte.tasks.answers.vqa import evalai_answer, official_answer, remembering, soft_accuracy
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.predictions import joined_by_prompt
from dyvte.tasks.prompts import strip_suffix
from dyvte.tasks.records import ImageSource
from dyvte.tasks.writing import number_or_text

_OCR = "Reference OCR token:"


@TASKS.register
class TextVQA(Benchmark):
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

    tables = ("TextVQA_VAL.tsv", "*textvqa*.tsv")
    shards = ("data/validation-*.parquet", "*.parquet")
    columns = (("question",), ("answers", "answer"))
    shard_columns = ("image_id",)

    def sources(self):
        """The release with LLaVA's texts where they are, tables."""
        return self._release, self.table

    def _release(self, root: Path) -> list[Question] | None:
        path = find_file(root, "TextVQA_0.5.1_val.json", "TextVQA_0.5.1_test.json")
        if path is None:
            return None
        images = ImageFolder(
            find_folder(path, "train_images", "train_val_images/train_images", "images", "test_images"),
            (".jpg", ".png", ""),
        )
        texts = _llava_texts(path.parent)
        questions = []
        for row in read_rows(path, "data"):
            image_id, text = row.identity("image_id"), row.text("question")
            if texts is not None:
                key = (image_id, bare_question(text).lower())
                if key not in texts:
                    continue  # LLaVA's file chooses the questions
                text = texts[key]
            questions.append(_question(row, images.of(row, image_id), image_id, text))
        if texts is not None and len(questions) < len(texts):
            raise DataError(f"{path}: {len(texts) - len(questions)} of LLaVA's questions have no gold answer")
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """Parquet lists the answers, the TSV holds the text of the list."""
        identity = row.identity("question_id", "index", default=str(number))
        image, name = table_image(row, base, identity)
        image_id = row.identity("image_id", "image_path", default=name)
        named = Row({**row, "question_id": identity}, row.where)
        return _question(named, image, image_id, row.text("question"))

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[float]:
        """Soft accuracy in [0, 1]."""
        if dialect == "original":
            odd = [q.id for q in questions if len(q.details["answers"]) != 10]
            if odd:
                raise ScoreError(f"{len(odd)} questions have not ten human answers: {name_some(odd)}")
        vlmevalkit = partial(official_answer, dialect="vlmevalkit")
        normalise = remembering(vlmevalkit if dialect == "vlmevalkit" else evalai_answer)
        return [
            soft_accuracy(normalise(predictions.texts[q.id]), [*map(normalise, q.details["answers"])])
            for q in questions
        ]

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Also LLaVA's answers, whose ``question_id`` is the image's: joined by image and question."""
        path = Path(path)
        if path.suffix.lower() == ".jsonl":
            joined = joined_by_prompt(
                path,
                questions,
                lambda q: (q.image_id, bare_question(q.text)),
                lambda image, prompt: (image, bare_question(prompt)),
            )
            if joined is not None:
                return joined
        return super().read_predictions(path, questions)

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """What the EvalAI server takes."""
        return [
            {"question_id": number_or_text(q.id), "answer": evalai_answer(predictions.texts[q.id])}
            for q in questions
        ]


def bare_question(prompt: str) -> str:
    """A question without LLaVA's request, and without its line of OCR tokens before or behind."""
    before, _, behind = strip_suffix(prompt).partition(_OCR)
    return before.strip() or behind.partition("\n")[2].strip()


def _llava_texts(folder: Path) -> dict[tuple[str, str], str] | None:
    """LLaVA's question with its OCR line, by image and question."""
    path = find_file(folder, "llava_textvqa_val_v051_ocr.jsonl")
    if path is None:
        return None
    texts: dict[tuple[str, str], str] = {}
    for row in read_jsonl(path):
        image, text = row.identity("question_id"), strip_suffix(row.text("text"))
        question = bare_question(text).lower()
        if (image, question) in texts:
            raise row.error(f"image {image} has this question twice")
        texts[image, question] = text
    return texts


def _question(row: Row, image: ImageSource | None, image_id: str, text: str) -> Question:
    given = row.texts("answers", "answer") if row.value("answers", "answer") is not None else []
    answers = tuple(answer or "" for answer in given)
    common = Counter(answers).most_common(1)
    return Question(
        id=row.identity("question_id"),
        image=image,
        text=text,
        answer=common[0][0] if common else None,
        image_id=image_id,
        kind="textvqa",
        details={"answers": answers},
    )
