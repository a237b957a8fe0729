"""What gates and adapters have in common around their training: folder, resuming, trackers, disk."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dyvte.config import dump_config, to_dict
from dyvte.distributed import Processes, join_processes
from dyvte.errors import TrainingError
from dyvte.progress import progress
from dyvte.training.config import TrainConfig
from dyvte.training.loop import Training
from dyvte.training.resuming import check_same_run
from dyvte.training.schedule import held_out
from dyvte.training.trackers import open_trackers

log = logging.getLogger(__name__)
CONFIG_FILE = "config.yaml"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

Result = TypeVar("Result")
Part = TypeVar("Part")
Work = Callable[[TrainConfig, Processes], Callable[[], Result]]


def carry_out(cfg: TrainConfig, work: Work, finished: Callable[[TrainConfig], Result | None]) -> Result:
    """Do a run from its configuration, or go on with it; under a launcher every process calls this.

    Parameters
    ----------
    work
        Trains, in all processes; returns what writes and judges the result, for the first process alone.
    finished
        The result that the output folder holds; None if there is none yet.
    """
    with join_processes(engine=True) as processes, disk_errors_named(cfg.output_dir):
        prepare_output(cfg, processes)
        if (found := finished(cfg)) is not None:
            return found
        result = processes.first_alone(work(cfg, processes))
        return result if result is not None else finished(cfg)  # type: ignore[return-value]


def without_held_out(
    rows: Callable[[Tensor], Part], image_ids: Sequence[str], cfg: TrainConfig
) -> tuple[Part, Part | None]:
    """What is trained on, and what is judged on: the samples of the held-out images, None if there are none.

    Parameters
    ----------
    rows
        From indices of samples to a part of them.
    """
    out_B = held_out(tuple(image_ids), cfg.data.validation_fraction, cfg.seed)
    validation = rows(out_B.nonzero().flatten()) if bool(out_B.any()) else None
    return rows((~out_B).nonzero().flatten()), validation


@contextmanager
def disk_errors_named(folder: Path) -> Iterator[None]:
    """Turn a disk that cannot be written into a TrainingError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise TrainingError(
            f"{folder} cannot be written any more ({error}). What was finished is kept: make room and start "
            "the same command again"
        ) from error


def prepare_output(cfg: TrainConfig, processes: Processes) -> None:
    """Refuse a folder of another run; write the resolved configuration.

    Parameters
    ----------
    cfg
        Of the run.
    processes
        The first writes.
    """
    path = cfg.output_dir / CONFIG_FILE
    if path.is_file():
        check_same_run(cfg, path)
    processes.barrier()

    def write() -> None:
        try:
            cfg.output_dir.mkdir(parents=True, exist_ok=True)
            dump_config(cfg, path)
        except OSError as error:
            raise TrainingError(
                f"{cfg.output_dir}: the output folder cannot be written ({error}); choose another output_dir"
            ) from error

    processes.first_alone(write)


def train_tracked(cfg: TrainConfig, training: Training, processes: Processes) -> dict[str, Tensor]:
    """Train, from the last checkpoint if there is one, under a progress bar and with all trackers.

    Parameters
    ----------
    cfg
        Of the run.
    training
        What is done.
    processes
        All.

    Returns
    -------
    dict
        The trained weights on the CPU, by name. The engine is gone then.
    """
    start = training.resume()
    if start and processes.first:
        log.info("going on from step %d of %d", start, training.size.steps)
    trackers = []
    if processes.first:
        trackers = open_trackers(
            cfg.tracking.report_to,
            cfg.output_dir,
            project=cfg.tracking.project,
            run_name=cfg.tracking.run_name or cfg.output_dir.name,
            config=to_dict(cfg),
            resume_step=start,
        )

    def report(step: int, metrics: Mapping[str, Any]) -> None:
        for tracker in trackers:
            tracker.write(step, metrics)

    try:
        steps = training.size.steps
        with progress(steps, training.trained, "step", shown=processes.first, done=start) as advance:
            training.run(start, report, advance)
        return training.weights()
    finally:
        for tracker in trackers:
            tracker.close()
        training.close()
