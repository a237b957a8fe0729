"""The label rule of DyVTE's reference code (arXiv 2411.19628), read off a trace.

The reference simulates one random exit layer per step for the whole batch. A trace holds all of them, so the
same rule can train every gate in every step; ``layer`` restores the reference's schedule.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from dyvte.objectives.base import OBJECTIVES, Objective
from dyvte.teacher.trace import Trace

MIN_AGREEMENT = 0.99
LOSS_SCALE = 1.03


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class ReferenceLabel(Objective):
    """Cross-entropy on the label rule of DyVTE's reference code; see :func:`reference_label`."""

    name: Literal["reference_label"] = "reference_label"
    """Chooses this objective."""
    one_layer_per_step: bool = False
    """Train one random gate per step, as the reference does; else all."""

    def prepared(self, train: Trace) -> Callable[..., Tensor]:
        """The loss; nothing need be known beforehand."""
        return reference_label


def reference_labels(trace: Trace) -> Tensor:
    """(B, L) bool, column k-1: agreement_k > 0.99 and loss_k < 1.03 loss_full, both strict.

    The reference's cross-entropy is on the ground truth, so the trace needs ``label_source="data"`` to
    reproduce it; its defect with token id 0 (in the sum of the loss, not in the count) is not reproduced. A
    full loss of exactly 0 gives label 0 everywhere, there as here.

    Parameters
    ----------
    trace:
        B samples; its ``agreement`` and ``loss`` are read.
    """
    agrees_BL = trace.agreement[:, 1:] > MIN_AGREEMENT
    return agrees_BL & (trace.loss[:, 1:] < LOSS_SCALE * trace.loss[:, -1:])


def reference_label(logits_BL: Tensor, trace: Trace, *, layer: int | None = None) -> Tensor:
    """Mean cross-entropy of the gates against :func:`reference_labels`.

    Two-way cross-entropy over (stay, exit) equals binary cross-entropy of their difference, which is what
    ``logits_BL`` holds.

    Parameters
    ----------
    logits_BL:
        (B, L), or with ``layer`` (B,) or (B, 1): that gate alone, so that no other gate gets a gradient.
    trace:
        The same B samples.
    layer:
        1..L-1: only the gate after this layer (the reference's one random layer per step). None: all gates
        at labelled exits, L omitted.
    """
    labels_BL = reference_labels(trace).to(logits_BL.device)
    if layer is None:
        gates = trace.labelled_gates
        return binary_cross_entropy_with_logits(logits_BL[:, gates].float(), labels_BL[:, gates].float())
    if layer < trace.num_layers and layer not in trace.exits:
        raise ValueError(f"layer {layer} has no label: these traces are thinned to {trace.exits}")
    if not 1 <= layer < trace.num_layers:
        raise ValueError(f"layer must lie in 1..{trace.num_layers - 1}, found {layer}")
    logits_B = logits_BL.reshape(len(trace), -1)
    logits_B = logits_B[:, 0 if logits_B.shape[1] == 1 else layer - 1]
    return binary_cross_entropy_with_logits(logits_B.float(), labels_BL[:, layer - 1].float())
