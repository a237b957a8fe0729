"""A process that keeps what it frees asks the system for no more memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from dyvte.heap import keep_memory

if sys.argv[1] == "keep":
    assert keep_memory()
torch.set_num_threads(1)

def work():
    # as a layer's activations: several at once, then all of them gone
    held = [torch.ones(2**20) for _ in range(4)]
    del held

for _ in range(10):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> int:
    """Page faults of ten rounds of 16 MiB, taken and given back."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = subprocess.run(
        [sys.executable, "-c", FAULTS, how], env={**known, **environment}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_what_was_freed_is_used_again() -> None:
    pages = 10 * 4 * 2**22 // os.sysconf("SC_PAGE_SIZE")
    assert faults("leave") > pages / 20  # else there would be nothing to keep
    assert faults("keep") < pages / 200


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    from dyvte.heap import keep_memory

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert keep_memory() is False
