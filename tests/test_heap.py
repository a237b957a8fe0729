"""A process that keeps what it frees asks the system for no more memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

KEPT = """
import sys
import torch
from dyvte.heap import keep_memory

def held():
    return int(open("/proc/self/statm").read().split()[1])

if sys.argv[1] == "keep":
    assert keep_memory()
before = held()
blocks = [torch.ones(6 * 2**20) for _ in range(4)]
del blocks
print(held() - before)
"""


def kept(how: str) -> int:
    """Pages that a process still holds of four blocks of 24 MiB, all of them freed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run([sys.executable, "-c", KEPT, how], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_what_was_freed_is_kept() -> None:
    pages = 4 * 24 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert kept("leave") < pages / 10
    assert kept("keep") > pages * 0.9


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    from dyvte.heap import keep_memory

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert keep_memory() is False
