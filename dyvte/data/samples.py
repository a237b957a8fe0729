"""What every data loader yields: samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Turns = Literal["single", "first", "all"]


@dataclass(frozen=True)
class EmbeddedImage:
    """An image whose encoded bytes came with the data (a parquet column, a hub dataset).

    Attributes
    ----------
    data
        The encoded file: PNG, JPEG, ...
    """

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
    id
        Unique in its source, or numbered there.
    image
        Where the image is; None for text only.
    question, answer
        Plain text; the image placeholder is taken out of the question.
    history
        The earlier exchanges of the conversation as (question, answer): part of the prompt, the image
        placeholder before the first question.
    image_id
        Tells which samples share an image and are therefore dependent: the path as the file gives it, or the
        sha256 of an embedded image.
    system
        The conversation's own system prompt; "": the template's.
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
    system: str = ""

    @property
    def num_characters(self) -> int:
        """Length of all its text, earlier exchanges included."""
        earlier = (text for turn in self.history for text in turn)
        return sum(map(len, (self.system, self.question, self.answer, *earlier)))
