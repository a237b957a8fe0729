"""Thresholds that bound a risk for every group of questions apart: certificates by task.

A bound over all questions holds for their mix: where hard ones are more frequent than in calibration, it may
break. Certified group by group, it holds for any mix of the groups, as long as each group's own questions
stay of their kind. A group is a named type or a cluster; what tells it is fitted on images of its own
(`dyvte.calibration.finder`), so that it is fixed before the others are tested, and the bound is for groups AS
FOUND, right or wrong. A row that is like no group is left at full depth and loses nothing.

Shapes: B samples, L layers, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dyvte.calibration.apply import Calibration, bounded_loss, check_store, seen_on, trained_on
from dyvte.calibration.finder import Parts, features_after, fit_finder
from dyvte.calibration.operating_points import gate_logits
from dyvte.calibration.path import ThresholdPath
from dyvte.calibration.risk import DEFAULT_LEVELS, RiskThreshold, certified_threshold
from dyvte.errors import CalibrationError
from dyvte.gates import (
    CLOSED,
    UNLIKE,
    FoundGroups,
    GateStack,
    GroupThresholds,
    HeadLogits,
    Schedules,
)
from dyvte.teacher.store import TraceStore


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How calibration samples are grouped and told apart.

    Attributes
    ----------
    names
        Group of every sample by its id; None: `clusters` clusters of the gate features.
    clusters
        How many, where there are no names.
    layer
        Layers behind the features that tell the group; None: 0, the embeddings, where the traces hold them
        (those with freeze layers do), else 1.
    guard
        Share of calibration-like rows that may be taken for rows that are like none; 0: no row is.
    share
        Of the images, for fitting the finder; a third of it for the guard's limit. The others are tested.
    joint
        Let all bounds hold together with probability 1 - delta, and not each by itself.
    """

    names: Mapping[str, str] | None = None
    clusters: int = 0
    layer: int | None = None
    guard: float = 0.01
    share: float = 0.25
    joint: bool = False

    def __post_init__(self) -> None:
        if (self.names is None) == (self.clusters < 1):
            raise CalibrationError("groups: expected names of the samples' groups, or a number of clusters")
        if not 0 <= self.guard < 1 or not 0 < self.share < 1:
            raise CalibrationError(
                f"guard {self.guard} and share {self.share}: expected shares of rows and images, below 1"
            )


def calibrate_groups(
    gates: GateStack,
    store: TraceStore,
    grouping: Grouping,
    alpha: float,
    delta: float,
    *,
    loss: str = "same_answer",
    method: str = "betting",
    seed: int = 0,
    levels: Sequence[float] = DEFAULT_LEVELS,
) -> Calibration:
    """Thresholds for a bounded risk in every group (see `certified_threshold`), and one for all beside.

    Parameters
    ----------
    gates
        Of a checkpoint.
    store
        Of the calibration samples.
    grouping
        What the groups are.
    alpha, delta, loss, method, seed
        As for `calibrate_risk`; each group is held to ``alpha``.
    levels
        The grid in logits, strictly falling, chosen beforehand.

    Raises
    ------
    CalibrationError
        If the gates were trained on these samples, or a sample has no group.
    """
    check_store(gates.config, store)
    if trained_on(gates.config, store):
        raise CalibrationError(
            f"{store.folder}: the gates were trained on these samples; a risk bound needs others"
        )
    trace, image_ids = store.trace(gates.config.features), store.image_ids()
    layer = grouping.layer if grouping.layer is not None else int(trace.grid is None)
    features_BF, parts = features_after(trace, layer), Parts.of(image_ids, grouping.share, seed)
    labels: Sequence[str] | int = grouping.clusters
    if grouping.names is not None:
        labels = _named(trace.sample_ids, grouping.names)
    names, finder = fit_finder(features_BF, parts, labels, image_ids, grouping.guard, seed)
    path = ThresholdPath.of(gate_logits(gates, trace), trace, gates.config)
    path, tested = path.rows(parts.test), trace.rows(parts.test)
    images = [image_ids[row] for row in parts.test.tolist()]
    losses = bounded_loss(tested, loss, path)
    found = finder.find(features_BF[parts.test])
    how = {"method": method, "seed": seed, "levels": levels}
    pooled = certified_threshold(path, losses, images, alpha, delta, **how)
    held = closed_before(path, layer)
    each = []
    for group in range(len(names)):
        rows = (found.groups_B == group).nonzero().flatten()
        own = delta / len(names) if grouping.joint else delta
        each.append(_certified(held, losses, images, rows, alpha, own, how))
    thresholds = GroupThresholds(
        layer=layer,
        names=names,
        thresholds=tuple(one.threshold if one else 1.0 for one in each),
        freeze_thresholds=tuple(
            one.freeze_threshold if one and one.freeze_threshold is not None else 1.0 for one in each
        )
        if gates.config.freeze_head
        else (),
        finder=finder.digest(),
    )
    chosen = group_schedules(held, found, thresholds)
    record = {
        "kind": "risk by group",
        "loss": loss,
        "guarantee": "in each certified group, as it is told at run time: mean loss <= alpha with "
        "probability >= 1 - delta over the draw of the images; so for any mix of these groups"
        + (", all groups together" if grouping.joint else ""),
        "assumes": "within a group, images are independent draws of the kind met later; gates, settings, "
        "finder, grid and alpha were chosen without them",
        "alpha": alpha,
        "delta": delta,
        "method": method,
        "joint": grouping.joint,
        "groups_of": "named" if grouping.names is not None else f"{grouping.clusters} clusters",
        "guard": grouping.guard,
        "unlike": float((found.groups_B == UNLIKE).double().mean()),
        "groups": [_group_record(name, one) for name, one in zip(names, each, strict=True)],
        "one_threshold": {n: v for n, v in asdict(pooled).items() if v is not None},
        **seen_on(path, chosen, tested, images, store),
    }
    certified = sum(one is not None and one.certified for one in each)
    text = (
        f"{certified} of {len(names)} groups certified at alpha {alpha:g}, delta {delta:g}; rows of the "
        f"others and rows like none ({record['unlike']:.1%} here) stay at full depth\n{_table(names, each)}"
    )
    return Calibration(
        threshold=pooled.threshold,
        freeze_threshold=pooled.freeze_threshold,
        record=record,
        text=text,
        groups=thresholds,
        finder=finder,
    )


