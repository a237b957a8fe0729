"""Rules side by side at given shares of visual compute, and what each spends at equal fidelity.

Shape letters: B samples, L decoder layers, S settings, R seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.calibration.operating_points import OperatingPoints, compute_to_reach
from dyvte.calibration.path import Labels
from dyvte.comparison.bootstrap import PairedDifference, paired_bootstrap
from dyvte.comparison.oracle import first_safe_layer, first_safe_schedule
from dyvte.comparison.records import Curve, Spread, plain
from dyvte.comparison.scenes import TracedScenes
from dyvte.costs.schedules import schedule_compute
from dyvte.costs.visual import visual_compute

MARGIN = 0.002
"""Nats by which a rule may come out worse in the upper 95 % bound and still count as no worse."""
TARGET = 0.99
"""Same-answer rate at which visual compute is compared."""

PointsAt = Callable[[float], OperatingPoints]
"""A rule's operating points on the test samples, as tuned for a budget (most rules: always the same)."""


@dataclass(frozen=True)
class Rule:
    """A rule: one entry for each seed it was trained with (one for a rule without training).

    Attributes
    ----------
    name : of the rule.
    seeds : its points as tuned for a budget.
    for_target : as tuned for a share of the answers that stays the same; None: whatever the budget.
    """

    name: str
    seeds: tuple[PointsAt, ...]
    for_target: tuple[PointsAt, ...] | None = None

    @staticmethod
    def of(name: str, *points: OperatingPoints) -> Rule:
        """A rule whose points do not depend on the budget."""
        return Rule(name, tuple(lambda budget, p=one: p for one in points))

    def values_RB(self, values: Tensor | Labels, budget: float) -> Tensor:
        """(R, B) expected value of each sample at the budget, by mixing two neighbouring settings.

        Parameters
        ----------
        values
            By freeze and exit layer.
        budget
            Share of the full model's visual compute.
        """
        found = []
        for points_at in self.seeds:
            points = points_at(budget)
            found.append(points.mixed_values(values, points.at_compute(budget)))
        return torch.stack(found)


@dataclass(frozen=True)
class BudgetRow:
    """All rules at one budget.

    Attributes
    ----------
    budget : share of the full model's visual compute.
    risk, same_answer : over seeds, by rule.
    risk_minus, same_answer_minus : our rule's less a baseline's, by baseline; of means over seeds, intervals
        over images.
    """

    budget: float
    risk: dict[str, Spread]
    same_answer: dict[str, Spread]
    risk_minus: dict[str, PairedDifference]
    same_answer_minus: dict[str, PairedDifference]


@dataclass(frozen=True)
class Verdict:
    """Our rule against a baseline, over all budgets.

    Attributes
    ----------
    worst_upper_bound : of the differences' intervals, nats.
    never_worse : that bound is at most :data:`MARGIN`.
    strictly_better : budgets at which the whole interval lies below zero.
    budgets : how many there are.
    """

    worst_upper_bound: float
    never_worse: bool
    strictly_better: int
    budgets: int


@dataclass(frozen=True)
class ComputeAtTarget:
    """Visual compute at which rules keep :data:`TARGET` of the answers.

    Attributes
    ----------
    target : that share.
    oracle : what the oracle spends.
    rules : what each rule spends, over seeds.
    hindsight : what leaving where all later exits agree would spend, and keep every answer.
    hindsight_one_layer_late : leaving one layer after it.
    schedule_oracle, schedule_hindsight : the same of schedules (freeze and exit); None where no freeze layer
        is traced.
    """

    target: float
    oracle: float
    rules: dict[str, Spread]
    hindsight: float
    hindsight_one_layer_late: float
    schedule_oracle: float | None = None
    schedule_hindsight: float | None = None

    @property
    def bound(self) -> float:
        """What the strongest oracle spends: that of schedules where they are traced."""
        return self.oracle if self.schedule_oracle is None else self.schedule_oracle

    def over_oracle(self, rule: str) -> float:
        """How many times the strongest oracle's compute a rule needs."""
        return self.rules[rule].mean / self.bound

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, ratios included."""
        ratios = {rule: self.over_oracle(rule) for rule in self.rules}
        return {**{name: plain(value) for name, value in vars(self).items()}, "over_oracle": ratios}


@dataclass(frozen=True)
class BudgetComparison:
    """Outcome of `compare_at_budgets`.

    Attributes
    ----------
    num_samples, num_images : what rules were judged on.
    ours : name of the rule that is compared with the others.
    rows : one per budget.
    verdicts : by baseline.
    compute_at_same_answer : what is spent at equal fidelity.
    curves : of every rule, one per seed, as tuned for the last budget.
    """

    num_samples: int
    num_images: int
    ours: str
    rows: tuple[BudgetRow, ...]
    verdicts: dict[str, Verdict]
    compute_at_same_answer: ComputeAtTarget
    curves: dict[str, tuple[Curve, ...]]

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the rules that ours is compared with."""
        return tuple(self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: plain(value) for name, value in vars(self).items()}


