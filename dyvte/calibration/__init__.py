"""From gate logits to decisions: thresholds for a budget or a bounded risk, and VTW's fixed layer."""

from __future__ import annotations

from dyvte.calibration.apply import (
    Calibration,
    calibrate_compute,
    calibrate_risk,
    write_calibration,
    write_fixed_layer,
)
from dyvte.calibration.choosing import Frontier, best_frontier
from dyvte.calibration.compute import threshold_for_budget, threshold_for_compute
from dyvte.calibration.groups import Grouping, calibrate_groups
from dyvte.calibration.operating_points import at_exit, gate_logits
from dyvte.calibration.path import ThresholdPath, at_schedule, threshold_at
from dyvte.calibration.plot import check_plot, plot_search
from dyvte.calibration.profile import measure_profile
from dyvte.calibration.risk import RiskThreshold, certified_threshold, threshold_for_risk
from dyvte.calibration.shift import ShiftTest, two_sample_test
from dyvte.calibration.vtw import LayerSearch, search_exit_layer
from dyvte.costs.visual import visual_compute

__all__ = [
    "Calibration",
    "Frontier",
    "Grouping",
    "LayerSearch",
    "RiskThreshold",
    "ShiftTest",
    "ThresholdPath",
    "at_exit",
    "at_schedule",
    "best_frontier",
    "calibrate_compute",
    "calibrate_groups",
    "calibrate_risk",
    "certified_threshold",
    "check_plot",
    "gate_logits",
    "measure_profile",
    "plot_search",
    "search_exit_layer",
    "threshold_at",
    "threshold_for_budget",
    "threshold_for_compute",
    "threshold_for_risk",
    "two_sample_test",
    "visual_compute",
    "write_calibration",
    "write_fixed_layer",
]
