"""Comparisons of gates that choose schedules: static schedules, oracles, the router, and the whole."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dyvte.backbones.sizes import DecoderShape
from dyvte.calibration import gate_logits
from dyvte.calibration.operating_points import OperatingPoints, static_points
from dyvte.calibration.path import Labels
from dyvte.comparison.compare import make_pairs
from dyvte.comparison.oracle import first_safe_schedule, schedule_oracle_points
from dyvte.comparison.plan_compare import mixture_for
from dyvte.comparison.plans import PlanJudge
from dyvte.comparison.question_features import BagOfWords
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.schedule_router import ScheduleRouter
from dyvte.comparison.traces import compare_on_traces
from dyvte.comparison.tuned_gates import load_gates
from dyvte.costs.schedules import kv_share
from dyvte.errors import ConfigError
from dyvte.gates import GateConfig, GateStack, Schedules, uniform_freeze_offsets, uniform_offsets
from dyvte.objectives import expected_risk
from dyvte.teacher.freeze_grid import LABELS
from tests.helpers.traces import make_trace

LAYERS, HIDDEN, FREEZES, LAM = 5, 6, (0, 1, 3), 0.2


ROUTER_STEPS = 150


def all_pairs() -> list[tuple[int, int]]:
    frozen = [(f, k) for f in FREEZES for k in range(f + 1, LAYERS + 1)]
    return [(k, k) for k in range(LAYERS + 1)] + frozen


def cost(f: int, k: int, share: float) -> float:
    return (f + share * (k - f)) / LAYERS


def at(labels: Labels, f: int, k: int) -> torch.Tensor:
    """(B,) by hand."""
    stream = FREEZES.index(f) if f < k else len(FREEZES)
    return labels.values_BGL1[:, stream, k].double()


@pytest.mark.parametrize("seed", range(3))
def test_static_hull_is_the_best_mixture_of_two_schedules(seed):
    trace = make_trace(30, LAYERS, seed=seed, freezes=FREEZES)
    share, labels = trace.grid.kv_share, Labels.of(trace, "risk")
    points = static_points(labels, trace.num_visual, share)
    known = [(cost(f, k, share), float(at(labels, f, k).mean())) for f, k in all_pairs()]
    assert (points.compute_S[0], points.compute_S[-1]) == (0, 1)
    for budget in np.linspace(0, 1, 21):
        best = np.inf
        for (a, low), (b, high) in itertools.product(known, known):
            if a <= budget <= b:
                best = min(best, low if a == b else low + (budget - a) / (b - a) * (high - low))
        mixture = points.at_compute(float(budget))
        assert points.mixed_compute(mixture) == pytest.approx(budget)
        assert float(points.mixed_values(labels, mixture).mean()) == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_plans_of_static_schedules_mix_as_static_schedules_do(seed):
    shape = DecoderShape(32, 8, 2, 4, (64,) * LAYERS, 100)
    share, trace = kv_share(shape), make_trace(30, LAYERS, seed=seed, freezes=FREEZES)
    trace = dataclasses.replace(trace, grid=dataclasses.replace(trace.grid, kv_share=share))
    labels = Labels.of(trace, "risk")
    points = static_points(labels, trace.num_visual, share)
    judge = PlanJudge("none", [], trace, shape)
    plans = judge.fixed()
    least = min(one.compute for one in plans)
    for budget in np.linspace(least, 1, 17):
        mixed = mixture_for(plans, float(budget)).judged(judge.judge)
        assert mixed.compute == pytest.approx(budget, abs=1e-9)
        if budget >= points.compute_S[1]:  # below it the mixture holds k = 0, which is no plan
            expected = points.mixed_values(labels, points.at_compute(float(budget)))
            torch.testing.assert_close(mixed.risk_B.double(), expected, rtol=0, atol=1e-6)


def test_the_schedule_oracle_equals_enumeration():
    trace = make_trace(40, LAYERS, seed=4, freezes=FREEZES)
    share, labels = trace.grid.kv_share, Labels.of(trace, "risk")
    lams = (0.01, 0.3, 2.0)
    points = schedule_oracle_points(labels, trace.num_visual, share, lams)
    assert points.settings_S == (2.0, 0.3, 0.01)
    pairs = [(f, k) for f, k in all_pairs() if k > 0]
    for setting, lam in enumerate(points.settings_S):
        losses = torch.stack([at(labels, f, k) + lam * cost(f, k, share) for f, k in pairs], 1)
        chosen = points.schedules(setting)
        found = at_each(labels, chosen) + lam * cost_of(chosen, share)
        torch.testing.assert_close(found, losses.min(1).values)


def at_each(labels: Labels, chosen: Schedules) -> torch.Tensor:
    rows = zip(chosen.freeze_layers_B.tolist(), chosen.exit_layers_B.tolist(), strict=True)
    return torch.stack([at(labels, f, k)[row] for row, (f, k) in enumerate(rows)])


def cost_of(chosen: Schedules, share: float) -> torch.Tensor:
    rows = zip(chosen.freeze_layers_B.tolist(), chosen.exit_layers_B.tolist(), strict=True)
    return torch.tensor([cost(f, k, share) for f, k in rows], dtype=torch.float64)


def test_the_first_safe_schedule_stays_right_whatever_comes_later():
    trace = make_trace(60, LAYERS, seed=9, freezes=FREEZES)
    for name in LABELS:  # the full model is right, and most schedules are
        values = getattr(trace.grid, name)
        values[values.isnan().logical_not() & (torch.rand(values.shape) < 0.6)] = 1
    labels = Labels.of(trace, "same_answer")
    pairs = [(f, k) for f, k in all_pairs() if k > 0]
    chosen = first_safe_schedule(labels, 0.2)
    for row in range(len(trace)):
        safe = [
            (cost(f, k, 0.2), f, k)
            for f, k in pairs
            if all(at(labels, g, j)[row] == 1 for g, j in pairs if g >= f and j >= k)
        ]
        least = min(safe)[0]
        f, k = int(chosen.freeze_layers_B[row]), int(chosen.exit_layers_B[row])
        assert cost(f, k, 0.2) == pytest.approx(least)
        assert any((f, k) == pair[1:] for pair in safe)


def test_schedules_that_thinned_traces_do_not_label_are_no_choice():
    trace = make_trace(60, LAYERS, seed=9, freezes=FREEZES)
    whole, exits = Labels.of(trace, "same_answer"), (2, 4, LAYERS)
    thin = Labels.of(trace.thinned(exits=exits), "same_answer")
    allowed = [(f, k) for f, k in all_pairs() if k in exits and (f in exits or f < k)]
    chosen = first_safe_schedule(thin, 0.2)
    for row in range(len(trace)):
        f, k = int(chosen.freeze_layers_B[row]), int(chosen.exit_layers_B[row])
        safe = [
            cost(g, j, 0.2)
            for g, j in allowed
            if all(at(whole, h, i)[row] == 1 for h, i in allowed if h >= g and i >= j)
        ]
        assert (f, k) in allowed
        assert cost(f, k, 0.2) == pytest.approx(min(safe))


def test_settings_are_put_in_order_of_what_they_spend():
    chosen = [Schedules(torch.tensor([f] * 4), torch.tensor([k] * 4)) for f, k in ((3, 5), (0, 5), (1, 1))]
    points = OperatingPoints.of_schedules("rule", (1.0, 2.0, 3.0), chosen, torch.ones(4), LAYERS, 0.2)
    assert points.settings_S == (2.0, 3.0, 1.0)  # 0.2 (stable), 0.2, 0.68
    assert points.compute_S == pytest.approx([0.2, 0.2, 0.68])
    drawn = points.draw(points.at_compute(0.44), ["a", "b", "c", "d"], seed=1)
    assert sorted(drawn.freeze_layers_B.tolist()) == [1, 1, 3, 3]
    assert [(f, k) for f, k in zip(drawn.freeze_layers_B.tolist(), drawn.exit_layers_B.tolist())].count(
        (3, 5)
    ) == 2


# --- planted scenes: the image decides who needs how much, or the wording -----------------------------------


def planted(count: int, seed: int, by_image: bool) -> TracedScenes:
    """Needs 0, 1 or 3 updates and 2 or 4 layers of reading; the states tell, or the wording."""
    trace = make_trace(count, LAYERS, seed=seed, features=2 * HIDDEN, freezes=FREEZES)
    rng = torch.Generator().manual_seed(seed)
    updates = torch.tensor(FREEZES)[torch.randint(0, 3, (count,), generator=rng)]
    reads = torch.maximum(updates, torch.tensor([2, 4])[torch.randint(0, 2, (count,), generator=rng)])
    layer = torch.arange(LAYERS + 1)
    plain = (layer < reads[:, None]).float()
    frozen = torch.stack([torch.where((updates > f)[:, None], 1.0, plain) for f in FREEZES], 1)
    for i, f in enumerate(FREEZES):
        frozen[:, i, :f], frozen[:, i, f] = torch.nan, plain[:, f]
    labels = {name: 1 - frozen if name in ("agreement", "same_answer") else frozen for name in LABELS}
    exits = {name: 1 - plain if name in ("agreement", "same_answer") else plain for name in LABELS}
    told = torch.zeros(count, 2 * HIDDEN)
    told[torch.arange(count), updates], told[torch.arange(count), 4 + reads] = 2.0, 2.0

    def features(like: torch.Tensor) -> torch.Tensor:
        return 0.1 * like + (told if like.dim() == 2 else told[:, None])

    grid = dataclasses.replace(
        trace.grid,
        **labels,
        embeddings=features(trace.grid.embeddings),
        features=features(trace.grid.features),
    )
    trace = dataclasses.replace(trace, **exits, features=features(trace.features), grid=grid)
    words = [f"update {u} times and read {r} times" for u, r in zip(updates.tolist(), reads.tolist())]
    questions = ["follow the arrow"] * count if by_image else words
    return TracedScenes(trace, tuple(questions), tuple(f"image{n // 4}" for n in range(count)))


def trained(train: TracedScenes, seed: int = 0) -> GateStack:
    objective = {"lam": LAM, "span": 10.0, "loss": "same_answer+risk:1"}
    config = GateConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        offsets=uniform_offsets(LAYERS),
        freeze_head=True,
        freeze_offsets=uniform_freeze_offsets(LAYERS, FREEZES),
        training={"objective": objective, "epochs": 2.0, "seed": seed},
    )
    gates = GateStack.init(config, seed)
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        logits = gates.logits(**train.trace.gate_inputs())
        expected_risk(logits, train.trace, **objective).backward()
        optimizer.step()
    return gates


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Pair and comparison where the image decides (True), and where the wording does (False)."""
    words = SimpleNamespace(of=lambda pipeline: BagOfWords.fit(["update 0 1 3 times and read 2 4 times"]))
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dyvte.comparison.question_features.TextStates", words)
        for by_image in (True, False):
            train, calibration, test = (planted(300, seed, by_image) for seed in (1, 2, 3))
            folder = tmp_path_factory.mktemp("gates")
            trained(train).save_pretrained(folder)
            settings = SimpleNamespace(gates=(str(folder),), lam=None)
            pairs = make_pairs(settings, None, train, calibration)
            found[by_image] = (pairs[0], compare_on_traces(calibration, test, pairs, num_draws=300))
    return found


