"""What every kind of training run does around its training: its folder, its trackers, its disk."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dyvte.config import dump_config, to_dict
from dyvte.distributed import Processes
from dyvte.errors import TrainingError
from dyvte.progress import progress
from dyvte.training.config import TrainConfig
from dyvte.training.engine import Training
from dyvte.training.resuming import check_same_run
from dyvte.training.trackers import open_trackers

log = logging.getLogger(__name__)
CONFIG_FILE, SUMMARY_FILE = "config.yaml", "summary.json"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


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
    """Refuse a folder of another run; write the resolved configuration."""
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


def run_tracked(cfg: TrainConfig, training: Training, processes: Processes) -> None:
    """Train, from the last checkpoint if there is one, under a progress bar and with all trackers."""
    start = training.resume()
    if start and processes.first:
        log.info("going on from step %d of %d", start, training.plan.steps)
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

    def report(step: int, figures: Mapping[str, Any]) -> None:
        for tracker in trackers:
            tracker.write(step, figures)

    try:
        steps = training.plan.steps
        with progress(steps, training.trained, "step", shown=processes.first, done=start) as advance:
            training.run(start, report, advance)
    finally:
        for tracker in trackers:
            tracker.close()
