"""Intervals of the difference of two scores of one benchmark, by a paired bootstrap of its units.

Shape letters: G units (images, videos, ...), R bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dyvte.comparison.bootstrap import PairedDifference, bootstrap_difference
from dyvte.tasks.base import Benchmark, Question
from dyvte.tasks.statistics import Statistic


def score_difference(
    benchmark: Benchmark,
    questions: Sequence[Question],
    hits_a: Sequence[Sequence[float]],
    hits_b: Sequence[Sequence[float]],
    *,
    num_draws: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Interval of mean score of a minus that of b; each holds the hits of one or several seeds."""
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
