"""LLaVA instruction data: a conversation file and an image folder become samples.

The format is that of ``llava_v1_5_mix665k.json``: a JSON list of ``{"id", "image", "conversations": [{"from":
"human", "value": "<image>\\nQ"}, {"from": "gpt", "value": "A"}, ...]}``; text-only conversations carry no
``image``. A sample is the FIRST exchange of a conversation, whose prompt depends on nothing else; whether
conversations with further exchanges are used at all is the caller's choice (``single_turn``).

What is wrong with a conversation is never repaired or passed over in silence: every defect names file, sample
and field, and more than ``max_bad_samples`` of them end the run. An image path that leaves the image folder
always does.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dyvte.errors import DataError

IMAGE_PLACEHOLDER = "<image>"
_SHOWN_DEFECTS = 5


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question about one image, with the answer the data gives.

    ``image_id`` (the path as the file gives it) tells which samples share an image and are therefore
    dependent; ``num_turns`` counts the exchanges of the conversation it is the first of. ``image`` is None
    for text only.
    """

    id: str
    image: Path | None
    question: str
    answer: str
    image_id: str
    num_turns: int = 1


@dataclass(frozen=True, kw_only=True)
class Defect:
    """What is wrong with one sample, and where."""

    file: str
    sample_id: str
    field: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: sample {self.sample_id!r}: {self.field}: {self.problem}"


@dataclass(frozen=True, kw_only=True)
class LlavaData:
    """A conversation file as read: usable samples in file order, defects, and the file's sha256."""

    path: Path
    sha256: str
    samples: tuple[Sample, ...]
    defects: tuple[Defect, ...]
    num_conversations: int


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The samples chosen for a run; ``sha256`` covers their ids, images, questions and answers, in order.

    ``counts`` maps each step of the selection to the number of samples left or dropped, for the log and for
    the training record.
    """

    samples: tuple[Sample, ...]
    counts: dict[str, int]
    sha256: str
    defects: tuple[Defect, ...] = field(default=())


def load_llava(path: str | Path, image_folder: str | Path, *, max_bad_samples: int = 0) -> LlavaData:
    """Read a LLaVA conversation file.

    Parameters
    ----------
    path:
        The JSON file.
    image_folder:
        What the ``image`` entries are relative to. Images are not opened here, and their existence is checked
        by :func:`select`, for the chosen samples only.
    max_bad_samples:
        How many conversations may be unusable before the file is refused.

    Raises
    ------
    DataError
        If the file is missing or no JSON list of conversations, an image path leaves ``image_folder``, or
        more than ``max_bad_samples`` conversations are unusable (the first five are named).
    """
    path, image_folder = Path(path), Path(image_folder)
    entries, digest = _read_json_list(path)
    samples: list[Sample] = []
    defects: list[Defect] = []
    seen: Counter[str] = Counter()
    for index, entry in enumerate(entries):
        sample_id = _unique_id(entry, index, seen)
        try:
            samples.append(_parse(entry, sample_id, image_folder, str(path)))
        except _Unusable as problem:
            defects.append(problem.defect)
    check_defects(defects, max_bad_samples)
    return LlavaData(
        path=path,
        sha256=digest,
        samples=tuple(samples),
        defects=tuple(defects),
        num_conversations=len(entries),
    )


def select(
    data: LlavaData,
    *,
    single_turn: bool = True,
    image_only: bool = True,
    fraction: float = 1.0,
    limit: int | None = None,
    seed: int = 0,
    max_bad_samples: int = 0,
) -> Selection:
    """Choose samples: filters first, then a seeded random ``fraction`` of what is left, then at most
    ``limit``.

    ``single_turn`` drops conversations of more than one exchange (else their first exchange is used);
    ``image_only`` drops text-only samples. The reference's "1 % single-turn image-only" is ``fraction=0.01``
    with both filters on; which 1 % and which seed its authors took is not published. File order is kept, and
    ``limit`` also draws at random (with the same seed), so that a file ordered by image gives a varied
    sample.

    Chosen samples whose image file does not exist are dropped, counted and named among ``defects``.

    Raises
    ------
    DataError
        If nothing is left, or more than ``max_bad_samples`` samples are unusable, those of the file included.
    ValueError
        If ``fraction`` is not in (0, 1] or ``limit`` is not positive.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], found {fraction}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    counts = {"conversations": data.num_conversations, "unusable": len(data.defects)}
    kept = list(data.samples)
    counts["text_only"] = sum(sample.image is None for sample in kept)
    if image_only:
        kept = [sample for sample in kept if sample.image is not None]
    counts["multi_turn"] = sum(sample.num_turns > 1 for sample in kept)
    if single_turn:
        kept = [sample for sample in kept if sample.num_turns == 1]
    counts["eligible"] = len(kept)
    size = max(1, round(fraction * len(kept))) if kept else 0
    size = min(size, limit) if limit is not None else size
    kept = _draw(kept, size, seed)

    present, missing = [], []
    for sample in kept:
        if sample.image is None or sample.image.is_file():
            present.append(sample)
        else:
            problem = f"there is no file {sample.image}"
            missing.append(Defect(file=str(data.path), sample_id=sample.id, field="image", problem=problem))
    check_defects([*data.defects, *missing], max_bad_samples)
    counts["missing_images"] = len(missing)
    counts["chosen"] = len(present)
    if not present:
        raise DataError(
            f"{data.path}: no sample is left after selection ({_spell(counts)}); single_turn={single_turn}, "
            f"image_only={image_only}, fraction={fraction}"
        )
    return Selection(
        samples=tuple(present),
        counts=counts,
        sha256=selection_sha256(present),
        defects=(*data.defects, *missing),
    )


