"""Question-only routers trained and tuned like the gates they are compared with.

Everything that is chosen is chosen on calibration samples: the kind of features, the objective, the learning
rate and the thresholds.

Shape letters: L decoder layers, F features, S settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration.operating_points import OperatingPoints, compute_to_reach, mixed, mixture_at
from dyvte.calibration.path import Labels
from dyvte.comparison.question_features import Featurise
from dyvte.comparison.router import (
    NEVER,
    QuestionRouter,
    router_points,
    router_threshold,
    train_routers,
)
from dyvte.comparison.router_training import RouterSettings, router_steps
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.schedule_router import KINDS as SCHEDULE_RULES
from dyvte.comparison.schedule_router import Kind, ScheduleRouter, schedule_curve, train_schedule_routers
from dyvte.comparison.tuned_gates import budget_grid
from dyvte.distributed import Processes
from dyvte.errors import ConfigError
from dyvte.gates import GateConfig, GateStack
from dyvte.objectives import ExpectedRisk, answer_loss
from dyvte.progress import Advance, progress

ROUTER_LEARNING_RATES = (1e-3, 3e-3)
ROUTER_MIN_STEPS = 1000

Curve = Callable[[Tensor, Tensor], OperatingPoints]
"""From features and visual tokens of other questions to a rule's operating points."""


@dataclass(frozen=True)
class TunedRouter:
    """A trained question-only router with its curve of settings found on calibration scenes."""

    kind: str
    featurise: Featurise
    router: QuestionRouter | ScheduleRouter
    curve: Curve
    calibration_curve: tuple[np.ndarray, np.ndarray, np.ndarray]
    """Visual compute, loss and same answer on the calibration scenes at those settings."""
    settings: RouterSettings

    def calibration_loss(self, budget: float) -> float:
        """Loss on the calibration scenes at a visual compute, by mixing neighbouring settings."""
        compute_S, loss_S, _ = self.calibration_curve
        return mixed(loss_S, mixture_at(compute_S, budget))

    def calibration_compute(self, same_answer: float) -> float:
        """Visual compute that keeps a share of the calibration scenes' answers; infinite if none does."""
        compute_S, _, same_S = self.calibration_curve
        found = compute_to_reach(compute_S, same_S, same_answer)
        return float("inf") if np.isnan(found) else found

    def points(self, questions: Sequence[str], num_visual_B: Tensor) -> OperatingPoints:
        """The curve on other questions.

        Parameters
        ----------
        questions
            All.
        num_visual_B
            (B,) visual tokens.
        """
        return self.curve(self.featurise(questions), num_visual_B)


class _Candidate(NamedTuple):
    """What a process tells the others of a router: the fields of `TunedRouter` after the first two."""

    router: QuestionRouter | ScheduleRouter
    curve: Curve
    calibration_curve: tuple[np.ndarray, np.ndarray, np.ndarray]
    settings: RouterSettings


@dataclass(frozen=True)
class TrainingRecord:
    """What a gates checkpoint says of its training, as far as a router repeats it.

    Attributes
    ----------
    lam : price of a layer, nats; None where the objective has none, or nothing is recorded.
    span : range of prices; what `ExpectedRisk` trains with where it is not recorded.
    epochs : passes over the samples.
    seed : of the training.
    loss, memory_price : what the gates learned from, and the price of KV memory.
    """

    lam: float | None
    span: float
    epochs: float
    seed: int
    loss: str = "risk"
    memory_price: float = 0.0

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
            loss=str(objective.get("loss", "risk")),
            memory_price=float(objective.get("memory_price", 0.0)),
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
        loss=record.loss,
        memory_price=record.memory_price,
    )


