"""Choosing among trainings: frontiers against their definition, and the choice for a budget or a bound."""

from __future__ import annotations

import pytest
import torch

from dyvte.calibration import Frontier, ThresholdPath, best_frontier
from dyvte.errors import CalibrationError

LAYERS = 5


def population(noise: float, rows: int = 400) -> tuple[ThresholdPath, torch.Tensor]:
    """Gates that know the layer from which on an answer is safe, up to noise."""
    generator = torch.Generator().manual_seed(1)
    needed_B = torch.randint(1, LAYERS, (rows,), generator=generator)
    layer = torch.arange(LAYERS + 1)
    loss_BL1 = (layer < needed_B[:, None]).float()
    logits = (layer[1:] - needed_B[:, None] + 0.5).float()
    logits = logits + noise * torch.randn(rows, LAYERS, generator=generator)
    return ThresholdPath(logits, torch.ones(rows)), loss_BL1[:, None]


def test_a_frontier_holds_the_least_loss_at_or_below_each_compute() -> None:
    path, loss = population(2.0)
    frontier = Frontier.of(path, loss)
    points = []
    for level in torch.linspace(-20, 20, 401).tolist():
        chosen = path.at(level)
        exits = chosen.exit_layers_B
        points.append((path.compute(chosen), float(loss[torch.arange(400), 0, exits].mean())))
    for compute, value in zip(frontier.compute_S, frontier.loss_S, strict=True):
        assert value == pytest.approx(min(v for c, v in points if c <= compute + 1e-9), abs=1e-6)
    assert (frontier.compute_S[1:] >= frontier.compute_S[:-1]).all()
    middle = (frontier.compute_S[3] + frontier.compute_S[4]) / 2
    assert frontier.loss_at(middle) == pytest.approx((frontier.loss_S[3] + frontier.loss_S[4]) / 2)
    assert frontier.loss_at(0.0) == frontier.loss_S[0]


def test_the_training_that_knows_more_is_chosen() -> None:
    frontiers = [Frontier.of(*population(noise)) for noise in (3.0, 0.0, 1.0)]
    assert best_frontier(frontiers, budget=0.5) == 1
    assert best_frontier(frontiers, max_loss=0.01) == 1
    assert frontiers[1].compute_at(0.0) < frontiers[0].compute_at(0.0)


def test_targets_that_nothing_reaches_are_named() -> None:
    path, loss = population(0.0)
    stuck = Frontier.of(path, loss.clamp(min=0.2))
    assert stuck.compute_at(0.1) == float("inf")
    with pytest.raises(CalibrationError, match=r"none of 2 trainings reaches a mean loss of 0\.1"):
        best_frontier([stuck, stuck], max_loss=0.1)
    with pytest.raises(ValueError, match="either"):
        best_frontier([stuck], budget=0.5, max_loss=0.1)
    with pytest.raises(ValueError, match="either"):
        best_frontier([], budget=0.5)