def selection_sha256(samples: Iterable[Sample]) -> str:
    """Digest of the samples' ids, image paths, questions and answers, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.id, sample.image_id, sample.question, sample.answer]).encode())
        digest.update(b"\n")
    return digest.hexdigest()


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


class _Unusable(Exception):
    def __init__(self, file: str, sample_id: str, field_name: str, problem: str) -> None:
        super().__init__(problem)
        self.defect = Defect(file=file, sample_id=sample_id, field=field_name, problem=problem)


def _read_json_list(path: Path) -> tuple[list[Any], str]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such data file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    try:
        entries = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); expected a LLaVA conversation list") from error
    if not isinstance(entries, list):
        raise DataError(
            f"{path}: expected a JSON list of LLaVA conversations, found {type(entries).__name__}"
        )
    if not entries:
        raise DataError(f"{path}: the list of conversations is empty")
    return entries, hashlib.sha256(raw).hexdigest()


def _unique_id(entry: Any, index: int, seen: Counter[str]) -> str:
    """The entry's id; ids that repeat (they do in mix665k) get '#2', '#3', ... and missing ones their
    index."""
    given = entry.get("id") if isinstance(entry, dict) else None
    base = str(given) if isinstance(given, (str, int)) and str(given) else f"entry {index}"
    seen[base] += 1
    return base if seen[base] == 1 else f"{base}#{seen[base]}"


def _parse(entry: Any, sample_id: str, image_folder: Path, file: str) -> Sample:
    if not isinstance(entry, dict):
        raise _Unusable(file, sample_id, "entry", f"expected a JSON object, found {type(entry).__name__}")
    image_name = _image_name(entry, sample_id, file)
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _Unusable(file, sample_id, "conversations", "expected a non-empty list of turns")
    for position, turn in enumerate(turns):
        where = f"conversations[{position}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            raise _Unusable(file, sample_id, where, 'expected {"from": ..., "value": text}')
        # Text-only conversations of mix665k may start with gpt; nobody asks them for a prompt.
        expected = "human" if position % 2 == 0 else "gpt"
        if image_name is not None and turn["from"] != expected:
            problem = f"expected {expected!r}, found {turn['from']!r}"
            if position == 0:
                problem = f"the conversation starts with {turn['from']!r}, expected 'human'"
            raise _Unusable(file, sample_id, f"{where}.from", problem)
    values = [turn["value"] for turn in turns]
    if image_name is None:
        return _text_only(values, sample_id, file)
    if len(turns) < 2:
        raise _Unusable(file, sample_id, "conversations", "the question has no answer turn")
    _check_placeholders(values, sample_id, file)
    question, answer = values[0].replace(IMAGE_PLACEHOLDER, "").strip(), values[1].strip()
    if not question:
        raise _Unusable(file, sample_id, "conversations[0].value", "the question is empty")
    if not answer:
        raise _Unusable(file, sample_id, "conversations[1].value", "the answer is empty")
    image = _inside(image_folder, image_name, sample_id, file)
    return Sample(
        id=sample_id,
        image=image,
        question=question,
        answer=answer,
        image_id=os.path.normpath(image_name),
        num_turns=(len(turns) + 1) // 2,
    )


def _image_name(entry: dict[str, Any], sample_id: str, file: str) -> str | None:
    image = entry.get("image")
    if isinstance(image, list):
        if len(image) > 1:
            raise _Unusable(file, sample_id, "image", f"{len(image)} images, one per sample is supported")
        image = image[0] if image else None
    if image is None or image == "":
        return None
    if not isinstance(image, str):
        raise _Unusable(file, sample_id, "image", f"expected a path, found {type(image).__name__}")
    return image


def _text_only(values: list[str], sample_id: str, file: str) -> Sample:
    if any(IMAGE_PLACEHOLDER in value for value in values):
        raise _Unusable(file, sample_id, "image", f"the text holds {IMAGE_PLACEHOLDER} but no image is given")
    answer = values[1].strip() if len(values) > 1 else ""
    turns = (len(values) + 1) // 2
    return Sample(
        id=sample_id, image=None, question=values[0].strip(), answer=answer, image_id="", num_turns=turns
    )


def _check_placeholders(values: list[str], sample_id: str, file: str) -> None:
    total = sum(value.count(IMAGE_PLACEHOLDER) for value in values)
    if total > 1:
        raise _Unusable(
            file, sample_id, "conversations", f"{total} {IMAGE_PLACEHOLDER}, one image is supported"
        )
    if IMAGE_PLACEHOLDER not in values[0]:
        raise _Unusable(
            file,
            sample_id,
            "conversations[0].value",
            f"an image is given but the question holds no {IMAGE_PLACEHOLDER}",
        )


def _inside(image_folder: Path, image_name: str, sample_id: str, file: str) -> Path:
    """The image's path; a name that would leave the folder is refused whatever the limit on bad samples.

    The check is lexical on purpose: symbolic links inside the folder are the user's own.
    """
    relative = os.path.normpath(image_name)
    if os.path.isabs(relative) or relative == os.pardir or relative.startswith(os.pardir + os.sep):
        raise DataError(
            f"{file}: sample {sample_id!r}: image: {image_name!r} leaves the image folder {image_folder}; "
            "give paths relative to that folder"
        )
    return image_folder / relative


def _draw(samples: list[Sample], size: int, seed: int) -> list[Sample]:
    if size >= len(samples):
        return samples
    chosen = random.Random(seed).sample(range(len(samples)), size)
    return [samples[index] for index in sorted(chosen)]


def _spell(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
