"""YOPO's neighbour-aware visual attention (arXiv 2410.06169)."""

from __future__ import annotations

import re

from dyvte.errors import ConfigError
from dyvte.reductions.base import REDUCTIONS, Neighbourhood, Reduction, ReductionPlan, TokenRows, VisualWork


class NeighboursPlan(ReductionPlan):
    """The same in every layer."""

    def __init__(self, window: Neighbourhood) -> None:
        self._work = VisualWork(window=window)

    def visual_work(self, k: int) -> VisualWork:
        """What the k-th layer does for visual tokens."""
        return self._work


@REDUCTIONS.register
class Neighbours(Reduction):
    """A visual token attends to the visual tokens within `radius` rows and columns on its own image.

    It attends to the text before it as ever; text attends to all visual tokens. In all layers, as the
    published code does it, which is bidirectional inside the window: its window of 5 is radius 2. Tiles of a
    image and frames of a video are images of their own.

    Parameters
    ----------
    radius
        Chebyshev distance on the grid; 0: a visual token sees itself alone.
    causal
        Exclude neighbours that come later in the sequence.

    Raises
    ------
    ConfigError
        If the radius is negative.
    """

    name = "neighbours"
    usage = "neighbours:RADIUS[:causal]"
    needs_grid = True

    def __init__(self, radius: int = 2, causal: bool = False) -> None:
        if radius < 0:
            raise ConfigError(f"neighbours within radius {radius}: expected 0 or more")
        self.window = Neighbourhood(radius, causal)

    def __repr__(self) -> str:
        return f"neighbours:{self.window.radius}" + (":causal" if self.window.causal else "")

    @classmethod
    def parse(cls, argument: str) -> Neighbours:
        """Make the reduction from the text after its name."""
        match = re.fullmatch(r"(\d+)(:causal)?", argument)
        if match is None:
            raise ConfigError(f"reduction neighbours:{argument}: expected neighbours:RADIUS[:causal]")
        return cls(int(match[1]), bool(match[2]))

    def start(self, rows: TokenRows) -> NeighboursPlan:
        """The plan for one prefill."""
        return NeighboursPlan(self.window)
