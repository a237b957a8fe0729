"""From a configuration to traces on disk, by one or several processes: for themselves, or for a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dyvte.backbones import describe_config, fingerprint, image_padding, weights_digest
from dyvte.data import Selection, check_defects, select_samples
from dyvte.distributed import Processes, join_processes
from dyvte.progress import progress
from dyvte.teacher import Teacher, TraceStore, write_traces
from dyvte.tracing.config import TracingConfig
from dyvte.tracing.sharded import Lockstep, opened_backbone
from dyvte.tracing.zero import shards_backbone


def trace_data(cfg: TracingConfig, folder: str | Path) -> TraceStore | None:
    """Trace the configured data into ``folder``; under a launcher every process calls this.

    Parameters
    ----------
    cfg
        Of backbone, data and teacher.
    folder
        Of the traces.

    Returns
    -------
    TraceStore or None
        The complete store on the first process, None on the others.
    """
    with join_processes(engine=shards_backbone(cfg)) as processes:
        store, _ = run_traces(cfg, select_samples(cfg.data), Path(folder), processes)
        return store if processes.first else None


def run_traces(
    cfg: TracingConfig, selection: Selection, folder: Path, processes: Processes
) -> tuple[TraceStore, dict[str, str | None]]:
    """Traces of the selection, written where they are not there yet; and the backbone's identity.

    All processes must call this.

    Parameters
    ----------
    cfg
        Of backbone, data and teacher.
    selection
        Of the samples.
    folder
        Of the traces.
    processes
        That share the samples.
    """
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
    cfg: TracingConfig,
    teacher: Teacher | Lockstep,
    selection: Selection,
    folder: Path,
    processes: Processes,
    finish: Callable[[], None] = lambda: None,
) -> TraceStore:
    """This process's share of the traces, under a progress bar; ``finish``; then wait for the others.

    Parameters
    ----------
    cfg
        Of backbone, data and teacher.
    teacher
        Traces a batch.
    selection
        Of the samples.
    folder
        Of the traces.
    processes
        That share the samples.
    finish
        Called when this process has no more to do.
    """
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
