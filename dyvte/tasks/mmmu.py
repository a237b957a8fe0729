"""MMMU, the validation questions (Yue et al., 2024): college exams with up to seven images a question.

Sources: ``eval/eval_utils.py`` and ``eval/main_parse_and_eval.py`` of MMMU-Benchmark/MMMU in the later
version that ``lmms_eval/tasks/mmmu/utils.py`` and ``_task_utils/mmmu_mcq_utils.py`` repeat (``original`` and
``lmms``; the first version wanted a blank on both sides of a bare letter); ``MMMU_preproc`` and
``mcq_vanilla_eval`` of ``vlmeval/dataset/utils/multiple_choice.py`` with exact matching (``vlmevalkit``: an
open question becomes a choice between its gold answer and "Other Answers").

**Chance.** The official tool gives an answer that it cannot read a random option. So do ``original`` and
``lmms`` here, with the official seed (42) and order (subjects, then questions as stored), so that a whole
validation run scores as the official tool's first run does; lmms-eval does not state its own draws.
``num_random`` says how many answers that were and ``accuracy_without_chance`` counts them wrong. Draws depend
on which answers are unreadable before: compare runs by the second figure.

Options are shown as LLaVA does; images stand before the question, whose ``<image 1>`` marks stay in the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError
from dyvte.tasks.answers.choices import (
    LETTERS,
    lettered,
    options_of,
    parse_list,
    vlmevalkit_letter,
    with_options,
)
from dyvte.tasks.answers.mmmu_open import gold_forms, is_right, read_open
from dyvte.tasks.base import (
    LETTER_SUFFIX,
    SHORT_ANSWER_SUFFIX,
    Predictions,
    Question,
    percent,
    read_json,
)
from dyvte.tasks.common import StandardBenchmark, breakdown
from dyvte.tasks.readers.files import need, table_rows

SEED = 42
"""Of the official tool."""

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine"),
        *("Pharmacy", "Public_Health"),
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics"),
        *("Energy_and_Power", "Materials", "Mechanical_Engineering"),
    ),
}
# the order of the official tool's table of subjects, in which its random draws are made: alphabetical
_ORDER = sorted(subject for subjects in DOMAINS.values() for subject in subjects)
_IMAGE_MARK = re.compile(r"<image (\d+)>")
_ID = re.compile(r"[^_]+_(.+)_\d+")


class MMMU(StandardBenchmark):
    """The validation split."""

    name = "mmmu"
    title = "MMMU"
    unit = "question"
    submission_name = "total_val_output.json"
    expected_tree = (
        "  <root>/<Subject>/validation-*.parquet      (release: 30 folders)\n"
        "  or <root>/data/validation-*.parquet        (all subjects in one)\n"
        "  or <root>/MMMU_DEV_VAL.tsv"
    )

    def sources(self):
        """Tables only: the release is parquet."""
        return (self._table,)

    def _table(self, root: Path) -> list[Question] | None:
        patterns = ("data/validation-*.parquet", "validation-*.parquet", "*/validation-*.parquet")
        rows = table_rows(root, ("MMMU_DEV_VAL.tsv", "*.tsv"), patterns)
        if rows is None:
            return None
        questions = []
        for number, row in enumerate(rows, start=1):
            if row.get("split", "validation") != "validation":
                continue
            need(row, ("question", "answer"), root, number)
            questions.append(_question(row, number))
        return questions

    def prompt(self, question: Question, suffix: str | None = None) -> str:
        """Open questions ask for a word or phrase, the others for a letter."""
        if suffix is None:
            suffix = LETTER_SUFFIX if question.details["options"] else SHORT_ANSWER_SUFFIX
        return question.text + suffix

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Right or wrong; unreadable choices drawn at random under ``original`` and ``lmms``."""
        return [hit for hit, _ in self._graded(questions, predictions, dialect)]

    def _graded(
        self, questions: Sequence[Question], predictions: Predictions, dialect: str
    ) -> list[tuple[bool, bool]]:
        """(right, drawn at random) of every question, in order."""
        if dialect == "vlmevalkit":
            return [(_vlmevalkit_right(q, predictions.texts[q.id]), False) for q in questions]
        graded: dict[str, tuple[bool, bool]] = {}
        draw = random.Random(SEED)
        for q in sorted(questions, key=lambda q: _ORDER.index(q.kind) if q.kind in _ORDER else len(_ORDER)):
            graded[q.id] = _right(q, predictions.texts[q.id], draw)
        return [graded[q.id] for q in questions]

    def figures(
        self, questions: Sequence[Question], hits: Sequence[bool], predictions: Predictions, dialect: str
    ) -> dict[str, Any]:
        """Accuracy over questions in percent, by subject and domain, and what chance has a part in."""
        graded = self._graded(questions, predictions, dialect)
        domain_of = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}
        kinds = [q.kind for q in questions]
        return {
            "accuracy": percent(hits),
            "accuracy_without_chance": percent([right and not drawn for right, drawn in graded]),
            "num_random": sum(drawn for _, drawn in graded),
            "per_domain": breakdown([domain_of.get(kind, "other") for kind in kinds], hits),
            "per_subject": breakdown(kinds, hits),
        }

    def submission(self, questions: Sequence[Question], predictions: Predictions) -> Any:
        """For ``main_eval_only.py``, by id: the letter read (else the answer) or the open answer."""
        result = {}
        for q in questions:
            text = predictions.texts[q.id].strip()
            letter = read_letter(text, q.details["options"]) if q.details["options"] else None
            result[q.id] = letter or text
        return result

    def read_submission(self, path: Path, questions: Sequence[Question]) -> Predictions:
        """Answers by id."""
        content = read_json(path)
        if not isinstance(content, dict):
            raise DataError(f"{path}: expected answers by question id")
        return Predictions({str(key): str(text) for key, text in content.items()})


