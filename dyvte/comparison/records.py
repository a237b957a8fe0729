"""What comparisons are made of: a metric's curve over visual compute, and how seeds spread.

Shape letters: S settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dyvte.calibration.operating_points import OperatingPoints
from dyvte.calibration.path import Labels
from dyvte.teacher.trace import Trace

METRICS = {"risk": True, "same_answer": False, "agreement": False}
"""Metrics of a trace, and whether less is better."""


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (over n - 1; 0 for one value), least and most of a few values."""

    mean: float
    std: float
    min: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one value, one per seed."""
        column = np.asarray(values, dtype=np.float64)
        deviation = float(column.std(ddof=1)) if len(column) > 1 else 0.0
        return Spread(float(column.mean()), deviation, float(column.min()), float(column.max()))


@dataclass(frozen=True)
class Curve:
    """What a rule keeps over what it spends, at every setting of its knob.

    Attributes
    ----------
    settings : thresholds, prices or K.
    compute : visual compute.
    metrics : means over samples, by metric.
    """

    settings: tuple[float, ...]
    compute: tuple[float, ...]
    metrics: Mapping[str, tuple[float, ...]]

    @staticmethod
    def on_trace(points: Mapping[str, OperatingPoints], trace: Trace) -> Curve:
        """Of operating points on traced samples.

        Parameters
        ----------
        points : by metric (fixed K has another hull for each); the settings are those of the first.
        trace : of the samples.
        """
        first = next(iter(points.values()))
        return Curve(
            first.settings_S,
            tuple(first.compute_S.tolist()),
            {name: tuple(own.means_S(Labels.of(trace, name)).tolist()) for name, own in points.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, one list for each column."""
        columns = {name: list(values) for name, values in self.metrics.items()}
        return {"setting": list(self.settings), "compute": list(self.compute), **columns}


def on_every_metric(points: OperatingPoints) -> dict[str, OperatingPoints]:
    """The points of a rule that is the same for every metric."""
    return dict.fromkeys(METRICS, points)


@dataclass(frozen=True)
class RuleCurves:
    """Curves of every rule on the same samples.

    Attributes
    ----------
    fixed : every fixed K, whether on the hull or not.
    oracle : what knows the outcome of every exit.
    gates, router : by seed.
    static : every static schedule (f, k), hull or not, where the gates choose schedules.
    schedule_oracle : what knows the outcome of every schedule; likewise.
    """

    fixed: Curve
    oracle: Curve
    gates: Mapping[str, Curve]
    router: Mapping[str, Curve]
    static: Curve | None = None
    schedule_oracle: Curve | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what there is not is omitted."""
        schedules = {"static": self.static, "schedule_oracle": self.schedule_oracle}
        return {
            "fixed": self.fixed.to_dict(),
            "oracle": self.oracle.to_dict(),
            "gates": {name: curve.to_dict() for name, curve in self.gates.items()},
            "router": {name: curve.to_dict() for name, curve in self.router.items()},
            **{name: curve.to_dict() for name, curve in schedules.items() if curve is not None},
        }


def plain(record: Any) -> Any:
    """A record as JSON-ready values: by its own ``to_dict`` where it has one, else field by field."""
    if hasattr(record, "to_dict"):
        return record.to_dict()
    if dataclasses.is_dataclass(record):
        return {field.name: plain(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, Mapping):
        return {key: plain(value) for key, value in record.items()}
    if isinstance(record, tuple | list):
        return [plain(value) for value in record]
    return record
