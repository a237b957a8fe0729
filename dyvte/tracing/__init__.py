"""One run of the teacher over configured data, as trace, calibrate, search and train share it."""

from __future__ import annotations

from dyvte.tracing.config import TracingConfig
from dyvte.tracing.traces import run_traces, trace_data

__all__ = ["TracingConfig", "run_traces", "trace_data"]
