"""Losses that turn a trace into gates: one file each, registered under its name in configurations."""

from dyvte.objectives.base import OBJECTIVES, Objective
from dyvte.objectives.expected_risk import ExpectedRisk, ScheduleCosts, expected_risk
from dyvte.objectives.losses import answer_loss
from dyvte.objectives.reference_label import ReferenceLabel, reference_label, reference_labels
from dyvte.objectives.safe_label import SafeLabel, safe_label, safe_labels

__all__ = [
    "OBJECTIVES",
    "ExpectedRisk",
    "Objective",
    "ReferenceLabel",
    "SafeLabel",
    "ScheduleCosts",
    "answer_loss",
    "expected_risk",
    "reference_label",
    "reference_labels",
    "safe_label",
    "safe_labels",
]
