"""Sets of frozen layers as a rule: mixtures along the hull that the search found, judged on other samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dyvte.comparison.static_sets import SetHull, StaticSet, compare_hulls

IMAGES = [f"image{i // 2}" for i in range(8)]


def a_set(rule: str, layers: tuple[int, ...], compute: float, searched: float, risk: float) -> StaticSet:
    drawn = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(len(layers)))
    values = {"risk": risk * drawn / drawn.mean(), "same_answer": (drawn > 0.1 * len(layers)).double()}
    return StaticSet(rule, layers, compute, values, searched)


SETS = [
    a_set("shortv", (3,), 0.8, 0.3, 0.2),  # above the chord of its neighbours where it was searched
    a_set("shortv", (2, 3), 0.6, 0.2, 0.4),
    a_set("shortv", (1, 2, 3), 0.4, 0.7, 0.9),
    a_set("answer", (0,), 0.8, 0.1, 0.1),
]


def test_the_hull_is_that_of_the_samples_that_were_searched():
    hull = SetHull.of(SETS[:3])
    assert hull.layers_S == ((1, 2, 3), (2, 3), ())
    assert hull.compute_S.tolist() == [0.4, 0.6, 1.0]
    assert float(hull.mixed_values("risk", 0.5).mean()) == pytest.approx((0.4 + 0.9) / 2)
    assert float(hull.mixed_values("risk", 0.7).mean()) == pytest.approx(
        0.75 * 0.4
    )  # a quarter is the full model
    assert float(hull.mixed_values("same_answer", 1.0).mean()) == 1.0
    kept = SETS[1].values["same_answer"].mean().item()
    target = (1 + kept) / 2
    assert hull.compute_at(target) == pytest.approx(0.8)


def test_mixtures_are_compared_where_the_cheapest_set_can_be_paid():
    def gates_at(metric: str, compute: float) -> torch.Tensor:
        value = 0.5 * (1 - compute) if metric == "risk" else 1.0
        return torch.full((2, 8), value, dtype=torch.float64)

    found = compare_hulls(SETS, gates_at, IMAGES, (0.2, 0.5, 0.9), num_draws=200)
    assert [(one.rule, one.budgets) for one in found] == [("shortv", (0.5, 0.9)), ("answer", (0.9,))]
    for one in found:
        hull = SetHull.of([each for each in SETS if each.rule == one.rule])
        for i, budget in enumerate(one.budgets):
            assert one.risk[i] == pytest.approx(float(hull.mixed_values("risk", budget).mean()))
            assert one.risk_minus[i].difference == pytest.approx(0.5 * (1 - budget) - one.risk[i])
        assert one.verdict.budgets == len(one.budgets)
        assert one.verdict.strictly_better == sum(minus.high < 0 for minus in one.risk_minus)
        assert np.isfinite(one.compute_at_target)
    # at 0.5 the mixture loses 0.65 nats, the gates 0.25
    assert found[0].risk_minus[0].high < 0
    none = compare_hulls(SETS, gates_at, IMAGES, (0.1,), num_draws=10)
    assert [one.verdict for one in none] == [None, None]