def read_letter(text: str, options: Sequence[str]) -> str | None:
    """``parse_multi_choice_response`` without its random choice: the option an answer states, None for none.

    Of the letters in brackets, else before a blank, else before a full stop, else (in answers of more than
    five words) of the options whose text occurs, the one that stands last.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    padded = f" {text} "
    letters = LETTERS[: len(options)]
    for shape, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if shape.format(letter) in padded]
        if found:
            return max(found, key=lambda letter: padded.rfind(place.format(letter)))
    if len(padded.split()) > 5:
        lowered = padded.lower()
        found = [letter for letter, option in lettered(options).items() if option.lower() in lowered]
        if found:
            return max(found, key=lambda letter: lowered.rfind(lettered(options)[letter].lower()))
    return None


def _right(question: Question, text: str, draw: random.Random) -> tuple[bool, bool]:
    options = question.details["options"]
    if not options:
        return is_right(read_open(text.strip()), gold_forms(question.details["gold"])), False
    letter = read_letter(text.strip(), options)
    if letter is not None:
        return letter in question.details["gold"], False
    return draw.choice(list(LETTERS[: len(options)])) in question.details["gold"], True


def _vlmevalkit_right(question: Question, text: str) -> bool:
    options = question.details["options"]
    if options:
        return vlmevalkit_letter(text.strip(), lettered(options)) == question.answer
    return vlmevalkit_letter(text.strip(), lettered([str(question.answer), "Other Answers"])) == "A"


def _question(row: Mapping[str, Any], number: int) -> Question:
    identity = str(row.get("id") or row.get("index") or number)
    if "options" in row:
        open_question = row.get("question_type", "multiple-choice") != "multiple-choice"
        options = [] if open_question else parse_list(row["options"], f"question {identity}")
    else:
        options = options_of(row)
    images = _images(row, identity, options)
    subject = _ID.fullmatch(identity)
    kind = subject.group(1) if subject else str(row.get("category") or row.get("subject") or "")
    gold = _gold(row["answer"])
    if options and not set(gold) <= set(LETTERS[: len(options)]):
        raise DataError(
            f"question {identity}: gold answer {row['answer']!r} is none of {len(options)} options"
        )
    return Question(
        id=identity,
        image=images[0],
        text=with_options(row["question"], options),
        answer=str(row["answer"]),
        image_id=identity,
        kind=kind,
        details={"options": options, "gold": gold},
        more_images=tuple(images[1:]),
    )


def _gold(answer: Any) -> list[str]:
    """Right answers: MMMU stores several as the text of a list."""
    text = str(answer)
    return parse_list(text, "answer") if text.startswith("[") and text.endswith("]") else [text]


def _images(row: Mapping[str, Any], identity: str, options: Sequence[str]) -> list[Any]:
    """The images that question and options refer to, by number; the TSV lists them in that order."""
    if row.get("image") is not None:
        images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    else:
        text = "\n".join([row["question"], *options])
        numbers = sorted({int(n) for n in _IMAGE_MARK.findall(text)})
        images = [row.get(f"image_{n}") for n in numbers]
    if not images or any(image is None for image in images):
        raise DataError(f"question {identity}: an image that the question refers to is not there")
    return images
