"""Plots without a display and without matplotlib's global state; their colours and axes, everywhere alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dyvte.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#d62728", "#4d4d4d", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b")
"""The first is that of what is shown (the gates), the second that of the full model and fixed layers."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, ready to be saved.

    Parameters
    ----------
    width, height
        In inches.

    Raises
    ------
    ConfigError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: install dyvte[eval]") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Any) -> None:
    """A light grid, no frame above and on the right."""
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def log_axis_with_zero(axes: Any, smallest: float) -> None:
    """Let the y axis be logarithmic above a value, and linear from 0 to it: a risk is often exactly 0.

    Parameters
    ----------
    axes
        Of matplotlib.
    smallest
        The value, in the axis's unit.
    """
    axes.set_yscale("symlog", linthresh=smallest)
    axes.set_ylim(bottom=0)
