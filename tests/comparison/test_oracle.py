"""What knows the outcome, against enumeration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dyvte.comparison.oracle import first_safe_layer, oracle_exits, oracle_points, within_wording_share
from dyvte.costs.visual import visual_compute

LAYERS = 6


def test_oracle_equals_enumeration_and_ties_go_to_the_smaller_layer():
    risk = torch.tensor([[9.0, 1.0, 0.5, 0.0], [9.0, 0.0, 0.0, 0.0], [9.0, 3.0, 2.0, 1.0]])
    # lam 3: a layer costs 1. Row 0: 2, 2.5, 3. Row 1: 1, 2, 3. Row 2: 4, 4, 4 (tie)
    assert oracle_exits(risk, 3.0).tolist() == [1, 1, 1]
    assert oracle_exits(risk, 0.0).tolist() == [3, 1, 3]
    rng = torch.Generator().manual_seed(0)
    risk = torch.rand(50, LAYERS + 1, generator=rng)
    for lam in (0.0, 0.3, 2.0):
        cost = [[risk[b, k].item() + lam * k / LAYERS for k in range(1, LAYERS + 1)] for b in range(50)]
        assert oracle_exits(risk, lam).tolist() == [1 + int(np.argmin(row)) for row in np.array(cost)]


def test_no_rule_beats_the_oracle_at_its_price():
    rng = torch.Generator().manual_seed(1)
    risk = torch.rand(40, LAYERS + 1, generator=rng).sort(1, descending=True).values
    visual = torch.full((40,), 8)
    points = oracle_points(risk, visual, [0.05, 0.5, 5.0])
    assert np.all(np.diff(points.compute_S) >= 0)
    for lam, compute, value in zip(points.settings_S, points.compute_S, points.means_S(risk), strict=True):
        for _ in range(20):
            exits = torch.randint(1, LAYERS + 1, (40,), generator=rng)
            other = risk[torch.arange(40), exits].mean().item() + lam * visual_compute(exits, visual, LAYERS)
            assert value + lam * compute <= other + 1e-6


def test_within_wording_share():
    questions = ["a"] * 50 + ["b"] * 50
    by_wording = torch.tensor([2] * 50 + [5] * 50)
    assert within_wording_share(by_wording, questions) == 0.0
    by_image = torch.tensor([2, 5] * 50)
    assert within_wording_share(by_image, questions) == pytest.approx(1.0, rel=0.03)
    # half and half: exits 1, 3 under "a" and 3, 5 under "b": within 1, between 1
    mixed = torch.tensor([1, 3] * 25 + [3, 5] * 25)
    assert within_wording_share(mixed, questions) == pytest.approx(0.5, rel=0.03)
    assert np.isnan(within_wording_share(torch.tensor([1, 2]), ["a", "b"]))


def test_the_share_is_not_pulled_down_by_few_samples_per_wording():
    exits = torch.randint(1, 9, (6000,), generator=torch.Generator().manual_seed(2))
    questions = [str(n // 2) for n in range(6000)]
    assert within_wording_share(exits, questions) == pytest.approx(1.0, abs=0.05)


def test_first_safe_layer():
    same = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    assert first_safe_layer(same).tolist() == [3, 4, 1]
    thinned = same.double()
    thinned[:, [0, 3]] = torch.nan  # exits 1, 2 and 4 are labelled
    assert first_safe_layer(thinned).tolist() == [4, 4, 1]
