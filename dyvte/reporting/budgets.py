"""Tables and plot of rules at given shares of visual compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dyvte.comparison.budgets import MARGIN, BudgetComparison
from dyvte.comparison.records import Curve
from dyvte.formatting import difference_text, markdown_table, spread_text
from dyvte.plotting import COLORS, log_axis_with_zero, new_figure, plain_axes

_BOUND_COLORS = {"oracle": "#2ca02c", "schedule oracle": "#98df8a"}
_RULE_COLORS = [c for c in (*COLORS, "#e377c2", "#bcbd22") if c not in _BOUND_COLORS.values()]
_PANELS = {"risk": "risk: KL(full || exit), nats", "same_answer": "same answer as the full model, %"}


def budget_markdown(found: BudgetComparison) -> str:
    """The comparison as tables: risk, same answer, differences, verdicts, and compute at equal fidelity."""
    names, ours = list(found.rows[0].risk), found.ours
    head = ["visual compute", *names]
    risk = [[_share(row.budget), *(spread_text(row.risk[name], 4) for name in names)] for row in found.rows]
    same = [
        [_share(row.budget), *(spread_text(row.same_answer[name], scale=100.0) for name in names)]
        for row in found.rows
    ]
    minus = [
        [_share(row.budget), *(difference_text(row.risk_minus[name], 4) for name in found.baselines)]
        for row in found.rows
    ]
    same_minus = [
        [
            _share(row.budget),
            *(difference_text(row.same_answer_minus[name], scale=100.0) for name in found.baselines),
        ]
        for row in found.rows
    ]
    needed = found.compute_at_same_answer
    return "\n\n".join(
        [
            "Risk, nats (mean over seeds ± deviation):",
            markdown_table(head, risk),
            "Same answer, %:",
            markdown_table(head, same),
            f"Risk of {ours} minus the baseline's, nats, with 95 % intervals over images:",
            markdown_table(["visual compute", *found.baselines], minus),
            f"Same answer of {ours} minus the baseline's, points, with 95 % intervals over images:",
            markdown_table(["visual compute", *found.baselines], same_minus),
            "Verdicts, by risk:",
            _verdict_table(found),
            f"Visual compute at which {needed.target:.0%} of the answers stay the same:",
            _needed_table(found),
            "In hindsight, leaving at the first layer from which all exits give the full model's answer "
            f"spends {needed.hindsight:.1%} and keeps every answer; leaving one layer after it "
            f"{needed.hindsight_one_layer_late:.1%}." + _schedules_in_hindsight(found),
        ]
    )


def _schedules_in_hindsight(found: BudgetComparison) -> str:
    spent = found.compute_at_same_answer.schedule_hindsight
    if spent is None:
        return ""
    return (
        " The cheapest freeze and exit from which on all later ones give the full model's answer spend "
        f"{spent:.1%}."
    )


def _share(budget: float) -> str:
    return f"{budget:.1%}"


def _verdict_table(found: BudgetComparison) -> str:
    rows = [
        [
            name,
            f"{one.worst_upper_bound:+.4f}",
            "yes" if one.never_worse else "no",
            f"{one.strictly_better} of {one.budgets}",
        ]
        for name, one in found.verdicts.items()
    ]
    head = ["baseline", "worst upper bound", f"never worse (bound <= {MARGIN})", "strictly better"]
    return markdown_table(head, rows)


def _needed_table(found: BudgetComparison) -> str:
    needed = found.compute_at_same_answer
    rows = [["oracle", f"{needed.oracle:.1%}", f"{needed.oracle / needed.bound:.2f}"]]
    if needed.schedule_oracle is not None:
        rows.insert(0, ["schedule oracle", f"{needed.schedule_oracle:.1%}", "1.00"])
    rows += [
        [name, f"{spread_text(spread, 1, scale=100.0)} %", f"{needed.over_oracle(name):.2f}"]
        for name, spread in needed.rules.items()
    ]
    return markdown_table(["rule", "visual compute", f"over {rows[0][0]}"], rows)


def plot_budgets(found: BudgetComparison, path: Path) -> None:
    """Draw the curves, means over seeds with the range between the least and the most; png, svg or pdf.

    Parameters
    ----------
    found
        What is drawn.
    path
        Its ending says the format.

    Raises
    ------
    ConfigError
        matplotlib is not installed.
    """
    figure = new_figure(11.5, 4.8)
    for axes, (metric, title) in zip(figure.subplots(1, 2), _PANELS.items()):
        colors = iter(_RULE_COLORS * len(found.curves))
        for name, seeds in found.curves.items():
            is_bound = name in _BOUND_COLORS
            color = _BOUND_COLORS[name] if is_bound else next(colors)
            _band(axes, seeds, metric, name, color, dashed=is_bound)
        for row in found.rows:
            axes.axvline(100 * row.budget, color="#dddddd", lw=0.6, zorder=0)
        axes.set_xlabel("visual compute, % of the full model")
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0 if "schedule oracle" in found.curves else 8, 101)
        plain_axes(axes)
        if metric == "risk":
            log_axis_with_zero(axes, 1e-3)
        else:
            axes.set_ylim(40, 100.5)
            axes.axhline(99, color="#999999", lw=0.6, ls=":")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _band(axes: Any, seeds: Sequence[Curve], metric: str, name: str, color: str, *, dashed: bool) -> None:
    scale = 100.0 if metric == "same_answer" else 1.0
    grid = np.linspace(max(min(curve.compute) for curve in seeds), 1.0, 300)
    values = scale * np.array([np.interp(grid, one.compute, one.metrics[metric]) for one in seeds])
    axes.plot(100 * grid, values.mean(0), color=color, lw=1.6, ls="--" if dashed else "-", label=name)
    if len(values) > 1:
        axes.fill_between(100 * grid, values.min(0), values.max(0), color=color, alpha=0.18, lw=0)
