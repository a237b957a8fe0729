"""Question-only routers trained and tuned like the gates they are compared with.

Everything that is chosen is chosen on calibration samples: the kind of features, the objective, the learning
rate and the thresholds.

Shape letters: L decoder layers, F features, S settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dyvte.calibration.operating_points import OperatingPoints, mixed, mixture_at
from dyvte.comparison.question_features import Featurise
from dyvte.comparison.router import (
    NEVER,
    QuestionRouter,
    RouterSettings,
    router_points,
    router_threshold,
    train_routers,
)
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.tuned_gates import budget_grid
from dyvte.errors import ConfigError
from dyvte.gates import GateConfig, GateStack
from dyvte.objectives import ExpectedRisk

ROUTER_LEARNING_RATES = (1e-3, 3e-3)
ROUTER_MIN_STEPS = 1000


@dataclass(frozen=True)
class TunedRouter:
    """A trained question-only router with its curve of thresholds found on calibration scenes."""

    kind: str
    featurise: Featurise
    router: QuestionRouter
    curve_thresholds: tuple[float, ...]
    calibration_curve: tuple[np.ndarray, np.ndarray]
    """Visual compute and risk on the calibration scenes at those thresholds."""
    settings: RouterSettings

    def calibration_risk(self, budget: float) -> float:
        """Risk on the calibration scenes at a visual compute, by mixing neighbouring thresholds."""
        compute_S, risk_S = self.calibration_curve
        return mixed(risk_S, mixture_at(compute_S, budget))

    def points(self, questions: Sequence[str], num_visual_B: Tensor) -> OperatingPoints:
        """The threshold curve on other questions."""
        readiness_BL = self.router.readiness(self.featurise(questions))
        return router_points("question-only router", readiness_BL, num_visual_B, self.curve_thresholds)


@dataclass(frozen=True)
class TrainingRecord:
    """What a gates checkpoint says of its training, as far as a router repeats it.

    Attributes
    ----------
    lam : price of a layer, nats; None where the objective has none, or nothing is recorded.
    span : range of prices; what `ExpectedRisk` trains with where it is not recorded.
    epochs : passes over the samples.
    seed : of the training.
    """

    lam: float | None
    span: float
    epochs: float
    seed: int

    @staticmethod
    def of(config: GateConfig) -> TrainingRecord:
        """The record at its places in ``gate_config.json``: ``objective`` holds price and range."""
        record, objective = config.training, config.training.get("objective") or {}
        lam = objective.get("lam")
        return TrainingRecord(
            lam=None if lam is None else float(lam),
            span=float(objective.get("span", ExpectedRisk().span)),
            epochs=float(record.get("epochs", 1)),
            seed=int(record.get("seed", 0)),
        )


def training_settings(
    gates: GateStack, num_samples: int, *, lam: float | None = None, batch_size: int = 256
) -> RouterSettings:
    """Router settings equal to those the gates were trained with; never fewer epochs, and enough steps.

    Parameters
    ----------
    gates : with the record of their training.
    num_samples : samples that the router learns from.
    lam : price of a layer in nats; None: the recorded one.
    batch_size : of the router's training.

    Raises
    ------
    ConfigError
        No price is given and none recorded.
    """
    record = TrainingRecord.of(gates.config)
    lam = record.lam if lam is None else lam
    if lam is None:
        raise ConfigError(
            "gate_config.json does not record the lam of its training: the question-only router must be "
            "trained with the same; give --lam"
        )
    enough = -(-ROUTER_MIN_STEPS * batch_size // max(1, num_samples))
    return RouterSettings(
        lam=lam,
        span=record.span,
        epochs=max(int(record.epochs), 1, enough),
        batch_size=batch_size,
        seed=record.seed,
        min_parameters=gates.num_deciding_parameters,
    )


def train_router_candidates(
    features: Mapping[str, Featurise],
    train: TracedScenes,
    calibration: TracedScenes,
    settings: RouterSettings,
    advance: Callable[[int], object] | None = None,
) -> list[TunedRouter]:
    """Routers on each kind of features, with each objective (one price, or the gates' range of prices) and
    learning rate; ``advance`` as in `train_routers`."""
    tried = [
        dataclasses.replace(settings, learning_rate=rate, span=span)
        for span in sorted({1.0, settings.span})
        for rate in ROUTER_LEARNING_RATES
    ]
    found = []
    for kind, featurise in features.items():
        routers = train_routers(featurise(train.questions), train.trace, tried, advance)
        features_BF = featurise(calibration.questions)
        for router, chosen in zip(routers, tried, strict=True):
            found.append(_tuned(kind, featurise, router, features_BF, calibration, chosen))
    return found


def best_router(candidates: Sequence[TunedRouter], budget: float) -> TunedRouter:
    """The candidate with the least risk at ``budget`` on the calibration scenes."""
    return min(candidates, key=lambda router: router.calibration_risk(budget))


def _tuned(
    kind: str,
    featurise: Featurise,
    router: QuestionRouter,
    features_BF: Tensor,
    calibration: TracedScenes,
    settings: RouterSettings,
) -> TunedRouter:
    readiness_BL = router.readiness(features_BF)
    num_visual_B = calibration.trace.num_visual
    grid = budget_grid(calibration.num_layers)
    thresholds = tuple(sorted({router_threshold(readiness_BL, num_visual_B, b) for b in grid} | {NEVER}))
    points = router_points(kind, readiness_BL, num_visual_B, thresholds)
    curve = (points.compute_S, points.means_S(calibration.trace.risk))
    return TunedRouter(kind, featurise, router, thresholds, curve, settings)
