"""How MMMU reads open answers and compares them (``eval/eval_utils.py`` of MMMU-Benchmark/MMMU)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_BEFORE_ANSWER = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")


def forms(text: str) -> list[str | float]:
    """``normalize_str``: a number to two decimals, else lower case; one character with a blank on a side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def read_open(text: str) -> set[str | float]:
    """``parse_open_response``: what an answer may state: the ends of its sentences after words such as "is",
    and the numbers in them.

    The answer is lower-cased before it is split at a full stop before a capital, so that only line breaks
    split it; this is the official tool's behaviour.
    """
    text = text.strip().strip(".").lower()
    parts = _SENTENCES.split(text)
    ends = []
    for index, part in enumerate(parts):
        words = (*_BEFORE_ANSWER, "=") if index == len(parts) - 1 else _BEFORE_ANSWER
        shortest = _shortest([part.split(word)[-1].strip() for word in words if word in part])
        if shortest and shortest not in _TRIVIAL:
            ends.append(shortest)
    stated = ends or [text]
    numbers = [number for end in stated for pattern in _NUMBERS for number in pattern.findall(end)]
    return {form for part in (*stated, *numbers) for form in forms(part)}


def _shortest(ends: Sequence[str]) -> str:
    """The first of the shortest; an empty one gives way to the next, as the official loop does."""
    shortest = ""
    for end in ends:
        if not shortest or len(end) < len(shortest):
            shortest = end
    return shortest


def gold_forms(golds: Iterable[str]) -> list[str | float]:
    """Gold answers in the same forms."""
    return [form for gold in golds for form in forms(gold)]


def is_right(stated: Iterable[str | float], golds: Sequence[str | float]) -> bool:
    """``eval_open``: a stated number equals a gold number, or a gold text occurs in a stated text.

    Parameters
    ----------
    stated
        What the answer says, as numbers and texts.
    golds
        What is right, likewise.
    """
    return any(
        any(isinstance(gold, str) and gold in one for gold in golds) if isinstance(one, str) else one in golds
        for one in stated
    )
