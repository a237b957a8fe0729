"""MME's release layout: question files beside images, and the official result files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from dyvte.errors import DataError, ScoreError
from dyvte.formatting import name_some
from dyvte.readers.files import IMAGE_EXTENSIONS
from dyvte.readers.rows import read_text, shown
from dyvte.tasks.records import Predictions, Question

_YES_NO_REQUEST = re.compile(r"\s*Please answer yes or no\.\s*$")

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


def _question_files(folder: Path) -> tuple[list[Path], Path]:
    """Question files of a subtask and where its images lie."""
    split = folder / "questions_answers_YN"
    if split.is_dir():
        return sorted(split.glob("*.txt")), folder / "images"
    return sorted(folder.glob("*.txt")), folder


def subtask_names(folder: Path) -> list[str]:
    """Subtasks below a folder, in the order of SUBTASKS; a folder of questions by another name is an error
    where there are subtasks."""
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


def subtask_images(folder: Path) -> Iterator[tuple[Path, Path]]:
    """(question file, image) pairs of one subtask, sorted by name. An image that is not there, which scoring
    can do without, is named as a pattern."""
    text_files, image_folder = _question_files(folder)
    found = {}
    if image_folder.is_dir():
        for path in sorted(image_folder.iterdir()):
            if path.suffix.lower() in IMAGE_EXTENSIONS:
                found.setdefault(path.stem, path)
    yield from ((path, found.get(path.stem, image_folder / f"{path.stem}.*")) for path in text_files)


def read_pair(text_file: Path, image: Path) -> list[Question]:
    """The two questions about an image.

    Parameters
    ----------
    text_file
        Of the two questions.
    image
        That they are about.
    """
    lines = [line.strip("\r") for line in read_text(text_file).split("\n")]
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


def file_name(question: Question) -> str:
    """Name of the image file, as result lines state it."""
    return question.image_id.rsplit("/", 1)[-1]


def image_key(name: str) -> str:
    """``subtask/stem`` of an image: LLaVA's files name ``artwork/images/x.jpg`` and, once converted,
    ``x.txt`` what the release calls ``artwork/x.jpg``."""
    return f"{name.split('/', 1)[0]}/{name.rsplit('/', 1)[-1].rsplit('.', 1)[0]}"


def question_key(question_id: str) -> str:
    """A question's id whatever its image's ending: ``artwork/x#1`` of ``artwork/x.jpg#1``."""
    name, _, number = question_id.rpartition("#")
    return f"{image_key(name)}#{number}"


def joined_by_stem(predictions: Predictions, questions: Sequence[Question]) -> Predictions:
    """Predictions by the questions' ids, where images are not there to say how their names end.

    Parameters
    ----------
    predictions
        By ids that hold the images' endings.
    questions
        As they were read.
    """
    known = {question_key(q.id): q.id for q in questions if "#" in q.id}
    own = {q.id for q in questions}
    texts = {
        name if name in own else known.get(question_key(name), name): text
        for name, text in predictions.texts.items()
    }
    return predictions if len(texts) < len(predictions.texts) else replace(predictions, texts=texts)


def plain_question(text: str) -> str:
    """A question without " Please answer yes or no.", which files put after one blank, two or none."""
    return _YES_NO_REQUEST.sub("", text)


def read_results(folder: Path, questions: Sequence[Question]) -> Predictions:
    """Join result lines (file, question, gold, answer) by subtask, stem of the file name and question.

    Parameters
    ----------
    folder
        Of the files ``<subtask>.txt``.
    questions
        Those that are answered.
    """
    ids: dict[tuple[str, str], list[str]] = {}
    for q in questions:
        ids.setdefault((image_key(q.image_id), plain_question(q.text)), []).append(q.id)
    texts: dict[str, str] = {}
    for name in sorted({q.kind for q in questions}):
        path = folder / f"{name}.txt"
        if not path.is_file():
            raise ScoreError(f"{folder} has no results for subtask {name}: expected {path.name}")
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if not line:
                continue
            columns = line.split("\t")
            if len(columns) != 4:
                raise ScoreError(f"{path}, line {number}: {len(columns)} columns, expected 4")
            key = (image_key(f"{name}/{columns[0]}"), plain_question(columns[1]))
            found = [one for one in ids.get(key, []) if one not in texts]
            if not found:
                known = key in ids
                problem = "a second prediction for" if known else "no such question:"
                raise ScoreError(f"{path}, line {number}: {problem} {columns[0]} {shown(columns[1])}")
            texts[found[0]] = columns[3]
    return Predictions(texts, converted=True)
