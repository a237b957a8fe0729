"""What the benchmarks share: formats on disk, prompts, checks before scoring, files of predictions."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyvte.errors import DataError, ScoreError
from dyvte.tasks.base import (
    DIALECTS,
    LETTER_SUFFIX,
    SHORT_ANSWER_SUFFIX,
    Predictions,
    Question,
    check_dialect,
    count_unknown,
    layout_error,
    name_some,
    percent,
    predictions_from_rows,
    read_json,
    read_jsonl,
    read_raw_predictions,
    require_all,
    unique_ids,
)
from dyvte.tasks.statistics import Statistic, mean_statistic, unit_strata

Source = Callable[[Path], list[Question] | None]
"""Questions below a root, or None where the root is not of that format."""

NOT_GRADED = "not graded"


class StandardBenchmark:
    """A benchmark but for its formats (:meth:`sources`) and its rule (:meth:`hits`).

    Class attributes: ``name`` on the command line, ``title`` in messages, ``dialects`` that exist for it,
    ``suffix`` that LLaVA appends to its questions, ``expected_tree`` shown for a folder of no known format,
    ``unit`` that was drawn independently, ``score_name`` of what :meth:`statistic` gives.
    """

    name = ""
    title = ""
    expected_tree = ""
    dialects: tuple[str, ...] = DIALECTS
    suffix = SHORT_ANSWER_SUFFIX
    submission_name = "submission.json"
    unit = "image"
    score_name = "accuracy, %"

    def sources(self) -> Sequence[Source]:
        """Readers of the formats, in the order in which they are tried."""
        raise NotImplementedError

    def hits(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str
    ) -> list[bool] | list[float]:
        """What each question is worth; all are there and all have a gold answer."""
        raise NotImplementedError

    def load(self, root: Path, limit: int | None = None, *, images: bool = True) -> list[Question]:
        """Read the questions.

        Parameters
        ----------
        root
            A folder of one of the formats, or the question file itself.
        limit
            Keep about that many questions.
        images
            Check that the images and videos of the questions kept are there; scoring needs none.

        Raises
        ------
        DataError
            No known format (the expected trees are shown), duplicate ids, gold answers that are partly
            absent, missing images.
        """
        root = Path(root)
        if not root.exists():
            raise layout_error(self.title, root, "the folder does not exist", self.expected_tree)
        for source in self.sources():
            questions = source(root)
            if questions is not None:
                break
        else:
            raise layout_error(self.title, root, "no question file of a known format", self.expected_tree)
        if not questions:
            raise layout_error(self.title, root, "the question file holds no question", self.expected_tree)
        unique_ids(questions, root)
        without = [q.id for q in questions if q.answer is None]
        if without and len(without) < len(questions):
            raise DataError(f"{root}: {len(without)} questions have no gold answer: {name_some(without)}")
        kept = self.limited(questions, limit)
        if images:
            _refuse_missing_files(kept, root)
        return kept

    def limited(self, questions: list[Question], limit: int | None) -> list[Question]:
        """The first ``limit`` questions."""
        return questions[:limit]

    def prompt(self, question: Question, suffix: str | None = None) -> str:
        """The question with its options, then the suffix."""
        return question.text + (self.suffix if suffix is None else suffix)

    def correct(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str = "original"
    ) -> list[bool] | list[float]:
        """Per question, in order: answered rightly under ``dialect``."""
        self.check(questions, predictions, dialect)
        without = [q.id for q in questions if q.answer is None]
        if without:
            raise ScoreError(
                f"{len(without)} of {len(questions)} questions have no gold answer: {name_some(without)}. "
                f"Write {self.title}'s submission file and have it scored where the answers are"
            )
        return self.hits(questions, predictions, dialect)

    def statistic(self, questions: Sequence[Question], hits: Sequence[float]) -> Statistic:
        """The score of the headline as a function of how often each unit was drawn.

        Parameters
        ----------
        questions, hits
            As :meth:`correct` takes and gives them.

        Returns
        -------
        Statistic
            Maps weights (R, G) over the units, in order of first appearance of ``image_id``, to (R,) scores.
        """
        return mean_statistic([q.image_id for q in questions], hits)

    def stratum(self, question: Question) -> str:
        """The part of the benchmark within which the question's unit is drawn; "" for one draw over all."""
        return ""

    def strata(self, questions: Sequence[Question]) -> np.ndarray:
        """(G,) index of every unit's stratum: units are drawn within theirs, so that none comes out empty."""
        return unit_strata([q.image_id for q in questions], [self.stratum(q) for q in questions])

    def check(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> None:
        """Raise unless the dialect exists and every question has a prediction."""
        check_dialect(dialect, self.dialects, self.title)
        require_all(questions, predictions)

    def score(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str = "original"
    ) -> dict[str, Any]:
        """Accuracy in percent, over all and per kind of question.

        On a split without public answers: ``graded`` is False and there is no figure.
        """
        self.check(questions, predictions, dialect)
        scores: dict[str, Any] = {
            "benchmark": self.name,
            "dialect": dialect,
            "num_questions": len(questions),
            "num_unknown_predictions": count_unknown(questions, predictions),
        }
        if all(q.answer is None for q in questions):
            return {**scores, **ungraded("the answers of this split are not public")}
        hits = self.correct(questions, predictions, dialect)
        return {**scores, **self.figures(questions, hits, predictions, dialect)}

    def figures(
        self,
        questions: Sequence[Question],
        hits: Sequence[bool] | Sequence[float],
        predictions: Predictions,
        dialect: str,
    ) -> dict[str, Any]:
        """What :meth:`score` reports beside the counts."""
        return {"accuracy": percent(hits), "per_kind": breakdown([q.kind for q in questions], hits)}

    def headline(self, scores: Mapping[str, Any]) -> str:
        """Accuracy with one decimal."""
        return NOT_GRADED if scores.get("graded") is False else f"{scores['accuracy']:.1f}"

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Read raw answers (jsonl, ours or LLaVA's) or this benchmark's submission file (json)."""
        path = Path(path)
        if path.suffix == ".json":
            return self.read_submission(path, questions)
        return read_raw_predictions(path)

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Read what :meth:`write_submission` writes: here a list of ``{"question_id", "answer"}``."""
        rows = read_json(path)
        if not isinstance(rows, list):
            raise ScoreError(f'{path}: expected a list of {{"question_id", "answer"}}')
        return predictions_from_rows(rows, path, "question_id", ("answer", "prediction"), converted=True)

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write the file that the benchmark's own tool or server takes."""
        return write_json(Path(folder) / self.submission_name, self.submission(questions, predictions))

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """The content of the submission file."""
        return [{"question_id": q.id, "answer": predictions.texts[q.id].strip()} for q in questions]


def _refuse_missing_files(questions: Sequence[Question], root: Path) -> None:
    """Raise DataError naming images and videos that are not there."""
    base = root if root.is_dir() else root.parent
    paths = {path: None for q in questions for path in q.images if isinstance(path, Path)}
    missing = [str(os.path.relpath(path, base)) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{base} lacks {len(missing)} images: {name_some(missing)}")
    videos = {q.video: None for q in questions if q.video is not None}
    lost = [video.name for video in videos if not video.path.exists()]
    if lost:
        raise DataError(f"{base} lacks {len(lost)} videos or folders of frames: {name_some(lost)}")


def ungraded(why: str) -> dict[str, Any]:
    """The part of the scores that says there are none."""
    return {"graded": False, "why": why}


def breakdown(kinds: Sequence[Any], hits: Sequence[bool] | Sequence[float]) -> dict[str, Any]:
    """Accuracy in percent and number of questions for every kind, in order of first appearance."""
    groups: dict[str, list[float]] = defaultdict(list)
    for kind, hit in zip(kinds, hits, strict=True):
        groups[str(kind)].append(hit)
    return {kind: {"accuracy": percent(own), "num_questions": len(own)} for kind, own in groups.items()}


def write_json(path: Path, content: Any) -> Path:
    """Write JSON, non-ASCII characters as they are."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line; lines end with ``\\n`` only."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def number_or_text(question_id: str) -> int | str:
    """An id as the release writes it: a number where it is one."""
    return int(question_id) if question_id.isdigit() and str(int(question_id)) == question_id else question_id


def strip_suffix(text: str) -> str:
    """A LLaVA question without what its authors appended."""
    for suffix in (SHORT_ANSWER_SUFFIX, LETTER_SUFFIX):
        text = text.removesuffix(suffix)
    return text.strip()


def joined_by_prompt(
    path: Path, questions: Sequence[Question], key: Callable[[Question], tuple[str, str]]
) -> Predictions | None:
    """LLaVA's answers where ``question_id`` names an image and the prompt tells its questions apart.

    Parameters
    ----------
    key
        (image id, question text) of a question, as the answers file states them, case aside.

    Returns
    -------
    Predictions or None
        None where the file is not of that kind: no prompts, or ids that are the questions' own.
    """
    rows = [row for row in read_jsonl(path) if isinstance(row, Mapping)]
    known = {q.id for q in questions}
    if not all({"prompt", "text", "question_id"} <= row.keys() for row in rows) or any(
        str(row["question_id"]) in known for row in rows
    ):
        return None
    ids = {(image, text.lower()): q.id for q in questions for image, text in (key(q),)}
    if len(ids) < len(questions):
        raise DataError(f"{path}: an image has the same question twice: give predictions by question id")
    texts: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        question = strip_suffix(row["prompt"].replace("<image>", "")).lower()
        question_id = ids.get((str(row["question_id"]), question))
        if question_id is None:
            raise ScoreError(f"{path}, row {number}: no such question: {row['question_id']}, {question!r}")
        if question_id in texts:
            raise ScoreError(f"{path}, row {number}: a second prediction for question {question_id!r}")
        texts[question_id] = row["text"]
    return Predictions(texts)
