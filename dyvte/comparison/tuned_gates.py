"""Trained gates, ready to be compared: their decision rule, and thresholds found on calibration samples.

Shape letters: B samples, L decoder layers, S settings.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration import ThresholdPath, gate_logits, threshold_for_compute
from dyvte.calibration.operating_points import OperatingPoints
from dyvte.calibration.path import threshold_at
from dyvte.comparison.router import NEVER
from dyvte.comparison.scenes import TracedScenes
from dyvte.errors import CalibrationError, ConfigError
from dyvte.gates import GateStack, HeadLogits, Schedules, follow_threshold, load_checkpoint, schedules

CURVE_LEVELS = 160
"""Levels of the threshold on a curve of gates with a freeze head."""


@dataclass(frozen=True)
class TunedGates:
    """Trained gates with their decision rule and the curve of thresholds found on calibration scenes."""

    name: str
    gates: GateStack
    threshold: float
    min_layer: int
    fallback: int | None
    curve_thresholds: tuple[float, ...]
    budget: float
    """Visual compute on the calibration scenes at ``threshold``."""
    kv_share: float = math.nan
    """Of the backbone, where the gates have a freeze head."""

    @property
    def num_parameters(self) -> int:
        """Of all gates that decide."""
        return self.gates.num_deciding_parameters

    @property
    def freezes(self) -> bool:
        """Do they say when visual tokens freeze, too?"""
        return self.gates.config.freeze_head

    def decided(self, logits: Tensor | HeadLogits, threshold: float | None = None) -> Schedules:
        """The schedules that the rule draws; the freeze threshold goes with the exit threshold.

        Parameters
        ----------
        logits
            (B, L), or those of both heads.
        threshold
            Of exiting; None: the stored one.
        """
        t, config = self.threshold if threshold is None else threshold, self.gates.config
        freeze = follow_threshold(config.freeze_threshold, config.threshold, t) if self.freezes else None
        return schedules(logits, t, self.min_layer, self.fallback, freeze)

    def points(self, logits: Tensor | HeadLogits, num_visual_B: Tensor) -> OperatingPoints:
        """The threshold curve on other samples.

        Parameters
        ----------
        logits
            (B, L), or those of both heads.
        num_visual_B
            (B,) visual tokens.
        """
        return self._points(logits, num_visual_B, self.curve_thresholds)

    def points_on(self, scenes: TracedScenes) -> OperatingPoints:
        """The threshold curve on traced scenes."""
        return self.points(gate_logits(self.gates, scenes.trace, scenes.features), scenes.trace.num_visual)

    def operating_point(self, logits: Tensor | HeadLogits, num_visual_B: Tensor) -> OperatingPoints:
        """The one point of the stored threshold.

        Parameters
        ----------
        logits
            (B, L), or those of both heads.
        num_visual_B
            (B,) visual tokens.
        """
        return self._points(logits, num_visual_B, (self.threshold,))

    def _points(
        self, logits: Tensor | HeadLogits, num_visual_B: Tensor, thresholds: tuple[float, ...]
    ) -> OperatingPoints:
        chosen_S = [self.decided(logits, t) for t in thresholds]
        num_layers = self.gates.config.num_layers
        if self.freezes:
            return OperatingPoints.of_schedules(
                self.name, thresholds, chosen_S, num_visual_B, num_layers, self.kv_share
            )
        exits_SB = torch.stack([chosen.exit_layers_B for chosen in chosen_S])
        return OperatingPoints(self.name, thresholds, exits_SB, num_visual_B, num_layers)


def budget_grid(num_layers: int) -> list[float]:
    """Visual compute from one layer to all of them, four steps a layer."""
    return [float(b) for b in np.linspace(1 / num_layers, 1.0, 4 * (num_layers - 1) + 1)]


def read_gates(folder: str | Path) -> GateStack:
    """Trained gates of a checkpoint folder; ConfigError where it describes a fixed exit."""
    config, gates = load_checkpoint(folder)
    if gates is None or config.mode == "fixed":
        raise ConfigError(f"{folder} describes a fixed exit; a comparison needs trained gates")
    return gates


def load_gates(folder: str | Path, name: str, calibration: TracedScenes) -> TunedGates:
    """Gates of a checkpoint folder; the thresholds of their curve come from the calibration scenes.

    Parameters
    ----------
    folder
        Of the checkpoint.
    name
        Of the seed.
    calibration
        Samples that whatever is chosen is chosen on.

    Raises
    ------
    ConfigError
        The folder holds no gates, or they do not fit the traces.
    """
    gates = read_gates(folder)
    config = gates.config
    if config.num_layers != calibration.num_layers:
        raise ConfigError(
            f"{folder}: gates for {config.num_layers} layers, traces of {calibration.num_layers} layers"
        )
    trace = calibration.trace
    if unknown := sorted(set(config.open_freezes) - set(trace.freezes)):
        raise ConfigError(
            f"{folder}: the gates can freeze rows after layers {unknown[:8]}, which the traces do not hold "
            f"(they hold {list(trace.freezes)}): trace with the freeze layers of the gates' training data"
        )
    trace.check_labelled(config.open_gates, f"{folder}: the gates")
    logits = gate_logits(gates, trace, calibration.features)
    path = ThresholdPath.of(logits, trace, config)
    find = levels_of_both if isinstance(logits, HeadLogits) else _thresholds_over_budgets
    tuned = TunedGates(
        name=name,
        gates=gates,
        threshold=config.threshold,
        min_layer=config.min_layer,
        fallback=config.fallback,
        curve_thresholds=tuple(sorted({*find(path), NEVER})),
        budget=math.nan,
        kv_share=path.kv_share,
    )
    return dataclasses.replace(tuned, budget=path.compute(tuned.decided(logits)))


def _thresholds_over_budgets(path: ThresholdPath) -> set[float]:
    """Thresholds of gates without freeze head that meet the budgets of the grid."""
    found = set()
    for budget in budget_grid(path.num_layers):
        try:
            found.add(threshold_for_compute(path.logits, path.num_visual_B, budget, min_layer=path.min_layer))
        except CalibrationError:
            continue  # below what leaving at min_layer costs
    return found


def levels_of_both(path: ThresholdPath, count: int = CURVE_LEVELS) -> set[float]:
    """Thresholds of both heads at ``count`` levels, evenly over those at which some decision changes.

    Of them, those that spend more than all before.

    Parameters
    ----------
    path
        Of the gates.
    count
        Levels of each head.
    """
    levels = path.levels()
    cuts = levels[torch.linspace(0, len(levels) - 1, count).round().long()]
    found, most = set(), -math.inf
    for level in cuts.tolist():
        if (spent := path.compute(path.at(level))) > most + 1e-6:
            found.add(threshold_at(level))
            most = spent
    return found