def closed_before(path: ThresholdPath, layer: int) -> ThresholdPath:
    """The path on which no row freezes or leaves before its group is told, after ``layer`` layers."""
    logits = path.logits
    if isinstance(logits, HeadLogits):
        exit_BGL, freeze_BL = logits.exit_BGL.clone(), logits.freeze_BL.clone()
        exit_BGL[..., : max(0, layer - 1)], freeze_BL[:, :layer] = CLOSED, CLOSED
        return replace(path, logits=replace(logits, exit_BGL=exit_BGL, freeze_BL=freeze_BL))
    exit_BL = logits.clone()
    exit_BL[:, : max(0, layer - 1)] = CLOSED
    return replace(path, logits=exit_BL)


def group_schedules(path: ThresholdPath, found: FoundGroups, thresholds: GroupThresholds) -> Schedules:
    """Where rows freeze and leave by the thresholds of their groups; those like none never do.

    Parameters
    ----------
    path
        Of the gates on these rows, closed before the groups' layer.
    found
        Their groups.
    thresholds
        Of the groups.
    """
    num_layers = path.num_layers
    exits_B = torch.full((len(found.groups_B),), num_layers, dtype=torch.int64)
    freezes_B = exits_B.clone()
    for group, name in enumerate(thresholds.names):
        rows = (found.groups_B == group).nonzero().flatten()
        exit_threshold, freeze_threshold = thresholds.of(name)
        if len(rows) and exit_threshold < 1:
            chosen = path.rows(rows).by(exit_threshold, freeze_threshold)
            exits_B[rows], freezes_B[rows] = chosen.exit_layers_B, chosen.freeze_layers_B
    return Schedules(freezes_B, exits_B)


def _certified(
    path: ThresholdPath,
    losses: Tensor,
    images: Sequence[str],
    rows: Tensor,
    alpha: float,
    delta: float,
    how: Mapping[str, Any],
) -> RiskThreshold | None:
    if not len(rows):
        return None
    return certified_threshold(
        path.rows(rows), losses[rows], [images[row] for row in rows.tolist()], alpha, delta, **how
    )


def _named(sample_ids: Sequence[str], names: Mapping[str, str]) -> list[str]:
    missing = [one for one in sample_ids if one not in names and one.partition(":turn")[0] not in names]
    if missing:
        raise CalibrationError(
            f"{len(missing)} of {len(sample_ids)} calibration samples have no group (first: {missing[0]}): "
            "give the file that they were traced from"
        )
    return [names.get(one) or names[one.partition(":turn")[0]] for one in sample_ids]


def _group_record(name: str, found: RiskThreshold | None) -> dict[str, Any]:
    if found is None:
        return {"name": name, "certified": False, "num_images": 0, "num_samples": 0}
    kept = ("certified", "num_images", "num_samples", "mean_loss", "mean_exit_layer", "mean_freeze_layer")
    values = asdict(found)
    return {"name": name, **{k: values[k] for k in (*kept, "smallest_alpha") if values[k] is not None}}


def _table(names: Sequence[str], each: Sequence[RiskThreshold | None]) -> str:
    lines = []
    for name, one in zip(names, each, strict=True):
        if one is None:
            said = "no question of it among those tested"
        elif one.certified:
            said = (
                f"threshold {one.threshold:.6g}, mean loss seen {one.mean_loss:.4f}, {one.num_images} images"
            )
        else:
            said = f"not certified: {one.num_images} images could certify {one.smallest_alpha:.3g} at best"
        lines.append(f"  {name}: {said}")
    return "\n".join(lines)
