"""Gates of one seed and the question-only router tuned like them, ready to be compared.

Everything that is chosen is chosen on calibration scenes: thresholds, the router's kind and learning rate,
the fixed layers of a mixture. Test scenes are only looked at.

Shape letters: B samples, L decoder layers, S settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration import threshold_for_compute, visual_compute
from dyvte.calibration.operating_points import OperatingPoints, gate_logits, mixed, mixture_at
from dyvte.comparison.router import (
    NEVER,
    QuestionRouter,
    RouterSettings,
    router_points,
    router_threshold,
    train_routers,
)
from dyvte.comparison.scenes import TracedScenes
from dyvte.errors import CalibrationError, ConfigError
from dyvte.gates import GateConfig, GateStack, exit_layers, load_checkpoint
from dyvte.objectives import ExpectedRisk

Featurise = Callable[[Sequence[str]], Tensor]
ROUTER_LEARNING_RATES = (1e-3, 3e-3)
ROUTER_MIN_STEPS = 1000


@dataclass(frozen=True)
class GateContender:
    """Trained gates with their decision rule and the curve of thresholds found on calibration scenes."""

    name: str
    gates: GateStack
    threshold: float
    min_layer: int
    fallback: int | None
    curve_thresholds: tuple[float, ...]
    budget: float
    """Visual compute on the calibration scenes at ``threshold``."""

    @property
    def num_parameters(self) -> int:
        """Of all gates that decide."""
        return self.gates.num_deciding_parameters

    def exits(self, logits_BL: Tensor, threshold: float | None = None) -> Tensor:
        """(B,) exit layers that the rule draws from logits."""
        t = self.threshold if threshold is None else threshold
        return exit_layers(logits_BL, t, self.min_layer, self.fallback)

    def points(self, logits_BL: Tensor, num_visual_B: Tensor) -> OperatingPoints:
        """The threshold curve on other samples."""
        exits_SB = torch.stack([self.exits(logits_BL, t) for t in self.curve_thresholds])
        return OperatingPoints(self.name, self.curve_thresholds, exits_SB, num_visual_B, logits_BL.shape[1])

    def points_on(self, scenes: TracedScenes) -> OperatingPoints:
        """The threshold curve on traced scenes."""
        return self.points(gate_logits(self.gates, scenes.trace, scenes.features), scenes.trace.num_visual)

    def operating_point(self, logits_BL: Tensor, num_visual_B: Tensor) -> OperatingPoints:
        """The one point of the stored threshold."""
        exits_1B = self.exits(logits_BL)[None]
        return OperatingPoints(self.name, (self.threshold,), exits_1B, num_visual_B, logits_BL.shape[1])


@dataclass(frozen=True)
class RouterContender:
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
class VtwChoice:
    """VTW's fixed layer: by eta as published, and by an eta chosen on calibration where none qualifies."""

    k: int | None
    eta: float
    calibrated_k: int | None
    calibrated_eta: float | None
    kl: tuple[float, ...]

    def layers(self) -> list[int]:
        """The K to run."""
        return [k for k in (self.k, self.calibrated_k) if k is not None]


def budget_grid(num_layers: int) -> list[float]:
    """Visual compute from one layer to all of them, four steps a layer."""
    return [float(b) for b in np.linspace(1 / num_layers, 1.0, 4 * (num_layers - 1) + 1)]


def load_gates(folder: str | Path, name: str, calibration: TracedScenes) -> GateContender:
    """Gates of a checkpoint folder; their thresholds over budgets come from the calibration scenes.

    Raises
    ------
    ConfigError
        The folder holds no gates, or they do not fit the traces.
    """
    config, gates = load_checkpoint(folder)
    if gates is None or config.mode == "fixed":
        raise ConfigError(f"{folder} describes a fixed exit; a comparison needs trained gates")
    if config.num_layers != calibration.num_layers:
        raise ConfigError(
            f"{folder}: gates for {config.num_layers} layers, traces of {calibration.num_layers} layers"
        )
    logits_BL = gate_logits(gates, calibration.trace, calibration.features)
    num_visual_B = calibration.trace.num_visual
    thresholds = set()
    for budget in budget_grid(config.num_layers):
        try:
            found = threshold_for_compute(logits_BL, num_visual_B, budget, min_layer=config.min_layer)
        except CalibrationError:
            continue  # below what leaving at min_layer costs
        thresholds.add(found)
    exits_B = exit_layers(logits_BL, config.threshold, config.min_layer, config.fallback)
    return GateContender(
        name=name,
        gates=gates,
        threshold=config.threshold,
        min_layer=config.min_layer,
        fallback=config.fallback,
        curve_thresholds=tuple(sorted(thresholds | {NEVER})),
        budget=visual_compute(exits_B, num_visual_B, config.num_layers),
    )


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
) -> list[RouterContender]:
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
            found.append(_contender(kind, featurise, router, features_BF, calibration, chosen))
    return found


def best_router(candidates: Sequence[RouterContender], budget: float) -> RouterContender:
    """The candidate with the least risk at ``budget`` on the calibration scenes."""
    return min(candidates, key=lambda contender: contender.calibration_risk(budget))


def _contender(
    kind: str,
    featurise: Featurise,
    router: QuestionRouter,
    features_BF: Tensor,
    calibration: TracedScenes,
    settings: RouterSettings,
) -> RouterContender:
    readiness_BL = router.readiness(features_BF)
    num_visual_B = calibration.trace.num_visual
    grid = budget_grid(calibration.num_layers)
    thresholds = tuple(sorted({router_threshold(readiness_BL, num_visual_B, b) for b in grid} | {NEVER}))
    points = router_points(kind, readiness_BL, num_visual_B, thresholds)
    curve = (points.compute_S, points.means_S(calibration.trace.risk))
    return RouterContender(kind, featurise, router, thresholds, curve, settings)
