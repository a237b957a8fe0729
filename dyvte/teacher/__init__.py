"""The teacher: what the frozen backbone says about every possible exit."""

from __future__ import annotations

from dyvte.teacher.exits import exit_logits, kl_divergence, trace_exits
from dyvte.teacher.trace import Trace

__all__ = ["Trace", "exit_logits", "kl_divergence", "trace_exits"]