def test_gates_beat_static_schedules_and_a_router_that_cannot_see(results):
    pair, found = results[True]
    over = found.over_seeds
    for baseline in ("fixed", "static", "router"):
        assert over.gates_minus[baseline]["risk"].high < 0
        assert over.gates_minus[baseline]["same_answer"].low > 0
    # A static freeze is worth something even where nobody knows who needs it.
    means = {rule: over.at_equal_compute[rule]["risk"].mean for rule in over.at_equal_compute}
    assert means["schedule_oracle"] <= means["gates"] < means["static"] <= means["fixed"]
    assert means["schedule_oracle"] <= means["oracle"]
    assert over.mean_freeze_layer.mean < over.mean_exit_layer.mean
    assert over.over_gates["static"].mean > 1.2
    assert isinstance(pair.router.router, ScheduleRouter)
    assert pair.router.router.num_parameters >= pair.gates.num_parameters
    assert {one.kind for one in pair.candidates} == {
        f"{kind}, {rule}" for kind in ("bag of words", "text states") for rule in ("heads", "table")
    }


def test_a_schedule_that_the_wording_decides_is_the_routers_too(results):
    pair, found = results[False]
    over = found.over_seeds
    assert over.over_gates["router"].mean == pytest.approx(1.0, abs=0.1)
    assert over.gates_minus["static"]["same_answer"].low > 0
    # Both kinds of router find it.
    for kind in ("heads", "table"):
        own = [one for one in pair.candidates if one.kind.endswith(kind)]
        assert min(one.calibration_loss(pair.gates.budget) for one in own) < 0.05


