"""Expected risk plus cost: the exact objective of a stopping rule over a frozen backbone.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dyvte.gates import exit_probabilities
from dyvte.teacher.trace import Trace


def expected_risk(logits_BL: Tensor, trace: Trace, *, lam: float = 0.1) -> Tensor:
    """Mean over samples of sum_k P_k (risk_k + lam * k / L), k = 1..L.

    P_k is the chance that the gates leave after layer k, each asked in turn; P_L is what remains. The
    backbone is frozen, so the risks are constants and the expectation is exact: no exit is sampled and every
    gate learns from every sample. P is computed in log space, because the product of 31 survivals underflows
    long before its gradient does.

    Parameters
    ----------
    logits_BL:
        (B, L) exit minus stay, offsets included (:func:`dyvte.gates.uniform_offsets` makes P start uniform).
    trace:
        The same B samples; ``risk`` in nats is read.
    lam:
        Price, in nats, of keeping the visual tokens in all layers; larger means earlier exits.
    """
    if lam < 0:
        raise ValueError(f"lam must not be negative, found {lam}")
    num_layers = trace.num_layers
    log_probability_BL = exit_probabilities(logits_BL)
    layers_L = torch.arange(1, num_layers + 1, device=logits_BL.device, dtype=log_probability_BL.dtype)
    cost_BL = trace.risk[:, 1:].to(log_probability_BL) + lam * layers_L / num_layers
    return (log_probability_BL.exp() * cost_BL).sum(1).mean()
