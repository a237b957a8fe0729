"""Where a run's figures go: a JSONL file always, wandb and TensorBoard on request."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

LOG_FILE = "train_log.jsonl"
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes figures by step; ``figures`` values are numbers or lists of numbers."""

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Record the figures of a step."""

    def close(self) -> None:
        """Finish."""


class JsonlTracker:
    """One JSON object per line; lines after the step a run resumes from are cut off first."""

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    if json.loads(line)["step"] <= resume_step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # the torn last line of a killed run
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Append a line and hand it to the system at once."""
        self._stream.write(json.dumps({"step": step, **figures}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class WandbTracker:
    """wandb, offline unless WANDB_MODE is set; a resumed run keeps its id."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb_run_id"
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = wandb.init(
            project=project,
            name=name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=os.environ.get("WANDB_MODE", "offline"),
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(silent=True),
        )
        self._histogram = wandb.Histogram

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Log scalars as they are; a list over layers becomes one series per entry and a histogram."""
        flat: dict[str, Any] = {}
        for name, value in figures.items():
            if isinstance(value, Sequence) and not isinstance(value, str):
                flat |= {f"{name}/{index:02d}": item for index, item in enumerate(value)}
                edges = [index - 0.5 for index in range(len(value) + 1)]
                flat[name] = self._histogram(np_histogram=(list(value), edges))
            else:
                flat[name] = value
        self._run.log(flat, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TensorboardTracker:
    """TensorBoard event files."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        """Scalars, lists entry by entry."""
        for name, value in figures.items():
            values = value if isinstance(value, Sequence) and not isinstance(value, str) else None
            if values is None:
                self._writer.add_scalar(name, value, step)
            else:
                for index, item in enumerate(values):
                    self._writer.add_scalar(f"{name}/{index:02d}", item, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def open_trackers(
    report_to: Sequence[str],
    folder: Path,
    *,
    project: str,
    run_name: str,
    config: Mapping[str, Any],
    resume_step: int,
) -> list[Tracker]:
    """The run's trackers; one that is not installed is left out with a warning, training does not need it."""
    trackers: list[Tracker] = [JsonlTracker(folder / LOG_FILE, resume_step)]
    for name in report_to:
        try:
            if name == "wandb":
                trackers.append(WandbTracker(folder, project, run_name, config))
            elif name == "tensorboard":
                trackers.append(TensorboardTracker(folder))
        except ImportError as error:
            log.warning("report_to %s: not installed (%s); figures go to %s only", name, error, LOG_FILE)
    return trackers
