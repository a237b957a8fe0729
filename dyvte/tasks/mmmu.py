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
on which answers are unreadable before: compare runs by the second score.

Options are shown as LLaVA does; images stand before the question, whose ``<image 1>`` marks stay in the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.readers.files import table_images
from dyvte.readers.rows import Row, is_blank
from dyvte.readers.tables import PackedImage
from dyvte.tasks.answers.choices import LETTERS, Options, lettered, vlmevalkit_letter, with_options
from dyvte.tasks.answers.mmmu_open import gold_forms, is_right, read_open
from dyvte.tasks.base import TASKS, Benchmark, Predictions, Question
from dyvte.tasks.choices import checked_letter, lettered_options
from dyvte.tasks.metrics import breakdown, percent
from dyvte.tasks.predictions import checked, read_by_id
from dyvte.tasks.prompts import LETTER_SUFFIX, SHORT_ANSWER_SUFFIX
from dyvte.tasks.records import ImageSource

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


@TASKS.register
class MMMU(Benchmark):
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

    tables = ("MMMU_DEV_VAL.tsv", "*mmmu*.tsv")
    shards = ("data/validation-*.parquet", "validation-*.parquet", "*/validation-*.parquet")
    columns = (("question",), ("answer",), ("options", "A"))
    shard_columns = ("id", "question_type")

    def table_question(self, row: Row, number: int, base: Path) -> Question | None:
        """A question of the validation split; the TSV holds others too."""
        return _question(row, number, base) if row.value("split") in (None, "validation") else None

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

    def metrics(
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
        return checked(read_by_id(path), path)


def read_letter(text: str, options: Options) -> str | None:
    """``parse_multi_choice_response`` without its random choice: the option an answer states, None for none.

    Of the letters in brackets, else before a blank, else before a full stop, else (in answers of more than
    five words) of the options whose text occurs, the one that stands last.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    padded = f" {text} "
    for shape, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if shape.format(letter) in padded]
        if found:
            return max(found, key=lambda letter: padded.rfind(place.format(letter)))
    if len(padded.split()) > 5:
        lowered = padded.lower()
        found = [letter for letter, option in options.items() if option.lower() in lowered]
        if found:
            return max(found, key=lambda letter: lowered.rfind(options[letter].lower()))
    return None


def _right(question: Question, text: str, draw: random.Random) -> tuple[bool, bool]:
    options = question.details["options"]
    if not options:
        return is_right(read_open(text.strip()), gold_forms(question.details["gold"])), False
    letter = read_letter(text.strip(), options)
    if letter is not None:
        return letter in question.details["gold"], False
    return draw.choice(list(options)) in question.details["gold"], True


def _vlmevalkit_right(question: Question, text: str) -> bool:
    options = question.details["options"]
    if options:
        return vlmevalkit_letter(text, options) == question.answer
    return vlmevalkit_letter(text, lettered([str(question.answer), "Other Answers"])) == "A"


def _question(row: Row, number: int, base: Path) -> Question:
    identity = row.identity("id", "index", default=str(number))
    options = {} if _is_open(row) else lettered_options(row, "options")
    images = _images(row, options, base)
    subject = _ID.fullmatch(identity)
    gold = _gold(row)
    if options:
        gold = [checked_letter(row, letter, options) for letter in gold]
    return Question(
        id=identity,
        image=images[0] if images else None,
        text=with_options(row.text("question"), options),
        answer=row.text("answer"),
        image_id=identity,
        kind=subject.group(1) if subject else row.text("category", "subject", default=""),
        details={"options": options, "gold": gold},
        more_images=tuple(images[1:]),
    )


def _is_open(row: Row) -> bool:
    """Whether a question asks for a word: so its type says, and in the TSV that no option is there at all."""
    if row.value("question_type") is not None:
        return row.text("question_type") != "multiple-choice"
    return "options" not in row and all(is_blank(row.get(letter)) for letter in LETTERS)


def _gold(row: Row) -> list[str]:
    """Right answers: MMMU stores several as the text of a list."""
    text = row.text("answer")
    if text.startswith("[") and text.endswith("]"):
        return [one for one in row.texts("answer") if one is not None]
    return [text]


def _images(row: Row, options: Options, base: Path) -> list[ImageSource]:
    """The images that question and options refer to, by number; the TSV lists them in that order. None in a
    table without images."""
    if "image" in row or "image_path" in row or not any(f"image_{n}" in row for n in range(1, 8)):
        images = table_images(row, base)
        if not images and "image" in row:
            raise row.error("an image that the question refers to is not there")
        return images
    text = "\n".join([row.text("question"), *options.values()])
    numbers = sorted({int(n) for n in _IMAGE_MARK.findall(text)})
    found = [row.get(f"image_{n}") for n in numbers]
    if not found or not all(isinstance(image, PackedImage) for image in found):
        raise row.error("an image that the question refers to is not there")
    return found
