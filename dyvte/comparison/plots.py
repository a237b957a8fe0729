"""The plot of a comparison: what each rule keeps over the visual compute it spends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dyvte.calibration.operating_points import lower_hull
from dyvte.plotting import new_figure

COLORS = {"fixed": "#4d4d4d", "router": "#1f77b4", "gates": "#d62728", "oracle": "#2ca02c"}
LABELS = {
    "fixed": "fixed K (VTW)",
    "router": "question-only router",
    "gates": "DyVTE gates",
    "oracle": "oracle",
}
PANELS = {"risk": "risk: KL(full || exit), nats", "same_answer": "same answer as the full model, %"}


def comparison_plot(result: dict[str, Any], folder: Path, name: str = "comparison") -> list[Path]:
    """Draw risk and same answer on traced scenes, and benchmark accuracy, over visual compute; png and svg.

    Raises
    ------
    ConfigError
        matplotlib is not installed.
    """
    panels = [(title, metric, result["traces"]["curves"]) for metric, title in PANELS.items()]
    for benchmark, found in result["benchmarks"].items():
        if "curves" in found:
            panels.append((f"mini-{benchmark.upper()} accuracy, %", "accuracy", found["curves"]))
    figure = new_figure(5.2 * len(panels), 4.4)
    for axes, (title, metric, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        _panel(axes, curves, metric, title)
    _operating_points(figure.axes, result)
    figure.axes[0].legend(frameon=False, fontsize=9)
    paths = [Path(folder) / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _panel(axes: Any, curves: dict[str, Any], metric: str, title: str) -> None:
    scale = 100.0 if metric == "same_answer" else 1.0
    fixed = curves["fixed"]
    compute, values = 100 * np.array(fixed["compute"]), scale * np.array(fixed[metric])
    axes.plot(compute, values, "o", color=COLORS["fixed"], ms=4, label=LABELS["fixed"])
    corners = lower_hull(compute, values if metric == "risk" else -values)
    _line(
        axes, compute[corners], values[corners], color=COLORS["fixed"], lw=1.2, label="best mixture of two K"
    )
    for k, x, y in zip(fixed["setting"], compute, values):
        axes.annotate(
            f"{k:.0f}", (x, y), textcoords="offset points", xytext=(3, 5), fontsize=7, color="#777777"
        )
    for rule in ("router", "gates"):
        _seed_band(axes, curves[rule], metric, scale, rule)
    oracle = curves["oracle"]
    oracle_compute, oracle_values = 100 * np.array(oracle["compute"]), scale * np.array(oracle[metric])
    _line(
        axes, oracle_compute, oracle_values, color=COLORS["oracle"], ls="--", lw=1.2, label=LABELS["oracle"]
    )
    axes.set_xlabel("visual compute, % of the full model")
    axes.set_title(title, fontsize=10)
    axes.set_xlim(0, 102)
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if metric == "risk":
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(bottom=0)


def _line(axes: Any, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    """A line that stays straight in the data (a mixture of its ends) whatever the scale of the axis."""
    grid = np.unique(np.concatenate([np.linspace(x[0], x[-1], 300), x]))
    axes.plot(grid, np.interp(grid, x, y), **style)


def _seed_band(axes: Any, seeds: dict[str, Any], metric: str, scale: float, rule: str) -> None:
    """Mean over seeds, with the range between the least and the most as a band."""
    low = max(min(curve["compute"]) for curve in seeds.values())
    grid = np.linspace(low, 1.0, 200)
    values = scale * np.array([np.interp(grid, c["compute"], c[metric]) for c in seeds.values()])
    axes.plot(100 * grid, values.mean(0), color=COLORS[rule], lw=1.8, label=LABELS[rule])
    if len(values) > 1:
        axes.fill_between(100 * grid, values.min(0), values.max(0), color=COLORS[rule], alpha=0.18, lw=0)


def _operating_points(axes: Any, result: dict[str, Any]) -> None:
    """Mark where the gates' stored thresholds lie."""
    for name, one in result["traces"]["seeds"].items():
        for panel, (metric, scale) in zip(axes, (("risk", 1.0), ("same_answer", 100.0))):
            _star(panel, one["visual_compute"], scale * one["at_equal_compute"]["gates"][metric])
        if len(axes) > 2:
            run = result["benchmarks"]["gqa"]["runs"][f"gates-{name}"]
            _star(axes[2], run["visual_compute"], run["scores"]["accuracy"])


def _star(axes: Any, compute: float, value: float) -> None:
    axes.plot(100 * compute, value, "*", color=COLORS["gates"], ms=9, mec="white", mew=0.6, zorder=5)
