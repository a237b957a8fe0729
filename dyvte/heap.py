"""The C library's heap: a process keeps what it frees, and need not ask for memory in each pass."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
_KEPT = 2**31 - 1
_LARGEST = 32 * 2**20  # glibc takes no more


def keep_memory() -> bool:
    """Let this process keep up to 2 GiB that it frees, in blocks of up to 32 MiB, where it can (glibc).

    By itself it gives them back to the system and takes them again: two page faults per token and layer in a
    forward of small states on a CPU, up to a third of its time. ``MALLOC_TRIM_THRESHOLD_`` or
    ``MALLOC_MMAP_THRESHOLD_`` in the environment say otherwise, and are left to.

    Returns
    -------
    bool
        Whether it does now.
    """
    if any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _KEPT)) and bool(mallopt(_MMAP_THRESHOLD, _LARGEST))
