"""Scores as functions of how often each unit was drawn: what a bootstrap of a whole benchmark resamples.

A unit is what was drawn independently: an image with all its questions, a video, a question with its
rotations. :meth:`dyvte.tasks.base.Benchmark.statistic` gives the function, ``unit`` its name.

Shape letters: B questions, G units, R bootstrap draws, T parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

Statistic: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Maps weights (R, G), how often each unit was drawn, to (R,) scores."""


def group_index(ids: Sequence[str]) -> tuple[np.ndarray, int]:
    """Index of each id's unit, in order of first appearance, and the number of units."""
    index: dict[str, int] = {}
    groups_B = np.fromiter((index.setdefault(i, len(index)) for i in ids), dtype=np.int64)
    return groups_B, len(index)


def unit_strata(units: Sequence[str], strata: Sequence[str]) -> np.ndarray:
    """(G,) index of every unit's stratum, from the unit and the stratum of every question.

    Parameters
    ----------
    units, strata
        Of every question.
    """
    groups_B, num_units = group_index(units)
    strata_G = np.zeros(num_units, dtype=np.int64)
    strata_G[groups_B] = group_index(strata)[0]
    return strata_G


def mean_statistic(
    units: Sequence[str], values: Sequence[float], counted: Sequence[bool] | None = None
) -> Statistic:
    """The mean of per-question values in percent.

    Parameters
    ----------
    units : the unit of each question.
    values : what each question is worth, in [0, 1].
    counted : which questions count; all where omitted.
    """
    groups_B, num_units = group_index(units)
    counted_B = np.ones(len(groups_B)) if counted is None else np.asarray(counted, dtype=np.float64)
    values_B = np.asarray(values, dtype=np.float64) * counted_B
    values_G = np.bincount(groups_B, weights=values_B, minlength=num_units)
    counts_G = np.bincount(groups_B, weights=counted_B, minlength=num_units)
    return lambda weights_RG: 100.0 * (weights_RG @ values_G) / (weights_RG @ counts_G)


def mean_over_parts(units: Sequence[str], values: Sequence[float], parts: Sequence[str]) -> Statistic:
    """The mean over parts of the mean of the values in each, in percent (POPE's categories).

    Parameters
    ----------
    units, values, parts
        Of each entry; a question that belongs to several parts is an entry of each. A part none of whose
        units was drawn is excluded from the mean.
    """
    groups_B, num_units = group_index(units)
    parts_B, num_parts = group_index(parts)
    cells_B = groups_B * num_parts + parts_B
    values_B = np.asarray(values, dtype=np.float64)
    shape = (num_units, num_parts)
    values_GT = np.bincount(cells_B, weights=values_B, minlength=num_units * num_parts).reshape(shape)
    counts_GT = np.bincount(cells_B, minlength=num_units * num_parts).reshape(shape).astype(np.float64)

    def statistic(weights_RG: np.ndarray) -> np.ndarray:
        sums_RT, counts_RT = weights_RG @ values_GT, weights_RG @ counts_GT
        drawn_RT = counts_RT > 0
        means_RT = np.divide(sums_RT, counts_RT, out=np.zeros_like(sums_RT), where=drawn_RT)
        return 100.0 * means_RT.sum(1) / drawn_RT.sum(1)

    return statistic


def all_right(units: Sequence[str], hits: Sequence[float]) -> np.ndarray:
    """(G,) 1.0 for the units all of whose questions are right (MME's pairs, MMBench's rotations).

    Parameters
    ----------
    units
        Of every question.
    hits
        What each is worth.
    """
    groups_B, num_units = group_index(units)
    right_G = np.ones(num_units)
    np.minimum.at(right_G, groups_B, (np.asarray(hits, dtype=np.float64) >= 1.0).astype(np.float64))
    return right_G
