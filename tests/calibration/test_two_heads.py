"""One path of thresholds for both heads: budgets by brute force, the risk bound by simulation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from dyvte.calibration import (
    ThresholdPath,
    at_schedule,
    calibrate_compute,
    calibrate_risk,
    certified_threshold,
    gate_logits,
    threshold_at,
    threshold_for_budget,
    write_calibration,
)
from dyvte.calibration.pvalues import P_VALUES
from dyvte.calibration.risk import image_means
from dyvte.calibration.tables import ALPHAS, calibration_tables
from dyvte.errors import CalibrationError, GateMismatchError
from dyvte.gates import (
    GateConfig,
    GateStack,
    HeadLogits,
    Schedules,
    close_freezes,
    exit_layers,
    schedules,
    uniform_freeze_offsets,
    uniform_offsets,
)
from dyvte.teacher import Manifest, Shard, TraceStore
from dyvte.teacher.manifest import grid_fingerprint
from tests.helpers.traces import make_trace

LAYERS, FREEZES, SHARE = 6, (0, 2, 3), 0.2


def random_path(rows: int = 60, gap: float = 0.7, min_layer: int = 1) -> ThresholdPath:
    generator = torch.Generator().manual_seed(5)
    exit_BGL = torch.randn(rows, len(FREEZES) + 1, LAYERS, generator=generator) + torch.linspace(
        -2, 2, LAYERS
    )
    for i, f in enumerate(FREEZES):
        exit_BGL[:, i, :f] = exit_BGL[:, -1, :f]
    freeze_BL = torch.randn(rows, LAYERS, generator=generator) + torch.linspace(-2, 1, LAYERS)
    tokens = torch.randint(1, 50, (rows,), generator=generator)
    logits = HeadLogits(exit_BGL, freeze_BL, FREEZES).closed_elsewhere()
    return ThresholdPath(logits, tokens, min_layer, gap, SHARE)


def costs_by_hand(path: ThresholdPath, threshold: float) -> tuple[float, float]:
    """Visual compute and KV memory, row by row."""
    level = math.log(threshold / (1 - threshold))
    chosen = schedules(
        path.logits, threshold, path.min_layer, freeze_threshold=threshold_at(level + path.gap)
    )
    compute = memory = total = 0.0
    for f, k, n in zip(
        chosen.freeze_layers_B.tolist(),
        chosen.exit_layers_B.tolist(),
        path.num_visual_B.tolist(),
        strict=True,
    ):
        compute += n * (f * 1.0 + (k - f) * SHARE)
        memory += n * k
        total += n * LAYERS
    return compute / total, memory / total


@pytest.mark.parametrize("gap", [0.0, 0.7, -1.5])
@pytest.mark.parametrize(("budget", "memory_budget"), [(0.3, None), (0.6, None), (None, 0.7), (0.4, 0.6)])
def test_thresholds_meet_both_budgets_and_nothing_later_does(budget, memory_budget, gap) -> None:
    path = random_path(gap=gap)
    threshold = threshold_for_budget(path, budget, memory_budget)
    level = math.log(threshold / (1 - threshold))

    def meets(t: float) -> bool:
        compute, memory = costs_by_hand(path, t)
        return compute <= (budget or 1) and memory <= (memory_budget or 1)

    assert meets(threshold)
    exits, freezes = path.logits.exit_BGL[..., :-1], path.logits.freeze_BL[:, list(FREEZES)] - gap
    every = torch.cat((exits.flatten(), freezes.flatten())).double().unique().tolist()
    # Brute force over every level at which a decision changes: none above meets the budgets.
    later = [one for one in every if one > level]
    assert not any(meets(threshold_at(one + 1e-6)) for one in later)
    assert min(abs(level - one) for one in every) > 1e-7


def test_budgets_that_cannot_be_met_are_named() -> None:
    path = random_path(min_layer=3)
    with pytest.raises(CalibrationError, match=r"KV memory of 0\.4000.*cost 0\.5000.*layer 3 of 6"):
        threshold_for_budget(path, 0.9, 0.4)
    with pytest.raises(CalibrationError, match=r"visual compute of 0\.05"):
        threshold_for_budget(path, 0.05)
    with pytest.raises(ValueError, match="memory_budget must be positive"):
        threshold_for_budget(path, None, 0.0)
    assert threshold_for_budget(path) == threshold_for_budget(path, 1.0, 1.0) == 1.0
    broken = path.logits.freeze_BL.clone()
    broken[3, 2] = torch.nan
    with pytest.raises(CalibrationError, match="not finite"):
        threshold_for_budget(replace(path, logits=replace(path.logits, freeze_BL=broken)), 0.5)


def test_at_schedule_picks_the_stream_and_the_column() -> None:
    trace = make_trace(5, LAYERS, freezes=FREEZES)
    chosen = Schedules(torch.tensor([0, 2, 4, 6, -1]), torch.tensor([3, 6, 4, 6, -1]))
    got = at_schedule(trace.labels("risk"), FREEZES, chosen)
    wanted = [trace.grid.risk[0, 0, 3], trace.grid.risk[1, 1, 6], trace.risk[2, 4], trace.risk[3, 6]]
    assert got[:4].tolist() == [float(x) for x in wanted]
    assert got[4].isnan()
    with pytest.raises(CalibrationError, match=r"after layers \[1\]"):
        at_schedule(trace.labels("risk"), FREEZES, Schedules(torch.tensor([1] * 5), torch.tensor([3] * 5)))


# --- risk: a finite population whose truth is known exactly ---

QUESTIONS, IMAGES, DEPTH = 4, 2000, 10
STREAMS = (0, 2, 5)
LEVELS = tuple(12 - 0.5 * step for step in range(49))
ALPHA, DELTA = 0.05, 0.1


@cache
def population() -> SimpleNamespace:
    """Images with dependent questions; a loss rises again two layers after it first vanished."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    image = normal(IMAGES, 1)
    needs_read = 4 + 1.5 * image + 0.6 * normal(IMAGES, QUESTIONS)
    needs_update = 1.5 + 1.2 * image + 0.9 * normal(IMAGES, QUESTIONS)
    layer = torch.arange(DEPTH + 1.0)
    read = layer - needs_read[..., None]
    updated = torch.tensor([*STREAMS, 20.0]) - needs_update[..., None]
    chance = torch.sigmoid(-4 * read) + 0.12 * ((read > 1.5) & (read < 3))
    chance = chance[..., None, :] + 0.7 * torch.sigmoid(-4 * updated)[..., None]
    mood = torch.rand(IMAGES, 1, 1, 1, generator=generator)  # one draw per image: its questions fail together
    loss = (mood < chance).float()
    loss[..., -1, -1] = 0
    for i, f in enumerate(STREAMS):
        loss[..., i, :f] = torch.nan
    noise = 0.8 * normal(IMAGES, QUESTIONS, len(STREAMS) + 1, DEPTH)
    exit_logits = 1.5 * (read[..., None, 1:] - 1) + noise
    for i, f in enumerate(STREAMS):
        exit_logits[..., i, :f] = exit_logits[..., -1, :f]
    freeze_logits = 1.5 * (torch.arange(float(DEPTH)) - needs_update[..., None] - 1) + 0.8 * normal(
        IMAGES, QUESTIONS, DEPTH
    )
    logits = HeadLogits(exit_logits.flatten(0, 1), freeze_logits.flatten(0, 1), STREAMS).closed_elsewhere()
    path = ThresholdPath(logits, torch.ones(len(logits)), 1, 0.8, SHARE)
    chosen = [path.at(level) for level in LEVELS]
    flat = loss.flatten(0, 1)
    losses = torch.stack([at_schedule(flat, STREAMS, one) for one in chosen], 1)
    images = [str(i) for i in range(IMAGES) for _ in range(QUESTIONS)]
    return SimpleNamespace(
        path=path,
        loss=flat,
        images=images,
        image_losses=image_means(losses, images),
        true_risk=image_means(losses, images).mean(0),
        compute=torch.tensor([path.compute(one) for one in chosen]),
    )


