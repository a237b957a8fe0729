"""Questions that cannot be asked are found before anything is asked, and named.

A benchmark's score is over all of its questions, so none is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dyvte.backbones import PromptTemplate
from dyvte.backbones.encode import check_prompt
from dyvte.data import Defect, load_image
from dyvte.data.defects import check_text, collected
from dyvte.errors import DataError
from dyvte.readers.tables import PackedImage
from dyvte.tasks.base import Question
from dyvte.tasks.records import ImageSource

_SHOWN = 5


def check_texts(
    processor: Any,
    template: PromptTemplate,
    questions: Sequence[Question],
    prompts: Sequence[str],
    where: str,
) -> None:
    """Render and tokenise every prompt.

    Parameters
    ----------
    where
        The benchmark and its files, for the message.

    Raises
    ------
    DataError
        Naming the questions whose text no prompt or tokenizer takes.
    """
    defects: list[Defect] = []
    rendered = []
    for question, prompt in zip(questions, prompts, strict=True):
        with collected(defects, file=where, sample_id=question.id, field="text"):
            check_text(question.id, "id")
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
    _refuse(defects, len(questions), where)


def check_images(questions: Sequence[Question], where: str) -> None:
    """Decode every image of the questions once, on all cores; videos are left for when they are asked.

    Raises
    ------
    DataError
        Naming the questions whose image cannot be read.
    """
    asked: dict[ImageSource, str] = {}
    for question in questions:
        for source in question.images:
            asked.setdefault(source, question.id)

    def problems(source: ImageSource) -> list[Defect]:
        found: list[Defect] = []
        with collected(found, file=where, sample_id=asked[source], field="image"):
            open_image(source)
        return found

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        defects = [defect for found in pool.map(problems, asked) for defect in found]
    _refuse(defects, len(questions), where)


def open_image(source: ImageSource) -> Any:
    """An RGB PIL image."""
    return load_image(source.read() if isinstance(source, PackedImage) else source)


def name_unaskable(ids: Sequence[str], ask_alone: Callable[[int], Any], where: str = "") -> None:
    """After a batch of questions failed: try each alone.

    Parameters
    ----------
    ask_alone
        Prepares the question of that index.

    Raises
    ------
    DataError
        Naming those that fail alone too; nothing is raised if each succeeds.
    """
    defects: list[Defect] = []
    for index, question_id in enumerate(ids):
        with collected(defects, file=where, sample_id=question_id, field="question"):
            ask_alone(index)
    _refuse(defects, len(ids), where)


def _refuse(defects: Sequence[Defect], total: int, where: str) -> None:
    if not defects:
        return
    lines = [f"question {one.sample_id!r}: {one.field}: {one.problem}" for one in defects[:_SHOWN]]
    if len(defects) > _SHOWN:
        lines.append(f"... and {len(defects) - _SHOWN} more")
    text = "\n  ".join(lines).encode("utf-8", "backslashreplace").decode()
    head = f"{where}: " if where else ""
    raise DataError(
        f"{head}{len(defects)} of {total} questions cannot be asked, and none is left out of a score:\n"
        f"  {text}\nCorrect the questions, or their images"
    )
