"""Exit rules side by side at given shares of visual compute, and what each spends at equal fidelity.

Shape letters: B samples, L decoder layers, S settings, R seeds, C budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration import visual_compute
from dyvte.calibration.operating_points import OperatingPoints, compute_to_reach
from dyvte.comparison.bootstrap import paired_bootstrap
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.traces import first_safe_layer, spread
from dyvte.formatting import markdown_table

BUDGETS = tuple(float(b) for b in np.linspace(0.25, 0.85, 8))
"""Shares of the full model's visual compute."""
MARGIN = 0.002
"""Nats by which a rule may come out worse in the upper 95 % bound and still count as no worse."""
TARGET = 0.99
"""Same-answer rate at which visual compute is compared."""

PointsAt = Callable[[float], OperatingPoints]
"""A rule's operating points on the test samples, as tuned for a budget (most rules: always the same)."""


@dataclass(frozen=True)
class Rule:
    """An exit rule: one entry for each seed it was trained with (one for a rule without training)."""

    name: str
    seeds: tuple[PointsAt, ...]

    @staticmethod
    def of(name: str, *points: OperatingPoints) -> Rule:
        """A rule whose points do not depend on the budget."""
        return Rule(name, tuple(lambda budget, p=one: p for one in points))

    def values_RB(self, column_BL1: Tensor, budget: float) -> Tensor:
        """(R, B) expected value of each sample at the budget, by mixing two neighbouring settings."""
        found = []
        for points_at in self.seeds:
            points = points_at(budget)
            found.append(points.mixed_values(column_BL1, points.at_compute(budget)))
        return torch.stack(found)


