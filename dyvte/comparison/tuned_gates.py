"""Trained gates, ready to be compared: their decision rule, and thresholds found on calibration samples.

Shape letters: B samples, L decoder layers, S settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration import gate_logits, threshold_for_compute
from dyvte.calibration.operating_points import OperatingPoints
from dyvte.comparison.router import NEVER
from dyvte.comparison.scenes import TracedScenes
from dyvte.costs.visual import visual_compute
from dyvte.errors import CalibrationError, ConfigError
from dyvte.gates import GateStack, exit_layers, load_checkpoint


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


def budget_grid(num_layers: int) -> list[float]:
    """Visual compute from one layer to all of them, four steps a layer."""
    return [float(b) for b in np.linspace(1 / num_layers, 1.0, 4 * (num_layers - 1) + 1)]


def load_gates(folder: str | Path, name: str, calibration: TracedScenes) -> TunedGates:
    """Gates of a checkpoint folder; their thresholds over budgets come from the calibration scenes.

    Raises
    ------
    ConfigError
        The folder holds no gates, or they do not fit the traces, or have a freeze head.
    """
    config, gates = load_checkpoint(folder)
    if gates is None or config.mode == "fixed":
        raise ConfigError(f"{folder} describes a fixed exit; a comparison needs trained gates")
    if config.freeze_head:
        raise ConfigError(f"{folder}: gates with a freeze head; a comparison needs gates of exits alone")
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
    return TunedGates(
        name=name,
        gates=gates,
        threshold=config.threshold,
        min_layer=config.min_layer,
        fallback=config.fallback,
        curve_thresholds=tuple(sorted(thresholds | {NEVER})),
        budget=visual_compute(exits_B, num_visual_B, config.num_layers),
    )
