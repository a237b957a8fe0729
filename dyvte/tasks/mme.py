"""MME: 14 subtasks of yes/no questions, two per image (Fu et al., 2023).

Per subtask: acc = share of questions right, acc+ = share of images with both right, score = their sum in
percent (0..200). Perception and cognition are sums over the subtasks that are present. Answers are read as
the official ``calculation.py`` does (``original``), as lmms-eval does, or as VLMEvalKit's exact matching
does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyvte.errors import DataError, ScoreError
from dyvte.files import write_atomically
from dyvte.formatting import name_some
from dyvte.readers.files import find_file, table_images
from dyvte.readers.rows import Row, read_jsonl
from dyvte.tasks.answers.yes_no import yes_no_words
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.metrics import percent
from dyvte.tasks.mme_release import (
    COGNITION,
    PERCEPTION,
    SUBTASKS,
    file_name,
    image_key,
    joined_by_stem,
    plain_question,
    read_pair,
    read_results,
    subtask_images,
    subtask_names,
)
from dyvte.tasks.predictions import joined_by_prompt, read_answers
from dyvte.tasks.prompts import strip_suffix
from dyvte.tasks.records import count_unknown
from dyvte.tasks.statistics import Statistic, all_right, group_index

LLAVA_FILE = "llava_mme.jsonl"
_ROOT_LEVELS = (
    ".",
    "MME_Benchmark",
    "MME_Benchmark_release_version",
    "MME_Benchmark_release_version/MME_Benchmark",
)
_LINE_BREAKS = re.compile(r"[\t\r\n]+")


@TASKS.register
class MME(Benchmark):
    """The release layout (flat subtasks, split subtasks, or both) or a table."""

    name = "mme"
    title = "MME"
    score_name = "points, sum of subtasks"
    headline_metrics = ("perception", "cognition")
    expected_tree = (
        "  <root>/                      (an extra MME_Benchmark/ level is fine)\n"
        "    existence/                 (flat subtask)\n"
        "      0001.png\n"
        "      0001.txt                 (two lines: question<TAB>Yes|No)\n"
        "    artwork/                   (split subtask)\n"
        "      images/0001.jpg\n"
        "      questions_answers_YN/0001.txt\n"
        "    llava_mme.jsonl            (optional, beside that level: which questions, in which order)\n"
        "  or <root>/data/test-*.parquet\n"
        "  or <root>/MME.tsv\n"
        f"  subtasks: {', '.join(SUBTASKS)}"
    )

    tables = ("MME.tsv", "*mme*.tsv")
    shards = ("data/test-*.parquet", "test-*.parquet")
    columns = (("question",), ("answer",), ("category",))

    def sources(self):
        """Tables; then the release."""
        return self.table, self._release

    def limited(self, questions: list[Question], limit: int | None) -> list[Question]:
        """The first ``limit // 2`` images, from the subtasks in turn."""
        if limit is None:
            return questions
        by_subtask: dict[str, dict[str, list[Question]]] = defaultdict(lambda: defaultdict(list))
        for question in questions:
            by_subtask[question.kind][question.image_id].append(question)
        kept = _in_turn([list(images.values()) for images in by_subtask.values()], limit // 2)
        return [question for subtask in kept for pair in subtask for question in pair]

    def _release(self, root: Path) -> list[Question] | None:
        folder = _data_folder(root if root.is_dir() else root.parent)
        if folder is None:
            return None
        questions = [
            question
            for name in subtask_names(folder)
            for text_file, image in subtask_images(folder / name)
            for question in read_pair(text_file, image)
        ]
        return _chosen_by_llava(find_file(root, LLAVA_FILE, f"../{LLAVA_FILE}"), questions)

    def table(self, root: Path) -> list[Question] | None:
        """Also refuses images without exactly two questions."""
        questions = super().table(root)
        problem = _odd_pairs(questions or [])
        if problem:
            raise DataError(f"{root}: {problem}")
        return questions

    def table_question(self, row: Row, number: int, base: Path) -> Question:
        """Parquet names the image in ``question_id``, the TSV in ``image_path``."""
        subtask, answer = row.text("category"), row.text("answer").strip().capitalize()
        if subtask not in SUBTASKS or answer not in ("Yes", "No"):
            raise row.error(
                f"expected a subtask of MME and Yes or No, found {subtask!r} and {row['answer']!r}"
            )
        images = table_images(row, base)
        named = row.text("question_id", "image_path", default=images[0].name if images else None)
        if named is None:
            raise row.error("neither 'question_id' nor 'image_path' nor 'image' says which image it is about")
        image_id = f"{subtask}/{named.rsplit('/', 1)[-1]}"
        return Question(
            id=row.identity("index", default=f"{image_id}#{number}"),
            image=images[0] if images else None,
            text=row.text("question"),
            answer=answer,
            image_id=image_id,
            kind=subtask,
        )

    def prompt(self, question: Question, suffix: str | None = None) -> str:
        """The question without " Please answer yes or no.", then the suffix (LLaVA's way)."""
        return plain_question(question.text) + (self.suffix if suffix is None else suffix)

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Read answer equals gold; images must have both of their questions."""
        problem = _odd_pairs(questions)
        if problem:
            raise ScoreError(problem)
        return [
            read_answer(predictions.texts[q.id], dialect, predictions.converted) == q.answer.lower()
            for q in questions
        ]

    def score(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str = "original"
    ) -> dict[str, Any]:
        """Score per subtask and the perception and cognition sums over the subtasks present."""
        hits = self.correct(questions, predictions, dialect)
        by_image: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        unread: dict[str, int] = defaultdict(int)
        for question, hit in zip(questions, hits):
            by_image[question.kind][question.image_id].append(hit)
            answer = read_answer(predictions.texts[question.id], dialect, predictions.converted)
            unread[question.kind] += answer == "other"
        subtasks = {
            name: _subtask_score(list(by_image[name].values()), unread[name])
            for name in SUBTASKS
            if name in by_image
        }
        present = {
            "perception": [name for name in PERCEPTION if name in subtasks],
            "cognition": [name for name in COGNITION if name in subtasks],
        }
        sums = {part: sum(subtasks[name]["score"] for name in names) for part, names in present.items()}
        return {
            "benchmark": self.name,
            "dialect": dialect,
            "num_questions": len(questions),
            "num_unknown_predictions": count_unknown(questions, predictions),
            "num_answers_with_line_breaks": _num_with_breaks(questions, predictions),
            **sums,
            **{f"{part}_max": 200 * len(names) for part, names in present.items()},
            **{f"{part}_subtasks": names for part, names in present.items()},
            "missing_subtasks": [name for name in SUBTASKS if name not in subtasks],
            "per_subtask": subtasks,
        }

    def statistic(self, questions: Sequence[Question], hits: Sequence[float]) -> Statistic:
        """Sum over subtasks of acc + acc+ in percent: perception and cognition together."""
        units = [q.image_id for q in questions]
        groups_B, num_units = group_index(units)
        acc_G = np.bincount(groups_B, weights=np.asarray(hits, dtype=np.float64), minlength=num_units) / 2
        score_G = acc_G + all_right(units, hits)
        subtasks_G = self.strata(questions)
        member_GT = subtasks_G[:, None] == np.arange(subtasks_G.max() + 1)
        return lambda weights_RG: (
            100.0 * ((weights_RG * score_G) @ member_GT / (weights_RG @ member_GT)).sum(1)
        )

    def stratum(self, question: Question) -> str:
        """The subtask: none comes out empty."""
        return question.kind

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Read raw answers (LLaVA's are joined by image and question) or a folder of ``<subtask>.txt``
        results, the official tool's or those of LLaVA's converter."""
        path = Path(path)
        if path.is_dir():
            return read_results(path, questions)
        joined = None
        if path.suffix.lower() == ".jsonl":
            joined = joined_by_prompt(path, questions, _key, _asked)
        return joined if joined is not None else joined_by_stem(read_answers(path), questions)

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write ``mme_results/<subtask>.txt`` (file, question, gold, answer) for ``calculation.py``.

        Tabs and line breaks inside an answer would break that format: each run of them becomes one space.
        """
        results = Path(folder) / "mme_results"
        lines: dict[str, list[str]] = defaultdict(list)
        for q in questions:
            answer = predictions.texts[q.id]
            answer = answer if predictions.converted else _one_line(answer)
            lines[q.kind].append(f"{file_name(q)}\t{q.text}\t{q.answer}\t{answer}\n")
        for name, rows in lines.items():
            write_atomically(results / f"{name}.txt", "".join(rows))
        return results


def read_answer(text: str, dialect: str, converted: bool = False) -> str:
    """What the tool of ``dialect`` takes an answer for: "yes", "no" or "other".

    ``original`` and ``lmms`` look for "yes", then "no", within the first four characters, so "not sure" and
    "Norway" are no, and "The answer is yes" is other. ``vlmevalkit`` looks for the words.

    Parameters
    ----------
    text
        The answer.
    dialect
        Whose rule.
    converted
        Does it come from a submission file?
    """
    if dialect == "vlmevalkit":
        return yes_no_words(text)
    if dialect == "lmms":
        answer = text.lower().strip().replace(".", "")
        if len(answer) == 1:
            return {"y": "yes", "n": "no"}.get(answer, "other")
    else:
        answer = (text if converted else _one_line(text)).lower()
    start = answer[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _one_line(text: str) -> str:
    return _LINE_BREAKS.sub(" ", text.strip())


def _key(question: Question) -> tuple[str, str]:
    return image_key(question.image_id), plain_question(question.text)


def _asked(image: str, prompt: str) -> tuple[str, str]:
    """Image and question of a row of LLaVA's files."""
    return image_key(image), plain_question(strip_suffix(prompt))


def _data_folder(root: Path) -> Path | None:
    """The folder that holds the subtasks."""
    for candidate in (root / level for level in _ROOT_LEVELS):
        if candidate.is_dir() and any(subtask_names(candidate)):
            return candidate
    return None


def _odd_pairs(questions: Sequence[Question]) -> str:
    """What is wrong with the pairs, "" for nothing."""
    per_image: dict[str, int] = defaultdict(int)
    for question in questions:
        per_image[question.image_id] += 1
    odd = [image for image, count in per_image.items() if count != 2]
    return f"{len(odd)} images have not exactly two questions: {name_some(odd)}" if odd else ""


def _chosen_by_llava(path: Path | None, questions: list[Question]) -> list[Question]:
    """The questions of LLaVA's file, in its order; all where there is no such file."""
    if path is None:
        return questions
    known = {(image, text.lower()): q for q in questions for image, text in (_key(q),)}
    chosen, without = [], []
    for row in read_jsonl(path):
        image, text = _asked(row.text("question_id"), row.text("text"))
        question = known.get((image, text.lower()))
        if question is None:
            without.append(row.text("question_id"))
        else:
            chosen.append(question)
    if without:
        raise DataError(f"{path}: {len(without)} questions have no gold answer: {name_some(without)}")
    return chosen


def _subtask_score(images: Sequence[Sequence[bool]], unread: int) -> dict[str, Any]:
    acc = percent([hit for pair in images for hit in pair])
    acc_plus = percent([all(pair) for pair in images])
    return {
        "score": acc + acc_plus,
        "acc": acc,
        "acc_plus": acc_plus,
        "num_images": len(images),
        "num_questions": 2 * len(images),
        "num_neither_yes_nor_no": unread,
    }


def _num_with_breaks(questions: Sequence[Question], predictions: Predictions) -> int:
    return sum(1 for q in questions if _LINE_BREAKS.search(predictions.texts[q.id].strip()))


def _in_turn(images: list[list[Any]], num_images: int) -> list[list[Any]]:
    """The first images of every subtask in turn, ``num_images`` in all."""
    if num_images < 1:
        raise DataError("a limit below 2 keeps no MME image: each image has two questions")
    kept: list[list[Any]] = [[] for _ in images]
    turn = 0
    while num_images > 0 and any(turn < len(subtask) for subtask in images):
        for subtask, chosen in zip(images, kept):
            if turn < len(subtask) and num_images > 0:
                chosen.append(subtask[turn])
                num_images -= 1
        turn += 1
    return kept
