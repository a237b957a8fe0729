"""MME: 14 subtasks of yes/no questions, two per image (Fu et al., 2023).

Per subtask: acc = share of questions right, acc+ = share of images with both right, score = their sum in
percent (0..200). Perception and cognition are sums over the subtasks that are present. Answers are read as
the official ``calculation.py`` does (``original``), as lmms-eval does, or as VLMEvalKit's exact matching
does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError, ScoreError
from dyvte.evaluation.base import (
    IMAGE_EXTENSIONS,
    SHORT_ANSWER_SUFFIX,
    Predictions,
    Question,
    check_dialect,
    count_unknown,
    layout_error,
    name_some,
    percent,
    read_raw_predictions,
    require_all,
    unique_ids,
)

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION

_ROOT_LEVELS = (
    ".",
    "MME_Benchmark",
    "MME_Benchmark_release_version",
    "MME_Benchmark_release_version/MME_Benchmark",
)
_YES_NO_REQUEST = re.compile(r"\s*Please answer yes or no\.\s*$")
_LINE_BREAKS = re.compile(r"[\t\r\n]+")


class MME:
    """The benchmark in its release layout: flat subtasks, split subtasks, or both."""

    name = "mme"
    expected_tree = (
        "  <root>/                      (an extra MME_Benchmark/ level is fine)\n"
        "    existence/                 (flat subtask)\n"
        "      0001.png\n"
        "      0001.txt                 (two lines: question<TAB>Yes|No)\n"
        "    artwork/                   (split subtask)\n"
        "      images/0001.jpg\n"
        "      questions_answers_YN/0001.txt\n"
        f"  subtasks: {', '.join(SUBTASKS)}"
    )

    def load(self, root: Path, limit: int | None = None) -> list[Question]:
        """Read every subtask present; ``limit`` keeps the first ``limit // 2`` images, spread over subtasks.

        Raises
        ------
        DataError
            Another layout (the expected tree is shown), a subtask nobody knows, an image without exactly two
            questions, a gold answer that is not Yes or No, missing images.
        """
        root = Path(root)
        folder = self._data_folder(root)
        images = [list(_subtask_images(folder / name)) for name in _subtask_names(folder)]
        if limit is not None:
            images = _spread(images, limit // 2)
        questions = [q for subtask in images for text_file, image in subtask for q in _pair(text_file, image)]
        unique_ids(questions, folder)
        return questions

    def _data_folder(self, root: Path) -> Path:
        for candidate in (root / level for level in _ROOT_LEVELS):
            if candidate.is_dir() and any(_subtask_names(candidate)):
                return candidate
        problem = "no subtask folder with question files" if root.is_dir() else "the folder does not exist"
        raise layout_error("MME", root, problem, self.expected_tree)

    def prompt(self, question: Question, suffix: str = SHORT_ANSWER_SUFFIX) -> str:
        """The question without " Please answer yes or no.", then the suffix (LLaVA's way)."""
        return _YES_NO_REQUEST.sub("", question.text) + suffix

    def correct(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str = "original"
    ) -> list[bool]:
        """Per question, in order: answered rightly under ``dialect``."""
        return [
            read_answer(predictions.texts[q.id], dialect, predictions.converted) == q.answer.lower()
            for q in _checked(questions, predictions, dialect)
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

    def headline(self, scores: Mapping[str, Any]) -> str:
        """Perception / cognition with one decimal."""
        return f"{scores['perception']:.1f} / {scores['cognition']:.1f}"

    def read_predictions(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Read raw answers (jsonl) or a folder of official ``<subtask>.txt`` results."""
        path = Path(path)
        return _read_results(path, questions) if path.is_dir() else read_raw_predictions(path)

    def write_submission(self, folder: Path, questions: Sequence[Question], predictions: Predictions) -> Path:
        """Write ``mme_results/<subtask>.txt`` (file, question, gold, answer) for ``calculation.py``.

        Tabs and line breaks inside an answer would break that format: each run of them becomes one space.
        """
        results = Path(folder) / "mme_results"
        results.mkdir(parents=True, exist_ok=True)
        lines: dict[str, list[str]] = defaultdict(list)
        for q in questions:
            answer = predictions.texts[q.id]
            answer = answer if predictions.converted else _one_line(answer)
            lines[q.kind].append(f"{q.image.name}\t{q.text}\t{q.answer}\t{answer}\n")
        for name, rows in lines.items():
            (results / f"{name}.txt").write_text("".join(rows), encoding="utf-8", newline="\n")
        return results


def read_answer(text: str, dialect: str, converted: bool = False) -> str:
    """What the tool of ``dialect`` takes an answer for: "yes", "no" or "other".

    ``original`` and ``lmms`` look for "yes", then "no", within the first four characters, so "not sure" and
    "Norway" are no, and "The answer is yes" is other. ``vlmevalkit`` looks for the words.
    """
    if dialect == "vlmevalkit":
        return _read_words(text)
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


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def _read_words(text: str) -> str:
    """VLMEvalKit's reading: punctuation out, then exactly one of the words "yes" and "no"."""
    lowered = text.lower()
    digits_comma = re.search(r"\d,\d", lowered) is not None
    cleaned = lowered
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in lowered or f" {mark}" in lowered
        cleaned = cleaned.replace(mark, "" if beside_space or digits_comma else " ")
    # its full-stop rule removes at most 32 of them (a flag is passed where a count belongs)
    words = re.sub(r"\.(?!\d)", "", cleaned, count=32).split()
    if ("yes" in words) == ("no" in words):
        return "other"
    return "yes" if "yes" in words else "no"


def _checked(questions: Sequence[Question], predictions: Predictions, dialect: str) -> Sequence[Question]:
    check_dialect(dialect)
    require_all(questions, predictions)
    per_image: dict[str, int] = defaultdict(int)
    for question in questions:
        per_image[question.image_id] += 1
    odd = [image for image, count in per_image.items() if count != 2]
    if odd:
        raise ScoreError(f"{len(odd)} images have not exactly two questions: {name_some(odd)}")
    return questions


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


def _question_files(folder: Path) -> tuple[list[Path], Path]:
    """Question files of a subtask and where its images lie."""
    split = folder / "questions_answers_YN"
    if split.is_dir():
        return sorted(split.glob("*.txt")), folder / "images"
    return sorted(folder.glob("*.txt")), folder


def _subtask_names(folder: Path) -> list[str]:
    names = [
        path.name
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith((".", "_")) and _question_files(path)[0]
    ]
    known = [name for name in SUBTASKS if name in names]
    unknown = [name for name in names if name not in SUBTASKS and name != "eval_tool"]
    if known and unknown:
        raise DataError(f"{folder}: not subtasks of MME: {name_some(unknown)}; known: {', '.join(SUBTASKS)}")
    return known


def _subtask_images(folder: Path) -> Iterator[tuple[Path, Path]]:
    """(question file, image) pairs of one subtask, sorted by name."""
    text_files, image_folder = _question_files(folder)
    found = {}
    if image_folder.is_dir():
        for path in sorted(image_folder.iterdir()):
            if path.suffix.lower() in IMAGE_EXTENSIONS:
                found.setdefault(path.stem, path)
    missing = [path.stem for path in text_files if path.stem not in found]
    if missing:
        raise DataError(
            f"{image_folder} lacks images for {len(missing)} question files: {name_some(missing)}"
        )
    yield from ((path, found[path.stem]) for path in text_files)


def _spread(images: list[list[Any]], num_images: int) -> list[list[Any]]:
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


def _pair(text_file: Path, image: Path) -> list[Question]:
    try:
        lines = [line.strip("\r") for line in text_file.read_text(encoding="utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise DataError(f"{text_file} is not UTF-8 text: {error}") from error
    lines = [line for line in lines if line.strip()]
    if len(lines) != 2:
        raise DataError(f"{text_file}: {len(lines)} questions, expected two (acc+ is over pairs)")
    subtask = _subtask_of(text_file)
    return [
        _parse_line(line, number, text_file, image, subtask) for number, line in enumerate(lines, start=1)
    ]


def _subtask_of(text_file: Path) -> str:
    parent = text_file.parent
    return parent.parent.name if parent.name == "questions_answers_YN" else parent.name


def _parse_line(line: str, number: int, text_file: Path, image: Path, subtask: str) -> Question:
    text, tab, answer = line.rstrip().rpartition("\t")
    if not tab or answer.strip().lower() not in ("yes", "no"):
        raise DataError(f"{text_file}, line {number}: expected question<TAB>Yes|No, found {line!r}")
    name = f"{subtask}/{image.name}"
    return Question(
        id=f"{name}#{number}",
        image=image,
        text=text,
        answer=answer.strip().capitalize(),
        image_id=name,
        kind=subtask,
    )


def _read_results(folder: Path, questions: Sequence[Question]) -> Predictions:
    """Join official result lines by (subtask, file name, question)."""
    ids = {(q.kind, q.image.name, q.text): q.id for q in questions}
    texts: dict[str, str] = {}
    for name in sorted({q.kind for q in questions}):
        path = folder / f"{name}.txt"
        if not path.is_file():
            raise ScoreError(f"{folder} has no results for subtask {name}: expected {path.name}")
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not line:
                continue
            columns = line.split("\t")
            if len(columns) != 4:
                raise ScoreError(f"{path}, line {number}: {len(columns)} columns, expected 4")
            question_id = ids.get((name, columns[0], columns[1]))
            if question_id is None:
                raise ScoreError(f"{path}, line {number}: no such question: {columns[0]} {columns[1]!r}")
            if question_id in texts:
                raise ScoreError(f"{path}, line {number}: a second prediction for question {question_id!r}")
            texts[question_id] = columns[3]
    return Predictions(texts, converted=True)
