"""What one pass labels: exits, freeze layers, and every exit behind every freeze.

Shape letters: B samples, L decoder layers, S schedules, F freeze layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.teacher.freeze_grid import stream_layers


def thinned_exits(num_layers: int, every: int) -> tuple[int, ...]:
    """Exit layers 0, m, 2m, ... and L: every m-th, as a thinned pass labels them.

    Parameters
    ----------
    num_layers
        L.
    every
        m.
    """
    if every < 1:
        raise ValueError(f"exits can be thinned to every m-th with m >= 1, found {every}")
    return tuple(sorted({*range(0, num_layers + 1, every), num_layers}))


def thinned_freezes(num_layers: int, every: int) -> tuple[int, ...]:
    """Freeze layers 0, m, 2m, ... below L: every m-th.

    Parameters
    ----------
    num_layers
        L.
    every
        m.
    """
    if every < 1:
        raise ValueError(f"freeze layers can be thinned to every m-th with m >= 1, found {every}")
    return tuple(range(0, num_layers, every))


@dataclass(frozen=True)
class Schedules:
    """The exits and freeze layers of a pass; see :meth:`of`.

    Attributes
    ----------
    exits:
        Exit layers, ascending; the last is L, the full model.
    freezes:
        Freeze layers, ascending, each in 0..L-1; none: exits alone.
    """

    exits: tuple[int, ...]
    freezes: tuple[int, ...] = ()

    @staticmethod
    def of(exits: Sequence[int] | None, freezes: Sequence[int], num_layers: int) -> Schedules:
        """Those given, in order, and L, which is the full model; exits None: all, 0..L.

        Parameters
        ----------
        exits, freezes
            Layers in any order.
        num_layers
            L.

        Raises
        ------
        ValueError
            If an exit does not lie in 0..L.
        ConfigError
            If a freeze layer does not lie in 0..L-1.
        """
        found = tuple(sorted({*map(int, range(num_layers) if exits is None else exits), num_layers}))
        if not 0 <= found[0] <= found[-1] == num_layers:
            raise ValueError(f"exits {tuple(exits or ())}: expected exit layers in 0..{num_layers}")
        chosen = tuple(sorted({*map(int, freezes)}))
        if chosen and not 0 <= chosen[0] <= chosen[-1] < num_layers:
            raise ConfigError(
                f"freeze layers {tuple(freezes)}: expected layers in 0..{num_layers - 1} (frozen after the "
                f"last, {num_layers}, is the full model)"
            )
        return Schedules(found, chosen)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.exits[-1]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(f, k) of all S of them: what leaves, in the order of leaving; what is frozen and stays; the full
        model."""
        last = self.num_layers
        left = [(f, k) for k in self.exits[:-1] for f in (k, *self.frozen_before(k))]
        return [*left, *((f, last) for f in self.freezes), (last, last)]

    @property
    def stream_layers(self) -> list[tuple[int, int]]:
        """(f, l) of the features that frozen streams have beside the full one."""
        return stream_layers(self.freezes, self.num_layers)

    def frozen_before(self, layer: int) -> tuple[int, ...]:
        """The freeze layers below ``layer``: their streams are no longer the full one there."""
        return tuple(f for f in self.freezes if f < layer)

    def columns(self, values_SB: Tensor) -> Tensor:
        """(B, L+1) values of the exits by exit layer; NaN where an exit has no label."""
        columns = values_SB.new_full((values_SB.shape[1], self.num_layers + 1), torch.nan)
        for values_B, (f, k) in zip(values_SB, self.pairs, strict=True):
            if f == k:
                columns[:, k] = values_B
        return columns

    def grid(self, values_SB: Tensor) -> Tensor:
        """(B, F, L+1) values by freeze and exit layer; NaN where k < f and where an exit has no label."""
        of: Mapping[tuple[int, int], Tensor] = dict(zip(self.pairs, values_SB, strict=True))
        rows = values_SB.shape[1]
        grid = values_SB.new_full((rows, len(self.freezes), self.num_layers + 1), torch.nan)
        for i, f in enumerate(self.freezes):
            for k in self.exits:
                if k >= f:
                    grid[:, i, k] = of[f, k]
        return grid
