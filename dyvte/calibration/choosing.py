"""Which of several trainings is best for a target, judged on held-out samples by the certified measure.

Trainings on a trace cost seconds, and none is best for every target: learning rate and objective alone may be
worth half a layer. So train several on one trace and choose here.

Shape letters: B samples, L decoder layers, G streams (frozen after each traced layer, and the plain one), S
levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dyvte.calibration.operating_points import compute_to_reach, mixed, mixture_at
from dyvte.calibration.path import ThresholdPath, at_schedule
from dyvte.calibration.risk import DEFAULT_LEVELS
from dyvte.errors import CalibrationError


@dataclass(frozen=True)
class Frontier:
    """What a stack of gates loses at what it spends, along its path of thresholds.

    Attributes
    ----------
    compute_S
        Visual compute, rising; of equal ones the last has the least loss.
    loss_S
        Mean loss at or below that compute: a rule may always spend less.
    """

    compute_S: np.ndarray
    loss_S: np.ndarray

    @staticmethod
    def of(path: ThresholdPath, loss_BGL1: Tensor, levels: Sequence[float] = DEFAULT_LEVELS) -> Frontier:
        """That of a path on samples with this loss, (B, G, L+1) (:func:`dyvte.objectives.answer_loss`).

        Parameters
        ----------
        path
            Of the gates.
        loss_BGL1
            Of every traced schedule.
        levels
            The grid in logits, strictly falling.
        """
        points = []
        for level in levels:
            chosen = path.at(level)
            loss = float(at_schedule(loss_BGL1, path.freezes, chosen).double().mean())
            points.append((path.compute(chosen), loss))
        points = sorted(set(points), key=lambda point: (point[0], -point[1]))
        compute_S, loss_S = np.array(points).T
        return Frontier(compute_S, np.minimum.accumulate(loss_S))

    def loss_at(self, budget: float) -> float:
        """Least mean loss within a budget of visual compute, by mixing two neighbours.

        Parameters
        ----------
        budget:
            Share of the full model's visual compute.
        """
        return mixed(self.loss_S, mixture_at(self.compute_S, budget))

    def compute_at(self, max_loss: float) -> float:
        """Least visual compute within a mean loss; infinite if the path never gets there.

        Parameters
        ----------
        max_loss:
            In the unit of ``loss_S``.
        """
        found = compute_to_reach(self.compute_S, -self.loss_S, -max_loss)
        return float("inf") if np.isnan(found) else found


def best_frontier(
    frontiers: Sequence[Frontier], *, budget: float | None = None, max_loss: float | None = None
) -> int:
    """Index of the best of several stacks of gates on the same held-out samples.

    Parameters
    ----------
    frontiers:
        One for each.
    budget:
        Visual compute that may be spent: the one with the least loss there is best.
    max_loss:
        Mean loss that may be had: the one that spends least for it is best. Exactly one of the two.

    Raises
    ------
    CalibrationError
        If none of them reaches ``max_loss``.
    """
    if (budget is None) == (max_loss is None) or not frontiers:
        raise ValueError("give frontiers, and either a budget or a max_loss")
    if budget is not None:
        return int(np.argmin([frontier.loss_at(budget) for frontier in frontiers]))
    spent = [frontier.compute_at(max_loss) for frontier in frontiers]
    if not np.isfinite(spent).any():
        raise CalibrationError(
            f"none of {len(frontiers)} trainings reaches a mean loss of {max_loss:g} on the held-out samples"
        )
    return int(np.argmin(spent))
