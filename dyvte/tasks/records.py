"""What a benchmark is made of: questions, and predictions by question id."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

from dyvte.data.defects import Unusable, check_text, printable
from dyvte.errors import DataError, ScoreError
from dyvte.formatting import name_some
from dyvte.readers.files import is_file
from dyvte.readers.tables import PackedImage
from dyvte.readers.videos import Video

ImageSource: TypeAlias = Path | PackedImage
"""An image file, or an image inside a table (parquet, TSV)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question about one image, several images or a video.

    Attributes
    ----------
    id : str
        Unique within the benchmark; kept as text (GQA ids have leading zeros).
    image : Path or PackedImage, or None
        The first image; None for a question about a video, and where only scoring was asked for.
    text : str
        The question as the benchmark states it, options included, without what evaluations append.
    answer : str or None
        Gold answer as stored; None on a split whose answers are not public.
    image_id : str
        The unit of dependence: questions with the same ``image_id`` are resampled together.
    kind : str
        Question type or subtask, for breakdowns.
    details : Mapping
        What only this benchmark's scorer needs.
    more_images : tuple
        Further images, in the order of the question's placeholders.
    video : Video or None
    damage : tuple of str, or None
        Field and problem, where a text of it holds half a character: it cannot be asked. Its texts then show
        the half as an escape. See :meth:`dyvte.tasks.base.Benchmark.load`.
    """

    id: str
    image: ImageSource | None
    text: str
    answer: str | None
    image_id: str
    kind: str
    details: Mapping[str, Any] = field(default_factory=dict)
    more_images: tuple[ImageSource, ...] = ()
    video: Video | None = None
    damage: tuple[str, str] | None = None

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """All images, in order; empty for a question about a video."""
        return () if self.image is None else (self.image, *self.more_images)


@dataclass(frozen=True)
class Predictions:
    """Answers by question id.

    ``converted`` is True when the texts come from a benchmark's submission file, where the official
    tool compares them as they stand; False for a model's raw answers.
    """

    texts: Mapping[str, str]
    converted: bool = False


def image_size(question: Question, without: str) -> tuple[int, int]:
    """Width and height of a question's image, in pixels.

    Parameters
    ----------
    question
        Any.
    without
        What the error says where there is no image.

    Raises
    ------
    ScoreError
        No image, or one that cannot be read; the question is named.
    """
    from PIL import Image

    source = question.image
    if source is None or (isinstance(source, Path) and not is_file(source)):
        raise ScoreError(f"question {question.id}: {without}")
    try:
        with Image.open(BytesIO(source.read().data) if isinstance(source, PackedImage) else source) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ScoreError(f"question {question.id}: cannot read the size of its image: {error}") from error


def refuse_missing_files(questions: Sequence[Question], root: Path) -> None:
    """Raise DataError naming images and videos that are not there.

    Parameters
    ----------
    questions
        Those that will be asked.
    root
        Of the benchmark.
    """
    base = root if root.is_dir() else root.parent
    without = [q.id for q in questions if q.image is None and q.video is None]
    if without:
        raise DataError(
            f"{root}: {len(without)} questions have no image: {name_some(without)}. They can be scored, but "
            "not asked"
        )
    paths = {path: None for q in questions for path in q.images if isinstance(path, Path)}
    missing = [str(os.path.relpath(path, base)) for path in paths if not is_file(path)]
    if missing:
        raise DataError(f"{base} lacks {len(missing)} images: {name_some(missing)}")
    videos = {q.video: None for q in questions if q.video is not None}
    lost = [video.name for video in videos if not video.path.exists()]
    if lost:
        raise DataError(f"{base} lacks {len(lost)} videos or folders of frames: {name_some(lost)}")


def with_damage(question: Question) -> Question:
    """The question as it is, or with ``damage`` where one of its texts holds half a character.

    Parameters
    ----------
    question
        As a reader made it inside `halves_taken`.
    """
    found: list[Unusable] = []
    # an option stands in the text as well, and says more
    details = {name: _printable(value, name, found) for name, value in question.details.items()}
    tidied = {
        name: _printable(getattr(question, name), name, found)
        for name in ("id", "image", "more_images", "text", "answer", "image_id", "kind")
    }
    if not found:
        return question
    first = found[0]
    return replace(question, **tidied, details=details, damage=(first.field, first.problem))


def _printable(value: Any, name: str, found: list[Unusable]) -> Any:
    """A value without any half of a character, each text that had one added to ``found``."""
    if isinstance(value, Path):
        return Path(_printable(str(value), name, found))
    if isinstance(value, str):
        try:
            check_text(value, name)
        except Unusable as problem:
            found.append(problem)
            return printable(value)
    elif isinstance(value, Mapping):
        pairs = value.items()
        return {_printable(key, name, found): _printable(item, name, found) for key, item in pairs}
    elif isinstance(value, list | tuple):
        items = [_printable(item, name, found) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def unique_ids(questions: Sequence[Question], where: Path) -> None:
    """Raise DataError naming ids that occur twice.

    Parameters
    ----------
    questions
        All.
    where
        Their file, for the message.
    """
    twice = repeated(q.id for q in questions)
    if twice:
        raise DataError(f"{where}: {len(twice)} duplicate question ids: {name_some(twice)}")


def repeated(items: Iterable[str]) -> list[str]:
    """The items that were there before, once for each repetition."""
    seen: set[str] = set()
    return [item for item in items if item in seen or seen.add(item)]


def require_all(questions: Sequence[Question], predictions: Predictions) -> None:
    """Raise ScoreError naming questions without a prediction: the denominator never shrinks silently.

    Parameters
    ----------
    questions
        All.
    predictions
        By question id.
    """
    missing = [q.id for q in questions if q.id not in predictions.texts]
    if missing:
        raise ScoreError(
            f"{len(missing)} of {len(questions)} questions have no prediction: {name_some(missing)}. "
            "Every question must be answered; an empty answer counts as an answer"
        )


def count_unknown(questions: Sequence[Question], predictions: Predictions) -> int:
    """How many predictions belong to none of the questions (ignored, as the official tools do)."""
    known = {q.id for q in questions}
    return sum(1 for question_id in predictions.texts if question_id not in known)
