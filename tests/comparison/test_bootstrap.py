"""The paired bootstrap against exact results and against a plain loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dyvte.comparison.bootstrap import bootstrap_difference, group_index, paired_bootstrap
from dyvte.errors import DataError


def test_means_are_over_samples():
    result = paired_bootstrap([1, 1, 0, 1], [0, 1, 0, 0], ["x", "x", "x", "y"], num_draws=50)
    assert (result.mean_a, result.mean_b, result.difference) == (0.75, 0.25, 0.5)
    assert result.num_images == 2


def test_a_constant_difference_has_no_spread():
    b = np.random.default_rng(0).random(40)
    result = paired_bootstrap(b + 0.25, b, [f"i{n // 4}" for n in range(40)])
    assert result.low == pytest.approx(0.25)
    assert result.high == pytest.approx(0.25)
    assert result.share_above_zero == 1.0
    assert result.clear()


def test_equal_to_the_exact_distribution_over_three_images():
    a, b, images = [1.0, 0.0, 1.0, 3.0], [0.0, 0.0, 2.0, 0.0], ["p", "p", "q", "r"]
    differences = {"p": (1.0, 2), "q": (-1.0, 1), "r": (3.0, 1)}
    exact = []
    for draw in itertools.product("pqr", repeat=3):
        total = sum(differences[i][0] for i in draw)
        exact.append(total / sum(differences[i][1] for i in draw))
    result = paired_bootstrap(a, b, images, num_draws=20000, level=0.4, seed=3)
    assert result.low == pytest.approx(np.quantile(exact, 0.3), abs=1e-9)
    assert result.high == pytest.approx(np.quantile(exact, 0.7), abs=1e-9)
    assert result.share_above_zero == pytest.approx(np.mean(np.array(exact) > 0), abs=0.01)


def test_width_grows_with_questions_per_image():
    """Copies of one question add no information: the interval must not shrink."""
    rng = np.random.default_rng(1)
    a, b = rng.random(60), rng.random(60)
    images = [f"i{n}" for n in range(60)]
    once = paired_bootstrap(a, b, images, num_draws=4000)
    copies = paired_bootstrap(np.repeat(a, 5), np.repeat(b, 5), np.repeat(images, 5), num_draws=4000)
    assert copies.high - copies.low == pytest.approx(once.high - once.low, rel=0.05)


def test_same_seed_same_interval():
    rng = np.random.default_rng(2)
    a, b = rng.random(30), rng.random(30)
    images = [str(n // 2) for n in range(30)]
    assert paired_bootstrap(a, b, images, seed=7) == paired_bootstrap(a, b, images, seed=7)
    assert paired_bootstrap(a, b, images, seed=7) != paired_bootstrap(a, b, images, seed=8)


def test_strata_keep_their_size():
    strata = np.array([0, 0, 0, 1, 1])
    seen = []

    def statistic(weights):
        seen.append(weights)
        return weights[:, :3].sum(1)

    bootstrap_difference(statistic, statistic, 5, num_draws=300, strata_G=strata)
    weights = np.concatenate(seen)
    assert set(weights[:, :3].sum(1)) == {3.0}
    assert set(weights[:, 3:].sum(1)) == {2.0}


def test_groups_in_order_of_appearance():
    groups, count = group_index(["b", "a", "b"])
    assert groups.tolist() == [0, 1, 0]
    assert count == 2


def test_errors():
    with pytest.raises(DataError, match="differ in number"):
        paired_bootstrap([1, 2], [1], ["a"])
    with pytest.raises(DataError, match="no image"):
        paired_bootstrap([], [], [])
