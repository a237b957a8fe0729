"""Numbers as people read them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from dyvte.formatting import difference_text, flops_unit, markdown_table, significant, spread_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.000401, "0.000401"), (0.0456, "0.0456"), (0.4012, "0.401"), (4.684, "4.68"), (12.04, "12.0"),
        (999.6, "1000"), (9.996, "10.0"), (1234.0, "1234"), (0.0, "0"), (None, "-"), (math.nan, "-"),
        (-0.1234, "-0.123"),
    ],
)  # fmt: skip
def test_three_significant_digits_and_no_exponent(value, text):
    assert significant(value) == text


def test_flops_of_a_column_share_a_unit():
    small, large = flops_unit([4.01e8, 8.1e8]), flops_unit([4.68e12, 8.48e12, math.nan])
    assert (small.name, small.text(4.01e8), small.text(8.1e8)) == ("GFLOPs", "0.401", "0.810")
    assert (large.name, large.text(4.68e12), large.text(None)) == ("TFLOPs", "4.68", "-")
    assert flops_unit([]).name == "GFLOPs"


def test_intervals_and_spreads():
    found = SimpleNamespace(difference=0.01723, low=-0.0067, high=0.0278)
    assert difference_text(found) == "+0.02 [-0.01, +0.03]"
    assert difference_text(found, 1, scale=100) == "+1.7 [-0.7, +2.8]"
    seeds = SimpleNamespace(mean=0.9842, std=0.0007, min=0.98, max=0.99)
    assert spread_text(seeds, scale=100) == "98.42 ± 0.07"
    assert spread_text(SimpleNamespace(mean=0.9842, std=0.0, min=0.9842, max=0.9842), 3) == "0.984"


def test_tables_are_aligned():
    assert markdown_table(["a", "bb"], [["ccc", "d"]]).splitlines() == [
        "| a   | bb |",
        "|-----|----|",
        "| ccc | d  |",
    ]
