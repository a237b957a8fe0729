"""Expected risk plus cost: the exact objective of a stopping rule over a frozen backbone.

Shape letters: B samples, L decoder layers, S prices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dyvte.gates import exit_probabilities
from dyvte.teacher.trace import Trace


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
    if span == 1:
        return _objective(logits_BL, trace, lam)
    log_x_S = torch.linspace(-math.log(span), math.log(span), points)
    shifted_SBL = logits_BL + (shift * log_x_S).to(logits_BL)[:, None, None]
    terms_S = [
        _objective(shifted_BL, trace, lam * math.exp(log_x)) * math.exp(-log_x / 2)
        for shifted_BL, log_x in zip(shifted_SBL, log_x_S.tolist(), strict=True)
    ]
    return torch.stack(terms_S).mean()


def _objective(logits_BL: Tensor, trace: Trace, price: float) -> Tensor:
    num_layers = trace.num_layers
    log_probability_BL = exit_probabilities(logits_BL)
    layers_L = torch.arange(1, num_layers + 1, device=logits_BL.device, dtype=log_probability_BL.dtype)
    cost_BL = trace.risk[:, 1:].to(log_probability_BL) + price * layers_L / num_layers
    return (log_probability_BL.exp() * cost_BL).sum(1).mean()
