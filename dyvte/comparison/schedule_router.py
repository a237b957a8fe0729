"""A router of schedules that sees the question only: given the same choice of freeze and exit as the gates.

Two kinds, trained on the gates' own labels and loss. "heads": logits of both heads on every stream, with the
gates' objective over a range of prices and their rule. "table": the loss of every schedule, of which the rule
takes the cheapest at a price.

Shape letters: B samples, U distinct questions, L decoder layers, G streams, M schedules, F features,
C routers, O outputs, S settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dyvte.calibration.operating_points import OperatingPoints
from dyvte.calibration.path import Labels, ThresholdPath, at_pairs, traced_pairs
from dyvte.comparison.oracle import ORACLE_LAMS, cheapest_at_prices
from dyvte.comparison.router import NEVER
from dyvte.comparison.router_training import (
    RouterNetwork,
    RouterSettings,
    fit_together,
    hidden_units,
    standardisation,
)
from dyvte.comparison.tuned_gates import levels_of_both
from dyvte.errors import DataError
from dyvte.gates import (
    HeadLogits,
    Schedules,
    close_freezes,
    schedules,
    uniform_freeze_offsets,
    uniform_offsets,
)
from dyvte.objectives import ScheduleCosts, answer_loss
from dyvte.objectives.losses import is_bounded
from dyvte.teacher.trace import Trace

Kind = Literal["heads", "table"]
KINDS: tuple[Kind, ...] = ("heads", "table")
CURVE_LEVELS = 80


class ScheduleRouter(RouterNetwork):
    """MLP from question features to what a kind of router says; no fewer parameters than asked for."""

    def __init__(
        self, kind: Kind, mean_F: Tensor, scale_F: Tensor, trace: Trace, min_parameters: int
    ) -> None:
        num_layers = trace.num_layers
        # schedules that thinned traces do not label are no choice
        pairs = [pair for pair in traced_pairs(num_layers, trace.freezes) if pair[1] in trace.exits]
        outputs = len(pairs) if kind == "table" else (len(trace.freezes) + 2) * num_layers
        super().__init__(mean_F, scale_F, hidden_units(len(mean_F), outputs, min_parameters), outputs)
        self.kind, self.freeze_layers, self.num_layers, self.pairs = kind, trace.freezes, num_layers, pairs
        freezes = close_freezes(uniform_freeze_offsets(num_layers, trace.freezes), trace.freezes)
        self.register_buffer("exit_offsets_L", torch.tensor(uniform_offsets(num_layers, trace.exits)))
        self.register_buffer("freeze_offsets_L", torch.tensor(freezes))

    def heads(self, outputs: Tensor) -> HeadLogits:
        """Outputs of a router of heads as logits, offsets included."""
        both = outputs.unflatten(-1, (-1, self.num_layers))
        exits = both[:, :-1] + self.exit_offsets_L
        return HeadLogits(exits, both[:, -1] + self.freeze_offsets_L, self.freeze_layers)


def train_schedule_routers(
    features_BF: Tensor,
    trace: Trace,
    kind: Kind,
    settings_C: Sequence[RouterSettings],
    advance: Callable[[int], object] | None = None,
) -> list[ScheduleRouter]:
    """Routers of one kind, one for each of the settings, each on its own.

    Parameters
    ----------
    features_BF : of the questions.
    trace : of the same samples, with a grid of freeze layers.
    kind : what is learned.
    settings_C : they may differ in the learning rate and the weight decay.
    advance : called with the number of steps done.

    Raises
    ------
    DataError
        There is not one traced sample for each question, or no freeze layer is traced.
    """
    if len(features_BF) != len(trace) or trace.grid is None:
        raise DataError(
            f"{len(features_BF)} questions, {len(trace)} traced samples, freeze layers {trace.freezes}: "
            "expected one sample for each question, and traces with freeze layers"
        )
    first, (mean_F, scale_F) = settings_C[0], standardisation(features_BF)
    if len({(s.lam, s.span, s.memory_price, s.loss) for s in settings_C}) != 1:
        raise DataError("routers of schedules trained together need the same prices and loss")
    with torch.random.fork_rng(devices=[]):
        routers = []
        for _ in settings_C:
            torch.manual_seed(first.seed)
            routers.append(ScheduleRouter(kind, mean_F, scale_F, trace, first.min_parameters))
        if kind == "table":
            labels = Labels(answer_loss(trace, first.loss), trace.freezes)
            labels_BM, objective = (
                at_pairs(labels, routers[0].pairs).float(),
                partial(_table_loss, first.loss),
            )
        else:
            costs = ScheduleCosts.of(trace, first.loss, freezes=True)
            labels_BM, objective = costs.loss_BM, partial(_heads_loss, routers[0], costs, first)
        return fit_together(routers, features_BF, labels_BM, settings_C, objective, advance)


def _heads_loss(
    router: ScheduleRouter,
    costs: ScheduleCosts,
    settings: RouterSettings,
    outputs_CUO: Tensor,
    loss_UM: Tensor,
    share_U: Tensor,
) -> Tensor:
    """The gates' objective, of all routers at once: one more sample each, of the same labels."""
    count = len(outputs_CUO)
    costs = dataclasses.replace(costs, loss_BM=loss_UM.repeat(count, 1), weight_B=share_U.repeat(count))
    prices = {"lam": settings.lam, "span": settings.span, "memory_price": settings.memory_price}
    return costs.expected(router.heads(outputs_CUO.flatten(0, 1)), **prices)