def train_router_candidates(
    features: Mapping[str, Featurise],
    train: TracedScenes,
    calibration: TracedScenes,
    settings_P: Sequence[RouterSettings],
    *,
    freezes: bool = False,
    processes: Processes | None = None,
) -> list[list[TunedRouter]]:
    """For each of the settings, routers on each kind of features, of each kind of rule, with each rate.

    Of exits: one price, or the gates' range of prices. With ``freezes`` of schedules, as gates with a freeze
    head choose them: both kinds of `dyvte.comparison.schedule_router`.

    Parameters
    ----------
    features
        Inputs, by kind.
    train
        What routers learn from.
    calibration
        What their thresholds are chosen on.
    settings_P
        Of the trainings: one for each of the gates that are compared.
    freezes
        Choose schedules in place of exits.
    processes
        That share the trainings; None: this one alone. Each gets all that is found.
    """
    processes = processes or Processes()
    rules: tuple[Kind | None, ...] = SCHEDULE_RULES if freezes else (None,)
    # Rules take unequally long; every process gets as many of each.
    jobs = [(seed, kind, rule) for rule in rules for seed in range(len(settings_P)) for kind in features]
    own = processes.share(jobs)
    steps = sum(router_steps(len(train.questions), settings_P[seed]) for seed, _, _ in own)
    found = []
    with progress(steps, "question-only routers", "step", shown=processes.first) as advance, _one_thread():
        for seed, kind, rule in own:
            samples = (features[kind], train, calibration, settings_P[seed])
            if rule is None:
                found.append(_exit_candidates(*samples, advance))
            else:
                found.append(_schedule_candidates(rule, *samples, advance))
    by_job = dict(zip(jobs, processes.together(found), strict=True))
    return [
        [
            TunedRouter(kind if rule is None else f"{kind}, {rule}", features[kind], *one)
            for kind in features
            for rule in rules
            for one in by_job[seed, kind, rule]
        ]
        for seed in range(len(settings_P))
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """A router's step is many small operations: threads wait for each other more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _exit_candidates(
    featurise: Featurise,
    train: TracedScenes,
    calibration: TracedScenes,
    settings: RouterSettings,
    advance: Advance,
) -> list[_Candidate]:
    tried = [
        dataclasses.replace(settings, learning_rate=rate, span=span)
        for span in sorted({1.0, settings.span})
        for rate in ROUTER_LEARNING_RATES
    ]
    routers = train_routers(featurise(train.questions), train.trace, tried, advance)
    features_BF, num_visual_B = featurise(calibration.questions), calibration.trace.num_visual
    found = []
    for router, chosen in zip(routers, tried, strict=True):
        readiness_BL = router.readiness(features_BF)
        grid = budget_grid(calibration.num_layers)
        thresholds = {router_threshold(readiness_BL, num_visual_B, b) for b in grid} | {NEVER}
        curve = partial(_exit_points, router, tuple(sorted(thresholds)))
        found.append(_judged(router, curve, features_BF, calibration, chosen))
    return found


def _exit_points(
    router: QuestionRouter, thresholds: Sequence[float], features_BF: Tensor, num_visual_B: Tensor
) -> OperatingPoints:
    return router_points("question-only router", router.readiness(features_BF), num_visual_B, thresholds)


def _schedule_candidates(
    rule: Kind,
    featurise: Featurise,
    train: TracedScenes,
    calibration: TracedScenes,
    settings: RouterSettings,
    advance: Advance,
) -> list[_Candidate]:
    tried = [dataclasses.replace(settings, learning_rate=rate) for rate in ROUTER_LEARNING_RATES]
    features_BF, found = featurise(calibration.questions), []
    routers = train_schedule_routers(featurise(train.questions), train.trace, rule, tried, advance)
    for router, chosen in zip(routers, tried, strict=True):
        curve = schedule_curve(router, features_BF, calibration.trace, chosen.loss)
        found.append(_judged(router, curve, features_BF, calibration, chosen))
    return found


def best_router(candidates: Sequence[TunedRouter], budget: float) -> TunedRouter:
    """The candidate with the least loss at ``budget`` on the calibration scenes.

    Parameters
    ----------
    candidates
        Of one seed.
    budget
        Share of the full model's visual compute.
    """
    return min(candidates, key=lambda router: router.calibration_loss(budget))


def thriftiest_router(candidates: Sequence[TunedRouter], same_answer: float) -> TunedRouter:
    """The candidate that keeps this share of the answers of the calibration scenes for the least compute."""
    return min(candidates, key=lambda router: router.calibration_compute(same_answer))


def _judged(
    router: QuestionRouter | ScheduleRouter,
    curve: Curve,
    features_BF: Tensor,
    calibration: TracedScenes,
    settings: RouterSettings,
) -> _Candidate:
    trace = calibration.trace
    points = curve(features_BF, trace.num_visual)
    loss = points.means_S(Labels(answer_loss(trace, settings.loss), trace.freezes))
    same = points.means_S(Labels.of(trace, "same_answer"))
    return _Candidate(router, curve, (points.compute_S, loss, same), settings)
