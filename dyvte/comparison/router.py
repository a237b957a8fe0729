"""A router that sees the question only: what gates, which see the states, must beat.

Shape letters: B samples, U distinct questions, L decoder layers, F features, C routers, S settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dyvte.calibration.operating_points import OperatingPoints
from dyvte.comparison.router_training import (
    RouterNetwork,
    RouterSettings,
    fit_together,
    hidden_units,
    standardisation,
)
from dyvte.costs.visual import visual_compute
from dyvte.errors import DataError
from dyvte.gates import uniform_offsets
from dyvte.objectives import ScheduleCosts
from dyvte.teacher.trace import Trace

NEVER = 1.0


class QuestionRouter(RouterNetwork):
    """MLP from question features to a distribution over exit layers 1..L.

    Its outputs are the logits of that distribution, or with ``layerwise`` those of leaving after each layer.
    """

    def __init__(
        self, mean_F: Tensor, scale_F: Tensor, num_layers: int, hidden_size: int, *, layerwise: bool = False
    ) -> None:
        super().__init__(mean_F, scale_F, hidden_size, num_layers)
        self.layerwise = layerwise
        offsets_L = torch.tensor(uniform_offsets(num_layers)) if layerwise else torch.zeros(num_layers)
        self.register_buffer("offsets_L", offsets_L)

    def forward(self, features_BF: Tensor) -> Tensor:
        """(B, L) logits, offsets included."""
        return super().forward(features_BF) + self.offsets_L

    @torch.no_grad()
    def readiness(self, features_BF: Tensor) -> Tensor:
        """(B, L) float64, not falling along k: what `router_exits` holds against its threshold.

        The probability that k layers are enough; with ``layerwise`` the highest chance to leave so far, so
        that reaching the threshold means what it means for gates.
        """
        logits_BL = self(features_BF).double()
        if self.layerwise:
            return logits_BL.sigmoid().cummax(1).values
        return logits_BL.softmax(-1).cumsum(1)


def train_router(features_BF: Tensor, trace: Trace, settings: RouterSettings) -> QuestionRouter:
    """Minimise the gates' objective, sum_k P_k (risk_k + lam k / L), P given by the question alone.

    Parameters
    ----------
    features_BF
        Of the questions.
    trace
        Of the same samples.
    settings
        Of the training.
    """
    return train_routers(features_BF, trace, [settings])[0]


def train_routers(
    features_BF: Tensor,
    trace: Trace,
    settings_C: Sequence[RouterSettings],
    advance: Callable[[int], object] | None = None,
) -> list[QuestionRouter]:
    """:func:`train_router` for several settings at once, each on its own: what is one pass over the data for
    one of them is one for all.

    They must agree in seed, epochs, batch size, size and loss; price, span, learning rate and weight decay
    are free. ``advance`` is called with the number of steps done, for a progress bar.

    Parameters
    ----------
    features_BF
        Of the questions.
    trace
        Of the same samples.
    settings_C
        Of each training.
    advance
        Shows the progress.

    Raises
    ------
    DataError
        If there is not one traced sample for each question, or the settings do not go together.
    """
    if len(features_BF) != len(trace):
        raise DataError(f"{len(features_BF)} questions but {len(trace)} traced samples")
    first, num_layers = settings_C[0], trace.num_layers
    mean_F, scale_F = standardisation(features_BF)
    width = hidden_units(features_BF.shape[1], num_layers, first.min_parameters)
    costs = ScheduleCosts.of(trace, first.loss, freezes=False)
    with torch.random.fork_rng(devices=[]):
        routers = []
        for settings in settings_C:
            torch.manual_seed(first.seed)
            layerwise = settings.span > 1
            routers.append(QuestionRouter(mean_F, scale_F, num_layers, width, layerwise=layerwise))
        objective = partial(_objective, routers, settings_C, costs)
        return fit_together(routers, features_BF, costs.loss_BM, settings_C, objective, advance)


def _objective(
    routers: Sequence[QuestionRouter],
    settings_C: Sequence[RouterSettings],
    costs: ScheduleCosts,
    outputs_CUL: Tensor,
    loss_UL: Tensor,
    share_U: Tensor,
) -> Tensor:
    """Each router's own expected loss and price, summed."""
    costs, total = dataclasses.replace(costs, loss_BM=loss_UL, weight_B=share_U), torch.zeros(())
    for router, s, outputs_UL in zip(routers, settings_C, outputs_CUL, strict=True):
        if s.span > 1:
            prices = {"lam": s.lam, "span": s.span, "memory_price": s.memory_price}
            total = total + costs.expected(outputs_UL + router.offsets_L, **prices)
        else:
            cost_UL = loss_UL + s.lam * costs.compute_M.float()
            total = total + share_U @ (outputs_UL.softmax(-1) * cost_UL).sum(1)
    return total


def router_exits(readiness_BL: Tensor, threshold: float) -> Tensor:
    """(B,) smallest k in 1..L whose readiness reaches ``threshold``; 1 means L.

    Parameters
    ----------
    readiness_BL
        Chance to have left by each layer.
    threshold
        In (0, 1].
    """
    if threshold >= NEVER:
        return torch.full((len(readiness_BL),), readiness_BL.shape[1])
    return ((readiness_BL[:, :-1] < threshold).sum(1) + 1).long()


def router_threshold(readiness_BL: Tensor, num_visual_B: Tensor, budget: float) -> float:
    """Largest threshold whose visual compute on these (calibration) samples is at most ``budget``.

    Falls back to the smallest threshold where even that spends more.

    Parameters
    ----------
    readiness_BL
        Chance to have left by each layer.
    num_visual_B
        (B,) visual tokens.
    budget
        Share of the full model's visual compute.
    """
    num_layers = readiness_BL.shape[1]
    if budget >= 1:
        return NEVER
    levels = readiness_BL[:, :-1].flatten().unique()
    cuts = torch.cat([levels[:1] / 2, (levels[1:] + levels[:-1]) / 2, (levels[-1:] + 1) / 2]).clamp(
        max=1 - 1e-12
    )
    low, high = 0, len(cuts) - 1
    while low < high:
        middle = (low + high + 1) // 2
        exits_B = router_exits(readiness_BL, float(cuts[middle]))
        if visual_compute(exits_B, num_visual_B, num_layers) <= budget:
            low = middle
        else:
            high = middle - 1
    return float(cuts[low])


@torch.no_grad()
def router_points(
    name: str, readiness_BL: Tensor, num_visual_B: Tensor, thresholds: Sequence[float]
) -> OperatingPoints:
    """The router's exits at thresholds found on other samples; settings that decide alike are merged.

    Parameters
    ----------
    name
        Of the rule.
    readiness_BL
        Chance to have left by each layer.
    num_visual_B
        (B,) visual tokens.
    thresholds
        In (0, 1].
    """
    thresholds = sorted(set(thresholds) | {NEVER})
    exits_SB = torch.stack([router_exits(readiness_BL, t) for t in thresholds])
    return OperatingPoints(name, tuple(thresholds), exits_SB, num_visual_B, readiness_BL.shape[1])
