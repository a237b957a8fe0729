"""The hard subset: questions that the full model solves, and the same model with pooled visual tokens does
not.

Most questions of most benchmarks are solved from a quarter of the visual tokens, averaged; what selection
is worth shows on the others. By its choice the full model solves all of the subset, and the pooled model
none: the rules between are compared with each other.

Shape letters: G units, R bootstrap draws.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dyvte.comparison.bootstrap import bootstrap_difference
from dyvte.evaluation.scores import FULL_MODEL
from dyvte.reductions import Pool
from dyvte.tasks.base import Question
from dyvte.tasks.statistics import group_index, mean_statistic

SOLVED = 0.5
"""What a question must be worth, of 1, to count as solved."""


@dataclass(frozen=True)
class HardScore:
    """Share of the hard subset that a run solves, in percent, and its interval over units."""

    solved: float
    low: float
    high: float


@dataclass(frozen=True)
class HardSubset:
    """Runs on the questions that the full model solves and a pooled one does not.

    Attributes
    ----------
    pooled : what pooled them: "pool:2".
    num_questions, num_units : of the subset.
    num_all : questions of the benchmark.
    scores : by run.
    """

    pooled: str
    num_questions: int
    num_units: int
    num_all: int
    scores: Mapping[str, HardScore]


def is_pooled(policy: str, reduction: str) -> bool:
    """Is this a run that chooses: never an exit, and nothing but pooling?"""
    return policy == FULL_MODEL and re.fullmatch(rf"{Pool.name}:\d+", reduction) is not None


def hard_subset(
    questions: Sequence[Question],
    hits: Mapping[str, Sequence[float]],
    full: str,
    pooled: str,
    reduction: str,
    *,
    num_draws: int = 2000,
    seed: int = 0,
) -> HardSubset | None:
    """The subset, and what every run solves of it; None where there is no such question.

    Parameters
    ----------
    questions : all.
    hits : what each question is worth, 0 to 1, by run.
    full, pooled : which of the runs choose.
    reduction : what pooled.
    num_draws, seed : of the bootstrap over the subset's units.
    """
    chosen = [n for n, (a, b) in enumerate(zip(hits[full], hits[pooled], strict=True)) if a >= SOLVED > b]
    if not chosen:
        return None
    units = [questions[n].image_id for n in chosen]
    num_units = group_index(units)[1]
    scores = {}
    for name, own in hits.items():
        share = mean_statistic(units, [float(own[n] >= SOLVED) for n in chosen])
        found = bootstrap_difference(
            share, lambda weights_RG: 0.0 * weights_RG.sum(1), num_units, num_draws=num_draws, seed=seed
        )
        scores[name] = HardScore(found.mean_a, found.low, found.high)
    return HardSubset(reduction, len(chosen), num_units, len(questions), scores)
