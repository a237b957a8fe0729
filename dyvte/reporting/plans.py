"""Tables and plots of plans: what a search found, and plans beside single methods on held-out samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dyvte.comparison.plan_compare import CHOSEN, SINGLE_METHODS, PlanComparison
from dyvte.comparison.plan_search import PLANS_FILE, PlanSearch
from dyvte.comparison.plans import JudgedPlan, choose, front
from dyvte.files import write_atomically
from dyvte.formatting import difference_text, markdown_table, percentage
from dyvte.plotting import COLORS, log_axis_with_zero, new_figure, plain_axes

_GREY = "#999999"


def write_search(found: PlanSearch, folder: Path) -> None:
    """Write plans.json, plans.md and plans.png.

    Parameters
    ----------
    found
        What is written.
    folder
        Where it goes.

    Raises
    ------
    ConfigError
        matplotlib is not installed.
    """
    write_atomically(folder / PLANS_FILE, json.dumps(found.to_dict(), indent=2) + "\n")
    write_atomically(folder / "plans.md", search_table(found) + "\n")
    plot_search(found, folder / "plans.png")


def search_table(found: PlanSearch) -> str:
    """Markdown: the choice for each budget beside the best single method."""
    rows = []
    for budget, best in found.chosen.items():
        single = choose([one for one in found.judged if one.plan.kind != "combined"], budget)
        for label, one in (("chosen", best), ("best single method", single)):
            rows.append([f"{budget:.0%}", label, *_cells(one)])
    head = ["budget", "", "policy", "reduction", "visual compute", "risk (nats)", "same answer"]
    return markdown_table(head, rows)


def _cells(one: JudgedPlan | None) -> list[str]:
    if one is None:
        return ["none is cheap enough", "", "", "", ""]
    same = percentage(float(one.same_answer_B.mean()))
    return [one.plan.policy, one.plan.reduction, percentage(one.compute), f"{one.risk:.4f}", same]


def plot_search(found: PlanSearch, path: Path) -> None:
    """Risk over visual compute: every plan, the front, and the front of single methods.

    Parameters
    ----------
    found
        What is drawn.
    path
        Its ending says the format.
    """
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    singles = [one for one in found.judged if one.plan.kind != "combined"]
    every = [one.compute for one in found.judged], [one.risk for one in found.judged]
    axes.scatter(*every, s=5, color="#bbbbbb", label="all plans")
    for name, plans, color in (("single methods", singles, COLORS[2]), ("all", found.judged, COLORS[0])):
        best = front(plans)
        axes.step([p.compute for p in best], [p.risk for p in best], where="post", color=color, lw=1.4)
        axes.plot([], [], color=color, label=f"front, {name}")
    log_axis_with_zero(axes, 1e-3)
    axes.set_xlabel("visual compute, share of the full model's")
    axes.set_ylabel("risk, nats")
    _finish(axes, found.budgets, f"{len(found.judged)} plans on {found.num_samples} calibration samples")
    figure.savefig(path, dpi=150)


def _finish(axes: Any, budgets: Sequence[float], title: str) -> None:
    for budget in budgets:
        axes.axvline(budget, color=_GREY, lw=0.6, ls=":")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    plain_axes(axes)


def plan_table(found: PlanComparison) -> str:
    """Markdown: every method at every budget, and the chosen plan's risk less the method's."""
    rows = []
    for budget in found.budgets:
        for method in [*(one for one in SINGLE_METHODS if one in found.curves), CHOSEN]:
            one = found.at(budget, method)
            if one is None:
                rows.append([f"{budget:.0%}", method, "out of reach", "", "", ""])
                continue
            gap = found.differences.get((budget, method))
            metrics = [f"{one.risk:.4f}", percentage(one.same_answer), percentage(one.compute)]
            rows.append([f"{budget:.0%}", method, *metrics, "" if gap is None else difference_text(gap, 4)])
    head = ["budget", "method", "risk (nats)", "same answer", "compute, held out", f"{CHOSEN} less it"]
    return markdown_table(head, rows)


def plan_markdown(found: PlanComparison) -> str:
    """The comparison of plans as text: counts, the table, the verdicts."""
    verdicts = ", ".join(f"{budget:.0%}: {found.verdict(budget)}" for budget in found.budgets)
    return "\n\n".join(
        [
            f"Plans chosen on {found.num_calibration} samples, judged on {found.num_test} about "
            f"{found.num_images} images; {found.num_seeds} seed{'s' if found.num_seeds > 1 else ''} of the "
            "gates. Every method may mix two of its plans; differences have 95 % intervals over images.",
            plan_table(found),
            f"Any combination against the best single method: {verdicts}.",
        ]
    )


def plot_plans(found: PlanComparison, path: Path) -> None:
    """Held-out risk over visual compute, one curve for each method.

    Parameters
    ----------
    found
        What is drawn.
    path
        Its ending says the format.
    """
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    for method, points in found.curves.items():
        strong = method == CHOSEN
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, label=method, lw=2.2 if strong else 1.2, color=COLORS[0] if strong else None)
    log_axis_with_zero(axes, 1e-2)
    axes.set_xlabel("visual compute on held-out samples, share of the full model's")
    axes.set_ylabel("risk on held-out samples, nats")
    title = f"{found.num_test} held-out samples about {found.num_images} images, {found.num_seeds} seeds"
    _finish(axes, found.budgets, title)
    figure.savefig(path, dpi=150)
