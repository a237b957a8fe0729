"""A router that sees the question only: what gates, which see the states, must beat.

Shape letters: B samples, L decoder layers, F features, S settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dyvte.calibration.operating_points import OperatingPoints
from dyvte.costs.visual import visual_compute
from dyvte.errors import DataError
from dyvte.gates import uniform_offsets
from dyvte.objectives import answer_loss, expected_risk
from dyvte.teacher.trace import Trace

NEVER = 1.0


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """How a question-only router is trained; ``min_parameters`` makes it no smaller than the gates.

    ``span`` 1: a distribution over 1..L, at the price ``lam``; it leaves once enough of it has passed.
    Larger: a chance to leave per layer, as gates have it, with their objective over many prices and their
    rule.
    """

    lam: float
    span: float = 1.0
    epochs: int = 20
    learning_rate: float = 3e-3
    batch_size: int = 64
    weight_decay: float = 0.01
    seed: int = 0
    min_parameters: int = 0
    loss: str = "risk"
    """What the gates learned from, see :func:`dyvte.objectives.answer_loss`."""
    memory_price: float = 0.0


class QuestionRouter(nn.Module):
    """MLP from question features to a distribution over exit layers 1..L.

    Its outputs are the logits of that distribution, or with ``layerwise`` those of leaving after each layer.
    """

    def __init__(
        self, mean_F: Tensor, scale_F: Tensor, num_layers: int, hidden_size: int, *, layerwise: bool = False
    ) -> None:
        super().__init__()
        self.layerwise = layerwise
        offsets_L = torch.tensor(uniform_offsets(num_layers)) if layerwise else torch.zeros(num_layers)
        self.register_buffer("offsets_L", offsets_L)
        self.register_buffer("mean_F", mean_F)
        self.register_buffer("scale_F", scale_F)
        self.layers = nn.Sequential(
            nn.Linear(len(mean_F), hidden_size), nn.GELU(), nn.Linear(hidden_size, num_layers)
        )

    def forward(self, features_BF: Tensor) -> Tensor:
        """(B, L) logits, offsets included."""
        return self.layers((features_BF - self.mean_F) / self.scale_F) + self.offsets_L

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

    They must agree in seed, epochs, batch size and size; price, span, learning rate and weight decay are
    free. ``advance`` is called with the number of steps done, for a progress bar.

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
    if len({(s.seed, s.epochs, s.batch_size, s.min_parameters) for s in settings_C}) != 1:
        raise DataError("routers trained together need the same seed, epochs, batch size and size")
    first, num_layers, num_features = settings_C[0], trace.num_layers, features_BF.shape[1]
    hidden_size = max(32, math.ceil(first.min_parameters / (num_features + num_layers + 1)))
    mean_F, scale_F = features_BF.mean(0), features_BF.std(0, correction=0)
    scale_F = torch.where(scale_F > 1e-6, scale_F, torch.ones_like(scale_F))
    with torch.random.fork_rng(devices=[]):
        routers = []
        for settings in settings_C:
            torch.manual_seed(first.seed)
            layerwise = settings.span > 1
            routers.append(QuestionRouter(mean_F, scale_F, num_layers, hidden_size, layerwise=layerwise))
        _fit((features_BF - mean_F) / scale_F, trace, routers, settings_C, advance)
    return [router.eval().requires_grad_(False) for router in routers]


def router_steps(num_samples: int, settings: RouterSettings) -> int:
    """Optimiser steps of a training.

    Parameters
    ----------
    num_samples
        To train on.
    settings
        Of the training.
    """
    return settings.epochs * math.ceil(num_samples / settings.batch_size)


def _fit(
    normed_BF: Tensor,
    trace: Trace,
    routers: Sequence[QuestionRouter],
    settings_C: Sequence[RouterSettings],
    advance: Callable[[int], object] | None,
) -> None:
    num_layers, first = trace.num_layers, settings_C[0]
    share_L = torch.arange(1, num_layers + 1) / num_layers
    # Features of the whole trace are not needed here, and picking rows of them would be most of the work.
    risk_only = dataclasses.replace(trace, features=trace.features[:, :, :0], grid=None)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(router.parameters()), "lr": s.learning_rate, "weight_decay": s.weight_decay}
            for router, s in zip(routers, settings_C, strict=True)
        ]
    )
    steps = router_steps(len(normed_BF), first)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(first.epochs):
        for rows in torch.randperm(len(normed_BF)).split(first.batch_size):
            batch = risk_only.rows(rows)
            loss = torch.zeros(())
            for logits_BL, s in zip(_logits_together(routers, normed_BF[rows]), settings_C, strict=True):
                if s.span > 1:
                    prices = {"lam": s.lam, "span": s.span, "memory_price": s.memory_price}
                    loss = loss + expected_risk(logits_BL, batch, loss=s.loss, **prices)
                else:
                    cost_BL = answer_loss(batch, s.loss)[:, -1, 1:].float() + s.lam * share_L
                    loss = loss + (logits_BL.softmax(-1) * cost_BL).sum(1).mean()
            # A router's parameters appear in its own term only: the sum trains each as if alone.
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if advance is not None:
                advance(1)


def _logits_together(routers: Sequence[QuestionRouter], normed_BF: Tensor) -> list[Tensor]:
    """Each router's (B, L) logits; their first layers are one matrix product."""
    inner = [router.layers[0] for router in routers]
    hidden = nn.functional.linear(
        normed_BF, torch.cat([layer.weight for layer in inner]), torch.cat([layer.bias for layer in inner])
    )
    parts = nn.functional.gelu(hidden).chunk(len(routers), dim=1)
    return [router.layers[2](part) + router.offsets_L for router, part in zip(routers, parts, strict=True)]


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