def budget_report(
    test: TracedScenes,
    ours: Rule,
    rivals: Sequence[Rule],
    oracle: OperatingPoints,
    *,
    budgets: Sequence[float] = BUDGETS,
    num_draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Risk and same answer of every rule at every budget, ours minus each rival with intervals; JSON-ready.

    Every rule spends the budget exactly on the test samples (a mixture of two of its settings, which were
    chosen on other data); where it cannot spend as little, its cheapest setting stands. Differences are of
    means over seeds, intervals by bootstrap over images.
    """
    trace = test.trace
    rules = [ours, *rivals, Rule.of("oracle", oracle)]
    rows = []
    for budget in budgets:
        risk = {rule.name: rule.values_RB(trace.risk, budget) for rule in rules}
        same = {rule.name: rule.values_RB(trace.same_answer, budget) for rule in rules}
        differences = {
            rival.name: paired_bootstrap(
                risk[ours.name].mean(0),
                risk[rival.name].mean(0),
                test.image_ids,
                num_draws=num_draws,
                seed=seed,
            ).to_dict()
            for rival in rivals
        }
        rows.append(
            {
                "budget": budget,
                "risk": {name: spread(values.mean(1).tolist()) for name, values in risk.items()},
                "same_answer": {name: spread(values.mean(1).tolist()) for name, values in same.items()},
                "risk_minus": differences,
            }
        )
    return {
        "num_samples": len(trace),
        "num_images": len(set(test.image_ids)),
        "ours": ours.name,
        "rows": rows,
        "verdicts": {rival.name: verdict(rows, rival.name) for rival in rivals},
        "compute_at_same_answer": _compute_needed(test, [ours, *rivals], oracle, budgets[-1]),
        "curves": {rule.name: [_curve(points(budgets[-1]), test) for points in rule.seeds] for rule in rules},
    }


def verdict(rows: Sequence[Mapping[str, Any]], rival: str) -> dict[str, Any]:
    """Never worse beyond the margin? At how many budgets strictly better?"""
    bounds = [row["risk_minus"][rival] for row in rows]
    return {
        "worst_upper_bound": max(d["high"] for d in bounds),
        "never_worse": all(d["high"] <= MARGIN for d in bounds),
        "strictly_better": sum(d["high"] < 0 for d in bounds),
        "budgets": len(bounds),
    }


def _compute_needed(
    test: TracedScenes, rules: Sequence[Rule], oracle: OperatingPoints, budget: float
) -> dict[str, Any]:
    """Visual compute at which each rule keeps ``TARGET`` of the answers, and its ratio to the oracle's."""

    def needed(points: OperatingPoints) -> float:
        return compute_to_reach(points.compute_S, points.means_S(test.trace.same_answer), TARGET)

    base = needed(oracle)
    found: dict[str, Any] = {"target": TARGET, "oracle": base}
    for rule in rules:
        computes = [needed(points_at(budget)) for points_at in rule.seeds]
        found[rule.name] = {**spread(computes), "over_oracle": float(np.mean(computes)) / base}
    # What hindsight would spend to keep every answer: leaving where all later exits agree, and a layer later.
    safe_B = first_safe_layer(test.trace.same_answer)
    for name, late in (("hindsight", 0), ("hindsight_one_layer_late", 1)):
        exits_B = (safe_B + late).clamp(max=test.num_layers)
        found[name] = visual_compute(exits_B, test.trace.num_visual, test.num_layers)
    return found


def _curve(points: OperatingPoints, test: TracedScenes) -> dict[str, list[float]]:
    return {
        "compute": points.compute_S.tolist(),
        "risk": points.means_S(test.trace.risk).tolist(),
        "same_answer": points.means_S(test.trace.same_answer).tolist(),
    }


def budget_markdown(report: Mapping[str, Any]) -> str:
    """The report as tables."""
    rows, names = report["rows"], list(report["rows"][0]["risk"])
    head = ["visual compute", *names]

    def cells(column: str, scale: float, digits: int) -> list[list[str]]:
        return [
            [f"{row['budget']:.1%}", *(_cell(row[column][name], scale, digits) for name in names)]
            for row in rows
        ]

    rivals = list(report["verdicts"])
    minus = [
        [f"{row['budget']:.1%}", *(_interval(row["risk_minus"][rival]) for rival in rivals)] for row in rows
    ]
    verdicts = [
        [
            rival,
            f"{found['worst_upper_bound']:+.4f}",
            "yes" if found["never_worse"] else "no",
            f"{found['strictly_better']} of {found['budgets']}",
        ]
        for rival, found in report["verdicts"].items()
    ]
    needed = report["compute_at_same_answer"]
    spent = [["oracle", f"{needed['oracle']:.1%}", "1.00"]] + [
        [name, _cell(needed[name], 100.0, 1) + " %", f"{needed[name]['over_oracle']:.2f}"]
        for name in [report["ours"], *rivals]
    ]
    return "\n\n".join(
        [
            "Risk, nats (mean over seeds ± deviation):",
            markdown_table(head, cells("risk", 1.0, 4)),
            "Same answer, %:",
            markdown_table(head, cells("same_answer", 100.0, 2)),
            f"Risk of {report['ours']} minus the rival's, nats, with 95 % intervals over images:",
            markdown_table(["visual compute", *rivals], minus),
            markdown_table(
                ["rival", "worst upper bound", f"never worse (bound <= {MARGIN})", "strictly better"],
                verdicts,
            ),
            f"Visual compute at which {needed['target']:.0%} of the answers stay the same:",
            markdown_table(["rule", "visual compute", "over oracle"], spent),
            "In hindsight, leaving at the first layer from which all exits give the full model's answer "
            f"spends {needed['hindsight']:.1%} and keeps every answer; leaving one layer after it "
            f"{needed['hindsight_one_layer_late']:.1%}.",
        ]
    )


def _cell(figures: Mapping[str, float], scale: float, digits: int) -> str:
    text = f"{scale * figures['mean']:.{digits}f}"
    return text if figures["min"] == figures["max"] else f"{text} ± {scale * figures['std']:.{digits}f}"


def _interval(d: Mapping[str, float]) -> str:
    return f"{d['difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
