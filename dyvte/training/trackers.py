"""Where a run's metrics go: a JSONL file always, wandb and TensorBoard on request.

Metrics are numbers, or lists of numbers over exit layers. A run that goes on from an earlier step takes up
each tracker there: what a killed run had written beyond that step does not count.
"""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from dyvte.errors import ConfigError
from dyvte.files import write_atomically
from dyvte.training.plots import exit_histogram

LOG_FILE, PLOT_FILE = "train_log.jsonl", "exit_histogram.png"
EXIT_RATE = "validation/exit_rate"
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes metrics by step; ``metrics`` values are numbers or lists of numbers."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of a step."""

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
        write_atomically(path, "".join(f"{line}\n" for line in kept))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a line and hand it to the system at once."""
        self._stream.write(json.dumps({"step": step, **metrics}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class WandbTracker:
    """wandb, offline unless WANDB_MODE is set; a resumed run keeps its id.

    A resumed offline run adds a second folder; `wandb sync` joins them under the id, and of steps that both
    hold, which are equal, keeps the first.
    """

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / "wandb_run_id"
        if not id_file.is_file():
            write_atomically(id_file, secrets.token_hex(4))
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
        self._wandb, self._last = wandb, _LastExits()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log numbers as they are; a list becomes one series per entry, and a histogram."""
        self._last.take(step, metrics)
        flat: dict[str, Any] = dict(_flat(metrics))
        for name, value in metrics.items():
            if _is_list(value):
                edges = [index - 0.5 for index in range(len(value) + 1)]
                flat[name] = self._wandb.Histogram(np_histogram=(list(value), edges))
        self._run.log(flat, step=step)

    def close(self) -> None:
        """Add the plot of the last exits and finish the run."""
        plot = self._last.plot()
        if plot is not None:
            self._run.log({f"{EXIT_RATE}_plot": self._wandb.Image(plot)}, step=self._last.step)
        self._run.finish()


class TensorboardTracker:
    """TensorBoard event files: scalars, the configuration as text, the last exits as a plot."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers drop events from this step on that an earlier writer left.
        purge = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        if purge is None:
            self._writer.add_text("config", f"```\n{yaml.safe_dump(dict(config), sort_keys=False)}```", 0)
        self._last = _LastExits()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers as they are, lists entry by entry."""
        self._last.take(step, metrics)
        for name, value in _flat(metrics):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Add the plot, flush and close."""
        plot = self._last.plot()
        if plot is not None:
            self._writer.add_image(EXIT_RATE, plot, self._last.step, dataformats="HWC")
        self._writer.close()


class PlotTracker:
    """``exit_histogram.png`` in the output folder: where held-out samples leave, at the end of the run."""

    def __init__(self, folder: Path) -> None:
        self._path, self._last = folder / PLOT_FILE, _LastExits()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Remember the exits."""
        self._last.take(step, metrics)

    def close(self) -> None:
        """Draw them."""
        plot = self._last.plot()
        if plot is not None:
            from PIL import Image

            png = io.BytesIO()
            Image.fromarray(plot).save(png, format="PNG")
            write_atomically(self._path, png.getvalue())


class _LastExits:
    """The newest exit rates among the metrics."""

    def __init__(self) -> None:
        self.step, self._rate = 0, None

    def take(self, step: int, metrics: Mapping[str, Any]) -> None:
        if EXIT_RATE in metrics:
            self.step, self._rate = step, metrics[EXIT_RATE]

    def plot(self) -> Any:
        """Pixels; None where there is nothing to draw or to draw with."""
        if self._rate is None:
            return None
        try:
            return exit_histogram(self._rate, f"held-out samples, step {self.step}")
        except ConfigError as error:
            log.warning("no plot of the exits: %s", error)
            return None


def _flat(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers by name; entry k of a list is ``name/k``, in two digits."""
    for name, value in metrics.items():
        if _is_list(value):
            yield from ((f"{name}/{index:02d}", item) for index, item in enumerate(value))
        else:
            yield name, value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def open_trackers(
    report_to: Sequence[str],
    folder: Path,
    *,
    project: str,
    run_name: str,
    config: Mapping[str, Any],
    resume_step: int,
) -> list[Tracker]:
    """The run's trackers; one that is not installed is omitted with a warning, training does not need it.

    Parameters
    ----------
    report_to
        Their names.
    folder
        Of the run.
    project, run_name
        What wandb calls it.
    config
        Of the run, as YAML would hold it.
    resume_step
        Where it goes on; 0 for a new run.
    """
    trackers: list[Tracker] = [JsonlTracker(folder / LOG_FILE, resume_step), PlotTracker(folder)]
    for name in report_to:
        try:
            if name == "wandb":
                trackers.append(WandbTracker(folder, project, run_name, config))
            elif name == "tensorboard":
                trackers.append(TensorboardTracker(folder, config, resume_step))
        except ImportError as error:
            log.warning("report_to %s: not installed (%s); metrics go to %s only", name, error, LOG_FILE)
    return trackers
