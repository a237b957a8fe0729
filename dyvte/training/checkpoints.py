"""Checkpoints of a running training: whole or not there, checked before use, the last few kept.

A checkpoint is a folder ``step-00000500`` with DeepSpeed's files (private to the run: they are pickles, and
are read back only after their digests match) and ``state.json``, written last, which lists every file's
sha256.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dyvte.distributed import Processes
from dyvte.errors import CheckpointError, ConfigError
from dyvte.files import publish_folder, write_atomically

log = logging.getLogger(__name__)
STATE = "state.json"
_PREFIX = "step-"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stood, and what must not change when it goes on."""

    step: int
    global_batch: int
    world_size: int
    zero_stage: int


class Checkpoints:
    """The checkpoints of one run, in ``folder``."""

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        self.folder, self.keep, self.processes = folder, keep, processes

    def save(self, engine: Any, state: RunState) -> Path:
        """Write a checkpoint; all processes must call this. Older ones beyond ``keep`` are removed.

        Parameters
        ----------
        engine
            DeepSpeed's.
        state
            Where the training stands.
        """
        name = f"{_PREFIX}{state.step:08d}"
        writing = self.folder / f".writing-{name}"
        if self.processes.first:
            shutil.rmtree(writing, ignore_errors=True)
        self.processes.barrier()
        try:
            engine.save_checkpoint(str(self.folder), tag=writing.name, save_latest=False)
            if self.processes.first:
                self._publish(writing, self.folder / name, state)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {state.step} cannot be written ({error}); is the "
                "disk full? Earlier checkpoints are untouched: make room and start the same command again"
            ) from error
        self.processes.barrier()
        return self.folder / name

    def latest(self) -> tuple[Path, RunState] | None:
        """The newest checkpoint whose files are all as they were written; damaged ones are passed over."""
        for path in sorted(self.folder.glob(f"{_PREFIX}*"), reverse=True):
            state = self._checked(path)
            if state is not None:
                return path, state
            log.warning("%s is damaged or not whole: the checkpoint before it is used", path)
        return None

    def agreed(self) -> tuple[Path, RunState] | None:
        """:meth:`latest` as the first process finds it, on every process; all processes must call this."""
        return self.processes.from_first(self.latest() if self.processes.first else None)

    def load(self, engine: Any, path: Path) -> None:
        """Put a checkpoint's gates, optimiser and schedule into the engine; all processes must call this.

        Parameters
        ----------
        engine
            DeepSpeed's.
        path
            Of the checkpoint.
        """
        loaded, _ = engine.load_checkpoint(str(self.folder), tag=path.name, load_module_strict=True)
        if loaded is None:
            raise CheckpointError(f"{path}: DeepSpeed found nothing to load there; remove the folder")

    def _publish(self, writing: Path, final: Path, state: RunState) -> None:
        files = sorted(path for path in writing.rglob("*") if path.is_file())
        digests = {}
        for path in files:
            digests[str(path.relative_to(writing))] = _sha256(path)
        text = json.dumps({"state": asdict(state), "sha256": digests}, indent=2)
        write_atomically(writing / STATE, text)
        publish_folder(writing, final)  # in place of a damaged one of the same step
        for old in sorted(self.folder.glob(f"{_PREFIX}*"), reverse=True)[self.keep :]:
            doomed = self.folder / f".removing-{old.name}"
            os.replace(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        for left in (*self.folder.glob(".removing-*"), *self.folder.glob(".writing-*")):
            shutil.rmtree(left, ignore_errors=True)

    def _checked(self, path: Path) -> RunState | None:
        try:
            record = json.loads((path / STATE).read_text(encoding="utf-8"))
            for name, digest in record["sha256"].items():
                if _sha256(path / name) != digest:
                    return None
            return RunState(**record["state"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_resumable(found: RunState, now: RunState) -> None:
    """Raise ConfigError where a checkpoint cannot be continued by the processes at hand.

    Parameters
    ----------
    found
        Of the checkpoint.
    now
        Of this start.
    """
    if found.global_batch != now.global_batch:
        raise ConfigError(
            f"the run was started with {found.global_batch} samples per step (batch_size x accumulation x "
            f"processes), this start has {now.global_batch}; set them so that the product is the same"
        )
    if found.zero_stage != now.zero_stage:
        raise ConfigError(
            f"the run was started at ZeRO stage {found.zero_stage}, this start has {now.zero_stage}"
        )
    if found.zero_stage > 0 and found.world_size != now.world_size:
        raise ConfigError(
            f"at ZeRO stage {found.zero_stage} the number of processes cannot change: the run was started "
            f"with {found.world_size}, this start has {now.world_size}"
        )
