"""Pictures of a run, for the trackers and the output folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    ImportError
        If matplotlib is not installed.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.bar(range(len(rate)), rate, color="tab:blue")
    axes.set_xlabel(f"exit layer ({len(rate) - 1}: never)")
    axes.set_ylabel("share of samples")
    axes.set_title(title)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
