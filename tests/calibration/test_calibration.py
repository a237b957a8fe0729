"""Calibration: compute budgets by brute force, risk bounds by simulation against a known population."""

from __future__ import annotations

import itertools
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from dyvte.calibration import at_exit, visual_compute
from dyvte.calibration.compute import threshold_for_compute
from dyvte.calibration.path import threshold_at
from dyvte.calibration.pvalues import P_VALUES, bentkus, betting, images_needed, smallest_alpha
from dyvte.calibration.risk import DEFAULT_LEVELS, fixed_sequence, image_means, threshold_for_risk
from dyvte.errors import CalibrationError
from dyvte.gates import exit_layers


def test_visual_compute_weighs_by_visual_tokens_and_skips_rows_without_image() -> None:
    exits_B = torch.tensor([2, 4, -1, 0])
    tokens_B = torch.tensor([10, 30, 0, 60])
    assert visual_compute(exits_B, tokens_B, 4) == pytest.approx((10 * 2 + 30 * 4) / (4 * 100))
    assert math.isnan(visual_compute(torch.tensor([-1]), torch.tensor([0]), 4))


def test_at_exit_picks_the_column() -> None:
    values = torch.arange(15.0).reshape(3, 5)
    picked = at_exit(values, torch.tensor([0, 4, -1]))
    assert picked[:2].tolist() == [0.0, 9.0]
    assert picked[2].isnan()


def gate_logits(rows: int = 40, layers: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, layers, generator=generator) + torch.linspace(-2, 2, layers)


@pytest.mark.parametrize("min_layer", [1, 3])
@pytest.mark.parametrize("budget", [0.6, 0.75, 0.9])
def test_compute_threshold_is_the_largest_that_meets_the_budget(budget: float, min_layer: int) -> None:
    logits = gate_logits()
    tokens = torch.randint(1, 50, (40,), generator=torch.Generator().manual_seed(1))
    threshold = threshold_for_compute(logits, tokens, budget, min_layer=min_layer)

    def compute(t: float) -> float:
        return visual_compute(exit_layers(logits, t, min_layer), tokens, 6)

    every_level = sorted(logits[:, min_layer - 1 : 5].flatten().tolist())
    above = [level for level in every_level if threshold_at(level) > threshold]
    assert compute(threshold) <= budget
    assert all(compute(threshold_at(level + 1e-4)) > budget for level in above)
    # No decision hangs on rounding: the nearest logit is not at the threshold itself.
    level = math.log(threshold / (1 - threshold))
    assert min(abs(level - one) for one in every_level) > 1e-6


def test_compute_budget_that_cannot_be_met() -> None:
    with pytest.raises(CalibrationError, match=r"0\.5000"):
        threshold_for_compute(gate_logits(), torch.ones(40), 0.3, min_layer=3)
    with pytest.raises(CalibrationError, match="not finite"):
        threshold_for_compute(torch.full((2, 4), float("nan")), torch.ones(2), 0.5)
    assert threshold_for_compute(gate_logits(), torch.ones(40), 1.0) == 1.0


def test_bentkus_against_the_definition() -> None:
    losses = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.0, 0.0])[:, None]
    binomial = sum(math.comb(6, m) * 0.4**m * 0.6 ** (6 - m) for m in range(3))  # ceil(1.75) = 2
    assert float(bentkus(losses, 0.4, 0.1)) == pytest.approx(min(1.0, math.e * binomial))


def test_betting_against_a_plain_loop() -> None:
    losses = torch.rand(50, generator=torch.Generator().manual_seed(2)).square().tolist()
    wealth, best = 1.0, 0.0
    total, spread, variance = 0.5, 0.25, 0.25
    for index, loss in enumerate(losses, start=1):
        stake = min(1.0, math.sqrt(2 * math.log(1 / 0.1) / (50 * variance)))
        wealth *= 1 - stake * (loss - 0.5)
        best = max(best, wealth)
        total += loss
        spread += (loss - total / (index + 1)) ** 2
        variance = spread / (index + 1)
    assert float(betting(torch.tensor(losses)[:, None], 0.5, 0.1)) == pytest.approx(1 / best, rel=1e-6)


def test_smallest_alpha_is_what_clean_images_certify() -> None:
    # Bentkus, no loss: e (1 - alpha)^n = delta.
    assert smallest_alpha(100, 0.1, bentkus) == pytest.approx(1 - (0.1 / math.e) ** (1 / 100), rel=1e-6)
    assert smallest_alpha(1, 0.1, bentkus) > 0.9


def test_images_needed_are_the_fewest() -> None:
    for alpha in (0.2, 0.05, 0.01):
        assert images_needed(alpha, 0.1, bentkus) == math.ceil(math.log(0.1 / math.e) / math.log(1 - alpha))
        needed = images_needed(alpha, 0.1, betting)
        assert smallest_alpha(needed, 0.1, betting) <= alpha < smallest_alpha(needed - 1, 0.1, betting)
    assert images_needed(1e-7, 0.1, bentkus) is None


def test_fixed_sequence_stops_at_the_first_failure() -> None:
    assert fixed_sequence(torch.tensor([0.01, 0.1, 0.2, 0.0]), 0.1) == 1
    assert fixed_sequence(torch.tensor([0.2, 0.0]), 0.1) == -1


def test_image_means_take_the_image_as_the_unit() -> None:
    means = image_means(torch.tensor([[1.0], [0.0], [0.0], [1.0]]), ["b", "a", "b", "b"])
    assert means[:, 0].tolist() == pytest.approx([2 / 3, 0.0])


