"""Other tools, each in an environment of its own (``scripts/test_plugins.sh``), and commands in general."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKBONE = ROOT / "checkpoints" / "tiny-llava"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def run(command: Sequence[object], *, seconds: int = 1500, **more: str) -> str:
    """What a command that must succeed, in so many seconds, prints; ``more`` joins its environment."""
    env = {**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def tool_python(tool: str) -> str:
    """The python of an environment with the tool in it; skips the test where the tool cannot be had."""
    script = ROOT / "scripts" / "test_plugins.sh"
    command = ["bash", str(script), tool, "--environment"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    if done.returncode == 3:
        pytest.skip(f"{tool} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]
