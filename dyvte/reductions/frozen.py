"""A static set of layers that read visual tokens without updating them (ShortV, arXiv 2504.00502).

Shapes: B rows, L decoder layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dyvte.errors import ConfigError
from dyvte.reductions.base import REDUCTIONS, Reduction, ReductionPlan, TokenRows, VisualWork


class FrozenPlan(ReductionPlan):
    """The same layers for every row."""

    def __init__(self, layers: frozenset[int]) -> None:
        self._layers = layers

    def visual_work(self, k: int) -> VisualWork:
        """What the k-th layer does for visual tokens."""
        return VisualWork(frozen=k - 1 in self._layers)


@REDUCTIONS.register
class FrozenLayers(Reduction):
    """In these layers (counted from 0) visual tokens are read by text, but not updated.

    ShortV's ineffective layers: a visual token's state passes such a layer as it is; text attends to keys and
    values that the layer makes of it. ShortV freezes the layers 0, 2, 3, 12 and 17 to 31 of LLaVA-1.5-7B:
    ``frozen:0,2,3,12,17-31``. A freeze of a policy (``freeze:F``) comes on top.

    Parameters
    ----------
    layers
        Indices counted from 0, as ShortV does: layer k of everything else here has the index k - 1.

    Raises
    ------
    ConfigError
        If there is none, or a negative one.
    """

    name = "frozen"
    usage = "frozen:LAYERS"
    may_freeze = True

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = tuple(sorted(set(map(int, layers))))
        if not self.layers or self.layers[0] < 0:
            raise ConfigError(f"frozen layers {list(self.layers)}: expected indices counted from 0")

    def __repr__(self) -> str:
        return f"frozen:{as_ranges(self.layers)}"

    @classmethod
    def parse(cls, argument: str) -> FrozenLayers:
        """``0,2,3,12,17-31``: indices counted from 0, and ranges that include both ends."""
        return cls(parse_layers(argument))

    def check(self, num_layers: int) -> None:
        """Raise where the backbone has no such layer."""
        if self.layers[-1] >= num_layers:
            raise ConfigError(
                f"frozen layer {self.layers[-1]}: expected indices 0..{num_layers - 1} (counted from 0), the "
                f"backbone has {num_layers} layers"
            )

    def start(self, rows: TokenRows) -> FrozenPlan:
        """The plan for one prefill."""
        return FrozenPlan(frozenset(self.layers))


def parse_layers(text: str) -> tuple[int, ...]:
    """Indices from ``0,2,3,12,17-31``, ascending; ranges include both ends.

    Raises
    ------
    ConfigError
        If it is malformed, a range is empty, or an index stands there twice.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(
                f"layers {text!r}: expected indices counted from 0 and ranges such as 0,2,3,12,17-31, "
                f"got {part!r}"
            )
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(found)) < len(found):
        raise ConfigError(f"layers {text!r}: an index stands there twice")
    return tuple(sorted(found))


def as_ranges(layers: Sequence[int]) -> str:
    """``0,2-3,12,17-31``: what `parse_layers` reads, for ascending indices."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)
