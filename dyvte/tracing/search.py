"""Passes over configured data that leave no traces: VTW's search for K, the profile of heads and neurons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dyvte.backbones import open_backbone
from dyvte.calibration import LayerSearch, measure_profile, search_exit_layer
from dyvte.data import select_samples
from dyvte.distributed import own_device
from dyvte.errors import ConfigError
from dyvte.progress import progress
from dyvte.reductions import VisualProfile
from dyvte.teacher import Teacher, prepared_batches
from dyvte.tracing.config import TracingConfig
from dyvte.tracing.zero import shards_backbone


def search_k(cfg: TracingConfig, **search: Any) -> LayerSearch:
    """VTW's K on the configured data; ``search`` goes to :func:`~dyvte.calibration.search_exit_layer`."""
    check_whole(cfg, "the search for K")
    model, processor = open_backbone(cfg.model, own_device())
    labels = "data" if search.get("positions") == "answer" else "greedy"
    teacher = Teacher(model, processor, replace(cfg.teacher, label_source=labels))
    limits = {"file": cfg.data.name, "max_bad_samples": cfg.data.max_bad_samples}
    prepared = prepared_batches(teacher, select_samples(cfg.data), **limits)
    batches = ((ready.inputs, ready.answer_BN) for ready in prepared)
    return search_exit_layer(model, batches, exits_per_chunk=cfg.teacher.exits_per_chunk, **search)


def visual_profile(cfg: TracingConfig) -> VisualProfile:
    """What heads and neurons do with the visual tokens of the configured data."""
    check_whole(cfg, "the profile")
    model, processor = open_backbone(cfg.model, own_device())
    teacher = Teacher(model, processor, replace(cfg.teacher, label_source="greedy"))
    selection = select_samples(cfg.data)
    limits = {"file": cfg.data.name, "max_bad_samples": cfg.data.max_bad_samples}
    with progress(len(selection.samples), "profile", "sample") as advance:
        batches = prepared_batches(teacher, selection, **limits, progress=advance)
        found = measure_profile(model, (ready.inputs for ready in batches))
    dropped = len(selection.defects) + len(selection.samples) - found.about["num_samples"]
    data = {"data": cfg.data.name, "data_sha256": selection.sha256, "dropped": dropped}
    backbone = {**found.about["backbone"], "id": cfg.model.path}
    return replace(found, about={**found.about, "backbone": backbone, **data})


def check_whole(cfg: TracingConfig, what: str) -> None:
    """Raise ConfigError where ZeRO-3 would shard the backbone: ``what`` keeps it whole in one process.

    Parameters
    ----------
    cfg
        Of the pass.
    what
        The command, for the message.
    """
    if shards_backbone(cfg):
        raise ConfigError(
            f"{cfg.deepspeed} asks for ZeRO-3, but {what} keeps the backbone whole in one process: leave the "
            "file out"
        )
