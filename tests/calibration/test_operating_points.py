"""Curves, hulls and mixtures of decision rules against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dyvte.calibration import at_exit, gate_logits
from dyvte.calibration.operating_points import (
    Mixture,
    OperatingPoints,
    chosen_by_id,
    compute_to_reach,
    fixed_points,
    lower_hull,
    mixture_at,
)
from dyvte.errors import ConfigError, DataError
from dyvte.gates import FEATURES, GateConfig, GateStack
from dyvte.teacher.trace import Trace

LAYERS = 6


def _best_pair(values, budget: float) -> float:
    """Least mean value of any mixture of two fixed K whose mean K is ``budget``."""
    best = np.inf
    for low, high in itertools.combinations_with_replacement(range(len(values)), 2):
        if low <= budget <= high:
            share = 0.0 if low == high else (budget - low) / (high - low)
            best = min(best, values[low] + share * (values[high] - values[low]))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_hull_is_the_best_mixture_of_two_fixed_layers(seed):
    values = np.random.default_rng(seed).random(LAYERS + 1)
    trace = torch.from_numpy(values)[None].repeat(4, 1)
    points = fixed_points(trace, torch.full((4,), 64))
    for budget in np.linspace(0, 1, 31):
        mixture = points.at_compute(float(budget))
        assert points.mixed_compute(mixture) == pytest.approx(budget)
        got = points.mixed_values(trace, mixture).mean().item()
        assert got == pytest.approx(_best_pair(values, budget * LAYERS))


def test_upper_hull_for_values_that_should_be_large():
    values = np.random.default_rng(9).random(LAYERS + 1)
    points = fixed_points(torch.from_numpy(values)[None], torch.tensor([1]), smaller_is_better=False)
    assert [int(k) for k in points.settings_S] == lower_hull(range(LAYERS + 1), -values)


def test_mixtures_meet_any_compute_between():
    points = OperatingPoints(
        "rule", (0.0, 1.0), torch.tensor([[1] * 8, [5] * 8]), torch.full((8,), 64), LAYERS
    )
    mixture = points.at_compute(0.5)
    assert (mixture.lower, mixture.upper, mixture.weight) == (0, 1, pytest.approx(0.5))
    assert points.mixed_compute(mixture) == pytest.approx(0.5)
    values = torch.arange(LAYERS + 1.0).repeat(8, 1)
    assert points.mixed_values(values, mixture).tolist() == pytest.approx([3.0] * 8)
    ids = [f"q{n}" for n in range(8)]
    drawn = points.draw(mixture, ids, seed=1)
    assert sorted(drawn.exit_layers_B.tolist()) == [1] * 4 + [5] * 4
    assert drawn.freeze_layers_B.tolist() == drawn.exit_layers_B.tolist()
    backwards = points.draw(mixture, ids[::-1], seed=1).exit_layers_B.tolist()
    assert backwards == drawn.exit_layers_B.tolist()[::-1]
    assert points.at_compute(0.01) == Mixture(0, 0, 0.0)
    assert points.at_compute(0.99) == Mixture(1, 1, 0.0)


def test_mixture_skips_equal_points():
    compute = np.array([0.2, 0.4, 0.4, 0.8])
    assert mixture_at(compute, 0.4).weight == 0.0
    assert mixture_at(compute, 0.6) == Mixture(2, 3, pytest.approx(0.5))


def test_draws_differ_by_seed_and_keep_their_share():
    ids = [str(n) for n in range(101)]
    one, two = chosen_by_id(ids, 0.3, 0), chosen_by_id(ids, 0.3, 1)
    assert one.sum() == two.sum() == 30
    assert not np.array_equal(one, two)


def test_compute_to_reach():
    compute, value = np.array([0.2, 0.4, 0.6, 1.0]), np.array([0.5, 0.9, 0.8, 1.0])
    assert compute_to_reach(compute, value, 0.7) == pytest.approx(0.3)
    assert compute_to_reach(compute, value, 0.9) == pytest.approx(0.4)
    assert compute_to_reach(compute, value, 0.95) == pytest.approx(0.8)
    assert compute_to_reach(compute, value, 0.1) == pytest.approx(0.2)
    assert np.isnan(compute_to_reach(compute, value, 1.1))


def test_points_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="do not fit"):
        OperatingPoints("rule", (1.0,), torch.ones(2, 3), torch.ones(3), LAYERS)


@pytest.mark.parametrize("seed", range(5))
def test_corners_over_uneven_compute_bound_every_mixture(seed):
    draw = np.random.default_rng(seed)
    compute, values = np.sort(draw.random(9)), draw.random(9)
    values[4] = np.nan
    corners = lower_hull(compute, values)
    assert (corners[0], corners[-1], 4 in corners) == (0, 8, False)
    hull = np.interp(compute, compute[corners], values[corners])
    for low, high in itertools.combinations(np.flatnonzero(~np.isnan(values)), 2):
        between = compute[low : high + 1]
        chord = np.interp(between, compute[[low, high]], values[[low, high]])
        assert np.all(chord >= hull[low : high + 1] - 1e-12)


def test_corners_do_not_depend_on_the_order_and_the_best_of_equal_costs_counts():
    compute, values = [0.5, 0.1 + 0.2, 1.0, 0.3, 0.1], [0.4, 0.6, 0.0, 0.2, 0.9]
    assert lower_hull(compute, values) == [4, 3, 2]
    assert lower_hull([0.3, 0.3], [0.2, 0.1]) == [1]


def test_at_exit_reads_each_rows_own_column():
    values = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0]])
    assert at_exit(values, torch.tensor([2, 0, 1])).tolist() == [2.0, 3.0, 7.0]
    assert torch.isnan(at_exit(values, torch.tensor([2, -1, 1]))).tolist() == [False, True, False]
    assert at_exit(values.double(), torch.tensor([1, 1, 1])).dtype == torch.float64
    assert at_exit(values > 2, torch.tensor([1, 1, 1])).tolist() == [0.0, 1.0, 1.0]


def test_gate_logits_take_the_parts_that_the_gates_read():
    config = GateConfig(num_layers=LAYERS, hidden_size=8, features=("last_prompt", "mean_visual"))
    gates = GateStack.init(config, seed=1)
    rng = torch.Generator().manual_seed(7)
    features = torch.randn(1500, LAYERS, 4, 8, generator=rng)  # all four parts, more than one chunk
    columns = torch.zeros(1500, LAYERS + 1)
    trace = Trace(
        risk=columns, reverse_risk=columns, agreement=columns, same_answer=columns, loss=columns,
        features=features.flatten(2).half(), sample_ids=tuple(map(str, range(1500))),
        num_visual=torch.ones(1500, dtype=torch.long),
    )  # fmt: skip
    logits = gate_logits(gates, trace, FEATURES)
    assert (logits.dtype, logits.requires_grad, logits.shape) == (torch.float32, False, (1500, LAYERS))
    read = features.half().float()[:, :, [FEATURES.index(name) for name in config.features]].flatten(2)
    for k in range(1, LAYERS + 1):
        torch.testing.assert_close(logits[:, k - 1], gates.gate(k, read[:, k - 1]).detach())
    with pytest.raises(ConfigError, match="mean_visual"):
        gate_logits(gates, trace, FEATURES[:2])
