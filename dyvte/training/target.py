"""What gates are wanted for, and the trainings that are tried where that is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dyvte.errors import ConfigError
from dyvte.objectives import ExpectedRisk, Objective, SafeLabel
from dyvte.objectives.losses import check_loss, is_bounded

OWN = "own"
"""The training as the configuration has it; always among those that are tried."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a training that is tried changes; the rest is the run's own.

    Parameters
    ----------
    objective
        What the gates minimise.
    learning_rate, weight_decay
        Of the optimiser.
    architecture
        Of new gates.
    """

    objective: Objective
    learning_rate: float = 5e-3
    weight_decay: float = 0.3
    architecture: str = "scaled"


_ANSWER = "same_answer+risk:1"
CANDIDATES: Mapping[str, Recipe] = {
    "answer": Recipe(objective=ExpectedRisk(loss=_ANSWER)),
    "answer-slow": Recipe(objective=ExpectedRisk(loss=_ANSWER), learning_rate=1e-3),
    "risk": Recipe(objective=ExpectedRisk()),
    "safe": Recipe(objective=SafeLabel()),
}
"""Trainings that are tried beside the run's own: none is best on every backbone and for every target."""


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What the gates are wanted for. Nothing: one training, as configured. Else several trainings of the same
    traces, and the one that is best for it on held-out images is kept."""

    alpha: float | None = None
    """Mean loss that ``dyvte calibrate --alpha`` is to certify: the gates that spend least there are best."""
    budget: float | None = None
    """Visual compute, as a share of the full model's: the gates that lose least there are best."""
    loss: str = "same_answer"
    """What is lost: "same_answer" or "risk:C", as in ``dyvte calibrate``."""
    held_out: float = 0.2
    """Share of the images that the choice is made on, and no candidate is trained on."""
    candidates: tuple[str, ...] = field(default=(), metadata={"choices": CANDIDATES})
    """Trainings to try beside the run's own; empty: all."""

    def __post_init__(self) -> None:
        if self.alpha is not None and self.budget is not None:
            raise ConfigError("target: give alpha or budget, not both")
        for name in ("alpha", "budget", "held_out"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ConfigError(f"target.{name} must lie in (0, 1), found {value}")
        check_loss(self.loss)
        if not is_bounded(self.loss):
            raise ConfigError(f"target.loss: {self.loss!r} has no bound: expected same_answer or risk:C")
        if unknown := [name for name in self.candidates if name not in CANDIDATES]:
            raise ConfigError(f"target.candidates: unknown {unknown}; known: {', '.join(CANDIDATES)}")

    @property
    def is_set(self) -> bool:
        """Is anything wanted?"""
        return self.alpha is not None or self.budget is not None
