"""dyvte: visual tokens leave a multimodal LLM as soon as it has seen enough."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use, so that `import dyvte` (and the command line's --help) costs nothing.
_EXPORTS = {
    "VisualExit": "dyvte.runtime",
    "ImageStore": "dyvte.runtime",
    "GateStack": "dyvte.gates",
    "GateConfig": "dyvte.gates",
    "trace_exits": "dyvte.teacher",
    "search_exit_layer": "dyvte.calibration",
}
__all__ = [
    "GateConfig",
    "GateStack",
    "ImageStore",
    "VisualExit",
    "__version__",
    "search_exit_layer",
    "trace_exits",
]

if TYPE_CHECKING:
    from .calibration import search_exit_layer
    from .gates import GateConfig, GateStack
    from .runtime import ImageStore, VisualExit
    from .teacher import trace_exits


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dyvte' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
