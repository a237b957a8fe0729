"""From samples to traces on disk: batches, shards, several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dyvte.data import Defect, Sample, Selection, check_defects, log_excluded
from dyvte.teacher.batches import batches_of
from dyvte.teacher.encoder import Prepared
from dyvte.teacher.store import Shard, TraceStore
from dyvte.teacher.teacher import Teacher

Progress = Callable[[int], None]


def write_traces(
    folder: str | Path,
    teacher: Teacher,
    selection: Selection,
    *,
    file: str = "",
    rank: int = 0,
    world_size: int = 1,
    max_bad_samples: int = 0,
    progress: Progress | None = None,
) -> TraceStore:
    """Trace what is not yet in the folder; this rank's share only.

    Ranks take shards in turn. A shard's batches depend on the selection and the batch size alone, so that a
    resumed pass writes the same bytes. Samples that the selection had to exclude are named in the log.

    Parameters
    ----------
    folder:
        Of the store; made where it does not exist, else completed.
    teacher:
        Traces batch after batch.
    selection:
        Its order is that of the store.
    file:
        Name of the data, for messages about bad samples.
    rank, world_size:
        Which process this is, of how many.
    max_bad_samples:
        Samples that may be unusable, those of the selection included.
    progress:
        Called with the number of samples done since the last call, those found on disk included.

    Raises
    ------
    CheckpointError
        If the folder holds other traces (naming the field) or cannot be written.
    DataError
        If more than ``max_bad_samples`` samples cannot be used.
    """
    store = TraceStore.create(folder, teacher.manifest(selection))
    missing = set(store.missing())
    bad: list[Defect | str] = list(selection.defects)
    if rank == 0:  # every rank has the same selection
        log_excluded(selection.defects)
    for index in range(rank, store.manifest.num_shards, world_size):
        samples = [selection.samples[i] for i in store.manifest.shard_range(index)]
        if index not in missing:
            bad += store.read(index).dropped
            check_defects(bad, max_bad_samples)
            if progress:
                progress(len(samples))
            continue
        shard, defects = _trace_shard(teacher, samples, file, progress)
        bad += defects
        check_defects(bad, max_bad_samples)
        store.write(index, shard)
    return store


def prepared_batches(
    teacher: Teacher,
    selection: Selection,
    *,
    file: str = "",
    max_bad_samples: int = 0,
    progress: Progress | None = None,
) -> Iterator[Prepared]:
    """The selection as the model takes it, batch by batch, by the rules of a trace: unusable samples are
    excluded, counted and logged, so a batch may be smaller than others; one without a usable sample is
    skipped. Samples come in their order, but for those of one image, which come with the first of them.

    Parameters
    ----------
    teacher:
        Its settings say how large a batch is.
    selection:
        What is read.
    file:
        Name of the data, for messages about bad samples.
    max_bad_samples:
        Samples that may be unusable, those of the selection included.
    progress:
        Called with the number of samples done since the last call.

    Raises
    ------
    DataError
        If more than ``max_bad_samples`` samples cannot be used.
    """
    bad = list(selection.defects)
    log_excluded(bad)
    size = teacher.config.batch_size * teacher.config.shard_batches
    for start in range(0, len(selection.samples), size):
        samples = selection.samples[start : start + size]
        for batch in batches_of(samples, teacher.config, by_length=False):
            ready = teacher.prepare(batch, file)
            bad += ready.defects
            check_defects(bad, max_bad_samples)
            log_excluded(ready.defects)
            if ready.samples:
                yield ready
            if progress:
                progress(len(batch))


def _trace_shard(
    teacher: Teacher, samples: Sequence[Sample], file: str, progress: Progress | None
) -> tuple[Shard, list[Defect]]:
    """All batches of a shard, samples of one image together; they come back in the given order."""
    parts: list[Shard] = []
    defects: list[Defect] = []
    for batch in batches_of(samples, teacher.config):
        part, bad = teacher.trace(batch, file)
        parts.append(part)
        defects += bad
        if progress:
            progress(len(batch))
    whole = Shard.cat(parts)
    place = {sample.id: position for position, sample in enumerate(samples)}
    back = sorted(range(len(whole.trace)), key=lambda row: place[whole.trace.sample_ids[row]])
    shard = Shard(
        trace=whole.trace.rows(back),
        image_ids=tuple(whole.image_ids[row] for row in back),
        dropped=tuple(map(str, defects)),
        notes=whole.notes,
    )
    return shard, defects