# --- risk: a finite population whose truth is known exactly ---

LAYERS, QUESTIONS, IMAGES = 12, 8, 3000
LEVELS = DEFAULT_LEVELS[::4]
ALPHA, DELTA = 0.05, 0.1


@cache
def population() -> SimpleNamespace:
    """Images with 8 dependent questions each; the risk rises again two layers after it first vanished."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    depth = 5 + 1.8 * normal(IMAGES, 1) + 0.7 * normal(IMAGES, QUESTIONS)
    layer = torch.arange(LAYERS + 1.0)
    past = layer - depth[..., None]
    chance = torch.sigmoid(-4 * past) + 0.12 * ((past > 1.5) & (past < 3))
    mood = torch.rand(IMAGES, 1, 1, generator=generator)  # one draw per image: its questions fail together
    loss = (mood < chance).float()
    loss[..., -1] = 0
    logits = 1.5 * (past[..., 1:] - 1) + 0.8 * normal(IMAGES, QUESTIONS, LAYERS)
    flat_loss, flat_logits = loss.flatten(0, 1), logits.flatten(0, 1)
    exits = torch.stack([exit_layers(flat_logits, threshold_at(level)) for level in LEVELS], 1)
    losses = torch.stack([at_exit(flat_loss, exits[:, g]) for g in range(len(LEVELS))], 1)
    images = [str(i) for i in range(IMAGES) for _ in range(QUESTIONS)]
    return SimpleNamespace(
        logits=flat_logits,
        loss=flat_loss,
        images=images,
        image_losses=image_means(losses, images),
        true_risk=image_means(losses, images).mean(0),
        mean_exit=exits.double().mean(0),
        risk_by_layer=flat_loss.mean(0),
    )


def draw_images(draws: int, images: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(IMAGES, (draws, images), generator=generator)


def chosen_levels(picks: torch.Tensor, method: str) -> torch.Tensor:
    """Index of the certified level for every draw, -1 for none."""
    found = []
    for part in picks.split(100):
        passed = P_VALUES[method](population().image_losses[part], ALPHA, DELTA) <= DELTA
        found.append(passed.long().cumprod(1).sum(1) - 1)
    return torch.cat(found)


def test_the_simulated_risk_is_not_monotone_and_naive_choice_violates() -> None:
    known = population()
    assert (known.risk_by_layer.diff() > 0).any() or (known.true_risk.diff() < 0).any()
    means = known.image_losses[draw_images(2000, 100, 1)].mean(1)
    naive = (means <= ALPHA).long().cumprod(1).sum(1) - 1
    violated = (naive >= 0) & (known.true_risk[naive.clamp(min=0)] > ALPHA)
    assert violated.double().mean() > 2 * DELTA  # so that the next test can fail


@pytest.mark.parametrize("method", list(P_VALUES))
def test_violations_stay_below_delta_over_2000_draws(method: str) -> None:
    chosen = chosen_levels(draw_images(2000, 100, 1), method)
    violated = (chosen >= 0) & (population().true_risk[chosen.clamp(min=0)] > ALPHA)
    assert violated.double().mean() <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / 2000)


@pytest.mark.parametrize("method", list(P_VALUES))
def test_safety_is_not_bought_by_never_exiting(method: str) -> None:
    known = population()
    exact = known.mean_exit[known.true_risk <= ALPHA].min()
    chosen = chosen_levels(draw_images(25, 5000, 2), method)
    exits = torch.where(chosen >= 0, known.mean_exit[chosen.clamp(min=0)], float(LAYERS))
    assert exact < 0.8 * LAYERS
    assert float(exits.median()) <= 1.1 * float(exact)


@pytest.mark.parametrize("method", list(P_VALUES))
def test_public_function_chooses_what_the_simulation_chooses(method: str) -> None:
    known = population()
    images = 400
    rows = slice(images * QUESTIONS)
    result = threshold_for_risk(
        known.logits[rows], known.loss[rows], known.images[rows],
        ALPHA, DELTA, method=method, levels=LEVELS, seed=3,
    )  # fmt: skip
    order = torch.randperm(images, generator=torch.Generator().manual_seed(3))
    expected = int(chosen_levels(order[None], method))
    assert result.certified
    assert result.threshold == threshold_at(LEVELS[expected])
    assert (result.num_images, result.num_samples) == (images, images * QUESTIONS)
    assert result.mean_loss < ALPHA


def test_no_certified_threshold_means_never_and_says_what_could_be() -> None:
    known = population()
    result = threshold_for_risk(known.logits[:80], known.loss[:80], known.images[:80], 0.01, 0.1)
    assert not result.certified
    assert result.threshold == 1.0
    assert exit_layers(known.logits[:80], result.threshold).eq(LAYERS).all()
    assert result.smallest_alpha > 0.01
    assert "never leave" in result.describe()
    assert f"{result.smallest_alpha:.4g}" in result.describe()


def test_risk_refuses_what_the_theory_does_not_cover() -> None:
    logits, loss = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        threshold_for_risk(logits, loss + 2, ["a", "b"], 0.1)
    with pytest.raises(ValueError, match="falling"):
        threshold_for_risk(logits, loss, ["a", "b"], 0.1, levels=(0.0, 1.0))
    for bad in itertools.product((0.0, 1.0), (0.1,)):
        with pytest.raises(ValueError, match="alpha"):
            threshold_for_risk(logits, loss, ["a", "b"], *bad)
