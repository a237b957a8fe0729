#!/usr/bin/env python
"""Run several dyvte commands in one process, one after the other: what they import is imported once.

python scripts/several.py dyvte trace ARGUMENTS --then dyvte train ARGUMENTS --then dyvte calibrate ARGUMENTS

Ends at the first that fails, with its exit code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dyvte.cli import main

BETWEEN = "--then"


def run(words: Sequence[str]) -> int:
    """Exit code of the first command that fails, 0 without one.

    Parameters
    ----------
    words
        Commands as they are typed, ``--then`` between them.
    """
    command: list[str] = []
    for word in [*words, BETWEEN]:
        if word != BETWEEN:
            command.append(word)
            continue
        if len(command) < 2 or command[0] != "dyvte":
            print(f"error: expected a dyvte command before and behind each {BETWEEN}", file=sys.stderr)
            return 2
        if code := main(command[1:]):
            return code
        command = []
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
