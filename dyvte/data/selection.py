"""Which samples a run uses: filters, a seeded draw, and a record of both.

The draw is the same however the data is stored and read. Every eligible sample gets a key, the first 8 bytes
of sha256("<seed>\\0<sample id>") as a fraction of their range, and the round(fraction * n) samples with the
smallest keys are taken (at most ``limit``), in file order. n need not be known beforehand: a stream is read
once, and of n samples seen only those are kept that can still be among the smallest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from dyvte.data.defects import Defect, check_defects, collected
from dyvte.data.images import check_image_file
from dyvte.data.llava import Conversations, RepeatedIds, Tally
from dyvte.data.samples import Sample, Turns
from dyvte.errors import DataError
from dyvte.progress import Advance, progress

# Defects beyond the limit that are still collected, so that the error can say what is wrong at large.
_MORE_DEFECTS = 1000


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The samples chosen for a run, and how they were chosen.

    Attributes
    ----------
    samples
        In the order of their source.
    counts
        Number of conversations or samples left or dropped at each step, for the log and the record.
    sha256
        Over the samples' ids, images, questions, answers and earlier exchanges, in order.
    defects
        Unusable samples that were tolerated; they are none of ``samples``.
    source, source_sha256
        What was read; the digest of the file, None for datasets.
    rule
        Turns, fraction, limit and seed.
    """

    samples: tuple[Sample, ...]
    counts: dict[str, int]
    sha256: str
    defects: tuple[Defect, ...] = field(default=())
    source: str = ""
    source_sha256: str | None = None
    rule: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What a training record keeps of it."""
        return {
            "file": Path(self.source).name,
            "file_sha256": self.source_sha256,
            "sha256": self.sha256,
            **self.rule,
            **self.counts,
        }


def select(
    conversations: Conversations,
    *,
    turns: Turns = "single",
    image_only: bool = True,
    fraction: float = 1.0,
    limit: int | None = None,
    seed: int = 0,
    max_bad_samples: int = 0,
    repeated_ids: RepeatedIds = "number",
    follow_links: bool = False,
) -> Selection:
    """Choose samples: filters first, then a seeded random ``fraction`` of what is left, at most ``limit``.

    Parameters
    ----------
    conversations
        Read once, from the first to the last record.
    turns
        "single": conversations of one exchange only. "first": the first exchange of any. "all": every
        exchange is a sample, the exchanges before it are part of its prompt.
    image_only
        Drop text-only conversations.
    fraction, limit, seed
        The draw (see the module's text). The reference's "1 % single-turn image-only" is ``fraction=0.01``
        and the defaults; which 1 % its authors took is not published.
    max_bad_samples
        Unusable samples tolerated; they are excluded, counted and named among ``defects``. Chosen samples
        whose image file does not exist count as unusable.
    repeated_ids
        "number": a repeated id gets a number and is counted. "refuse": it makes its record unusable.
    follow_links
        Let symbolic links inside the image folder lead out of it.

    Raises
    ------
    DataError
        If the source cannot be read, an image leaves its folder, nothing is left, or more than
        ``max_bad_samples`` samples are unusable.
    ValueError
        If an argument is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], found {fraction}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    if turns not in get_args(Turns):
        raise ValueError(f"turns must be one of {', '.join(get_args(Turns))}, found {turns!r}")
    tally = Tally(patience=max_bad_samples + _MORE_DEFECTS)
    dropped = {"text_only": 0, "multi_turn": 0}
    read = conversations.samples("all" if turns == "all" else "first", tally, repeated_ids=repeated_ids)
    draw = Draw(fraction, limit, seed)
    # A hub dataset takes hours; a file, seconds: then no bar is shown.
    with progress(None, "conversations", "sample", delay=5) as advance:
        for sample in _filtered(_counted(read, advance), dropped, turns=turns, image_only=image_only):
            draw.offer(sample)
    check_defects(tally.defects, max_bad_samples)
    present, missing = _with_image_file(draw.taken(), conversations, follow_links=follow_links)
    defects = (*tally.defects, *missing)
    counts = {
        "conversations": tally.conversations,
        "unusable": len(tally.defects),
        "several_images": tally.several_images,
        "repeated_ids": tally.repeated_ids,
        "moved_placeholders": tally.moved_placeholders,
        **dropped,
        "eligible": draw.offered,
        "missing_images": len(missing),
        "chosen": len(present),
        "images": len({sample.image_id for sample in present if sample.image is not None}),
    }
    check_defects(defects, max_bad_samples)
    if not present:
        raise DataError(
            f"{conversations.name}: no sample is left after selection ({_spell(counts)}); turns={turns}, "
            f"image_only={image_only}, fraction={fraction}"
        )
    return Selection(
        samples=tuple(present),
        counts=counts,
        sha256=selection_sha256(present),
        defects=defects,
        source=conversations.name,
        source_sha256=tally.sha256.hexdigest() if conversations.hashed else None,
        rule={"turns": turns, "fraction": fraction, "limit": limit, "selection_seed": seed},
    )


