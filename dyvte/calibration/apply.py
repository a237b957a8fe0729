"""Put a calibrated decision rule into a gates checkpoint.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dyvte.backbones import check_image_padding
from dyvte.calibration.compute import threshold_for_compute
from dyvte.calibration.operating_points import at_exit, gate_logits
from dyvte.calibration.risk import threshold_for_risk
from dyvte.costs.visual import visual_compute
from dyvte.errors import CalibrationError, GateMismatchError
from dyvte.gates import GateConfig, GateStack, exit_layers, load_checkpoint, save_config
from dyvte.gates.config import CONFIG_FILE
from dyvte.reductions.learned_with import NO_REDUCTION
from dyvte.teacher.store import TraceStore
from dyvte.teacher.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold and the record that goes into ``gate_config.json`` with it."""

    threshold: float
    record: dict[str, Any]
    text: str


def calibrate_compute(gates: GateStack, store: TraceStore, budget: float) -> Calibration:
    """Threshold for a visual-compute budget on a store's samples (see ``threshold_for_compute``)."""
    check_store(gates.config, store)
    trace = store.trace(gates.config.features)
    logits_BL = gate_logits(gates, trace)
    threshold = threshold_for_compute(logits_BL, trace.num_visual, budget, min_layer=gates.config.min_layer)
    record = {"kind": "compute", "budget": budget, **_seen(gates, threshold, logits_BL, trace, store)}
    reductions = record["reductions"]
    left = (
        "" if reductions == NO_REDUCTION else f" of what {reductions} leave (dyvte search-plan counts both)"
    )
    return Calibration(
        threshold=threshold,
        record=record,
        text=f"threshold {threshold:.6g} for a visual compute of at most {budget:g}{left}",
    )


def calibrate_risk(
    gates: GateStack,
    store: TraceStore,
    alpha: float,
    delta: float,
    *,
    loss: str = "same_answer",
    method: str = "betting",
    seed: int = 0,
) -> Calibration:
    """Threshold for a bounded risk on a store's samples (see ``threshold_for_risk``).

    Parameters
    ----------
    loss:
        "same_answer": 1 - same answer. "risk:C": min(KL, C) / C, with C in nats; alpha is then a bound on
        that.

    Raises
    ------
    CalibrationError
        If the gates were trained on these very samples: the bound would mean nothing.
    """
    check_store(gates.config, store)
    if trained_on(gates.config, store):
        raise CalibrationError(
            f"{store.folder}: the gates were trained on these samples; a risk bound needs others"
        )
    trace = store.trace(gates.config.features)
    logits_BL = gate_logits(gates, trace)
    found = threshold_for_risk(
        logits_BL,
        bounded_loss(trace, loss),
        store.image_ids(),
        alpha,
        delta,
        method=method,
        min_layer=gates.config.min_layer,
        seed=seed,
    )
    record = {
        "kind": "risk",
        "loss": loss,
        "guarantee": "mean loss <= alpha with probability >= 1 - delta over the draw of the images",
        "assumes": "images are independent draws of the kind met later; gates, settings, grid and alpha were "
        "chosen without them",
        **{name: value for name, value in asdict(found).items() if name != "threshold"},
        **_seen(gates, found.threshold, logits_BL, trace, store),
    }
    return Calibration(threshold=found.threshold, record=record, text=found.describe())


def write_calibration(folder: str | Path, found: Calibration) -> GateConfig:
    """Store threshold and record in a checkpoint's ``gate_config.json``; its weights are not touched."""
    config, _ = load_checkpoint(folder)
    kept = {name: value for name, value in config.calibration.items() if name == "fixed"}
    config = replace(config, threshold=found.threshold, calibration={**found.record, **kept})
    save_config(config, folder)
    return config


def write_fixed_layer(folder: str | Path, base: GateConfig, k: int, record: dict[str, Any]) -> GateConfig:
    """Store VTW's K: as the fallback of the gates in the folder, or as a checkpoint of its own without gates.

    A folder without gates means "every row leaves after K" (``mode="fixed"``).
    """
    config, gates = base, None
    if (Path(folder) / CONFIG_FILE).is_file():
        config, gates = load_checkpoint(folder)
    mode = config.mode if gates is not None else "fixed"
    calibration = {**config.calibration, "fixed": record}
    config = replace(config, fallback=k, mode=mode, calibration=calibration)
    save_config(config, folder)
    return config


def bounded_loss(trace: Trace, loss: str) -> Tensor:
    """(B, L+1) loss in [0, 1] by its name, "same_answer" or "risk:C"."""
    if loss == "same_answer":
        return 1.0 - trace.same_answer
    kind, _, bound = loss.partition(":")
    try:
        c = float(bound)
    except ValueError:
        c = -1.0
    if kind != "risk" or not c > 0:
        raise CalibrationError(f"loss {loss!r}: expected 'same_answer' or 'risk:C' with C > 0 in nats")
    return trace.risk.clamp(min=0, max=c) / c


def check_store(config: GateConfig, store: TraceStore) -> None:
    """Raise GateMismatchError if the traces are not of the gates' backbone."""
    stored, mine = store.manifest.fingerprint, config.backbone
    hidden_size = store.manifest.feature_size // len(store.manifest.features)
    shape = (store.manifest.num_layers, hidden_size)
    if shape != (config.num_layers, config.hidden_size):
        raise GateMismatchError(
            f"{store.folder}: traces of {shape[0]} layers of size {shape[1]}, the gates have "
            f"{config.num_layers} of {config.hidden_size}; trace the data with the gates' backbone"
        )
    if unknown := sorted(set(config.open_gates) - set(store.manifest.exits)):
        raise GateMismatchError(
            f"{store.folder}: the gates can fire after layers {unknown[:8]}, which these traces do not label "
            "(they are thinned); trace the data without thinning, or as thinly as the gates' training data"
        )
    for what, theirs, ours in (
        ("architecture", stored.get("backbone"), mine.get("fingerprint")),
        ("weights", stored.get("backbone_weights"), mine.get("weights")),
    ):
        if ours is not None and ours != theirs:
            raise GateMismatchError(
                f"{store.folder}: traces of another backbone than the gates' ({what} {theirs}, the gates' "
                f"backbone has {ours}); trace the data with the gates' backbone, {mine.get('id')}"
            )
    check_image_padding(mine.get("image_padding"), stored.get("images", "").split(" ")[0], str(store.folder))


def trained_on(config: GateConfig, store: TraceStore) -> bool:
    """True if the gates' training record names the store's own data."""
    data = config.training.get("data") or {}
    return data.get("sha256") is not None and data.get("sha256") == store.manifest.fingerprint.get("data")


def _seen(
    gates: GateStack, threshold: float, logits_BL: Tensor, trace: Trace, store: TraceStore
) -> dict[str, Any]:
    """What the threshold does on the calibration samples themselves."""
    config = gates.config
    exits_B = exit_layers(logits_BL, threshold, config.min_layer, config.fallback)
    return {
        "data": store.manifest.fingerprint.get("data"),
        "labels": store.manifest.fingerprint.get("labels"),
        "reductions": store.manifest.fingerprint.get("reductions", NO_REDUCTION),
        "num_samples": len(trace),
        "num_images": len(set(store.image_ids())),
        "visual_compute": visual_compute(exits_B, trace.num_visual, trace.num_layers),
        "mean_exit_layer": float(exits_B.double().mean()),
        "same_answer": float(at_exit(trace.same_answer, exits_B).mean()),
        "risk": float(at_exit(trace.risk, exits_B).mean()),
    }
