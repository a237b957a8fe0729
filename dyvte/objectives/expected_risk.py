"""Expected risk plus cost: the exact objective of a stopping rule over a frozen backbone.

Shape letters: B samples, L decoder layers, S prices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dyvte.gates import CLOSED, exit_probabilities
from dyvte.objectives.base import OBJECTIVES, Objective
from dyvte.teacher.trace import Trace


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class ExpectedRisk(Objective):
    """Expected risk plus a price of visual compute, exactly, over many prices; see :func:`expected_risk`."""

    name: Literal["expected_risk"] = "expected_risk"
    lam: float = 0.1
    """Price in nats of the visual tokens in all layers, at threshold 0.5."""
    span: float = 100.0
    """Thresholds learn for prices of their own, lam / span to lam * span; 1: lam alone."""

    starts_uniform: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.span < 1:
            raise ValueError(f"span must be at least 1, found {self.span}")
        if self.lam < 0:
            raise ValueError(f"lam must not be negative, found {self.lam}")

    def prepared(self, train: Trace) -> Callable[..., Tensor]:
        """The loss; nothing need be known beforehand."""
        return partial(expected_risk, lam=self.lam, span=self.span)


def expected_risk(
    logits_BL: Tensor,
    trace: Trace,
    *,
    lam: float = 0.1,
    span: float = 1.0,
    points: int = 7,
    shift: float = 4.0,
) -> Tensor:
    """Mean over samples of sum_k P_k (risk_k + lam * k / L), k = 1..L; with ``span`` > 1 over many prices.

    P_k is the chance that the gates leave after layer k, each asked in turn; P_L is what remains. The
    backbone is frozen, so the risks are constants and the expectation is exact: no exit is sampled and every
    gate learns from every sample. P is computed in log space, because the product of 31 survivals underflows
    long before its gradient does.

    A threshold t decides as t = 0.5 would with log((1 - t) / t) added to every logit. Gates trained at one
    price are good at one threshold only; with ``span`` the price lam * x is paired with the logits + shift *
    log(x) for ``points`` values of x in [1/span, span], evenly spaced in log x, so that each threshold is
    trained for a price of its own and one stack of gates serves all budgets. Terms are weighted by x^-1/2,
    between equal weight of their risks and equal weight of their costs.

    Parameters
    ----------
    logits_BL:
        (B, L) exit minus stay, offsets included (:func:`dyvte.gates.uniform_offsets` makes P start uniform).
    trace:
        The same B samples; ``risk`` in nats is read.
    lam:
        Price, in nats, of keeping the visual tokens in all layers; larger means earlier exits. With ``span``:
        the price that threshold 0.5 stands for.
    span:
        1: the objective at ``lam`` alone. Else the range of prices, lam / span to lam * span.
    """
    if lam < 0:
        raise ValueError(f"lam must not be negative, found {lam}")
    if span < 1:
        raise ValueError(f"span must be at least 1, found {span}")
    log_x_S = torch.linspace(-math.log(span), math.log(span), points if span > 1 else 1, dtype=torch.float64)
    log_x_S = log_x_S.to(logits_BL.device)
    price_S = lam * log_x_S.exp()
    shifted_SBL = logits_BL + (shift * log_x_S).to(logits_BL)[:, None, None]
    risk_BL, num_layers = trace.risk[:, 1:], trace.num_layers
    if not trace.complete:  # nobody leaves where no risk is known
        unknown_L = ~trace.labelled[1:].to(logits_BL.device)
        shifted_SBL = shifted_SBL.masked_fill(unknown_L, CLOSED)
        risk_BL = risk_BL.nan_to_num(nan=0.0)
    log_probability_SBL = exit_probabilities(shifted_SBL.flatten(0, 1)).unflatten(0, shifted_SBL.shape[:2])

    share_L = torch.arange(1, num_layers + 1).to(log_x_S) / num_layers
    cost_SBL = risk_BL.to(log_probability_SBL) + (price_S[:, None] * share_L).to(log_probability_SBL)[:, None]
    objective_S = (log_probability_SBL.exp() * cost_SBL).sum(2).mean(1)
    return (objective_S * (-log_x_S / 2).exp().to(objective_S)).mean()
