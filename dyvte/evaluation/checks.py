"""Questions that cannot be asked are found before anything is asked, named, and counted.

A benchmark's score is over all of its questions. One that cannot be asked ends the run, unless
``max_bad_samples`` allows for it: then it counts as answered with nothing, which the benchmark's own rule
reads as it reads any empty answer, and ``scores.json`` names it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from dyvte.backbones import PromptTemplate
from dyvte.backbones.encode import check_prompt
from dyvte.data import Defect, load_image
from dyvte.data.defects import Unusable, check_text, collected
from dyvte.data.images import check_image
from dyvte.errors import DataError
from dyvte.readers.tables import PackedImage
from dyvte.tasks.base import Question
from dyvte.tasks.records import ImageSource

_SHOWN = 5


def check_ids(questions: Sequence[Question], where: str) -> None:
    """Raise a DataError naming ids that are no text, which no file can hold.

    Parameters
    ----------
    questions
        All.
    where
        The benchmark and its files, for the message.
    """
    defects: list[Defect] = []
    for question in questions:
        with collected(defects, file=where, sample_id=question.id, field="id"):
            check_text(question.id, "id")
    refuse(defects, len(questions), where)


def text_defects(
    processor: Any,
    template: PromptTemplate,
    questions: Sequence[Question],
    prompts: Sequence[str],
    where: str,
) -> list[Defect]:
    """Render and tokenise every prompt; what no template or tokenizer takes.

    Parameters
    ----------
    processor, template
        Of the backbone.
    questions, prompts
        What is asked about, and how.
    where
        The benchmark and its files, for messages.
    """
    defects: list[Defect] = []
    rendered = []
    for question, prompt in zip(questions, prompts, strict=True):
        with collected(defects, file=where, sample_id=question.id, field="text"):
            if question.damage is not None:
                raise Unusable(*question.damage)
            for source in question.images:
                check_text(source.name, "image")
            shown = 1 if question.video is not None else len(question.images)
            rendered.append((question.id, template.render(prompt, has_image=shown)))
    try:  # all at once is many times faster, and seldom fails
        processor.tokenizer([one.text for _, one in rendered], add_special_tokens=False)
    except Exception:
        for question_id, one in rendered:
            with collected(defects, file=where, sample_id=question_id, field="text"):
                check_prompt(processor, one)
    return defects


def image_defects(questions: Sequence[Question], where: str) -> list[Defect]:
    """Decode every image of the questions once, on all cores; those that cannot be, of each question about
    one. Videos are not decoded.

    Parameters
    ----------
    questions
        All that will be asked.
    where
        The benchmark and its files, for messages.
    """
    sources = list(dict.fromkeys(source for question in questions for source in question.images))

    def problem(source: ImageSource) -> list[Defect]:
        found: list[Defect] = []
        with collected(found, file=where, sample_id="", field="image"):
            check_image(source.read() if isinstance(source, PackedImage) else source)
        return found

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        bad = {source: found[0] for source, found in zip(sources, pool.map(problem, sources)) if found}
    first_bad = ((one, next((s for s in one.images if s in bad), None)) for one in questions)
    return [replace(bad[source], sample_id=one.id) for one, source in first_bad if source is not None]


def open_image(source: ImageSource) -> Any:
    """An RGB PIL image."""
    return load_image(source.read() if isinstance(source, PackedImage) else source)


def defects_alone(ids: Sequence[str], ask_alone: Callable[[int], Any], where: str = "") -> list[Defect]:
    """Try each question alone; those that fail.

    Parameters
    ----------
    ids
        Of the questions.
    ask_alone
        Prepares the question of that index.
    where
        For messages.
    """
    defects: list[Defect] = []
    for index, question_id in enumerate(ids):
        with collected(defects, file=where, sample_id=question_id, field="question"):
            ask_alone(index)
    return defects


def defects_of(problems: Mapping[str, str], where: str) -> list[Defect]:
    """What keeps questions from being asked, by id, as defects of them.

    Parameters
    ----------
    problems
        Field and problem, joined by a colon.
    where
        The benchmark and its files, for messages.
    """
    parted = ((question_id, *text.split(": ", 1)) for question_id, text in problems.items())
    return [Defect(file=where, sample_id=one, field=name, problem=text) for one, name, text in parted]


def without_units(questions: Sequence[Question], bad: Collection[str]) -> list[Question]:
    """The questions but for those of ids in ``bad`` and all others about the same images, which some
    benchmarks score together."""
    units = {question.image_id for question in questions if question.id in bad}
    return [question for question in questions if question.image_id not in units]


def refuse(defects: Sequence[Defect], total: int, where: str = "", max_bad_samples: int = 0) -> None:
    """Raise a DataError that names the first defects if there are more than ``max_bad_samples``.

    Parameters
    ----------
    defects
        One for each question that cannot be asked.
    total
        How many questions there are.
    where
        The benchmark and its files.
    max_bad_samples
        How many are tolerated.
    """
    if len(defects) <= max_bad_samples:
        return
    lines = [f"question {one.sample_id!r}: {one.field}: {one.problem}" for one in defects[:_SHOWN]]
    if len(defects) > _SHOWN:
        lines.append(f"... and {len(defects) - _SHOWN} more")
    text = "\n  ".join(lines).encode("utf-8", "backslashreplace").decode()
    head = f"{where}: " if where else ""
    raise DataError(
        f"{head}{len(defects)} of {total} questions cannot be asked, {max_bad_samples} allowed "
        f"(max_bad_samples):\n  {text}\nCorrect the questions, or their images; or allow that many"
    )
