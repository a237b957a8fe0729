"""How well answers of different lengths survive: long ones have more places to part from the full model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median

from dyvte.evaluation.run_log import Answer
from dyvte.formatting import percentage
from dyvte.reporting.page import Table
from dyvte.reporting.sections import Section

LENGTHS = ((1, 4), (5, 16), (17, 64), (65, None))
"""Tokens of the full model's answer, the closing one included: bounds of each column, both included."""


def length_table(section: Section) -> Table | None:
    """Same answer by length of the full model's, one row per run; None without that run, or with one length.

    The last column is where answers part: the first differing word, median over the answers that differ.
    """
    if section.full is None:
        return None
    full = section.full.answers
    columns = [(low, high, _within(full, low, high)) for low, high in LENGTHS]
    columns = [column for column in columns if column[2]]
    others = [run for run in section.runs if not run.is_full]
    if len(columns) < 2 or not others:
        return None
    header = [f"{_range(low, high)} tokens ({len(found)})" for low, high, found in columns]
    rows = []
    for run in others:
        same = [percentage(_same(full, run.answers, found)) for _, _, found in columns]
        rows.append([run.name, *same, _parting(full, run.answers)])
    return Table(["policy", *header, "first differing word"], rows)


def first_difference(reference: str, other: str) -> int | None:
    """Number, from 1, of the first word in which two answers differ; None for equal words."""
    ours, theirs = re.findall(r"\S+", reference), re.findall(r"\S+", other)
    if ours == theirs:
        return None
    same = zip(ours, theirs, strict=False)
    return next((n for n, (a, b) in enumerate(same, start=1) if a != b), min(len(ours), len(theirs)) + 1)


def _within(answers: Sequence[Answer], low: int, high: int | None) -> list[int]:
    return [
        index
        for index, answer in enumerate(answers)
        if low <= max(1, answer.num_new_tokens) <= (high or answer.num_new_tokens)
    ]


def _same(full: Sequence[Answer], answers: Sequence[Answer], chosen: Sequence[int]) -> float:
    return sum(full[i].prediction == answers[i].prediction for i in chosen) / len(chosen)


def _parting(full: Sequence[Answer], answers: Sequence[Answer]) -> str:
    found = (first_difference(a.prediction, b.prediction) for a, b in zip(full, answers, strict=True))
    places = [place for place in found if place is not None]
    return f"{median(places):g}" if places else "-"


def _range(low: int, high: int | None) -> str:
    return f"{low}+" if high is None else f"{low}-{high}"
