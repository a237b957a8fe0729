"""Which samples run together: those of about one length, and those about one image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from dyvte.data import EmbeddedImage, Sample


def batches(samples: Sequence[Sample], size: int, *, by_image: bool) -> list[list[int]]:
    """Indices of samples, batch by batch, at most ``size`` each.

    Parameters
    ----------
    samples:
        What is to run.
    size:
        Samples of a batch.
    by_image:
        Samples whose image files have the same content come one after the other, in one batch where they fit.
        Else all are sorted by the length of their text, as little padding as can be.
    """
    groups: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(_content(sample.image) if by_image else str(i), []).append(i)

    def length(i: int) -> tuple[int, str]:
        return samples[i].num_characters, samples[i].id

    ordered = [sorted(group, key=length) for group in groups.values()]
    ordered.sort(key=lambda group: length(group[-1]))
    found: list[list[int]] = []
    for group in ordered:
        fits = found and len(found[-1]) + len(group) <= size
        if found and (fits or len(group) > size):
            room = size - len(found[-1])
            found[-1] += group[:room]
            group = group[room:]
        found += [group[start : start + size] for start in range(0, len(group), size)]
    return found


def _content(image: Path | EmbeddedImage | None) -> str:
    """Of an image's file; its name where it cannot be read (whoever opens it will say so)."""
    try:
        data = image.data if isinstance(image, EmbeddedImage) else Path(str(image)).read_bytes()
    except OSError:
        return f"unreadable {image}"
    return hashlib.sha256(data).hexdigest()
