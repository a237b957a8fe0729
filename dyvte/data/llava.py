"""LLaVA conversations: one record becomes the samples of its exchanges.

The format is that of ``llava_v1_5_mix665k.json``: ``{"id", "image", "conversations": [{"from": "human",
"value": "<image>\\nQ"}, {"from": "gpt", "value": "A"}, ...]}``; text-only conversations carry no ``image``.

Text is what the original trains on (``preprocess_multimodal`` in llava/train/train.py): a turn that holds
``<image>``, wherever it stands, loses it and its outer white space, and the template puts it in front; all
other turns are taken as they are.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dyvte.data.images import image_path
from dyvte.data.samples import Defect, EmbeddedImage, LeavesFolder, Sample, Turns, Unusable
from dyvte.errors import DataError

IMAGE_PLACEHOLDER = "<image>"
RepeatedIds = Literal["number", "refuse"]


@dataclass
class Tally:
    """What reading found, counted along the way; ``sha256`` is complete once the source is read through.

    Reading stops after ``patience`` defects: the source is hopeless.
    """

    conversations: int = 0
    repeated_ids: int = 0
    moved_placeholders: int = 0
    several_images: int = 0
    defects: list[Defect] = field(default_factory=list)
    patience: float = math.inf
    sha256: Any = field(default_factory=hashlib.sha256)


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """A source of records that can be read any number of times; nothing is kept in memory.

    Attributes
    ----------
    name
        For messages and records: the file, or the dataset and split.
    records
        Reads the records once. It is given a hash object and feeds it the bytes of the file, where there is
        one (``hashed``).
    image_folder
        What image paths are relative to.
    """

    name: str
    records: Callable[[Any], Iterator[Any]]
    image_folder: Path
    hashed: bool = True

    def samples(
        self, turns: Turns = "first", tally: Tally | None = None, *, repeated_ids: RepeatedIds = "number"
    ) -> Iterator[Sample]:
        """Samples in order; defects go to the tally.

        Sample ids are unique: ids that repeat (they do in mix665k) get ``#2``, ``#3``, ..., exchanges after
        the first ``:turn2``, ..., and a record without id is called by its place. "single" yields the first
        exchange like "first" does: the choice by ``num_turns`` is the selection's.

        Raises
        ------
        DataError
            If the source cannot be read, or an image path leaves the image folder.
        """
        tally = Tally() if tally is None else tally
        names = _Names()
        for place, entry in enumerate(self.records(tally.sha256)):
            tally.conversations += 1
            given = entry.get("id") if isinstance(entry, dict) else None
            has_id = isinstance(given, (str, int)) and not isinstance(given, bool) and str(given) != ""
            wanted = str(given) if has_id else f"entry {place}"
            sample_id = names.take(wanted)
            try:
                if sample_id != wanted:
                    tally.repeated_ids += 1
                    if repeated_ids == "refuse":
                        raise Unusable("id", f"{wanted!r} was there before")
                conversation = _parse(entry, tally)
                made = _exchanges(conversation, turns)
                image, image_id = self._image(conversation.image)
            except LeavesFolder as problem:
                raise DataError(str(problem.defect(self.name, sample_id))) from problem
            except Unusable as problem:
                tally.defects.append(problem.defect(self.name, sample_id))
                if len(tally.defects) > tally.patience:
                    return
                continue
            for turn, (question, answer, history) in enumerate(made):
                yield Sample(
                    id=sample_id if turn == 0 else names.take(f"{sample_id}:turn{turn + 1}"),
                    image=image,
                    question=question,
                    answer=answer,
                    image_id=image_id,
                    num_turns=(len(conversation.values) + 1) // 2,
                    history=history,
                )

    def _image(self, given: str | EmbeddedImage | None) -> tuple[Path | EmbeddedImage | None, str]:
        if given is None:
            return None, ""
        if isinstance(given, EmbeddedImage):
            return given, f"sha256:{hashlib.sha256(given.data).hexdigest()}"
        return image_path(self.image_folder, given), os.path.normpath(given)


@dataclass(frozen=True)
class _Conversation:
    """A record of sound structure: texts by turn, human first."""

    image: str | EmbeddedImage | None
    values: list[str]


class _Names:
    """Gives every name out once."""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}

    def take(self, wanted: str) -> str:
        name, number = wanted, self._times.get(wanted, 0)
        while name in self._times:
            number += 1
            name = f"{wanted}#{number}"
        self._times[wanted] = max(number, 1)
        self._times.setdefault(name, 1)
        return name


def _parse(entry: Any, tally: Tally) -> _Conversation:
    if not isinstance(entry, dict):
        raise Unusable("entry", f"expected a JSON object, found {type(entry).__name__}")
    image = _image_entry(entry, tally)
    turns = entry.get("conversations")
    if (
        isinstance(turns, dict)
        and isinstance(turns.get("from"), list)
        and isinstance(turns.get("value"), list)
    ):
        # a list of objects as some versions of datasets store it: an object of lists
        turns = [
            {"from": who, "value": text} for who, text in zip(turns["from"], turns["value"], strict=False)
        ]
    if not isinstance(turns, list) or not turns:
        raise Unusable("conversations", "expected a non-empty list of turns")
    for position, turn in enumerate(turns):
        _check_turn(turn, position, has_image=image is not None)
    values = [turn["value"] for turn in turns]
    if image is None:
        if any(IMAGE_PLACEHOLDER in value for value in values):
            raise Unusable("image", f"the text holds {IMAGE_PLACEHOLDER} but no image is given")
        return _Conversation(None, values)
    _check_placeholders(values, tally)
    first = values[0].strip()
    tally.moved_placeholders += not (first.startswith(IMAGE_PLACEHOLDER) or first.endswith(IMAGE_PLACEHOLDER))
    return _Conversation(image, [values[0].replace(IMAGE_PLACEHOLDER, "").strip(), *values[1:]])


def _check_turn(turn: Any, position: int, *, has_image: bool) -> None:
    where = f"conversations[{position}]"
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise Unusable(where, 'expected {"from": ..., "value": text}')
    if not isinstance(turn["value"], str):
        raise Unusable(f"{where}.value", f"expected text, found {type(turn['value']).__name__}")
    # Text-only conversations of mix665k may start with gpt; nobody asks them for a prompt.
    expected = "human" if position % 2 == 0 else "gpt"
    if has_image and turn["from"] != expected:
        problem = f"expected {expected!r}, found {turn['from']!r}"
        if position == 0:
            problem = f"the conversation starts with {turn['from']!r}, expected 'human'"
        raise Unusable(f"{where}.from", problem)


def _check_placeholders(values: list[str], tally: Tally) -> None:
    total = sum(value.count(IMAGE_PLACEHOLDER) for value in values)
    if total > 1:
        tally.several_images += 1
        raise Unusable("conversations", f"{total} {IMAGE_PLACEHOLDER}, one image per sample is supported")
    if IMAGE_PLACEHOLDER not in values[0]:
        where = next((i for i, value in enumerate(values) if IMAGE_PLACEHOLDER in value), None)
        found = "holds none" if where is None else f"stands in conversations[{where}]"
        problem = f"an image is given, but the first question holds no {IMAGE_PLACEHOLDER}"
        raise Unusable("conversations[0].value", problem if where is None else f"{problem}: it {found}")


def _image_entry(entry: dict[str, Any], tally: Tally) -> str | EmbeddedImage | None:
    """The image: a path, a list of one, or the ``{"bytes", "path"}`` that datasets keep."""
    image = entry.get("image")
    if isinstance(image, list):
        if len(image) > 1:
            tally.several_images += 1
            raise Unusable("image", f"{len(image)} images, one per sample is supported")
        image = image[0] if image else None
    if isinstance(image, dict):
        data, path = image.get("bytes"), image.get("path")
        image = path if data is None else EmbeddedImage(data, str(path or "embedded image"))
    if isinstance(image, bytes):
        image = EmbeddedImage(image)
    if image is None or image == "":
        return None
    if not isinstance(image, (str, EmbeddedImage)):
        raise Unusable("image", f"expected a path or image bytes, found {type(image).__name__}")
    return image


def _exchanges(
    conversation: _Conversation, turns: Turns
) -> list[tuple[str, str, tuple[tuple[str, str], ...]]]:
    """(question, answer, earlier exchanges) of the exchanges that are used; only those are checked."""
    values = conversation.values
    if conversation.image is None:
        # no visual tokens, so no sample of a gate: counted and dropped by the selection, whatever it holds
        return [(values[0], values[1] if len(values) > 1 else "", ())]
    made, history = [], []
    for at in range(0, len(values) if turns == "all" else 1, 2):
        if at + 1 == len(values):
            raise Unusable(
                f"conversations[{at}]", "the question has no answer turn (a truncated conversation)"
            )
        for where, name in ((at, "question"), (at + 1, "answer")):
            if not values[where].strip():
                raise Unusable(f"conversations[{where}].value", f"the {name} is empty")
        made.append((values[at], values[at + 1], tuple(history)))
        history.append((values[at], values[at + 1]))
    return made
