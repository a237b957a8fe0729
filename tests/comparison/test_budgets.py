"""The budget report on a task whose risks are known in closed form."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dyvte.calibration.operating_points import OperatingPoints, fixed_points
from dyvte.comparison.bootstrap import PairedDifference
from dyvte.comparison.budgets import Rule, Verdict, compare_at_budgets, verdict
from dyvte.comparison.config import parse_budgets
from dyvte.comparison.oracle import oracle_points
from dyvte.comparison.scenes import TracedScenes
from dyvte.errors import ConfigError
from dyvte.reporting.budgets import budget_markdown, plot_budgets
from dyvte.teacher.trace import Trace

BUDGETS = parse_budgets("0.25:0.85")
LAYERS, IMAGES, QUESTIONS = 10, 60, 4


@pytest.fixture(scope="module")
def scenes() -> TracedScenes:
    """A sample needs 2 or 8 layers, by its question; before them its risk is 1 and its answer another."""
    rows = IMAGES * QUESTIONS
    need = torch.tensor([2, 8]).repeat(rows // 2)
    risk = (torch.arange(LAYERS + 1) < need[:, None]).float()
    return TracedScenes(
        trace=Trace(
            risk=risk, reverse_risk=risk, agreement=1 - risk, same_answer=1 - risk, loss=risk,
            features=torch.zeros(rows, LAYERS, 2), sample_ids=tuple(map(str, range(rows))),
            num_visual=torch.full((rows,), 64),
        ),
        questions=("short", "long") * (rows // 2),
        image_ids=tuple(str(n // QUESTIONS) for n in range(rows)),
    )  # fmt: skip


def knows(scenes: TracedScenes, name: str, extra: int = 0) -> OperatingPoints:
    """A rule that leaves every sample ``extra`` layers after it is ready, or at once."""
    rows = len(scenes.trace)
    ready = (scenes.trace.risk.sum(1).long() + extra).clamp(max=LAYERS)
    settings = torch.stack([torch.ones(rows, dtype=torch.long), ready, torch.full((rows,), LAYERS)])
    return OperatingPoints(name, (0.0, 0.5, 1.0), settings, scenes.trace.num_visual, LAYERS)


def compared(scenes: TracedScenes, ours: Rule, *baselines: Rule):
    oracle = oracle_points(scenes.trace.risk, scenes.trace.num_visual, (0.01, 0.1, 30.0))
    return compare_at_budgets(scenes, ours, baselines, oracle, BUDGETS, num_draws=300)


def test_risk_at_a_budget_is_the_mixture_that_spends_it(scenes):
    ours = Rule.of("ours", knows(scenes, "ours"), knows(scenes, "ours", extra=1))
    fixed = Rule.of("fixed K", fixed_points(scenes.trace.risk, scenes.trace.num_visual))
    report = compared(scenes, ours, fixed)
    assert [row.budget for row in report.rows] == pytest.approx(np.linspace(0.25, 0.85, 8).tolist())
    for row in report.rows:
        budget = row.budget
        # Ready at 2 or 8 layers: 50 % of the compute; before that a mixture with leaving after layer 1.
        first = float(np.interp(budget, [0.1, 0.5], [1.0, 0.0]))
        second = float(np.interp(budget, [0.1, 0.6], [1.0, 0.0]))
        assert row.risk["ours"].mean == pytest.approx((first + second) / 2, abs=1e-6)
        assert row.risk["ours"].max == pytest.approx(second, abs=1e-6)
        # Hull of the fixed layers: risk 1 at 0, 1/2 from 2, 0 from 8.
        layer = 10 * budget
        hull = float(np.interp(layer, [0, 2, 8, 10], [1.0, 0.5, 0.0, 0.0]))
        assert row.risk["fixed K"].mean == pytest.approx(hull, abs=1e-6)
        found = row.risk_minus["fixed K"]
        assert found.difference == pytest.approx((first + second) / 2 - hull, abs=1e-6)
        assert found.low - 1e-9 <= found.difference <= found.high + 1e-9


def test_verdicts_count_what_the_intervals_say(scenes):
    ours = Rule.of("ours", knows(scenes, "ours"))
    late = Rule.of("late", knows(scenes, "late", extra=1))
    report = compared(scenes, ours, late)
    # 25, 34, 42, 51 and 59 %: the late rule still has samples that it lets go too early.
    assert report.verdicts["late"].strictly_better == sum(b < 0.6 for b in BUDGETS) == 5
    assert report.verdicts["late"].never_worse
    turned = compared(scenes, late, Rule.of("ours", knows(scenes, "ours"))).verdicts["ours"]
    assert turned.strictly_better == 0
    assert not turned.never_worse
    margin = [PairedDifference(0, 0, high, -1, high, 0, 0.95, 9, 9) for high in (0.002, -0.1)]
    assert verdict(margin) == Verdict(worst_upper_bound=0.002, never_worse=True, strictly_better=1, budgets=2)


def test_compute_at_99_percent_is_interpolated_on_both_curves(scenes):
    ours = Rule.of("ours", knows(scenes, "ours", extra=1))
    needed = compared(scenes, ours).compute_at_same_answer
    # From (10 %, nothing right) to (60 %, all right), and the oracle's curve to 50 %.
    assert needed.rules["ours"].mean == pytest.approx(0.1 + 0.5 * 0.99)
    assert needed.over_oracle("ours") == pytest.approx(needed.rules["ours"].mean / needed.oracle)
    assert 0.4 < needed.oracle <= 0.5
    # Ready after 2 or 8 of 10 layers.
    assert (needed.hindsight, needed.hindsight_one_layer_late) == pytest.approx((0.5, 0.6))


def test_a_rule_may_be_tuned_for_each_budget(scenes):
    asked = []

    def points(budget: float) -> OperatingPoints:
        asked.append(budget)
        return knows(scenes, "tuned", extra=int(budget > 0.5))

    compared(scenes, Rule("tuned", (points,)))
    assert set(BUDGETS) <= set(asked)


def test_tables_and_plot(scenes, tmp_path):
    pytest.importorskip("matplotlib")
    ours = Rule.of("ours", knows(scenes, "ours"), knows(scenes, "ours", extra=1))
    report = compared(scenes, ours, Rule.of("late", knows(scenes, "late", extra=2)))
    text = budget_markdown(report)
    assert "| 25.0%" in text
    assert "| late " in text
    plot_budgets(report, tmp_path / "budgets.png")
    assert (tmp_path / "budgets.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_json_ready(scenes):
    report = compared(
        scenes, Rule.of("ours", knows(scenes, "ours")), Rule.of("late", knows(scenes, "late", 1))
    )
    values = json.loads(json.dumps(report.to_dict()))
    assert values["rows"][0]["risk_minus"]["late"]["high"] == report.rows[0].risk_minus["late"].high
    assert values["verdicts"]["late"]["strictly_better"] == 5
    assert values["compute_at_same_answer"]["over_oracle"][
        "ours"
    ] == report.compute_at_same_answer.over_oracle("ours")
    assert set(values["curves"]) == {"ours", "late", "oracle"}


def test_budgets_are_read_from_their_text_forms():
    assert parse_budgets("0.25:0.85") == pytest.approx(np.linspace(0.25, 0.85, 8).tolist())
    assert parse_budgets("0.1:0.9:3") == pytest.approx((0.1, 0.5, 0.9))
    assert parse_budgets("0.5, 0.3") == (0.3, 0.5)
    assert parse_budgets("") == ()
    for text in ("0:0.5", "0.5:1.5", "half", "0.1:0.9:2:3", "0.1:0.9:x", "1.2", ","):
        with pytest.raises(ConfigError, match="expected shares"):
            parse_budgets(text)
