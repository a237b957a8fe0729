"""What every data loader yields: samples, and the defects of what could not become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dyvte.errors import DataError

Turns = Literal["single", "first", "all"]
_SHOWN_DEFECTS = 5


@dataclass(frozen=True)
class EmbeddedImage:
    """An image whose encoded bytes came with the data (a parquet column, a hub dataset)."""

    data: bytes = field(repr=False)
    name: str = "embedded image"
    """For messages."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question about one image, with the answer the data gives.

    Attributes
    ----------
    image
        Where the picture is; None for text only.
    history
        The earlier exchanges of the conversation as (question, answer): part of the prompt, the image
        placeholder before the first question.
    image_id
        Tells which samples share an image and are therefore dependent: the path as the file gives it, or the
        sha256 of an embedded image.
    num_turns
        Exchanges of the conversation that the sample comes from.
    """

    id: str
    image: Path | EmbeddedImage | None
    question: str
    answer: str
    image_id: str
    num_turns: int = 1
    history: tuple[tuple[str, str], ...] = ()

    @property
    def num_characters(self) -> int:
        """Length of all its text, earlier exchanges included."""
        return sum(map(len, (self.question, self.answer, *(text for turn in self.history for text in turn))))


@dataclass(frozen=True, kw_only=True)
class Defect:
    """What is wrong with one sample, and where."""

    file: str
    sample_id: str
    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: sample {self.sample_id!r}: {self.field}: {self.problem}"


class Unusable(Exception):
    """Raised while a sample is made; the reader adds file and sample id and makes a `Defect` of it."""

    def __init__(self, field_name: str, problem: str) -> None:
        super().__init__(problem)
        self.field, self.problem = field_name, problem

    def defect(self, file: str, sample_id: str) -> Defect:
        """The defect that it is."""
        return Defect(file=file, sample_id=sample_id, field=self.field, problem=self.problem)


class LeavesFolder(Unusable):
    """An image path leads out of the image folder: always fatal, never one of the tolerated defects."""


def check_defects(defects: Sequence[Defect], max_bad_samples: int) -> None:
    """Raise a DataError naming the first defects if there are more than ``max_bad_samples``."""
    if len(defects) <= max_bad_samples:
        return
    shown = "\n  ".join(str(defect) for defect in defects[:_SHOWN_DEFECTS])
    more = f"\n  ... and {len(defects) - _SHOWN_DEFECTS} more" if len(defects) > _SHOWN_DEFECTS else ""
    raise DataError(
        f"{len(defects)} unusable samples, {max_bad_samples} allowed (max_bad_samples):\n  {shown}{more}\n"
        "Correct the data, or allow that many: they are then left out and counted."
    )
