"""ANLS, the average normalised Levenshtein similarity of documents (Biten et al., 2019).

The evaluation of the Robust Reading Competition, which lmms-eval (``api/metrics.py``, ``anls``) and
VLMEvalKit (``vqa_eval.py``, ``anls_compute``) repeat: case and kinds of blanks do not count for the distance,
but the length by which it is divided is that of the longer text as it stands, in capitals ("ß" counts two).
"""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5
"""Below it an answer is worth nothing."""


def anls(prediction: str, answers: Sequence[str], threshold: float = THRESHOLD) -> float:
    """What an answer is worth, in [0, 1]: its likeness to the nearest of the human answers.

    Parameters
    ----------
    prediction
        As it stands.
    answers
        At least one.
    threshold
        A likeness below it counts as none.
    """
    likeness = 1 - min(_distance_share(answer, prediction) for answer in answers)
    return 0.0 if likeness < threshold else likeness


def _distance_share(answer: str, prediction: str) -> float:
    length = max(len(answer.upper()), len(prediction.upper()))
    return edit_distance(_plain(answer), _plain(prediction)) / length if length else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def edit_distance(one: str, other: str) -> int:
    """Fewest characters inserted, deleted or replaced that make ``other`` of ``one`` (Levenshtein)."""
    short, long = sorted((one, other), key=len)
    costs = list(range(len(short) + 1))
    for row, letter in enumerate(long, start=1):
        diagonal, costs[0] = costs[0], row
        for column, same in enumerate(short, start=1):
            replaced = diagonal + (letter != same)
            diagonal = costs[column]
            costs[column] = min(replaced, diagonal + 1, costs[column - 1] + 1)
    return costs[-1]
