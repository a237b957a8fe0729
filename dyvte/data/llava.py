"""LLaVA conversations: one record becomes the samples of its exchanges.

The format is that of ``llava_v1_5_mix665k.json``: ``{"id", "image", "conversations": [{"from": "human",
"value": "<image>\\nQ"}, {"from": "gpt", "value": "A"}, ...]}``, or one that `records` reads besides;
text-only conversations carry no ``image``.

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

from dyvte.data.defects import Defect, Unusable, check_text, collected
from dyvte.data.images import image_path
from dyvte.data.records import Conversation, SeveralImages, parse_record
from dyvte.data.samples import EmbeddedImage, Sample, Turns

RepeatedIds = Literal["number", "refuse"]
Exchange = tuple[str, str, tuple[tuple[str, str], ...]]
"""Question, answer, earlier exchanges."""


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
    hashed
        Whether there is a file whose digest is recorded.
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

        Parameters
        ----------
        turns
            Which exchanges of a conversation are samples.
        tally
            Counts records, and takes defects.
        repeated_ids
            Number them, or refuse their records.

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
            made: list[Sample] = []
            with collected(tally.defects, file=self.name, sample_id=sample_id, field="entry"):
                if sample_id != wanted:
                    tally.repeated_ids += 1
                    if repeated_ids == "refuse":
                        raise Unusable("id", f"{wanted!r} was there before")
                made = self._samples_of(_parsed(entry, tally), turns, sample_id, names)
            if len(tally.defects) > tally.patience:
                return
            yield from made

    def _samples_of(
        self, conversation: Conversation, turns: Turns, sample_id: str, names: _Names
    ) -> list[Sample]:
        exchanges = _exchanges(conversation, turns)
        image, image_id = self._image(conversation.image)
        if image is not None:
            check_text(sample_id, "id")
        return [
            Sample(
                id=sample_id if turn == 0 else names.take(f"{sample_id}:turn{turn + 1}"),
                image=image,
                question=question,
                answer=answer,
                image_id=image_id,
                num_turns=(len(conversation.turns) + 1) // 2,
                history=history,
                system=conversation.system,
            )
            for turn, (question, answer, history) in enumerate(exchanges)
        ]

    def _image(self, given: str | EmbeddedImage | None) -> tuple[Path | EmbeddedImage | None, str]:
        if given is None:
            return None, ""
        if isinstance(given, EmbeddedImage):
            return given, f"sha256:{hashlib.sha256(given.data).hexdigest()}"
        return image_path(self.image_folder, given), os.path.normpath(given)


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


def _parsed(entry: Any, tally: Tally) -> Conversation:
    try:
        conversation = parse_record(entry)
    except SeveralImages:
        tally.several_images += 1
        raise
    tally.moved_placeholders += conversation.moved_placeholder
    return conversation


def _exchanges(conversation: Conversation, turns: Turns) -> list[Exchange]:
    """The exchanges that are used; only those are checked."""
    said = conversation.turns
    if conversation.image is None:
        # no visual tokens, so no sample of a gate: counted and dropped by the selection, whatever it holds
        return [(said[0].text, said[1].text if len(said) > 1 else "", ())]
    made: list[Exchange] = []
    history: list[tuple[str, str]] = []
    for at in range(0, len(said) if turns == "all" else 1, 2):
        if at + 1 == len(said):
            raise Unusable(said[at].where, "the question has no answer turn (a truncated conversation)")
        question, answer = said[at : at + 2]
        for turn, name in ((question, "question"), (answer, "answer")):
            if not turn.text.strip():
                raise Unusable(turn.field, f"the {name} is empty")
            check_text(turn.text, turn.field)
        made.append((question.text, answer.text, tuple(history)))
        history.append((question.text, answer.text))
    return made
