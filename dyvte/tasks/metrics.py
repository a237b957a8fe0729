"""Parts of scores that benchmarks share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

NOT_GRADED = "not graded"


def ungraded(why: str) -> dict[str, Any]:
    """The part of the scores that says there are none."""
    return {"graded": False, "why": why}


def percent(hits: Sequence[bool] | Sequence[float]) -> float:
    """Mean of hits in percent; 0 for none, as the official tools print."""
    return 100.0 * sum(hits) / len(hits) if hits else 0.0


def breakdown(kinds: Sequence[Any], hits: Sequence[bool] | Sequence[float]) -> dict[str, Any]:
    """Accuracy in percent and number of questions for every kind, in order of first appearance.

    Parameters
    ----------
    kinds
        Of every question.
    hits
        What each is worth.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for kind, hit in zip(kinds, hits, strict=True):
        groups[str(kind)].append(hit)
    return {kind: {"accuracy": percent(own), "num_questions": len(own)} for kind, own in groups.items()}