def selection_sha256(samples: Iterable[Sample]) -> str:
    """Digest of the samples' ids, image ids, questions, answers and earlier exchanges, in order.

    Parameters
    ----------
    samples
        In the order that counts.
    """
    digest = hashlib.sha256()
    for sample in samples:
        parts: list[Any] = [sample.id, sample.image_id, sample.question, sample.answer]
        parts += [sample.history] if sample.history else []
        parts += [{"system": sample.system}] if sample.system else []
        digest.update(json.dumps(parts).encode())
        digest.update(b"\n")
    return digest.hexdigest()


class Draw:
    """The samples with the smallest keys out of a stream of unknown length, exactly.

    The key of rank round(fraction * n) lies within 6 standard deviations of ``fraction`` but for one stream
    in 10^8, so samples beyond that are let go along the way.
    """

    def __init__(self, fraction: float, limit: int | None, seed: int) -> None:
        self._fraction, self._limit, self._seed = fraction, limit, seed
        self._kept: list[tuple[float, int, Sample]] = []
        self._next_cut = 1024
        self.offered = 0

    def offer(self, sample: Sample) -> None:
        """One more eligible sample."""
        self._kept.append((draw_key(sample.id, self._seed), self.offered, sample))
        self.offered += 1
        if len(self._kept) >= self._next_cut:
            self._cut()
            self._next_cut = 2 * len(self._kept) + 1024

    def taken(self) -> list[Sample]:
        """The chosen samples, in the order in which they were offered."""
        size = max(1, round(self._fraction * self.offered)) if self.offered else 0
        size = size if self._limit is None else min(size, self._limit)
        smallest = sorted(self._kept, key=lambda kept: kept[:2])[:size]
        return [sample for _, _, sample in sorted(smallest, key=lambda kept: kept[1])]

    def _cut(self) -> None:
        deviation = math.sqrt(self._fraction * (1 - self._fraction) / self.offered)
        bound = self._fraction + 6 * deviation + 20 / self.offered
        self._kept = sorted((k for k in self._kept if k[0] <= bound), key=lambda kept: kept[:2])
        if self._limit is not None:
            del self._kept[self._limit :]


def draw_key(sample_id: str, seed: int) -> float:
    """A sample's place in [0, 1) for a seed, the same on every machine.

    Parameters
    ----------
    sample_id
        Of the sample.
    seed
        Of the draw.
    """
    digest = hashlib.sha256(f"{seed}\0{sample_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _counted(samples: Iterator[Sample], advance: Advance) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        advance(1)


def _filtered(
    samples: Iterable[Sample], dropped: dict[str, int], *, turns: Turns, image_only: bool
) -> Iterator[Sample]:
    """The eligible samples; conversations that are text-only or have several exchanges are counted."""
    for sample in samples:
        first = not sample.history
        dropped["text_only"] += first and sample.image is None
        if image_only and sample.image is None:
            continue
        dropped["multi_turn"] += first and sample.num_turns > 1
        if turns == "single" and sample.num_turns > 1:
            continue
        yield sample


def _with_image_file(
    samples: Iterable[Sample], conversations: Conversations, *, follow_links: bool
) -> tuple[list[Sample], list[Defect]]:
    present: list[Sample] = []
    missing: list[Defect] = []
    for sample in samples:
        with collected(missing, file=conversations.name, sample_id=sample.id, field="image"):
            if isinstance(sample.image, Path):
                check_image_file(conversations.image_folder, sample.image, follow_links=follow_links)
            present.append(sample)
    return present, missing


def _spell(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
