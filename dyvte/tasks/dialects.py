"""Dialects: whose rule reads an answer."""

from __future__ import annotations

from collections.abc import Sequence

from dyvte.errors import ConfigError

DIALECTS = ("original", "lmms", "vlmevalkit")
"""Whose rule reads an answer: the benchmark's own tool, lmms-eval, or VLMEvalKit."""


def check_dialect(dialect: str, known: Sequence[str] = DIALECTS, benchmark: str = "") -> None:
    """Raise ConfigError unless ``dialect`` is one of ``known``.

    Parameters
    ----------
    dialect
        As it was given.
    known
        Those of the benchmark.
    benchmark
        Its title.
    """
    if dialect not in DIALECTS:
        raise ConfigError(f"unknown scoring dialect {dialect!r}; known: {', '.join(DIALECTS)}")
    if dialect not in known:
        raise ConfigError(
            f"{benchmark} has no {dialect!r} dialect: that tool does not score it. Use {' or '.join(known)}"
        )
