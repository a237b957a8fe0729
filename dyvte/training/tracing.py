"""From a configuration to samples, a backbone and traces: what training, tracing and the search for K
share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dyvte.backbones import describe_config, fingerprint, image_padding, open_backbone, weights_digest
from dyvte.calibration import LayerSearch, measure_profile, search_exit_layer
from dyvte.data import Selection, check_defects, open_conversations, open_hub_conversations, select
from dyvte.distributed import Processes, join_processes, own_device
from dyvte.errors import ConfigError
from dyvte.progress import progress
from dyvte.reductions import VisualProfile
from dyvte.teacher import Teacher, TraceStore, prepared_batches, write_traces
from dyvte.training.config import TrainConfig
from dyvte.training.sharded import Lockstep, opened_backbone
from dyvte.training.zero import shards_backbone


def select_samples(cfg: TrainConfig) -> Selection:
    """The samples of the run, by its data settings."""
    data = cfg.data
    if data.hub_id is None:
        conversations = open_conversations(data.path, data.images, split=data.split)
    else:
        conversations = open_hub_conversations(
            data.hub_id,
            data.images,
            subset=data.subset,
            split=data.split,
            revision=data.revision,
            streaming=data.streaming,
        )
    return select(
        conversations,
        turns=data.turns,
        image_only=True,  # a text-only prompt has no visual tokens to let go
        fraction=data.fraction,
        limit=data.limit,
        seed=data.seed,
        max_bad_samples=data.max_bad_samples,
        repeated_ids=data.repeated_ids,
        follow_links=data.follow_links,
    )


def trace_data(cfg: TrainConfig, folder: str | Path) -> TraceStore | None:
    """Trace the configured data into ``folder``; under a launcher every process calls this.

    Returns the complete store on the first process, None on the others.
    """
    with join_processes(engine=shards_backbone(cfg)) as processes:
        store, _ = _traced(cfg, select_samples(cfg), Path(folder), processes)
        return store if processes.first else None


def search_k(cfg: TrainConfig, **search: Any) -> LayerSearch:
    """VTW's K on the configured data; ``search`` goes to :func:`~dyvte.calibration.search_exit_layer`."""
    if shards_backbone(cfg):
        raise ConfigError(
            f"{cfg.deepspeed} asks for ZeRO-3, but the search for K keeps the backbone whole in one process: "
            "leave the file out"
        )
    model, processor = open_backbone(cfg.model, own_device())
    labels = "data" if search.get("positions") == "answer" else "greedy"
    teacher = Teacher(model, processor, replace(cfg.teacher, label_source=labels))
    limits = {"file": cfg.data.name, "max_bad_samples": cfg.data.max_bad_samples}
    batches = (
        (ready.inputs, ready.answer_BN) for ready in prepared_batches(teacher, select_samples(cfg), **limits)
    )
    return search_exit_layer(model, batches, exits_per_chunk=cfg.teacher.exits_per_chunk, **search)


def open_model(cfg: TrainConfig) -> Any:
    """The configured backbone on this machine's device."""
    return open_backbone(cfg.model, own_device())[0]


def visual_profile(cfg: TrainConfig) -> VisualProfile:
    """What heads and neurons do with the visual tokens of the configured data."""
    model, processor = open_backbone(cfg.model, own_device())
    teacher = Teacher(model, processor, replace(cfg.teacher, label_source="greedy"))
    selection = select_samples(cfg)
    limits = {"file": cfg.data.name, "max_bad_samples": cfg.data.max_bad_samples}
    with progress(len(selection.samples), "profile", "sample") as advance:
        batches = prepared_batches(teacher, selection, **limits, progress=advance)
        found = measure_profile(model, (ready.inputs for ready in batches))
    dropped = len(selection.defects) + len(selection.samples) - found.about["num_samples"]
    data = {"data": cfg.data.name, "data_sha256": selection.sha256, "dropped": dropped}
    backbone = {**found.about["backbone"], "id": cfg.model.path}
    return replace(found, about={**found.about, "backbone": backbone, **data})


def run_traces(
    cfg: TrainConfig, selection: Selection, processes: Processes
) -> tuple[TraceStore, dict[str, str | None]]:
    """The run's traces, written where they are not there yet; and the backbone's identity."""
    return _traced(cfg, selection, cfg.traces, processes)


def _traced(
    cfg: TrainConfig, selection: Selection, folder: Path, processes: Processes
) -> tuple[TraceStore, dict[str, str | None]]:
    with opened_backbone(cfg, processes) as (model, processor):
        backbone = {
            "id": cfg.model.path,
            "model_type": describe_config(model.config).model_type,
            "fingerprint": fingerprint(model),
            "weights": weights_digest(model),
            "image_padding": image_padding(processor),
        }
        if cfg.model.adapter is not None:
            backbone["adapter"] = cfg.model.adapter
        if shards_backbone(cfg):
            teacher = Lockstep.of(cfg, model, processor, selection, processes)
            store = write_store(cfg, teacher, selection, folder, processes, teacher.finish)
        else:
            store = write_store(cfg, Teacher(model, processor, cfg.teacher), selection, folder, processes)
    return store, backbone


def write_store(
    cfg: TrainConfig,
    teacher: Teacher | Lockstep,
    selection: Selection,
    folder: Path,
    processes: Processes,
    finish: Callable[[], None] = lambda: None,
) -> TraceStore:
    """This process's share of the traces, under a progress bar; ``finish``; then wait for the others."""
    share = -(-len(selection.samples) // processes.world_size)
    with progress(share, "teacher", "sample", shown=processes.first) as advance:
        write_traces(
            folder,
            teacher,
            selection,
            file=cfg.data.name,
            rank=processes.rank,
            world_size=processes.world_size,
            max_bad_samples=cfg.data.max_bad_samples,
            progress=advance,
        )
    finish()
    processes.barrier()
    store = TraceStore.open(folder)
    # Each process has counted its own share only.
    check_defects([*selection.defects, *store.dropped()], cfg.data.max_bad_samples)
    if processes.first:
        for left_by_a_killed_writer in folder.glob(".*.tmp"):
            left_by_a_killed_writer.unlink(missing_ok=True)
    return store
