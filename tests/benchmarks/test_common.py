"""The ratios that benchmarks print: bounds of a median, ratios of rounds. No timings."""

import math
import random

import pytest
from common import interleaved, median_rank, ratio


def coverage(count, rank):
    """Chance that the rank-th smallest and largest of `count` values enclose the median."""
    return 1 - 2 * sum(math.comb(count, i) for i in range(rank)) / 2**count


def test_ranks_are_the_innermost_that_cover_95_percent():
    assert [median_rank(n) for n in (5, 6, 20, 30, 40)] == [0, 1, 6, 10, 14]  # published tables
    for count in range(6, 120):
        rank = median_rank(count)
        assert coverage(count, rank) >= 0.95 > coverage(count, rank + 1)


def test_bounds_hold_the_true_median_as_often_as_they_say():
    order = random.Random(0)
    held = 0
    for _ in range(2000):
        times = {"a": [order.lognormvariate(0, 1) for _ in range(20)], "b": [1.0] * 20}
        figure = ratio(times, ["a"], ["b"])
        held += figure.low <= 1.0 <= figure.high
    assert 0.945 < held / 2000 < 0.975  # 0.9586


def test_a_ratio_is_taken_within_each_round():
    # a machine that slows down tenfold for half of the rounds changes nothing
    slow = [1.0] * 10 + [10.0] * 10
    times = {"x": [2 * s for s in slow], "y": slow, "z": [3 * s for s in slow]}
    figure = ratio(times, ["x"], ["y", "z"], "at most 1")
    assert (figure.median, figure.low, figure.high) == (0.5, 0.5, 0.5)
    assert math.isnan(ratio({"x": [1.0] * 5, "y": [1.0] * 5}, ["x"], ["y"]).low)


def test_rounds_are_complete_and_in_changing_order():
    calls = []
    variants = {name: lambda name=name: calls.append(name) or 1.0 for name in "abc"}
    times = interleaved(variants, 5)
    assert {name: len(values) for name, values in times.items()} == {"a": 5, "b": 5, "c": 5}
    rounds = [tuple(calls[i : i + 3]) for i in range(0, 18, 3)]  # the first is not counted
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert sum(times["a"]) == pytest.approx(5.0)
