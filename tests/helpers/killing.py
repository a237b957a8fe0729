"""kill -9 a training once it has something to lose."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def train_and_kill(
    options: Sequence[str], output: Path, environment: Mapping[str, str], limit_seconds: float
) -> None:
    """Start ``dyvte train`` in a process of its own and kill it at its first checkpoint below `output`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dyvte", "train", *options],
        env=dict(environment),
        cwd=output.parent,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + limit_seconds
    while not list((output / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
