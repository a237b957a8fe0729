"""Losses that turn a trace into gates: one file each, chosen by name.

Every objective is a function ``(logits_BL, trace, **options) -> scalar``, where ``logits_BL`` are the gates'
exit minus stay logits, offsets included. Column L-1 (gate L) never takes part: there is nothing left to
leave.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.objectives.expected_risk import expected_risk
from dyvte.objectives.reference_label import reference_label, reference_labels
from dyvte.objectives.safe_label import safe_label, safe_labels

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "expected_risk": expected_risk,
    "reference_label": reference_label,
    "safe_label": safe_label,
}


def get_objective(name: str) -> Callable[..., Tensor]:
    """The objective called ``name``; ConfigError lists the known ones."""
    try:
        return OBJECTIVES[name]
    except KeyError:
        raise ConfigError(f"unknown objective {name!r}; known: {', '.join(OBJECTIVES)}") from None


__all__ = [
    "OBJECTIVES",
    "expected_risk",
    "get_objective",
    "reference_label",
    "reference_labels",
    "safe_label",
    "safe_labels",
]
