"""Bars of what a rule does with visual tokens: layers that update them, read them, or lack them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dyvte.comparison.runs import KindLayers

STATE_COLORS = {"updated": "#d62728", "read": "#f4a6a0", "gone": "#eeeeee"}
MOST_KINDS = 24


def paint_states(axes: Any, kinds: Mapping[str, KindLayers], num_layers: int) -> None:
    """Bars of updated, read and gone layers, the most frequent question type on top.

    Parameters
    ----------
    axes
        Of matplotlib.
    kinds
        Mean layers of each question type.
    num_layers
        L.
    """
    chosen = dict(list(kinds.items())[:MOST_KINDS])
    ends = {
        "updated": [one.updated for one in chosen.values()],
        "read": [one.read for one in chosen.values()],
        "gone": [float(num_layers)] * len(chosen),
    }
    left = np.zeros(len(chosen))
    for state, values in ends.items():
        axes.barh(list(chosen), np.array(values) - left, left=left, color=STATE_COLORS[state], label=state)
        left = np.array(values)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlim(0, num_layers)
    axes.set_xlabel("decoder layers, mean")
    axes.spines[["top", "right"]].set_visible(False)
