"""When a row leaves, given its gates' logits: the one place of the decision rule.

Shapes: B rows, L decoder layers. Layer numbers k are 1-based: gate k reads the output of the k-th layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dyvte.errors import ConfigError

CLOSED = -1e30
"""Offset of a gate that never fires, at any threshold; finite, so that it is no broken gate either."""


def uniform_offsets(num_layers: int, exits: Collection[int] | None = None) -> tuple[float, ...]:
    """Offsets that make all exits equally likely at logit 0: minus the log of how many come after, 0 for L.

    ``exits`` are the exit layers that may be taken (None: all); gates at the others are closed.
    """
    allowed = set(range(1, num_layers + 1)) if exits is None else {*exits, num_layers}
    later = [sum(j > k for j in allowed) for k in range(1, num_layers)]
    return (*(-math.log(n) if k in allowed else CLOSED for k, n in enumerate(later, start=1)), 0.0)


def close_gates(offsets: Sequence[float], exits: Collection[int]) -> tuple[float, ...]:
    """The offsets, with the gates closed whose layer is not among ``exits``."""
    return tuple(x if k in exits or k == len(offsets) else CLOSED for k, x in enumerate(offsets, start=1))


def is_open(offset: float) -> bool:
    """Can a gate with this offset fire?"""
    return offset > CLOSED / 2


def logit_threshold(threshold: float) -> float:
    """log(t / (1 - t)); infinite at the ends."""
    if threshold >= 1.0:
        return math.inf
    return math.log(threshold / (1.0 - threshold)) if threshold > 0.0 else -math.inf


def check_rule(
    num_layers: int | None, threshold: float, min_layer: int, fallback: int | None, mode: str = "gates"
) -> None:
    """Raise ConfigError where the settings of the decision rule make no sense; L may be unknown yet."""
    if not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"threshold {threshold}: expected a probability in 0..1")
    if min_layer < 1:
        raise ConfigError(
            f"min_layer {min_layer}: the first gate is gate 1; for exits before any layer use fixed(0)"
        )
    if mode not in ("gates", "fixed"):
        raise ConfigError(f"mode {mode!r}: expected 'gates' or 'fixed'")
    top = "L" if num_layers is None else str(num_layers)
    if fallback is not None and (fallback < 0 or (num_layers is not None and fallback > num_layers)):
        raise ConfigError(f"exit layer {fallback}: expected 0..{top} (the backbone has {top} decoder layers)")


class ExitRule:
    """The decision rule, one layer at a time; `exit_layers` and the runtime both go through it.

    A row leaves at the first k >= min_layer whose logit is strictly above log(t / (1 - t)). A logit that is
    not finite makes its row stop asking and leave at max(that layer, fallback); without a fallback: never.
    Gates 1..L-1 decide.
    """

    def __init__(
        self,
        num_rows: int,
        num_layers: int,
        threshold: float,
        min_layer: int = 1,
        fallback: int | None = None,
    ) -> None:
        check_rule(num_layers, threshold, min_layer, fallback)
        self.cut = max(logit_threshold(threshold), CLOSED / 2)  # at threshold 0 a closed gate stays closed
        self.num_layers = num_layers
        self.min_layer = min_layer
        self.fallback = num_layers if fallback is None else fallback
        self.exit_layers_B = torch.full((num_rows,), num_layers, dtype=torch.int64)
        self.asking_B = torch.ones(num_rows, dtype=torch.bool)
        self.fallback_B = torch.zeros(num_rows, dtype=torch.bool)

    def wants(self, k: int) -> bool:
        """Does any row still need gate k?"""
        return self.min_layer <= k < self.num_layers and bool(self.asking_B.any())

    def step(self, k: int, logits_B: Tensor) -> None:
        """Take in the logits (on CPU) of gate k."""
        broken_B = self.asking_B & ~torch.isfinite(logits_B)
        fires_B = self.asking_B & ~broken_B & (logits_B > self.cut)
        self.exit_layers_B[fires_B] = k
        self.exit_layers_B[broken_B] = max(k, self.fallback)
        self.fallback_B |= broken_B
        self.asking_B &= ~(broken_B | fires_B)


def exit_layers(
    logits_BL: Tensor, threshold: float, min_layer: int = 1, fallback: int | None = None
) -> Tensor:
    """(B,) int64 exit layers that the rule (`ExitRule`) draws from all gates' logits."""
    logits_BL = logits_BL.detach().cpu()
    rule = ExitRule(logits_BL.shape[0], logits_BL.shape[1], threshold, min_layer, fallback)
    for k in range(1, logits_BL.shape[1]):
        if rule.wants(k):
            rule.step(k, logits_BL[:, k - 1])
    return rule.exit_layers_B


def exit_probabilities(logits_BL: Tensor) -> Tensor:
    """(B, L) log P_k of leaving at k: h_k times the chance not to have left before; column L-1 is the rest.

    h_k = sigmoid(logit_k). All in log space; the logit of gate L is not read.
    """
    logits_BK = logits_BL[:, :-1]
    if logits_BL.dtype not in (torch.float32, torch.float64):
        logits_BK = logits_BK.float()
    log_stay_BK = F.logsigmoid(-logits_BK).cumsum(1)
    before_BL = F.pad(log_stay_BK, (1, 0))
    return before_BL + F.pad(F.logsigmoid(logits_BK), (0, 1))