def compare_at_budgets(
    test: TracedScenes,
    ours: Rule,
    baselines: Sequence[Rule],
    oracle: OperatingPoints,
    budgets: Sequence[float],
    *,
    schedule_oracle: OperatingPoints | None = None,
    num_draws: int = 2000,
    seed: int = 0,
) -> BudgetComparison:
    """Risk and same answer of every rule at every budget, ours minus each baseline with intervals.

    Every rule spends the budget exactly on the test samples (a mixture of two of its settings, which were
    chosen on other data); where it cannot spend as little, its cheapest setting stands.

    Parameters
    ----------
    test : what rules are judged on.
    ours : the rule that is compared.
    baselines : what it is compared with.
    oracle : the bound of exits.
    schedule_oracle : that of schedules, where the traces hold freeze layers.
    budgets : shares of the full model's visual compute, ascending.
    num_draws, seed : of the paired bootstrap.
    """
    bounds = [Rule.of(one.name, one) for one in (oracle, schedule_oracle) if one is not None]
    rules = [ours, *baselines, *bounds]
    rows = tuple(_row(test, ours, baselines, rules, budget, num_draws, seed) for budget in budgets)
    return BudgetComparison(
        num_samples=len(test.trace),
        num_images=len(set(test.image_ids)),
        ours=ours.name,
        rows=rows,
        verdicts={one.name: verdict([row.risk_minus[one.name] for row in rows]) for one in baselines},
        compute_at_same_answer=_compute_needed(test, [ours, *baselines], bounds, budgets[-1]),
        curves={
            rule.name: tuple(_curve(points(budgets[-1]), test) for points in rule.seeds) for rule in rules
        },
    )


def _row(
    test: TracedScenes,
    ours: Rule,
    baselines: Sequence[Rule],
    rules: Sequence[Rule],
    budget: float,
    num_draws: int,
    seed: int,
) -> BudgetRow:
    risk, same = (
        {rule.name: rule.values_RB(Labels.of(test.trace, metric), budget) for rule in rules}
        for metric in ("risk", "same_answer")
    )

    def minus(values: dict[str, Tensor]) -> dict[str, PairedDifference]:
        means = {name: values_RB.mean(0) for name, values_RB in values.items()}
        draws = {"num_draws": num_draws, "seed": seed}
        return {
            one.name: paired_bootstrap(means[ours.name], means[one.name], test.image_ids, **draws)
            for one in baselines
        }

    return BudgetRow(
        budget=budget,
        risk={name: Spread.of(values_RB.mean(1).tolist()) for name, values_RB in risk.items()},
        same_answer={name: Spread.of(values_RB.mean(1).tolist()) for name, values_RB in same.items()},
        risk_minus=minus(risk),
        same_answer_minus=minus(same),
    )


def verdict(differences: Sequence[PairedDifference]) -> Verdict:
    """Never worse beyond the margin? At how many budgets strictly better?"""
    return Verdict(
        worst_upper_bound=max(found.high for found in differences),
        never_worse=all(found.high <= MARGIN for found in differences),
        strictly_better=sum(found.high < 0 for found in differences),
        budgets=len(differences),
    )


def _compute_needed(
    test: TracedScenes, rules: Sequence[Rule], bounds: Sequence[Rule], budget: float
) -> ComputeAtTarget:
    same = Labels.of(test.trace, "same_answer")

    def needed(points: OperatingPoints) -> float:
        return compute_to_reach(points.compute_S, points.means_S(same), TARGET)

    bound = [needed(one.seeds[0](budget)) for one in bounds]
    safe_B = first_safe_layer(test.trace.same_answer)

    def leaving(late: int) -> float:
        exits_B = (safe_B + late).clamp(max=test.num_layers)
        return visual_compute(exits_B, test.trace.num_visual, test.num_layers)

    return ComputeAtTarget(
        target=TARGET,
        oracle=bound[0],
        rules={
            rule.name: Spread.of(
                [needed(points(TARGET)) for points in rule.for_target]
                if rule.for_target is not None
                else [needed(points(budget)) for points in rule.seeds]
            )
            for rule in rules
        },
        hindsight=leaving(0),
        hindsight_one_layer_late=leaving(1),
        schedule_oracle=bound[1] if len(bound) > 1 else None,
        schedule_hindsight=_in_hindsight(test, same),
    )


def _in_hindsight(test: TracedScenes, same_answer: Labels) -> float | None:
    """Visual compute of the cheapest schedules that are right, and stay right for all later ones."""
    if test.trace.grid is None:
        return None
    share, visual_B = test.trace.grid.kv_share, test.trace.num_visual.double()
    safe = first_safe_schedule(same_answer, share)
    layers = (safe.freeze_layers_B.double(), safe.exit_layers_B.double())
    spent_B = schedule_compute(*layers, test.num_layers, share)
    return float((spent_B * visual_B).sum() / visual_B.sum())


def _curve(points: OperatingPoints, test: TracedScenes) -> Curve:
    return Curve.on_trace(dict.fromkeys(("risk", "same_answer"), points), test.trace)