def draw_images(draws: int, images: int, seed: int) -> torch.Tensor:
    return torch.randint(IMAGES, (draws, images), generator=torch.Generator().manual_seed(seed))


def chosen_levels(picks: torch.Tensor, method: str) -> torch.Tensor:
    """Index of the certified level for every draw, -1 for none."""
    found = []
    for part in picks.split(100):
        passed = P_VALUES[method](population().image_losses[part], ALPHA, DELTA) <= DELTA
        found.append(passed.long().cumprod(1).sum(1) - 1)
    return torch.cat(found)


def test_the_simulated_path_is_not_monotone_and_naive_choice_violates() -> None:
    known = population()
    assert (known.true_risk.diff() < 0).any()
    assert known.compute.max() - known.compute.min() > 0.5
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
def test_safety_is_not_bought_by_computing_everything(method: str) -> None:
    known = population()
    exact = known.compute[(known.true_risk <= ALPHA).long().cumprod(0).bool()].min()
    chosen = chosen_levels(draw_images(25, 5000, 2), method)
    spent = torch.where(chosen >= 0, known.compute[chosen.clamp(min=0)], 1.0)
    assert exact < 0.8
    assert float(spent.median()) <= 1.1 * float(exact)


@pytest.mark.parametrize("method", list(P_VALUES))
def test_public_function_chooses_what_the_simulation_chooses(method: str) -> None:
    known = population()
    images = 400
    rows = slice(images * QUESTIONS)
    path = replace(
        known.path, logits=known.path.logits.rows(rows), num_visual_B=known.path.num_visual_B[rows]
    )
    result = certified_threshold(
        path, known.loss[rows], known.images[rows], ALPHA, DELTA, method=method, levels=LEVELS, seed=3
    )
    order = torch.randperm(images, generator=torch.Generator().manual_seed(3))
    expected = LEVELS[int(chosen_levels(order[None], method))]
    assert result.certified
    assert (result.threshold, result.freeze_threshold) == (
        threshold_at(expected),
        threshold_at(expected + 0.8),
    )
    assert result.mean_loss < ALPHA
    assert 0 < result.mean_freeze_layer < result.mean_exit_layer < DEPTH


