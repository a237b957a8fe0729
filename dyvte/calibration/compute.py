"""The threshold that meets a compute budget.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dyvte.costs.visual import visual_compute
from dyvte.errors import CalibrationError
from dyvte.gates import exit_layers


def threshold_for_compute(
    logits_BL: Tensor, num_visual_B: Tensor, budget: float, *, min_layer: int = 1
) -> float:
    """Largest threshold whose mean visual compute on these samples is at most ``budget``.

    Visual compute is a step function of the threshold that rises with it and changes at the samples' logits
    only; the answer lies midway between two of them, so that rounding in another batch or dtype changes no
    decision.

    Parameters
    ----------
    logits_BL:
        (B, L) gate logits of the calibration samples.
    num_visual_B:
        (B,) visual tokens per sample.
    budget:
        Share of the full model's visual compute, in (0, 1]. 1 or more gives threshold 1 (never exit).

    Raises
    ------
    CalibrationError
        If even leaving at ``min_layer`` everywhere exceeds the budget, or a logit is not finite.
    """
    if not budget > 0:
        raise ValueError(f"budget must be positive, found {budget}")
    num_layers = logits_BL.shape[1]
    asked_BL = logits_BL[:, min_layer - 1 : num_layers - 1].double()
    if not bool(asked_BL.isfinite().all()):
        raise CalibrationError("a gate logit of the calibration samples is not finite; train the gates again")
    if budget >= 1:
        return 1.0
    levels = asked_BL.flatten().unique()  # ascending; a row's decision is "logit strictly above the level"

    def compute_above(level: float) -> float:
        exits_B = exit_layers(logits_BL, threshold_at(level), min_layer)
        return visual_compute(exits_B, num_visual_B, num_layers)

    cuts = _midpoints(levels)
    cheapest = compute_above(cuts[0])
    if cheapest > budget:
        raise CalibrationError(
            f"visual compute of {budget:.4f} cannot be met: leaving at layer {min_layer} of {num_layers} "
            f"already costs {cheapest:.4f}; raise the budget or lower min_layer"
        )
    low, high = 0, len(cuts) - 1  # compute_above(cuts[low]) <= budget always holds
    while low < high:
        middle = (low + high + 1) // 2
        if compute_above(cuts[middle]) <= budget:
            low = middle
        else:
            high = middle - 1
    return threshold_at(cuts[low])


def threshold_at(level: float) -> float:
    """The probability threshold t whose logit, log(t / (1 - t)), is ``level``."""
    if level >= 0:
        return 1.0 / (1.0 + math.exp(-level))
    return math.exp(level) / (1.0 + math.exp(level))


def _midpoints(levels: Tensor) -> list[float]:
    """One cut below all levels, one between each two neighbours, one above all."""
    inner = (levels[1:] + levels[:-1]) / 2
    return torch.cat((levels[:1] - 1, inner, levels[-1:] + 1)).tolist()
