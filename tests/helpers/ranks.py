"""Run a script on several processes of this machine that talk over gloo."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def on_two_ranks(folder: Path, script: str) -> None:
    """Each rank must write "rank R exact" to stderr; otherwise the test fails with what they said."""
    file = folder / "ranks.py"
    file.write_text(script)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(file),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, cwd=folder, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        assert f"rank {rank} exact" in done.stderr, done.stderr[-3000:]
