"""The teacher: what the frozen backbone says about every possible exit."""

from __future__ import annotations

from dyvte.teacher.config import TeacherConfig
from dyvte.teacher.exits import exit_logits, kl_divergence, trace_exits
from dyvte.teacher.labels import greedy_answers
from dyvte.teacher.manifest import Manifest, Shard
from dyvte.teacher.pipeline import prepared_batches, write_traces
from dyvte.teacher.schedules import thinned_exits, thinned_freezes
from dyvte.teacher.store import TraceStore
from dyvte.teacher.teacher import Teacher
from dyvte.teacher.trace import Trace

__all__ = [
    "Manifest",
    "Shard",
    "Teacher",
    "TeacherConfig",
    "Trace",
    "TraceStore",
    "exit_logits",
    "greedy_answers",
    "kl_divergence",
    "prepared_batches",
    "thinned_exits",
    "thinned_freezes",
    "trace_exits",
    "write_traces",
]
