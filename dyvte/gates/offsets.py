"""Constants on the heads' logits: what makes a new stack undecided, and what closes a gate for good."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

CLOSED = -1e30
"""Offset of a gate that never fires, at any threshold; finite, so that it is no broken gate either."""


def uniform_offsets(num_layers: int, exits: Collection[int] | None = None) -> tuple[float, ...]:
    """Offsets that make all exits equally likely at logit 0: minus the log of how many come after, 0 for L.

    ``exits`` are the exit layers that may be taken (None: all); gates at the others are closed.

    Parameters
    ----------
    num_layers
        L.
    exits
        Exit layers that may be taken; None: all.
    """
    allowed = set(range(1, num_layers + 1)) if exits is None else {*exits, num_layers}
    later = [sum(j > k for j in allowed) for k in range(1, num_layers)]
    return (*(-math.log(n) if k in allowed else CLOSED for k, n in enumerate(later, start=1)), 0.0)


def uniform_freeze_offsets(num_layers: int, freezes: Collection[int] | None = None) -> tuple[float, ...]:
    """Offsets of the freeze head that make all freeze layers, and never freezing, equally likely at logit 0.

    That is for a row which does not leave before. Entry j = 0..L-1 is of freezing after j layers; ``freezes``
    are those that may be taken (None: all), the head is closed at the others.

    Parameters
    ----------
    num_layers
        L.
    freezes
        Freeze layers that may be taken; None: all.
    """
    allowed = set(range(num_layers)) if freezes is None else set(freezes)
    later = [1 + sum(f > j for f in allowed) for j in range(num_layers)]
    return tuple(-math.log(n) if j in allowed else CLOSED for j, n in enumerate(later))


def close_gates(offsets: Sequence[float], exits: Collection[int]) -> tuple[float, ...]:
    """The offsets, with the gates closed whose layer is not among ``exits``.

    Parameters
    ----------
    offsets
        L constants, gate k at k-1; the last, of gate L, stays as it is.
    exits
        Layers at which a row may leave.
    """
    return tuple(x if k in exits or k == len(offsets) else CLOSED for k, x in enumerate(offsets, start=1))


def close_freezes(offsets: Sequence[float], freezes: Collection[int]) -> tuple[float, ...]:
    """The freeze head's offsets, closed at the layers that are not among ``freezes``.

    Parameters
    ----------
    offsets
        L constants, entry j of freezing after j layers.
    freezes
        Layers after which a row may freeze.
    """
    return tuple(x if j in freezes else CLOSED for j, x in enumerate(offsets))


def is_open(offset: float) -> bool:
    """Can a gate with this offset fire?"""
    return offset > CLOSED / 2
