"""Plans chosen on calibration samples against each single method, on held-out samples.

Every method may mix two of its plans, so that all spend the budget exactly; what it mixes lies on the lower
convex hull of its plans on the calibration samples.

Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyvte.backbones import describe
from dyvte.calibration.operating_points import lower_hull, mixture_at
from dyvte.comparison.bootstrap import PairedDifference, paired_bootstrap
from dyvte.comparison.plan_search import judges, searched_reductions
from dyvte.comparison.plans import JudgedPlan, PlanJudge, PolicyAndReduction, front, traces_of
from dyvte.errors import CalibrationError
from dyvte.gates import GateStack
from dyvte.reductions import NO_REDUCTION
from dyvte.teacher import TraceStore

CHOSEN = "any combination"
# Which plans a method may use; the full model belongs to all.
SINGLE_METHODS = {
    "fixed K": {"never", "fixed"},
    "static schedule": {"never", "fixed", "freeze"},
    "gates": {"never", "gates"},
    "FastV": {"never", "FastV"},
    "ShortV": {"never", "ShortV"},
    "YOPO": {"never", "YOPO"},
}
_CURVE_BUDGETS = np.linspace(0.06, 0.9, 43).round(4).tolist()


@dataclass(frozen=True)
class PlanMixture:
    """Draw ``upper`` with probability ``weight``, else ``lower``."""

    lower: JudgedPlan
    upper: JudgedPlan
    weight: float

    def judged(self, judge: Callable[[PolicyAndReduction], JudgedPlan]) -> JudgedPlan:
        """Expected metrics on the samples of a judge; the plan named is the one drawn more often."""
        low, high = judge(self.lower.plan), judge(self.upper.plan)
        return JudgedPlan(
            (self.upper if self.weight > 0.5 else self.lower).plan,
            low.compute + self.weight * (high.compute - low.compute),
            torch.lerp(low.risk_B.double(), high.risk_B.double(), self.weight),
            torch.lerp(low.same_answer_B.double(), high.same_answer_B.double(), self.weight),
        )

    def __str__(self) -> str:
        if self.weight in (0.0, 1.0):
            return str((self.upper if self.weight else self.lower).plan)
        return f"{1 - self.weight:.0%} {self.lower.plan}, {self.weight:.0%} {self.upper.plan}"


def mixture_for(judged: Sequence[JudgedPlan], budget: float) -> PlanMixture | None:
    """The mixture of least risk that spends the budget; None where no plan is cheap enough.

    Parameters
    ----------
    judged
        Plans, on the samples they are chosen on.
    budget
        Share of the full model's visual compute.
    """
    best = front(judged)
    corners = [best[index] for index in lower_hull([p.compute for p in best], [p.risk for p in best])]
    if not corners or corners[0].compute > budget + 1e-9:
        return None
    at = mixture_at([corner.compute for corner in corners], budget)
    return PlanMixture(corners[at.lower], corners[at.upper], at.weight)


@dataclass(frozen=True)
class MethodAt:
    """A method at a budget, on held-out samples.

    Attributes
    ----------
    budget : share of the full model's visual compute, met on calibration samples.
    method : its name.
    compute : what it spends on the held-out samples.
    risk_B : (B,) expected risk in nats, mean over the gates' seeds.
    same_answer : mean over samples and seeds.
    plans : what was chosen, for every seed that chose something else.
    """

    budget: float
    method: str
    compute: float
    risk_B: Tensor
    same_answer: float
    plans: tuple[str, ...]

    @property
    def risk(self) -> float:
        """Mean risk in nats."""
        return float(self.risk_B.mean())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "budget": self.budget,
            "method": self.method,
            "risk": self.risk,
            "same_answer": self.same_answer,
            "visual_compute": self.compute,
            "plans": list(self.plans),
        }


@dataclass(frozen=True)
class PlanComparison:
    """All methods at all budgets, and how far the chosen plan is from each of them.

    Attributes
    ----------
    methods : without those that no plan of theirs is cheap enough for, or that were not tried.
    differences : risk of the chosen plan less a method's, by budget and method.
    budgets : shares of the full model's visual compute.
    curves : held-out (compute, risk) by method.
    num_calibration, num_test, num_images, num_seeds : samples chosen on, samples judged on, their images, and
        seeds of the gates.
    """

    methods: tuple[MethodAt, ...]
    differences: dict[tuple[float, str], PairedDifference]
    budgets: tuple[float, ...]
    curves: dict[str, list[tuple[float, float]]]
    num_calibration: int
    num_test: int
    num_images: int
    num_seeds: int

    def at(self, budget: float, method: str) -> MethodAt | None:
        """One entry.

        Parameters
        ----------
        budget
            One of the budgets.
        method
            One of the methods.
        """
        found = [one for one in self.methods if (one.budget, one.method) == (budget, method)]
        return found[0] if found else None

    def verdict(self, budget: float) -> str:
        """ "better" or "worse" than the single method that is best held out; "equal" if that is not clear."""
        mine = [d for (at, _), d in self.differences.items() if at == budget]
        if not mine:
            return "alone" if self.at(budget, CHOSEN) else "not reached"
        closest = min(mine, key=lambda d: d.mean_b)
        return "better" if closest.high < 0 else "worse" if closest.low > 0 else "equal"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        counts = ("num_calibration", "num_test", "num_images", "num_seeds")
        return {
            **{name: getattr(self, name) for name in counts},
            "methods": [one.to_dict() for one in self.methods],
            "differences": [
                {"budget": budget, "method": method, **gap.to_dict()}
                for (budget, method), gap in self.differences.items()
            ],
            "verdicts": {f"{budget:g}": self.verdict(budget) for budget in self.budgets},
            "curves": {name: [list(point) for point in points] for name, points in self.curves.items()},
        }


def shared_reductions(calibration: Path, test: Path) -> list[str]:
    """The combinations of reductions of the calibration search, all of which the test search has traced.

    Raises
    ------
    DataError
        A folder holds no finished search.
    CalibrationError
        The test search lacks a combination.
    """
    tried, there = searched_reductions(calibration), searched_reductions(test)
    if lacking := [text for text in tried if text not in there]:
        raise CalibrationError(
            f"{test} lacks traces of {lacking[0]}: search there with the combinations of {calibration}"
        )
    return tried


def compare_searches(
    model: nn.Module,
    calibration: Path,
    test: Path,
    gates: Sequence[GateStack],
    budgets: Sequence[float],
    *,
    num_draws: int = 2000,
) -> PlanComparison:
    """`compare_plans` on what two runs of ``dyvte search-plan`` traced.

    Parameters
    ----------
    model : the un-pruned backbone.
    calibration, test : folders of the two searches; the second must have traced what the first did.
    gates : of every seed.
    budgets : shares of the full model's visual compute.
    num_draws : of the paired bootstrap.

    Raises
    ------
    DataError
        A folder holds no finished search.
    CalibrationError
        The test search lacks a combination of reductions.
    """
    tried = shared_reductions(calibration, test)
    backbone = describe(model)
    image_ids = TraceStore.open(traces_of(test, NO_REDUCTION)).image_ids()
    bare = {root: list(judges(backbone, root, tried)) for root in (calibration, test)}
    return compare_plans(
        [[judge.with_gates(one) for judge in bare[calibration]] for one in gates],
        [[judge.with_gates(one) for judge in bare[test]] for one in gates],
        budgets,
        image_ids,
        num_draws=num_draws,
    )


def compare_plans(
    calibration: Sequence[Sequence[PlanJudge]],
    test: Sequence[Sequence[PlanJudge]],
    budgets: Sequence[float],
    image_ids: Sequence[str],
    *,
    num_draws: int = 2000,
) -> PlanComparison:
    """Choose on calibration samples, judge on test samples.

    Parameters
    ----------
    calibration, test
        For each seed of the gates: a judge for every combination of reductions.
    budgets
        Shares of the full model's visual compute.
    image_ids
        The image of each test sample.
    num_draws
        Of the paired bootstrap.

    Raises
    ------
    CalibrationError
        If the two do not hold the same combinations.
    """
    chosen = [
        [one for judge in judges for one in (*judge.fixed(), *judge.learned())] for judges in calibration
    ]
    on_test = [_lookup(judges) for judges in test]
    if any(plan.plan.reduction not in known for plans, known in zip(chosen, on_test) for plan in plans):
        raise CalibrationError("the test traces lack a combination of reductions that calibration has")
    tried = {one.plan.kind for plans in chosen for one in plans}
    found: dict[tuple[float, str], MethodAt] = {}
    for method, kinds in {**SINGLE_METHODS, CHOSEN: None}.items():
        if kinds is not None and kinds - tried:
            continue
        allowed = [[p for p in plans if kinds is None or p.plan.kind in kinds] for plans in chosen]
        for budget in sorted({*budgets, *_CURVE_BUDGETS}):
            mixtures = [mixture_for(plans, budget) for plans in allowed]
            if all(mixture is not None for mixture in mixtures):
                found[budget, method] = _judged(budget, method, mixtures, on_test)
    differences = {
        (budget, method): paired_bootstrap(
            found[budget, CHOSEN].risk_B, found[budget, method].risk_B, image_ids, num_draws=num_draws
        )
        for budget in budgets
        for method in SINGLE_METHODS
        if (budget, method) in found
    }
    curves: dict[str, list[tuple[float, float]]] = {}
    for (_, method), one in found.items():
        curves.setdefault(method, []).append((one.compute, one.risk))
    return PlanComparison(
        methods=tuple(one for (budget, _), one in found.items() if budget in budgets),
        differences=differences,
        budgets=tuple(budgets),
        curves=curves,
        num_calibration=len(chosen[0][0].risk_B),
        num_test=len(image_ids),
        num_images=len(set(image_ids)),
        num_seeds=len(calibration),
    )


def _lookup(judges: Sequence[PlanJudge]) -> dict[str, PlanJudge]:
    return {judge.text: judge for judge in judges}


def _judged(
    budget: float, method: str, mixtures: Sequence[PlanMixture], on_test: Sequence[dict[str, PlanJudge]]
) -> MethodAt:
    got = [
        mixture.judged(lambda plan, known=known: known[plan.reduction].judge(plan))
        for mixture, known in zip(mixtures, on_test, strict=True)
    ]
    return MethodAt(
        budget,
        method,
        float(np.mean([one.compute for one in got])),
        torch.stack([one.risk_B for one in got]).mean(0),
        float(torch.stack([one.same_answer_B for one in got]).mean()),
        tuple(dict.fromkeys(map(str, mixtures))),
    )
