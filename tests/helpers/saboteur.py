"""`dyvte train` one of whose processes kills itself, with SIGKILL, at a chosen moment.

saboteur.py MOMENT RANK train ...

Moments: "shard" (the second trace shard is written but not yet in place), "step" (in the 13th step), "saving"
(half of the first file of the second checkpoint is written), "publishing" (that checkpoint is whole but not
yet in place), "finishing" (the gates are written, the summary is not).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Arm and start."""
    moment, rank = sys.argv[1], sys.argv[2]
    if os.environ.get("RANK", "0") == rank:
        {"step": _in_step, "saving": _while_saving}.get(moment, _before_renaming)(moment)
    from dyvte.cli import main as dyvte

    return dyvte(sys.argv[3:])


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before_renaming(moment: str) -> None:
    prefix, time = {"shard": ("shard-", 2), "publishing": ("step-", 2), "finishing": ("summary", 1)}[moment]
    real, seen = os.replace, []

    def replace(source: Any, target: Any, **options: Any) -> None:
        seen.extend([target] if Path(target).name.startswith(prefix) else [])
        return _die() if len(seen) == time else real(source, target, **options)

    os.replace = replace


def _in_step(_: str) -> None:
    from dyvte.training.loop import Training

    real = Training._step

    def step(self: Training, index: int) -> float:
        return _die() if index == 12 else real(self, index)

    Training._step = step


def _while_saving(_: str) -> None:
    import torch

    real, folders = torch.save, set()

    def save(content: Any, file: Any, *arguments: Any, **options: Any) -> None:
        real(content, file, *arguments, **options)
        folders.add(Path(file).parent.name)
        if len(folders) == 2:
            os.truncate(file, Path(file).stat().st_size // 2)
            _die()

    torch.save = save


if __name__ == "__main__":
    sys.exit(main())
