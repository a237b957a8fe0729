"""Benchmark scores as statistics of image weights, for paired bootstraps of whole benchmarks.

Shape letters: G images, R bootstrap draws, T subtasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dyvte.comparison.bootstrap import PairedDifference, bootstrap_difference, group_index
from dyvte.tasks.base import Question

Statistic = Callable[[np.ndarray], np.ndarray]


def accuracy_statistic(questions: Sequence[Question], hits: Sequence[bool]) -> Statistic:
    """Accuracy in percent over questions (GQA)."""
    groups_B, num_images = group_index([q.image_id for q in questions])
    hits_G = np.bincount(groups_B, weights=np.asarray(hits, dtype=np.float64), minlength=num_images)
    counts_G = np.bincount(groups_B, minlength=num_images).astype(np.float64)
    return lambda weights_RG: 100.0 * (weights_RG @ hits_G) / (weights_RG @ counts_G)


def mme_statistic(questions: Sequence[Question], hits: Sequence[bool]) -> Statistic:
    """Sum over subtasks of acc + acc+ in percent (perception and cognition together)."""
    groups_B, num_images = group_index([q.image_id for q in questions])
    hits_G = np.bincount(groups_B, weights=np.asarray(hits, dtype=np.float64), minlength=num_images)
    per_image_G = hits_G / 2 + (hits_G == 2)
    subtasks_G = image_strata(questions)
    member_GT = subtasks_G[:, None] == np.arange(subtasks_G.max() + 1)
    return lambda weights_RG: (
        100.0 * ((weights_RG * per_image_G) @ member_GT / (weights_RG @ member_GT)).sum(1)
    )


def image_strata(questions: Sequence[Question]) -> np.ndarray:
    """(G,) subtask index of every image."""
    groups_B, num_images = group_index([q.image_id for q in questions])
    kinds_B, _ = group_index([q.kind for q in questions])
    strata_G = np.zeros(num_images, dtype=np.int64)
    strata_G[groups_B] = kinds_B
    return strata_G


def score_difference(
    benchmark: str,
    questions: Sequence[Question],
    hits_a: Sequence[Sequence[bool]],
    hits_b: Sequence[Sequence[bool]],
    *,
    num_draws: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Interval of mean score of a minus that of b; each holds the hits of one or several seeds."""
    make = mme_statistic if benchmark == "mme" else accuracy_statistic
    strata_G = image_strata(questions)
    return bootstrap_difference(
        _mean_of([make(questions, hits) for hits in hits_a]),
        _mean_of([make(questions, hits) for hits in hits_b]),
        len(strata_G),
        num_draws=num_draws,
        seed=seed,
        strata_G=strata_G if benchmark == "mme" else None,
    )


def _mean_of(statistics: Sequence[Statistic]) -> Statistic:
    return lambda weights_RG: np.mean([statistic(weights_RG) for statistic in statistics], axis=0)
