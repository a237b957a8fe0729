"""What a wrong schedule costs an answer: the losses that gates learn from and that certificates bound.

Shape letters: B samples, L decoder layers, G streams (frozen after each traced layer, and the plain one).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.teacher.trace import Trace

USAGE = "risk | same_answer | risk:C, or the mean of several joined by '+'"


def answer_loss(trace: Trace, loss: str) -> Tensor:
    """(B, G, L+1) loss of every traced schedule, in the order of `Trace.labels`; NaN where not labelled.

    Parameters
    ----------
    trace:
        B samples; without a grid G = 1, the exits.
    loss:
        "risk": KL(full || reduced) in nats. "same_answer": 1 where the answer differs, else 0. "risk:C":
        min(KL, C) / C, C in nats. The last two lie in [0, 1] and can be certified. Joined by "+": their mean,
        such as "same_answer+risk:1", which says of a wrong answer how wrong it is.

    Raises
    ------
    ConfigError
        If ``loss`` is none of these.
    """
    if "+" in loss:
        parts = [answer_loss(trace, part) for part in loss.split("+")]
        return torch.stack(parts).mean(0)
    if loss == "risk":
        return trace.labels("risk")
    if loss == "same_answer":
        return 1.0 - trace.labels("same_answer")
    bound = risk_bound(loss)
    return trace.labels("risk").clamp(min=0, max=bound) / bound


def risk_bound(loss: str) -> float:
    """C of "risk:C"."""
    kind, _, bound = loss.partition(":")
    try:
        c = float(bound)
    except ValueError:
        c = -1.0
    if kind != "risk" or not c > 0:
        raise ConfigError(f"loss {loss!r}: expected {USAGE} with C > 0 in nats")
    return c


def check_loss(loss: str) -> None:
    """Raise ConfigError unless ``loss`` is the name of one."""
    for part in loss.split("+"):
        if part not in ("risk", "same_answer"):
            risk_bound(part)


def is_bounded(loss: str) -> bool:
    """Does the loss lie in [0, 1], so that a bound on its mean can be certified?"""
    return "risk" not in loss.split("+")
