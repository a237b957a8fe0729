"""Thresholds for many budgets and many bounds at once: what a server offers its requests.

Each entry is what `dyvte calibrate` would have found for it alone. A bound holds by itself, with its own
probability; that all hold together is not said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dyvte.calibration.apply import bounded_loss, check_store, follow_path, trained_on
from dyvte.calibration.compute import threshold_for_budget
from dyvte.calibration.operating_points import gate_logits
from dyvte.calibration.path import ThresholdPath
from dyvte.calibration.risk import certified_threshold
from dyvte.errors import CalibrationError
from dyvte.gates import GateStack
from dyvte.teacher.store import TraceStore

ALPHAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
BUDGETS = tuple(tenth / 10 for tenth in range(1, 10))


def calibration_tables(
    gates: GateStack,
    store: TraceStore,
    *,
    delta: float = 0.1,
    loss: str = "same_answer",
    method: str = "betting",
    seed: int = 0,
) -> dict[str, Any]:
    """``budgets``, and ``bounds`` unless the gates were trained on these samples, for a calibration's record.

    Parameters
    ----------
    delta, loss, method, seed
        Of the bounds, as for `calibrate_risk`.

    Returns
    -------
    dict
        Lists of entries with ``threshold``, with a freeze head ``freeze_threshold``, and ``budget``, or
        ``alpha``, ``delta`` and ``loss``. What cannot be met or certified has no entry.
    """
    check_store(gates.config, store)
    trace = store.trace(gates.config.features)
    path = ThresholdPath.of(gate_logits(gates, trace), trace, gates.config)
    budgets = []
    for budget in BUDGETS:
        try:
            threshold = threshold_for_budget(path, budget)
        except CalibrationError:
            continue
        freeze = follow_path(gates.config, threshold)
        budgets.append({"budget": budget, **_thresholds(threshold, freeze)})
    tables: dict[str, Any] = {"budgets": budgets}
    if trained_on(gates.config, store):
        return tables
    losses, ids = bounded_loss(trace, loss, path), store.image_ids()
    tables["bounds"] = []
    for alpha in ALPHAS:
        found = certified_threshold(path, losses, ids, alpha, delta, method=method, seed=seed)
        if found.certified:
            thresholds = _thresholds(found.threshold, found.freeze_threshold)
            tables["bounds"].append({"alpha": alpha, "delta": delta, "loss": loss, **thresholds})
    return tables


def _thresholds(threshold: float, freeze_threshold: float | None) -> Mapping[str, float]:
    if freeze_threshold is None:
        return {"threshold": threshold}
    return {"threshold": threshold, "freeze_threshold": freeze_threshold}
