"""The plot of a comparison: what each rule keeps over the visual compute it spends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dyvte.calibration.operating_points import lower_hull
from dyvte.comparison.compare import Comparison
from dyvte.comparison.records import Curve, RuleCurves
from dyvte.plotting import log_axis_with_zero, new_figure, plain_axes
from dyvte.reporting.states import MOST_KINDS, paint_states

RULE_COLORS = {
    "fixed": "#4d4d4d",
    "static": "#8c564b",
    "router": "#1f77b4",
    "gates": "#d62728",
    "oracle": "#2ca02c",
    "schedule_oracle": "#98df8a",
}
LABELS = {
    "fixed": "fixed K (VTW)",
    "static": "best mixture of two static schedules",
    "router": "question-only router",
    "gates": "gates",
    "oracle": "oracle of exits",
    "schedule_oracle": "oracle of schedules",
}


@dataclass(frozen=True)
class Panel:
    """One metric over visual compute.

    Attributes
    ----------
    title : above the panel.
    metric : of the curves.
    curves : of every rule.
    stars : visual compute and value of the gates at their stored thresholds.
    scale : what values are multiplied with.
    less_is_better : whether small values are good (risk).
    """

    title: str
    metric: str
    curves: RuleCurves
    stars: Sequence[tuple[float, float]]
    scale: float = 1.0
    less_is_better: bool = False


def panels_of(found: Comparison) -> list[Panel]:
    """Risk and same answer on the traced samples, and the score of each benchmark that was swept."""
    seeds = found.traces.seeds.values()

    def at_threshold(metric: str) -> list[tuple[float, float]]:
        return [(one.visual_compute, one.at_equal_compute["gates"][metric]) for one in seeds]

    panels = [
        Panel(
            "risk: KL(full || exit), nats",
            "risk",
            found.traces.curves,
            at_threshold("risk"),
            less_is_better=True,
        ),
        Panel(
            "same answer as the full model, %",
            "same_answer",
            found.traces.curves,
            at_threshold("same_answer"),
            scale=100.0,
        ),
    ]
    for one in found.benchmarks.values():
        if one.curves is not None:
            names = [f"gates-{seed}" for seed in found.gates]
            stars = [(one.runs[name].cost.visual_compute, one.values[name]) for name in names]
            panels.append(Panel(f"{one.title}: {one.score_name}", "score", one.curves.rules, stars))
    return panels


def plot_comparison(found: Comparison, folder: Path, name: str = "comparison") -> list[Path]:
    """Draw all panels side by side; png and svg.

    Parameters
    ----------
    found
        What is drawn.
    folder
        Of the files.
    name
        Of the files, without ending.

    Raises
    ------
    ConfigError
        matplotlib is not installed.
    """
    panels = panels_of(found)
    figure = new_figure(5.2 * len(panels), 4.4)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        _paint(axes, panel)
    figure.axes[1].legend(frameon=False, fontsize=9, loc="lower right")
    paths = [Path(folder) / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def plot_schedules(found: Comparison, path: Path) -> None:
    """For each benchmark a bar per question type: layers that update visual tokens, read them, or lack them.

    Nothing is drawn where the gates decide exits alone.

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
    shown = [one for one in found.benchmarks.values() if one.kinds]
    if not shown:
        return
    rows = max(min(len(one.kinds), MOST_KINDS) for one in shown)
    figure = new_figure(5.6 * len(shown), 1.4 + 0.26 * rows)
    for axes, one in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        paint_states(axes, one.kinds, found.traces.num_layers)
        axes.set_title(f"{one.title}, gates", fontsize=10)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    figure.savefig(path, dpi=130)


def _paint(axes: Any, panel: Panel) -> None:
    fixed = panel.curves.fixed
    compute, values = _columns(fixed, panel)
    axes.plot(compute, values, "o", color=RULE_COLORS["fixed"], ms=4, label=LABELS["fixed"])
    corners = lower_hull(compute, values if panel.less_is_better else -values)
    style = {"color": RULE_COLORS["fixed"], "lw": 1.2, "label": "best mixture of two K"}
    _line(axes, compute[corners], values[corners], **style)
    for k, x, y in zip(fixed.settings, compute, values):
        axes.annotate(
            f"{k:.0f}", (x, y), textcoords="offset points", xytext=(3, 5), fontsize=7, color="#777777"
        )
    _band(axes, panel.curves.router, panel, "router")
    _band(axes, panel.curves.gates, panel, "gates")
    if panel.curves.static is not None:
        compute, values = _columns(panel.curves.static, panel)
        style = {"color": RULE_COLORS["static"], "lw": 1.2, "label": LABELS["static"]}
        corners = lower_hull(compute, values if panel.less_is_better else -values)
        _line(axes, compute[corners], values[corners], **style)
    for rule in ("oracle", "schedule_oracle"):
        if (curve := getattr(panel.curves, rule)) is not None:
            style = {"color": RULE_COLORS[rule], "ls": "--", "lw": 1.2, "label": LABELS[rule]}
            _line(axes, *_columns(curve, panel), **style)
    for x, y in panel.stars:
        axes.plot(
            100 * x, panel.scale * y, "*", color=RULE_COLORS["gates"], ms=9, mec="white", mew=0.6, zorder=5
        )
    axes.set_xlabel("visual compute, % of the full model")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlim(0, 102)
    plain_axes(axes)
    if panel.less_is_better:
        log_axis_with_zero(axes, 1e-3)


def _columns(curve: Curve, panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    return 100 * np.array(curve.compute), panel.scale * np.array(curve.metrics[panel.metric])


def _line(axes: Any, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    """A line that stays straight in the data (a mixture of its ends) whatever the scale of the axis."""
    grid = np.unique(np.concatenate([np.linspace(x[0], x[-1], 300), x]))
    axes.plot(grid, np.interp(grid, x, y), **style)


def _band(axes: Any, seeds: Mapping[str, Curve], panel: Panel, rule: str) -> None:
    """Mean over seeds, with the range between the least and the most as a band."""
    low = max(min(curve.compute) for curve in seeds.values())
    grid = np.linspace(low, 1.0, 200)
    columns = [_columns(curve, panel) for curve in seeds.values()]
    values = np.array([np.interp(100 * grid, compute, found) for compute, found in columns])
    axes.plot(100 * grid, values.mean(0), color=RULE_COLORS[rule], lw=1.8, label=LABELS[rule])
    if len(values) > 1:
        axes.fill_between(100 * grid, values.min(0), values.max(0), color=RULE_COLORS[rule], alpha=0.18, lw=0)
