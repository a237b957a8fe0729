"""Exit labels that stay safe: leave after k only if every later exit is harmless too.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dyvte.objectives.base import OBJECTIVES, Objective
from dyvte.teacher.trace import Trace


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class SafeLabel(Objective):
    """Cross-entropy on "every later exit is harmless too"; see :func:`safe_label`."""

    name: Literal["safe_label"] = "safe_label"
    """Chooses this objective."""
    epsilon: float = 0.01
    """Risk in nats below which an exit is harmless."""
    balance: bool = True
    """Let exit and stay labels count alike in every layer."""

    def __post_init__(self) -> None:
        if self.epsilon <= 0:
            raise ValueError(f"epsilon must be positive, found {self.epsilon}")

    def prepared(self, train: Trace) -> Callable[..., Tensor]:
        """The loss; how often each label occurs is taken from all training samples."""
        balance_2L = class_balance(safe_labels(train, self.epsilon)) if self.balance else None
        return partial(safe_label, epsilon=self.epsilon, balance_2L=balance_2L)


def safe_labels(trace: Trace, epsilon: float) -> Tensor:
    """(B, L) bool, column k-1: risk_j < epsilon for every labelled exit j >= k.

    Parameters
    ----------
    trace
        With the risk of every exit.
    epsilon
        Bound on the risk, in nats.
    """
    harmless_BL = (trace.risk[:, 1:] < epsilon) | ~trace.labelled[1:]
    return harmless_BL.flip(1).cumprod(1).flip(1).bool()


def safe_label(
    logits_BL: Tensor, trace: Trace, *, epsilon: float = 0.01, balance_2L: Tensor | None = None
) -> Tensor:
    """Mean binary cross-entropy of the gates (at labelled exits, L omitted) against :func:`safe_labels`.

    ``balance_2L`` (see :func:`class_balance`) weighs stay and exit labels of each layer; without it the
    classes count as they come, which leaves the first gates with almost no exit to learn from.

    Parameters
    ----------
    logits_BL
        Of the gates.
    trace
        With the risk of every exit.
    epsilon
        Bound on the risk, in nats.
    balance_2L
        Weights of the two classes.
    """
    gates = trace.labelled_gates
    labels_BL = safe_labels(trace, epsilon)[:, gates]
    weight_BL = None
    if balance_2L is not None:
        stay_L, exit_L = balance_2L[:, gates].to(logits_BL)
        weight_BL = torch.where(labels_BL, exit_L, stay_L)
    return binary_cross_entropy_with_logits(
        logits_BL[:, gates].float(), labels_BL.to(torch.float32), weight=weight_BL
    )


def class_balance(labels_BL: Tensor, limit: float = 10.0) -> Tensor:
    """(2, L) weights of the stay and the exit label of each layer, such that both classes count alike.

    Weights are capped at ``limit`` so that a class seen a handful of times cannot rule a gate; taken over the
    whole training set, never over a batch.

    Parameters
    ----------
    labels_BL
        As `safe_labels` gives them.
    limit
        Largest weight.
    """
    share_L = labels_BL.float().mean(0)
    both_2L = torch.stack((1 - share_L, share_L))
    return (0.5 / both_2L).clamp(max=limit)
