"""Exit labels that stay safe: leave after k only if every later exit is harmless too.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dyvte.teacher.trace import Trace


def safe_labels(trace: Trace, epsilon: float) -> Tensor:
    """(B, L) bool, column k-1: risk_j < epsilon for every labelled exit j >= k."""
    harmless_BL = (trace.risk[:, 1:] < epsilon) | ~trace.labelled[1:]
    return harmless_BL.flip(1).cumprod(1).flip(1).bool()


def safe_label(
    logits_BL: Tensor, trace: Trace, *, epsilon: float = 0.01, balance_2L: Tensor | None = None
) -> Tensor:
    """Mean binary cross-entropy of the gates (at labelled exits, L left out) against :func:`safe_labels`.

    ``balance_2L`` (see :func:`class_balance`) weighs stay and exit labels of each layer; without it the
    classes count as they come, which leaves the first gates with almost no exit to learn from.
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
    """
    share_L = labels_BL.float().mean(0)
    both_2L = torch.stack((1 - share_L, share_L))
    return (0.5 / both_2L).clamp(max=limit)