def test_no_certified_threshold_means_that_neither_head_ever_fires() -> None:
    known = population()
    path = replace(known.path, logits=known.path.logits.rows(slice(80)))
    result = certified_threshold(path, known.loss[:80], known.images[:80], 0.01, 0.1)
    assert (result.certified, result.threshold, result.freeze_threshold) == (False, 1.0, 1.0)
    chosen = schedules(path.logits, result.threshold, freeze_threshold=result.freeze_threshold)
    assert chosen.exit_layers_B.eq(DEPTH).all()
    assert chosen.freeze_layers_B.eq(DEPTH).all()


# --- checkpoints ---


def two_heads(**fields) -> GateStack:
    config = GateConfig(
        num_layers=LAYERS, hidden_size=2, freeze_head=True, offsets=uniform_offsets(LAYERS),
        freeze_offsets=close_freezes(uniform_freeze_offsets(LAYERS), FREEZES), **fields,
    )  # fmt: skip
    return GateStack.init(config, seed=1)


def store_of(folder, trace) -> TraceStore:
    grid = grid_fingerprint(trace.freezes, trace.grid.kv_share) if trace.grid is not None else {}
    made = Manifest(
        fingerprint={"features": "mean_prompt+last_prompt", **grid},
        num_samples=len(trace), shard_size=len(trace), num_layers=LAYERS, feature_size=4,
    )  # fmt: skip
    store = TraceStore.create(folder, made)
    store.write(0, Shard(trace=trace, image_ids=tuple(str(i // 4) for i in range(len(trace)))))
    return store


def test_calibration_writes_both_thresholds(tmp_path) -> None:
    gates = two_heads(threshold=0.4, freeze_threshold=0.6)
    gates.save_pretrained(tmp_path / "gates")
    trace = make_trace(400, LAYERS, freezes=FREEZES)
    store = store_of(tmp_path / "trace", trace)
    found = calibrate_compute(gates, store, 0.5, memory_budget=0.6)
    config = write_calibration(tmp_path / "gates", found)
    gap = math.log(0.6 / 0.4 * 0.6 / 0.4)
    levels = [math.log(t / (1 - t)) for t in (config.threshold, config.freeze_threshold)]
    assert levels[1] - levels[0] == pytest.approx(gap)
    record = json.loads((tmp_path / "gates" / "gate_config.json").read_text())["calibration"]
    chosen = schedules(gate_logits(gates, trace), config.threshold, freeze_threshold=config.freeze_threshold)
    assert record["visual_compute"] <= 0.5
    assert record["kv_memory"] == pytest.approx(float(chosen.exit_layers_B.double().mean()) / LAYERS)
    assert record["mean_freeze_layer"] == pytest.approx(float(chosen.freeze_layers_B.double().mean()))
    answers = at_schedule(trace.labels("same_answer"), FREEZES, chosen)
    assert record["same_answer"] == pytest.approx(float(answers.mean()))
    bounded = calibrate_risk(gates, store, 0.9, 0.1)
    assert write_calibration(tmp_path / "gates", bounded).freeze_threshold == bounded.freeze_threshold
    with pytest.raises(CalibrationError, match="no bound"):
        calibrate_risk(gates, store, 0.9, 0.1, loss="risk")


def test_tables_hold_what_each_entry_would_be_alone(tmp_path) -> None:
    gates = two_heads(threshold=0.4, freeze_threshold=0.6)
    store = store_of(tmp_path / "trace", make_trace(400, LAYERS, freezes=FREEZES))
    tables = calibration_tables(gates, store, delta=0.2, loss="risk:4")
    assert len(tables["budgets"]) >= 3
    for one in tables["budgets"]:
        alone = calibrate_compute(gates, store, one["budget"])
        assert (one["threshold"], one["freeze_threshold"]) == (alone.threshold, alone.freeze_threshold)
    bounds = {one["alpha"]: one for one in tables["bounds"]}
    certified = 0
    for alpha in ALPHAS:
        alone = calibrate_risk(gates, store, alpha, 0.2, loss="risk:4")
        assert (alpha in bounds) == alone.record["certified"]
        if alpha in bounds:
            certified += 1
            assert bounds[alpha]["threshold"] == alone.threshold
            assert bounds[alpha]["freeze_threshold"] == alone.freeze_threshold
    assert 0 < certified < len(ALPHAS)


def test_gates_that_could_freeze_where_nothing_was_traced_are_refused(tmp_path) -> None:
    gates = two_heads()
    with pytest.raises(GateMismatchError, match=r"freeze rows after layers \[3\]"):
        calibrate_compute(gates, store_of(tmp_path, make_trace(8, LAYERS, freezes=(0, 2))), 0.5)


def test_exits_alone_decide_as_before_along_the_path() -> None:
    logits = torch.randn(50, LAYERS, generator=torch.Generator().manual_seed(1))
    path = ThresholdPath(logits, torch.ones(50), min_layer=2)
    for level in (-1.0, 0.0, 2.0):
        assert torch.equal(path.at(level).exit_layers_B, exit_layers(logits, threshold_at(level), 2))
