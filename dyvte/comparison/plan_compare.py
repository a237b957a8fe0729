"""Plans chosen on calibration samples against each single method, on held-out samples.

Every method may mix two of its plans, so that all spend the budget exactly; what it mixes lies on the lower
convex hull of its plans on the calibration samples.

Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration.operating_points import lower_hull, mixture_at
from dyvte.comparison.bootstrap import PairedDifference, paired_bootstrap
from dyvte.comparison.plans import JudgedPlan, Plan, PlanJudge, front
from dyvte.errors import CalibrationError
from dyvte.formatting import markdown_table

CHOSEN = "any combination"
# Which plans a method may use; the full model belongs to all.
SINGLE_METHODS = {
    "fixed K": {"never", "fixed"},
    "gates": {"never", "gates"},
    "FastV": {"never", "FastV"},
    "YOPO": {"never", "YOPO"},
}


@dataclass(frozen=True)
class Mix:
    """Draw `upper` with probability `weight`, else `lower`."""

    lower: JudgedPlan
    upper: JudgedPlan
    weight: float

    def judged(self, judge: Callable[[Plan], JudgedPlan]) -> JudgedPlan:
        """Expected figures on the samples of a judge; the plan named is the one drawn more often."""
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


def hull(judged: Sequence[JudgedPlan]) -> list[JudgedPlan]:
    """Corners of the lower convex hull of (compute, risk), from the cheapest to the one of least risk."""
    best = front(judged)
    return [best[index] for index in lower_hull([p.compute for p in best], [p.risk for p in best])]


def mix_for(judged: Sequence[JudgedPlan], budget: float) -> Mix | None:
    """The mixture of least risk that spends the budget; None where no plan is cheap enough."""
    corners = hull(judged)
    if not corners or corners[0].compute > budget + 1e-9:
        return None
    at = mixture_at([corner.compute for corner in corners], budget)
    return Mix(corners[at.lower], corners[at.upper], at.weight)


@dataclass(frozen=True)
class MethodAt:
    """A method at a budget: figures on held-out samples, mean over the gates' seeds."""

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


@dataclass(frozen=True)
class PlanComparison:
    """All methods at all budgets, and how far the chosen plan is from each of them.

    `methods` lacks those that no budget's plan of theirs is cheap enough for. A difference is the chosen
    plan's risk less the method's.
    """

    methods: tuple[MethodAt, ...]
    differences: dict[tuple[float, str], PairedDifference]
    budgets: tuple[float, ...]
    curves: dict[str, list[tuple[float, float]]]

    def at(self, budget: float, method: str) -> MethodAt | None:
        """One entry."""
        found = [one for one in self.methods if (one.budget, one.method) == (budget, method)]
        return found[0] if found else None

    def verdict(self, budget: float) -> str:
        """ "better" or "worse" than the single method that is best held out; "equal" if that is not clear."""
        mine = [d for (at, _), d in self.differences.items() if at == budget]
        if not mine:
            return "alone" if self.at(budget, CHOSEN) else "not reached"
        closest = min(mine, key=lambda d: d.mean_b)
        return "better" if closest.high < 0 else "worse" if closest.low > 0 else "equal"

    def table(self) -> str:
        """Markdown."""
        rows = []
        for budget in self.budgets:
            for method in (*SINGLE_METHODS, CHOSEN):
                one = self.at(budget, method)
                if one is None:
                    rows.append([f"{budget:.0%}", method, "out of reach", "", "", ""])
                    continue
                gap = self.differences.get((budget, method))
                text = "" if gap is None else f"{gap.difference:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"
                figures = [f"{one.risk:.4f}", f"{one.same_answer:.1%}", f"{one.compute:.1%}", text]
                rows.append([f"{budget:.0%}", method, *figures])
        head = [
            "budget",
            "method",
            "risk (nats)",
            "same answer",
            "compute, held out",
            "any combination less it",
        ]
        return markdown_table(head, rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "methods": [
                {
                    "budget": one.budget,
                    "method": one.method,
                    "risk": one.risk,
                    "same_answer": one.same_answer,
                    "visual_compute": one.compute,
                    "plans": list(one.plans),
                }
                for one in self.methods
            ],
            "differences": [
                {"budget": budget, "method": method, **gap.to_dict()}
                for (budget, method), gap in self.differences.items()
            ],
            "verdicts": {f"{budget:g}": self.verdict(budget) for budget in self.budgets},
            "curves": {name: [list(point) for point in points] for name, points in self.curves.items()},
        }


def compare_plans(
    calibration: Sequence[Sequence[PlanJudge]],
    test: Sequence[Sequence[PlanJudge]],
    budgets: Sequence[float],
    image_ids: Sequence[str],
    *,
    draws: int = 2000,
) -> PlanComparison:
    """Choose on calibration samples, judge on test samples.

    Parameters
    ----------
    calibration, test
        For each seed of the gates: a judge for every combination of reductions.
    image_ids
        The image of each test sample.

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
    grid = sorted({*budgets, *np.linspace(0.06, 0.9, 43).round(4).tolist()})
    found: dict[tuple[float, str], MethodAt] = {}
    for method, kinds in {**SINGLE_METHODS, CHOSEN: None}.items():
        allowed = [[p for p in plans if kinds is None or p.plan.kind in kinds] for plans in chosen]
        for budget in grid:
            mixes = [mix_for(plans, budget) for plans in allowed]
            if all(mix is not None for mix in mixes):
                found[budget, method] = _judged(budget, method, mixes, on_test)
    differences = {
        (budget, method): paired_bootstrap(
            found[budget, CHOSEN].risk_B, found[budget, method].risk_B, image_ids, num_draws=draws
        )
        for budget in budgets
        for method in SINGLE_METHODS
        if (budget, method) in found
    }
    curves: dict[str, list[tuple[float, float]]] = {}
    for (_, method), one in found.items():
        curves.setdefault(method, []).append((one.compute, one.risk))
    at_budgets = tuple(one for (budget, _), one in found.items() if budget in budgets)
    return PlanComparison(at_budgets, differences, tuple(budgets), curves)


def _lookup(judges: Sequence[PlanJudge]) -> dict[str, PlanJudge]:
    return {judge.text: judge for judge in judges}


def _judged(
    budget: float, method: str, mixes: Sequence[Mix], on_test: Sequence[dict[str, PlanJudge]]
) -> MethodAt:
    got = [
        mix.judged(lambda plan, known=known: known[plan.reduction].judge(plan))
        for mix, known in zip(mixes, on_test, strict=True)
    ]
    return MethodAt(
        budget,
        method,
        float(np.mean([one.compute for one in got])),
        torch.stack([one.risk_B for one in got]).mean(0),
        float(torch.stack([one.same_answer_B for one in got]).mean()),
        tuple(dict.fromkeys(map(str, mixes))),
    )


def plot_comparison(found: PlanComparison, path: Any, title: str) -> None:
    """Held-out risk over visual compute, one curve for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method, points in found.curves.items():
        strong = method == CHOSEN
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, label=method, lw=2.2 if strong else 1.2, color="#d62728" if strong else None)
    for budget in found.budgets:
        axes.axvline(budget, color="#999999", lw=0.6, ls=":")
    axes.set_yscale("symlog", linthresh=1e-2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("visual compute on held-out samples, share of the full model's")
    axes.set_ylabel("risk on held-out samples, nats")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
