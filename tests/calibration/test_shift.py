"""The classifier two-sample test: its AUC by counting pairs, its p-value by its own distribution."""

from __future__ import annotations

import itertools

import pytest
import torch

from dyvte.calibration.finder import one_of_each
from dyvte.calibration.shift import area_under_curve, two_sample_test
from dyvte.errors import CalibrationError


def normal(rows: int, seed: int, size: int = 4) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def test_auc_counts_pairs_and_half_of_the_ties() -> None:
    scores = torch.tensor([[0.0, 3], [1, 3], [1, 1], [2, 1]]).double()
    labels = torch.tensor([[0.0, 1], [1, 1], [0, 0], [1, 0]]).double()
    found = area_under_curve(scores, labels)
    for column in range(2):
        ones = [s for s, y in zip(scores[:, column].tolist(), labels[:, column].tolist(), strict=True) if y]
        zeros = [
            s for s, y in zip(scores[:, column].tolist(), labels[:, column].tolist(), strict=True) if not y
        ]
        wins = sum((a > b) + 0.5 * (a == b) for a, b in itertools.product(ones, zeros))
        assert float(found[column]) == pytest.approx(wins / len(ones) / len(zeros))


def test_p_values_of_equal_samples_are_as_small_as_they_say() -> None:
    values = torch.tensor(
        [
            two_sample_test(normal(40, 2 * n), normal(25, 2 * n + 1), permutations=19, seed=n).p_value
            for n in range(150)
        ]
    )
    for level in (0.05, 0.25, 0.5):
        allowed = level + 3 * (level * (1 - level) / 150) ** 0.5
        assert (values <= level).double().mean() <= allowed
    assert values.mean() > 0.4


def test_samples_that_differ_are_told_apart_and_it_is_said() -> None:
    found = two_sample_test(normal(200, 1), normal(120, 2) + 0.6, permutations=199)
    assert found.p_value == pytest.approx(1 / 200)
    assert found.auc > 0.7
    assert "do not look like" in found.describe()
    same = two_sample_test(normal(200, 1), normal(120, 2), permutations=199)
    assert same.auc < 0.6
    assert same.p_value > 0.1
    assert "nothing tells" in same.describe(0.001)


def test_one_question_stands_for_each_image() -> None:
    images = ["a", "b", "a", "c", "b", "a"]
    drawn = [tuple(images[row] for row in one_of_each(images, seed)) for seed in range(20)]
    assert all(sorted(one) == ["a", "b", "c"] for one in drawn)
    assert len({tuple(one_of_each(images, seed)) for seed in range(20)}) > 3
    assert one_of_each(images, 3) == one_of_each(images, 3)


def test_too_little_to_compare_is_said() -> None:
    with pytest.raises(CalibrationError, match="3 at hand"):
        two_sample_test(normal(40, 0), normal(3, 1))
    broken = normal(40, 0)
    broken[3, 1] = torch.nan
    with pytest.raises(CalibrationError, match="not finite"):
        two_sample_test(broken, normal(30, 1))
