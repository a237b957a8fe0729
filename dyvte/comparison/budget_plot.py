"""The picture of a budget report: risk and same answer of every rule over visual compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dyvte.plotting import new_figure

_COLORS = ("#d62728", "#4d4d4d", "#1f77b4", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf")
_PANELS = {"risk": "risk: KL(full || exit), nats", "same_answer": "same answer as the full model, %"}


def plot_budgets(report: Mapping[str, Any], path: Path) -> None:
    """Draw the curves, means over seeds with the range between the least and the most; png, svg or pdf.

    Raises
    ------
    ConfigError
        matplotlib is not installed.
    """
    figure = new_figure(11.5, 4.8)
    for axes, (metric, title) in zip(figure.subplots(1, 2), _PANELS.items()):
        colors = iter(_COLORS)
        for name, seeds in report["curves"].items():
            is_bound = name == "oracle"
            _band(axes, seeds, metric, name, "#2ca02c" if is_bound else next(colors), dashed=is_bound)
        for row in report["rows"]:
            axes.axvline(100 * row["budget"], color="#dddddd", lw=0.6, zorder=0)
        axes.set_xlabel("visual compute, % of the full model")
        axes.set_title(title, fontsize=10)
        axes.set_xlim(8, 101)
        axes.spines[["top", "right"]].set_visible(False)
        if metric == "risk":
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_ylim(bottom=0)
        else:
            axes.set_ylim(40, 100.5)
            axes.axhline(99, color="#999999", lw=0.6, ls=":")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _band(
    axes: Any, seeds: list[dict[str, Any]], metric: str, name: str, color: str, *, dashed: bool
) -> None:
    scale = 100.0 if metric == "same_answer" else 1.0
    grid = np.linspace(max(min(curve["compute"]) for curve in seeds), 1.0, 300)
    values = scale * np.array([np.interp(grid, c["compute"], c[metric]) for c in seeds])
    axes.plot(100 * grid, values.mean(0), color=color, lw=1.6, ls="--" if dashed else "-", label=name)
    if len(values) > 1:
        axes.fill_between(100 * grid, values.min(0), values.max(0), color=color, alpha=0.18, lw=0)