def test_decisions_at_a_threshold_are_those_of_the_rule(results):
    pair, _ = results[True]
    scenes = planted(80, 7, True)
    points = pair.gates.points_on(scenes)
    assert np.all(np.diff(points.compute_S) >= 0)
    logits = gate_logits(pair.gates.gates, scenes.trace)
    for setting in (0, len(points.settings_S) // 2):
        chosen = pair.gates.decided(logits, points.settings_S[setting])
        assert torch.equal(points.schedules(setting).exit_layers_B, chosen.exit_layers_B)
        assert torch.equal(points.schedules(setting).freeze_layers_B, chosen.freeze_layers_B)


def test_gates_and_traces_that_do_not_go_together_are_refused(tmp_path, monkeypatch):
    scenes = planted(40, 1, True)
    trained_gates = trained(scenes)
    trained_gates.save_pretrained(tmp_path / "both")
    for freezes, expected in (((0, 1), r"freeze rows after layers \[3\]"), ((), r"layers \[0, 1, 3\]")):
        thin = dataclasses.replace(scenes, trace=scenes.trace.thinned(freezes=freezes))
        with pytest.raises(ConfigError, match=expected):
            load_gates(tmp_path / "both", "seed", thin)
    config = GateConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, training={"objective": {"lam": LAM}, "epochs": 1.0}
    )
    GateStack.init(config).save_pretrained(tmp_path / "one")
    settings = SimpleNamespace(gates=(str(tmp_path / "both"), str(tmp_path / "one")), lam=None)
    words = SimpleNamespace(of=lambda pipeline: BagOfWords.fit(["a"]))
    monkeypatch.setattr("dyvte.comparison.question_features.TextStates", words)
    with pytest.raises(ConfigError, match="some of the gates have a freeze head"):
        make_pairs(settings, None, scenes, scenes)
