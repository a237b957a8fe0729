"""A router of schedules that sees the question only: given the same choice of freeze and exit as the gates.

Two kinds, trained on the gates' own labels and loss. "heads": logits of both heads on every stream, with the
gates' objective over a range of prices and their rule. "table": the loss of every schedule, of which the rule
takes the cheapest at a price.

Shape letters: B samples, L decoder layers, G streams, M schedules, F features, S settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyvte.calibration.operating_points import OperatingPoints
from dyvte.calibration.path import Labels, ThresholdPath
from dyvte.comparison.oracle import ORACLE_LAMS, at_pairs, cheapest_at_prices, traced_pairs
from dyvte.comparison.router import NEVER, RouterSettings, router_steps
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
from dyvte.objectives import answer_loss, expected_risk
from dyvte.objectives.losses import is_bounded
from dyvte.teacher.trace import Trace

Kind = Literal["heads", "table"]
KINDS: tuple[Kind, ...] = ("heads", "table")
CURVE_LEVELS = 80


class ScheduleRouter(nn.Module):
    """MLP from question features to what a kind of router says; ``width`` hidden units."""

    def __init__(self, kind: Kind, mean_F: Tensor, scale_F: Tensor, trace: Trace, width: int) -> None:
        super().__init__()
        self.kind, self.freeze_layers, self.num_layers = kind, trace.freezes, trace.num_layers
        # schedules that thinned traces do not label are no choice
        self.pairs = [p for p in traced_pairs(trace.num_layers, trace.freezes) if p[1] in trace.exits]
        streams = len(trace.freezes) + 1
        outputs = len(self.pairs) if kind == "table" else (streams + 1) * trace.num_layers
        exits = torch.tensor(uniform_offsets(trace.num_layers, trace.exits))
        freezes = torch.tensor(
            close_freezes(uniform_freeze_offsets(trace.num_layers, trace.freezes), trace.freezes)
        )
        self.register_buffer("exit_offsets_L", exits)
        self.register_buffer("freeze_offsets_L", freezes)
        self.register_buffer("mean_F", mean_F)
        self.register_buffer("scale_F", scale_F)
        self.layers = nn.Sequential(nn.Linear(len(mean_F), width), nn.GELU(), nn.Linear(width, outputs))

    def forward(self, features_BF: Tensor) -> Tensor:
        """The outputs as they are."""
        return self.layers((features_BF - self.mean_F) / self.scale_F)

    def heads(self, outputs: Tensor) -> HeadLogits:
        """Outputs of a router of heads as logits, offsets included."""
        both = outputs.unflatten(-1, (-1, self.num_layers))
        exits = both[:, :-1] + self.exit_offsets_L
        return HeadLogits(exits, both[:, -1] + self.freeze_offsets_L, self.freeze_layers)

    @property
    def num_parameters(self) -> int:
        """Of the router."""
        return sum(parameter.numel() for parameter in self.parameters())


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
    first, mean_F = settings_C[0], features_BF.mean(0)
    scale_F = features_BF.std(0, correction=0)
    scale_F = torch.where(scale_F > 1e-6, scale_F, torch.ones_like(scale_F))
    outputs = (len(trace.freezes) + 2) * trace.num_layers
    width = max(32, math.ceil(first.min_parameters / (features_BF.shape[1] + outputs + 1)))
    with torch.random.fork_rng(devices=[]):
        routers = []
        for _ in settings_C:
            torch.manual_seed(first.seed)
            routers.append(ScheduleRouter(kind, mean_F, scale_F, trace, width))
        _fit((features_BF - mean_F) / scale_F, trace, routers, settings_C, advance)
    return [router.eval().requires_grad_(False) for router in routers]


def _fit(
    normed_BF: Tensor,
    trace: Trace,
    routers: Sequence[ScheduleRouter],
    settings_C: Sequence[RouterSettings],
    advance: Callable[[int], object] | None,
) -> None:
    first = settings_C[0]
    lean, loss_BM = without_features(trace), None
    if routers[0].kind == "table":
        labels = Labels(answer_loss(trace, first.loss), trace.freezes)
        loss_BM = at_pairs(labels, routers[0].pairs).float()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(router.parameters()), "lr": s.learning_rate, "weight_decay": s.weight_decay}
            for router, s in zip(routers, settings_C, strict=True)
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, max(1, router_steps(len(normed_BF), first))
    )
    for _ in range(first.epochs):
        for rows in torch.randperm(len(normed_BF)).split(first.batch_size):
            given = [router.layers(normed_BF[rows]) for router in routers]
            if loss_BM is not None:
                parts = [_table_loss(one, loss_BM[rows], first.loss) for one in given]
            else:
                batch = lean.rows(rows)
                parts = [
                    expected_risk(
                        router.heads(one),
                        batch,
                        lam=s.lam,
                        span=s.span,
                        memory_price=s.memory_price,
                        loss=s.loss,
                    )
                    for router, one, s in zip(routers, given, settings_C, strict=True)
                ]
            optimizer.zero_grad()
            torch.stack(parts).sum().backward()
            optimizer.step()
            schedule.step()
            if advance is not None:
                advance(1)


def _table_loss(given_BM: Tensor, loss_BM: Tensor, loss: str) -> Tensor:
    """Cross-entropy where the loss lies in [0, 1], else squared error."""
    if is_bounded(loss):
        return F.binary_cross_entropy_with_logits(given_BM, loss_BM.clamp(0, 1))
    return F.mse_loss(given_BM, loss_BM)


def without_features(trace: Trace) -> Trace:
    """The labels alone: picking rows of the features would be most of a training's work."""
    grid = trace.grid
    if grid is not None:
        grid = dataclasses.replace(grid, features=grid.features[..., :0], embeddings=grid.embeddings[..., :0])
    return dataclasses.replace(trace, features=trace.features[..., :0], grid=grid)


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
