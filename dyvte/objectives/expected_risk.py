"""Expected risk plus cost: the exact objective of a stopping rule over a frozen backbone.

Shape letters: B samples, L decoder layers, S prices, M schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dyvte.costs.schedules import schedule_compute
from dyvte.errors import ConfigError
from dyvte.gates import CLOSED, HeadLogits, exit_probabilities
from dyvte.objectives.base import OBJECTIVES, Objective
from dyvte.objectives.expectation import expected_cost
from dyvte.objectives.losses import answer_loss, check_loss
from dyvte.teacher.trace import Trace


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class ExpectedRisk(Objective):
    """Expected loss plus a price of visual compute, exactly, over many prices; see :func:`expected_risk`."""

    name: Literal["expected_risk"] = "expected_risk"
    """Chooses this objective."""
    lam: float = 0.1
    """Price, in nats, of the visual tokens in all layers, at threshold 0.5."""
    span: float = 100.0
    """Thresholds learn for prices of their own, lam / span to lam * span; 1: lam alone."""
    memory_price: float = 0.0
    """Price of the visual tokens in the KV caches of all layers, on top."""
    loss: str = "risk"
    """"risk" (KL in nats), "same_answer" (0 or 1), "risk:C" (min(KL, C) / C), or the mean of several, such as
    "same_answer+risk:1". The price is in the same unit."""

    starts_uniform: ClassVar[bool] = True
    trains_freezes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.lam, self.span, self.memory_price)
        check_loss(self.loss)

    def prepared(self, train: Trace) -> Callable[..., Tensor]:
        """The loss; nothing need be known beforehand."""
        settings = {name: getattr(self, name) for name in ("lam", "span", "memory_price", "loss")}
        return partial(expected_risk, **settings)


def expected_risk(
    logits: Tensor | HeadLogits,
    trace: Trace,
    *,
    lam: float = 0.1,
    span: float = 1.0,
    points: int = 7,
    shift: float = 4.0,
    memory_price: float = 0.0,
    loss: str = "risk",
) -> Tensor:
    """Mean over samples of sum P (risk + lam * compute + memory_price * kv), over all schedules.

    P_k is the chance that the gates leave after layer k, each asked in turn; P_L is what remains. The
    backbone is frozen, so the risks are constants and the expectation is exact: no exit is sampled and every
    gate learns from every sample. P is computed in log space, because the product of 31 survivals underflows
    long before its gradient does. With a freeze head it is P(f, k), over the grid of the trace
    (:func:`dyvte.gates.schedule_probabilities`); compute is (f + r (k - f)) / L with r the backbone's
    ``kv_share``, kv is k / L. Without one f = k: both are k / L, k = 1..L.

    A threshold t decides as t = 0.5 would with log((1 - t) / t) added to every logit. Gates trained at one
    price are good at one threshold only; with ``span`` the price lam * x is paired with the logits + shift *
    log(x) for ``points`` values of x in [1/span, span], evenly spaced in log x, so that each threshold is
    trained for a price of its own and one stack of gates serves all budgets. Terms are weighted by x^-1/2,
    between equal weight of their risks and equal weight of their costs. Both heads and both prices move
    together: one threshold drives them all.

    Parameters
    ----------
    logits:
        (B, L) exit minus stay, offsets included (:func:`dyvte.gates.uniform_offsets` makes P start uniform);
        or those of both heads, on the streams that the trace labels.
    trace:
        The same B samples.
    lam:
        Price, in nats, of keeping the visual tokens in all layers; larger means earlier exits. With ``span``:
        the price that threshold 0.5 stands for.
    span:
        1: the objective at ``lam`` alone. Else the range of prices, lam / span to lam * span.
    points:
        How many prices are summed over, where there is a span.
    shift:
        How far, in logits, a price e times higher moves the threshold.
    memory_price:
        Price of their keys and values in the caches of all layers.
    loss:
        What "risk" is: see :func:`dyvte.objectives.losses.answer_loss`. The prices are in its unit.

    Raises
    ------
    ConfigError
        If logits of two heads meet a trace without their freeze layers.
    """
    costs = ScheduleCosts.of(trace, loss, freezes=isinstance(logits, HeadLogits))
    prices = {"lam": lam, "span": span, "memory_price": memory_price}
    return costs.expected(logits, points=points, shift=shift, **prices)


@dataclass(frozen=True)
class ScheduleCosts:
    """What `expected_risk` knows of a trace, apart from any logits: made once where training asks often.

    Attributes
    ----------
    loss_BM
        Of every schedule, as `dyvte.gates.schedule_probabilities` orders them, or of exits 1..L; 0 where no
        label is known.
    compute_M, kv_M
        Visual compute, and share of the full model's cache.
    freeze_layers
        Of the streams; None where the schedules are exits alone.
    closed_L
        Exits 1..L without a label; None: all have one.
    weight_B
        How much each sample counts; None: 1 / B.
    """

    loss_BM: Tensor
    compute_M: Tensor
    kv_M: Tensor
    freeze_layers: tuple[int, ...] | None
    closed_L: Tensor | None = None
    weight_B: Tensor | None = None

    @staticmethod
    def of(trace: Trace, loss: str, *, freezes: bool) -> ScheduleCosts:
        """Those of a trace's samples.

        Parameters
        ----------
        trace
            B samples.
        loss
            See :func:`dyvte.objectives.losses.answer_loss`.
        freezes
            Of every traced schedule; else of exits alone, whether or not freeze layers were traced.
        """
        num_layers, device = trace.num_layers, trace.risk.device
        exits_L = torch.arange(1, num_layers + 1, device=device).double()
        loss_BGL = answer_loss(trace, loss)[..., 1:].nan_to_num(nan=0.0)
        closed_L = None if trace.complete else ~trace.labelled[1:].to(device)
        share_L = exits_L / num_layers
        if not freezes:
            return ScheduleCosts(loss_BGL[:, -1], share_L, share_L, None, closed_L)
        compute_GL = share_L[None]
        if trace.grid is not None:
            freezes_F1 = torch.tensor(trace.freezes, device=device).double()[:, None]
            frozen_FL = schedule_compute(freezes_F1, exits_L, num_layers, trace.grid.kv_share)
            compute_GL = torch.cat((frozen_FL, compute_GL))
        kv_M = share_L.expand_as(compute_GL).flatten()
        return ScheduleCosts(loss_BGL.flatten(1), compute_GL.flatten(), kv_M, trace.freezes, closed_L)

    def expected(
        self,
        logits: Tensor | HeadLogits,
        *,
        lam: float,
        span: float = 1.0,
        points: int = 7,
        shift: float = 4.0,
        memory_price: float = 0.0,
    ) -> Tensor:
        """`expected_risk` of logits of the same samples.

        Parameters
        ----------
        logits
            (B, L), or those of both heads where the schedules are a grid.
        lam, span, points, shift, memory_price
            As for `expected_risk`.

        Raises
        ------
        ValueError
            If a price is negative, or the span below 1.
        """
        _check(lam, span, memory_price)
        num_points = points if span > 1 else 1
        log_x_S = torch.linspace(-math.log(span), math.log(span), num_points, dtype=torch.float64)
        log_x_S = log_x_S.to(self.loss_BM.device)
        price_SM = lam * log_x_S.exp()[:, None] * self.compute_M
        if memory_price:
            price_SM = price_SM + memory_price * log_x_S.exp()[:, None] * self.kv_M
        each_S = (-log_x_S / 2).exp()
        if isinstance(logits, HeadLogits):
            return self._of_schedules(logits, shift * log_x_S, price_SM, each_S / num_points)
        log_probability_SBL = self._chances(logits, shift * log_x_S)
        cost_SBL = self.loss_BM.to(log_probability_SBL) + price_SM.to(log_probability_SBL)[:, None]
        objective_SB = (log_probability_SBL.exp() * cost_SBL).sum(2)
        objective_S = objective_SB.mean(1) if self.weight_B is None else objective_SB @ self.weight_B
        return (objective_S * each_S.to(objective_S)).mean()

    def _of_schedules(self, logits: HeadLogits, shift_S: Tensor, price_SM: Tensor, each_S: Tensor) -> Tensor:
        """Over the grid of schedules; nobody leaves or freezes where no label is known."""
        if logits.freeze_layers != self.freeze_layers:
            raise ConfigError(
                f"logits of streams frozen after {logits.freeze_layers}, labels of {self.freeze_layers}: "
                "expected both from one trace"
            )
        grid = logits.exit_BGL.shape[1:]
        weight_B = self.weight_B
        if weight_B is None:
            weight_B = torch.full((len(logits),), 1 / len(logits), dtype=each_S.dtype, device=each_S.device)
        return expected_cost(
            logits,
            shift_S,
            self.loss_BM.unflatten(1, grid),
            price_SM.unflatten(1, grid),
            each_S[:, None] * weight_B,
            self.closed_L,
        )

    def _chances(self, logits_BL: Tensor, shift_S: Tensor) -> Tensor:
        """(S, B, L) log P of the exits, with each shift added to every logit; nobody leaves where no label
        is known."""
        shifted_SBL = logits_BL + shift_S.to(logits_BL)[:, None, None]
        if self.closed_L is not None:
            shifted_SBL = shifted_SBL.masked_fill(self.closed_L, CLOSED)
        return exit_probabilities(shifted_SBL.flatten(0, 1)).unflatten(0, shifted_SBL.shape[:2])


def _check(lam: float, span: float, memory_price: float) -> None:
    for name, price in (("lam", lam), ("memory_price", memory_price)):
        if price < 0:
            raise ValueError(f"{name} must not be negative, found {price}")
    if span < 1:
        raise ValueError(f"span must be at least 1, found {span}")
