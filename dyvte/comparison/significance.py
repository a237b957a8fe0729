"""Scores of a benchmark, and intervals of their differences by a paired bootstrap of its units.

Shape letters: G units (images, videos, ...), R bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dyvte.comparison.bootstrap import PairedDifference, bootstrap_difference
from dyvte.errors import ScoreError
from dyvte.evaluation.run_log import Answer, texts
from dyvte.tasks.base import Benchmark, Predictions, Question
from dyvte.tasks.statistics import Statistic


def graded(
    benchmark: Benchmark, questions: Sequence[Question], answers: Sequence[Answer], dialect: str
) -> list[float] | None:
    """What each question is worth, 0 to 1; None where nothing can be graded here (no public answers).

    Parameters
    ----------
    benchmark : whose rule is applied.
    questions, answers : in the same order.
    dialect : whose reading of the answers.
    """
    try:
        found = benchmark.correct(questions, Predictions(texts(answers)), dialect)
    except ScoreError:
        return None
    return [float(hit) for hit in found]


def score_value(benchmark: Benchmark, questions: Sequence[Question], hits: Sequence[float]) -> float:
    """The score that intervals are of: the benchmark's statistic, each unit drawn once.

    Parameters
    ----------
    benchmark
        Whose statistic it is.
    questions
        All.
    hits
        What each is worth, 0 to 1.
    """
    ones_1G = np.ones((1, len(benchmark.strata(questions))))
    return float(benchmark.statistic(questions, hits)(ones_1G)[0])


def score_difference(
    benchmark: Benchmark,
    questions: Sequence[Question],
    hits_a: Sequence[Sequence[float]],
    hits_b: Sequence[Sequence[float]],
    *,
    num_draws: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Interval of mean score of a minus that of b.

    Parameters
    ----------
    benchmark : whose statistic, and units, it is.
    questions : all.
    hits_a, hits_b : what each question is worth, for one or several seeds.
    num_draws, seed : of the paired bootstrap.
    """
    strata_G = benchmark.strata(questions)
    return bootstrap_difference(
        _mean_of([benchmark.statistic(questions, hits) for hits in hits_a]),
        _mean_of([benchmark.statistic(questions, hits) for hits in hits_b]),
        len(strata_G),
        num_draws=num_draws,
        seed=seed,
        strata_G=strata_G,
    )


def _mean_of(statistics: Sequence[Statistic]) -> Statistic:
    return lambda weights_RG: np.mean([statistic(weights_RG) for statistic in statistics], axis=0)
