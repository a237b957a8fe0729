"""Plots of a run, for the trackers and the output folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dyvte.plotting import new_figure

if TYPE_CHECKING:
    import numpy as np


def exit_histogram(rate: Sequence[float], title: str = "") -> np.ndarray:
    """Where samples leave, as bars.

    Parameters
    ----------
    rate
        L+1 shares, entry k of exit layer k.

    Returns
    -------
    (H, W, 3) uint8 pixels.

    Raises
    ------
    ConfigError
        If matplotlib is not installed.
    """
    import numpy as np

    figure = new_figure(6, 3)
    axes = figure.subplots()
    axes.bar(range(len(rate)), rate, color="tab:blue")
    axes.set_xlabel(f"exit layer ({len(rate) - 1}: never)")
    axes.set_ylabel("share of samples")
    axes.set_title(title)
    figure.set_dpi(100)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
