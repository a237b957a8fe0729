"""What is spent on visual tokens before they leave: one reduction per file, and its command line name.

A policy says when ALL visual tokens of a row leave; a reduction makes them fewer or cheaper before that. Any
reductions combine with any policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from dyvte.errors import ConfigError
from dyvte.reductions.base import (
    REDUCTIONS,
    Neighbourhood,
    Reduction,
    ReductionPlan,
    TokenRows,
    VisualWork,
    merged,
)
from dyvte.reductions.divprune import DivPrune
from dyvte.reductions.fastv import FastV
from dyvte.reductions.ffn import SparseFFN
from dyvte.reductions.frozen import FrozenLayers
from dyvte.reductions.heads import InactiveHeads
from dyvte.reductions.identity import NO_REDUCTION, identity, warn_of_others
from dyvte.reductions.neighbours import Neighbours
from dyvte.reductions.pool import Pool
from dyvte.reductions.profile import VisualProfile
from dyvte.reductions.random_tokens import RandomTokens
from dyvte.reductions.random_visual import RandomVisual

__all__ = [
    "NO_REDUCTION",
    "REDUCTIONS",
    "DivPrune",
    "FastV",
    "FrozenLayers",
    "InactiveHeads",
    "Neighbourhood",
    "Neighbours",
    "Pool",
    "RandomTokens",
    "RandomVisual",
    "Reduction",
    "ReductionPlan",
    "SparseFFN",
    "TokenRows",
    "VisualProfile",
    "VisualWork",
    "check_reductions",
    "identity",
    "merged",
    "parse_reduction",
    "parse_reductions",
    "warn_of_others",
]


def parse_reduction(text: str) -> Reduction:
    """A reduction from its command line form, such as ``fastv:2:0.5``; ``REDUCTIONS.usages()`` are all.

    Parameters
    ----------
    text
        ``NAME:ARGUMENT``.

    Raises
    ------
    ConfigError
        If the name is unknown (the nearest is named) or its argument malformed.
    """
    return cast(Reduction, REDUCTIONS.parse(text))


def parse_reductions(text: str) -> tuple[Reduction, ...]:
    """Reductions joined by ``+``; an empty text or ``none``: none.

    Parameters
    ----------
    text
        As `--reduction` takes it.
    """
    if text in ("", "none"):
        return ()
    return check_reductions([parse_reduction(part) for part in text.split("+")])


def check_reductions(reductions: Sequence[Reduction]) -> tuple[Reduction, ...]:
    """The reductions as a tuple.

    Parameters
    ----------
    reductions
        In the order in which they act.

    Raises
    ------
    ConfigError
        If something else is among them.
    """
    for item in reductions:
        if not isinstance(item, Reduction):
            raise ConfigError(
                f"reductions holds a {type(item).__name__}: expected objects such as FastV(2, 0.5)"
            )
    return tuple(reductions)
