"""Paired bootstrap over images: questions about one image are dependent, so whole images are resampled.

Shape letters: B samples, G images, R bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dyvte.errors import DataError
from dyvte.tasks.statistics import group_index as group_index

_CHUNK_DRAWS = 256


@dataclass(frozen=True)
class PairedDifference:
    """``a - b`` with a percentile interval over images.

    ``share_above_zero`` is the share of draws in which a beats b.
    """

    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    share_above_zero: float
    level: float
    num_images: int
    num_draws: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    values_a_B: Any,
    values_b_B: Any,
    image_ids: Sequence[str],
    *,
    num_draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Interval of the difference of two means over the same samples.

    Parameters
    ----------
    values_a_B, values_b_B : per-sample values of the two, in the same order.
    image_ids : the image of each sample.

    Raises
    ------
    DataError
        Lengths differ, or there is nothing to resample.
    """
    a_B, b_B = (np.asarray(values, dtype=np.float64) for values in (values_a_B, values_b_B))
    if not a_B.shape == b_B.shape == (len(image_ids),):
        raise DataError(
            f"paired samples differ in number: {a_B.shape}, {b_B.shape}, {len(image_ids)} image ids"
        )
    groups_B, num_images = group_index(image_ids)
    counts_G = np.bincount(groups_B, minlength=num_images).astype(np.float64)
    sums_a_G = np.bincount(groups_B, weights=a_B, minlength=num_images)
    sums_b_G = np.bincount(groups_B, weights=b_B, minlength=num_images)
    return bootstrap_difference(
        lambda weights_RG: (weights_RG @ sums_a_G) / (weights_RG @ counts_G),
        lambda weights_RG: (weights_RG @ sums_b_G) / (weights_RG @ counts_G),
        num_images,
        num_draws=num_draws,
        level=level,
        seed=seed,
    )


def bootstrap_difference(
    statistic_a: Callable[[np.ndarray], np.ndarray],
    statistic_b: Callable[[np.ndarray], np.ndarray],
    num_images: int,
    *,
    num_draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    strata_G: np.ndarray | None = None,
) -> PairedDifference:
    """Interval of the difference of two statistics of image weights.

    Parameters
    ----------
    statistic_a, statistic_b : map weights (R, G), how often each image was drawn, to (R,) values.
    strata_G : images are drawn within their stratum (MME: subtask), so that none comes out empty.

    Raises
    ------
    DataError
        No image.
    """
    if num_images < 1:
        raise DataError("nothing to resample: no image")
    rng = np.random.default_rng(seed)
    strata_G = np.zeros(num_images, dtype=np.int64) if strata_G is None else np.asarray(strata_G)
    differences = []
    for start in range(0, num_draws, _CHUNK_DRAWS):
        weights_RG = _draw(rng, min(_CHUNK_DRAWS, num_draws - start), strata_G)
        differences.append(statistic_a(weights_RG) - statistic_b(weights_RG))
    difference_R = np.concatenate(differences)
    ones_1G = np.ones((1, num_images))
    mean_a, mean_b = float(statistic_a(ones_1G)[0]), float(statistic_b(ones_1G)[0])
    low, high = np.quantile(difference_R, [(1 - level) / 2, (1 + level) / 2])
    return PairedDifference(
        mean_a=mean_a,
        mean_b=mean_b,
        difference=mean_a - mean_b,
        low=float(low),
        high=float(high),
        share_above_zero=float((difference_R > 0).mean()),
        level=level,
        num_images=num_images,
        num_draws=num_draws,
    )


def _draw(rng: np.random.Generator, num_draws: int, strata_G: np.ndarray) -> np.ndarray:
    """How often each image is drawn, (R, G): as many as there are, with replacement, within strata."""
    weights_RG = np.zeros((num_draws, len(strata_G)))
    for stratum in np.unique(strata_G):
        members = np.flatnonzero(strata_G == stratum)
        uniform = np.full(len(members), 1 / len(members))
        weights_RG[:, members] = rng.multinomial(len(members), uniform, size=num_draws)
    return weights_RG