def _table_loss(loss: str, outputs_CUM: Tensor, loss_UM: Tensor, share_U: Tensor) -> Tensor:
    """Cross-entropy where the loss lies in [0, 1], else squared error."""
    loss_CUM = loss_UM.expand_as(outputs_CUM)
    if is_bounded(loss):
        parts = F.binary_cross_entropy_with_logits(outputs_CUM, loss_CUM.clamp(0, 1), reduction="none")
    else:
        parts = F.mse_loss(outputs_CUM, loss_CUM, reduction="none")
    return (parts.mean(2) @ share_U).sum()


@torch.no_grad()
def schedule_curve(
    router: ScheduleRouter, features_BF: Tensor, calibration: Trace, loss: str
) -> Callable[[Tensor, Tensor], OperatingPoints]:
    """The rule of a trained router at settings found on calibration samples.

    Parameters
    ----------
    router : trained.
    features_BF : of the calibration samples' questions.
    calibration : their trace.
    loss : what the router learned from; a table of it that is bounded holds its logits.

    Returns
    -------
    Callable
        From features and visual tokens of other questions to operating points.
    """
    share = calibration.grid.kv_share
    if router.kind == "table":
        return partial(_table_points, router, is_bounded(loss), share)
    logits = router.heads(router(features_BF))
    path = ThresholdPath(logits, calibration.num_visual, kv_share=share)
    thresholds = tuple(sorted({*levels_of_both(path, CURVE_LEVELS), NEVER}))
    return partial(_head_points, router, thresholds, share)


@torch.no_grad()
def _head_points(
    router: ScheduleRouter,
    thresholds: Sequence[float],
    kv_share: float,
    features_BF: Tensor,
    num_visual_B: Tensor,
) -> OperatingPoints:
    logits = router.heads(router(features_BF))
    chosen_S = [schedules(logits, t) for t in thresholds]
    return OperatingPoints.of_schedules(
        "question-only router", thresholds, chosen_S, num_visual_B, router.num_layers, kv_share
    )


@torch.no_grad()
def _table_points(
    router: ScheduleRouter, bounded: bool, kv_share: float, features_BF: Tensor, num_visual_B: Tensor
) -> OperatingPoints:
    given_BM = router(features_BF).double()
    loss_BM = given_BM.sigmoid() if bounded else given_BM
    lams = sorted(ORACLE_LAMS, reverse=True)
    chosen_S = cheapest_at_prices(loss_BM, router.pairs, router.num_layers, kv_share, lams)
    whole_B = torch.full((len(loss_BM),), router.num_layers)
    lams, chosen_S = [*lams, 0.0], [*chosen_S, Schedules(whole_B, whole_B)]  # the full model, as for gates
    return OperatingPoints.of_schedules(
        "question-only router", lams, chosen_S, num_visual_B, router.num_layers, kv_share
    )
