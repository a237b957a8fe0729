"""Prefills of the same inputs that do the same in their first layers: compute those once.

The first pass records what it did, layer by layer; a later one takes its first `upto` layers from there. A
branch is another recording that begins with the first layers of this one. For tracing, which asks for every
schedule of a batch; generation has no use for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dyvte.runtime.cache import Columns, ExitLayer


@dataclass(frozen=True)
class Step:
    """One layer of the recorded pass.

    Attributes
    ----------
    output
        What the layer returned.
    kept_BN
        Tokens that reductions left after it.
    gone_B
        Rows whose last visual token left with it; None: no reduction dropped any.
    has_scores
        Was its last row of attention computed apart?
    cache_layer
        Its cache layer as it was then; None without a cache.
    """

    output: Any
    kept_BN: Tensor
    gone_B: Tensor | None
    has_scores: bool
    cache_layer: Any


class Replay:
    """Shared by prefills of the same inputs; the first one fills it.

    Attributes
    ----------
    upto
        Layers that the next prefill takes from the record; None: it is the first, and is recorded.
    steps
        The layers recorded so far. A prefill adds those that are not.
    """

    def __init__(self) -> None:
        self.upto: int | None = None
        self.steps: list[Step] = []
        self._encoded: dict[tuple[int, str], list[Any]] = {}
        self._asked: dict[tuple[int, str], int] = {}
        self._columns: dict[int, tuple[Columns, Columns]] = {}

    def takes(self, index: int) -> bool:
        """Does the pass in progress take layer `index` from the record?"""
        return self.upto is not None and index < self.upto

    def branch(self, upto: int) -> Replay:
        """A recording that begins with the first ``upto`` layers of this; the next prefill adds to it."""
        found = Replay()
        found.upto, found.steps, found._encoded = upto, self.steps[:upto], self._encoded
        return found

    def start(self) -> None:
        """A pass begins."""
        self._asked.clear()
        self._columns.clear()
        if self.upto is None:
            self.steps.clear()
            self._encoded.clear()

    def add(
        self, output: Any, kept_BN: Tensor, gone_B: Tensor | None, has_scores: bool, cache: Any, index: int
    ) -> None:
        """Record a layer of the first pass; nothing in later ones."""
        if index < len(self.steps):
            return
        layers = getattr(cache, "layers", ())
        held = self.copied(layers[index]) if index < len(layers) else None
        self.steps.append(Step(output, kept_BN, gone_B, has_scores, held))

    def copied(self, layer: Any) -> Any:
        """A cache layer that can grow on its own; layers of equal content go on sharing their columns."""
        found = copy.copy(layer)
        if isinstance(layer, ExitLayer):
            # The original is kept as long as its id stands for it.
            pair = self._columns.setdefault(id(layer.columns), (layer.columns, copy.copy(layer.columns)))
            found.columns = pair[1]
        return found

    def encoded(self, key: tuple[int, str], encode: Callable[[], Any]) -> Any:
        """What a vision method returned when it was called as often in the recorded pass."""
        count = self._asked[key] = self._asked.get(key, 0) + 1
        known = self._encoded.setdefault(key, [])
        if len(known) < count:
            known.append(encode())
        return known[count - 1]
