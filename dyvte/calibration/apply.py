"""Put a calibrated decision rule into a gates checkpoint.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dyvte.backbones import check_image_padding
from dyvte.calibration.compute import threshold_for_budget
from dyvte.calibration.operating_points import gate_logits
from dyvte.calibration.path import ThresholdPath, at_schedule
from dyvte.calibration.risk import certified_threshold
from dyvte.errors import CalibrationError, GateMismatchError
from dyvte.gates import (
    GateConfig,
    GateStack,
    GroupFinder,
    GroupThresholds,
    HeadLogits,
    Schedules,
    follow_threshold,
    load_checkpoint,
    save_config,
    schedules,
    write_groups,
)
from dyvte.gates.config import CONFIG_FILE
from dyvte.objectives.losses import answer_loss, is_bounded
from dyvte.reductions.identity import NO_REDUCTION
from dyvte.teacher.store import TraceStore
from dyvte.teacher.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A threshold (two, with a freeze head) and the record that goes into ``gate_config.json`` with it.

    Attributes
    ----------
    threshold:
        Of exiting, a probability in (0, 1]; 1: never.
    freeze_threshold:
        Of freezing; None without a freeze head.
    record:
        What it was calibrated for and on, JSON-ready; ``kind`` says which way.
    text:
        The same for people.
    groups, finder:
        Thresholds by group and what tells the groups, where they were found so.
    """

    threshold: float
    freeze_threshold: float | None
    record: dict[str, Any]
    text: str
    groups: GroupThresholds | None = None
    finder: GroupFinder | None = None


