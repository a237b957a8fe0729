"""The threshold that meets a budget of visual compute, of KV memory, or of both.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dyvte.calibration.path import ThresholdPath, threshold_at
from dyvte.errors import CalibrationError
from dyvte.gates import HeadLogits, Schedules

COARSE_LEVELS = 256


def threshold_for_compute(
    logits_BL: Tensor, num_visual_B: Tensor, budget: float, *, min_layer: int = 1
) -> float:
    """Largest threshold of gates without freeze head whose mean visual compute is at most ``budget``.

    See `threshold_for_budget`, for gates of either kind.

    Parameters
    ----------
    logits_BL
        Of the gates.
    num_visual_B
        (B,) visual tokens.
    budget
        Share of the full model's visual compute.
    min_layer
        First layer that may be an exit.
    """
    return threshold_for_budget(ThresholdPath(logits_BL, num_visual_B, min_layer), budget)


def threshold_for_budget(
    path: ThresholdPath, budget: float | None = None, memory_budget: float | None = None
) -> float:
    """Largest exit threshold along the path whose mean costs on its samples are within the budgets.

    Costs are step functions of the threshold that change at the samples' logits only; the answer lies midway
    between two of them, so that rounding in another batch or dtype changes no decision. With one head they
    rise with it. With two they may not everywhere (a row that freezes later may be read for a shorter time):
    the first level, from never down, at which they are met on a grid of the logits' quantiles is then refined
    by bisection between its neighbours.

    Parameters
    ----------
    path:
        Gates' decisions on the calibration samples.
    budget:
        Share of the full model's visual compute, in (0, 1]; None or 1: no bound.
    memory_budget:
        Share of the bytes that its visual tokens' keys and values take; None or 1: no bound.

    Returns
    -------
    float
        1 (never) without any bound.

    Raises
    ------
    CalibrationError
        If even the earliest decisions exceed a budget, or a logit is not finite.
    """
    for name, value in (("budget", budget), ("memory_budget", memory_budget)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, found {value}")
    cuts = _midpoints(path.levels())
    bounds = [math.inf if bound is None or bound >= 1 else bound for bound in (budget, memory_budget)]
    if bounds == [math.inf, math.inf]:
        return 1.0

    def meets(cut: int) -> bool:
        spent = path.spent(float(cuts[cut]))
        return all(cost <= bound for cost, bound in zip(spent, bounds, strict=True))

    if not meets(0):
        raise CalibrationError(_unmet(path, path.at(float(cuts[0])), budget, memory_budget))
    low, high = 0, len(cuts) - 1  # meets(low) always holds
    if isinstance(path.logits, HeadLogits):
        grid = torch.linspace(0, high, min(COARSE_LEVELS, len(cuts))).round().long().unique().tolist()
        above = high + 1
        for cut in reversed(grid):
            if meets(cut):
                low, high = cut, above - 1
                break
            above = cut
    while low < high:
        middle = (low + high + 1) // 2
        if meets(middle):
            low = middle
        else:
            high = middle - 1
    return threshold_at(float(cuts[low]))


def _unmet(
    path: ThresholdPath, cheapest: Schedules, budget: float | None, memory_budget: float | None
) -> str:
    found = [
        f"{name} of {bound:.4f} cannot be met: the earliest decisions already cost {cost:.4f}"
        for name, bound, cost in (
            ("visual compute", budget, path.compute(cheapest)),
            ("KV memory", memory_budget, path.memory(cheapest)),
        )
        if bound is not None and cost > bound
    ]
    return (
        f"{'; '.join(found)} (leaving at layer {path.min_layer} of {path.num_layers}); raise the budget or "
        "lower min_layer"
    )


def _midpoints(levels: Tensor) -> Tensor:
    """One cut below all levels, one between each two neighbours, one above all."""
    inner = (levels[1:] + levels[:-1]) / 2
    return torch.cat((levels[:1] - 1, inner, levels[-1:] + 1))
