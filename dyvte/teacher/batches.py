"""Which samples run together: those of about one length, and those about one image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from dyvte.data import EmbeddedImage, Sample
from dyvte.teacher.config import TeacherConfig

LONG_TEXT = 256
"""Characters beyond which a question with its answer is long: padding the others about its image to it costs
more than its image once again."""


def batches_of(
    samples: Sequence[Sample], config: TeacherConfig, *, by_length: bool = True
) -> list[list[Sample]]:
    """All samples, batch by batch.

    Where questions share images, those whose image files have the same content come one after the other, in
    one batch if they fit.

    Parameters
    ----------
    samples:
        What is to run.
    config:
        Says how many samples a batch has at most, and whether images are shared.
    by_length:
        Samples of about one length run together, so that there is little padding; long ones not with short
        ones about their image. Else they keep their order.
    """
    groups: dict[tuple[str, bool], list[Sample]] = {}
    for i, sample in enumerate(samples):
        is_long = by_length and sample.num_characters > LONG_TEXT
        content = _content(sample.image) if config.share_images else str(i)
        groups.setdefault((content, is_long), []).append(sample)
    ordered = list(groups.items())
    if by_length:
        sorted_groups = ((key, sorted(group, key=_length)) for key, group in ordered)
        ordered = sorted(sorted_groups, key=lambda one: (one[0][1], _length(one[1][-1])))
    found: list[list[Sample]] = []
    last = False
    for (_, is_long), group in ordered:
        room = config.batch_size - len(found[-1]) if found and is_long == last else 0
        # A group that fits into no batch fills up the one before it.
        taken = group[:room] if len(group) <= room or len(group) > config.batch_size else []
        if taken:
            found[-1] += taken
        rest = group[len(taken) :]
        found += [rest[at : at + config.batch_size] for at in range(0, len(rest), config.batch_size)]
        last = is_long
    return found


def _length(sample: Sample) -> tuple[int, str]:
    return sample.num_characters, sample.id


def _content(image: Path | EmbeddedImage | None) -> str:
    """Of an image's file; its name where it cannot be read (whoever opens it will say why)."""
    try:
        data = image.data if isinstance(image, EmbeddedImage) else Path(str(image)).read_bytes()
    except (OSError, ValueError):
        return f"unreadable {image}"
    return hashlib.sha256(data).hexdigest()