def calibrate_compute(
    gates: GateStack, store: TraceStore, budget: float | None = None, *, memory_budget: float | None = None
) -> Calibration:
    """Threshold for budgets on a store's samples (see ``threshold_for_budget``).

    Parameters
    ----------
    gates
        Of a checkpoint.
    store
        Of the calibration samples.
    budget
        Share of the full model's visual compute.
    memory_budget
        Share of its KV bytes of visual tokens.
    """
    check_store(gates.config, store)
    trace = store.trace(gates.config.features)
    path = ThresholdPath.of(gate_logits(gates, trace), trace, gates.config)
    threshold = threshold_for_budget(path, budget, memory_budget)
    freeze = follow_path(gates.config, threshold)
    record: dict[str, Any] = {"kind": "compute", "budget": budget}
    if memory_budget is not None:
        record["memory_budget"] = memory_budget
    record |= _seen(gates, threshold, freeze, path.logits, trace, store)
    reductions = record["reductions"]
    left = (
        "" if reductions == NO_REDUCTION else f" of what {reductions} leave (dyvte search-plan counts both)"
    )
    bounds = ((budget, "a visual compute"), (memory_budget, "KV bytes"))
    goals = " and ".join(f"{what} of at most {bound:g}" for bound, what in bounds if bound is not None)
    return Calibration(
        threshold=threshold,
        freeze_threshold=freeze,
        record=record,
        text=f"threshold {threshold:.6g}{_freeze_text(freeze)} for {goals}{left}",
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
    """Threshold for a bounded risk on a store's samples (see ``certified_threshold``).

    Parameters
    ----------
    gates:
        To be calibrated; their other settings stay.
    store:
        Traces of samples that they did not learn from.
    alpha:
        Bound on the mean loss, in (0, 1).
    delta:
        Chance that the bound fails, over the draw of the calibration images.
    loss:
        "same_answer": 1 - same answer. "risk:C": min(KL, C) / C, with C in nats; alpha is then a bound on
        that.
    method:
        How p-values are computed: "betting" or "bentkus".
    seed:
        Of the order in which images are bet on.

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
    path = ThresholdPath.of(gate_logits(gates, trace), trace, gates.config)
    found = certified_threshold(
        path, bounded_loss(trace, loss, path), store.image_ids(), alpha, delta, method=method, seed=seed
    )
    named = {name: value for name, value in asdict(found).items() if value is not None}
    record = {
        "kind": "risk",
        "loss": loss,
        "guarantee": "mean loss <= alpha with probability >= 1 - delta over the draw of the images",
        "assumes": "images are independent draws of the kind met later; gates, settings, grid and alpha were "
        "chosen without them",
        **{name: value for name, value in named.items() if name not in ("threshold", "freeze_threshold")},
        **_seen(gates, found.threshold, found.freeze_threshold, path.logits, trace, store),
    }
    return Calibration(
        threshold=found.threshold,
        freeze_threshold=found.freeze_threshold,
        record=record,
        text=found.describe(),
    )


def follow_path(config: GateConfig, threshold: float) -> float | None:
    """The freeze threshold that goes with a new exit threshold; None without a freeze head.

    Parameters
    ----------
    config
        Of the gates.
    threshold
        Of exiting.
    """
    if not config.freeze_head:
        return None
    return follow_threshold(config.freeze_threshold, config.threshold, threshold)


def write_calibration(folder: str | Path, found: Calibration) -> GateConfig:
    """Store thresholds and record in a checkpoint's ``gate_config.json``; its weights are not touched. What
    tells groups goes into ``groups.safetensors``; without groups there is no such file afterwards.

    Parameters
    ----------
    folder
        Of the checkpoint.
    found
        What is stored.
    """
    config, _ = load_checkpoint(folder)
    kept = {name: value for name, value in config.calibration.items() if name == "fixed"}
    config = replace(config, threshold=found.threshold, calibration={**found.record, **kept})
    if found.freeze_threshold is not None:
        config = replace(config, freeze_threshold=found.freeze_threshold)
    config = replace(config, groups=found.groups)
    # A config is never there before the file that it names, nor after it.
    if found.finder is not None:
        write_groups(folder, found.finder)
    save_config(config, folder)
    if found.finder is None:
        write_groups(folder, None)
    return config


def write_fixed_layer(folder: str | Path, base: GateConfig, k: int, record: dict[str, Any]) -> GateConfig:
    """Store VTW's K: as the fallback of the gates in the folder, or as a checkpoint of its own without gates.

    A folder without gates means "every row leaves after K" (``mode="fixed"``).

    Parameters
    ----------
    folder
        Of the checkpoint.
    base
        Settings of a new checkpoint.
    k
        VTW's K.
    record
        How it was found.
    """
    config, gates = base, None
    if (Path(folder) / CONFIG_FILE).is_file():
        config, gates = load_checkpoint(folder)
    mode = config.mode if gates is not None else "fixed"
    calibration = {**config.calibration, "fixed": record}
    config = replace(config, fallback=k, mode=mode, calibration=calibration)
    save_config(config, folder)
    return config


def bounded_loss(trace: Trace, loss: str, path: ThresholdPath) -> Tensor:
    """(B, G, L+1) loss in [0, 1] of the path's schedules by its name, "same_answer" or "risk:C".

    Parameters
    ----------
    trace
        Of the calibration samples.
    loss
        Its name.
    path
        Of the gates.

    Raises
    ------
    CalibrationError
        If the loss is not bounded.
    """
    if not is_bounded(loss):
        raise CalibrationError(f"loss {loss!r} has no bound: expected 'same_answer' or 'risk:C', C in nats")
    loss_BGL1 = answer_loss(trace, loss)
    return loss_BGL1 if path.freezes else loss_BGL1[:, -1:]


def check_store(config: GateConfig, store: TraceStore) -> None:
    """Raise GateMismatchError if the traces are not of the gates' backbone.

    Parameters
    ----------
    config
        Of the gates.
    store
        Of the traces.
    """
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
    if unknown := sorted(set(config.open_freezes) - set(store.manifest.freezes)):
        raise GateMismatchError(
            f"{store.folder}: the gates can freeze rows after layers {unknown[:8]}, which these traces do "
            "not hold; trace the data with the freeze layers of the gates' training data"
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
    """True if the gates' training record names the store's own data.

    Parameters
    ----------
    config
        Of the gates.
    store
        Of the traces.
    """
    data = config.training.get("data") or {}
    return data.get("sha256") is not None and data.get("sha256") == store.manifest.fingerprint.get("data")


def _freeze_text(freeze_threshold: float | None) -> str:
    return "" if freeze_threshold is None else f" (freeze threshold {freeze_threshold:.6g})"


def _seen(
    gates: GateStack,
    threshold: float,
    freeze_threshold: float | None,
    logits: Tensor | HeadLogits,
    trace: Trace,
    store: TraceStore,
) -> dict[str, Any]:
    """What the thresholds do on the calibration samples themselves."""
    config = gates.config
    path = ThresholdPath.of(logits, trace, config)
    chosen = schedules(logits, threshold, config.min_layer, config.fallback, freeze_threshold)
    return seen_on(path, chosen, trace, store.image_ids(), store)


def seen_on(
    path: ThresholdPath, chosen: Schedules, trace: Trace, image_ids: Sequence[str], store: TraceStore
) -> dict[str, Any]:
    """What schedules do on traced samples, and which samples they are.

    Parameters
    ----------
    path
        Of the gates on these samples.
    chosen
        Their schedules.
    trace
        Of the samples.
    image_ids
        Their images.
    store
        That they are of.
    """
    seen = {
        "data": store.manifest.fingerprint.get("data"),
        "labels": store.manifest.fingerprint.get("labels"),
        "reductions": store.manifest.fingerprint.get("reductions", NO_REDUCTION),
        "num_samples": len(trace),
        "num_images": len(set(image_ids)),
        "visual_compute": path.compute(chosen),
        "mean_exit_layer": float(chosen.exit_layers_B.double().mean()),
    }
    if path.freezes:
        seen["kv_memory"] = path.memory(chosen)
        seen["mean_freeze_layer"] = float(chosen.freeze_layers_B.double().mean())
    for name in ("same_answer", "risk"):
        labels_BGL1 = trace.labels(name) if path.freezes else getattr(trace, name)[:, None]
        seen[name] = float(at_schedule(labels_BGL1, path.freezes, chosen).mean())
    return seen
