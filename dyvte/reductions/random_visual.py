"""The control of every selection: visual tokens that leave are drawn, not chosen.

Shapes: B rows, N tokens of the padded batch, L decoder layers, D hidden size.
"""

from __future__ import annotations

import re

from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.reductions.base import (
    REDUCTIONS,
    Reduction,
    ReductionPlan,
    TokenRows,
    check_layer,
    check_share,
    drawn_order,
    floor_share,
)


class RandomVisualPlan(ReductionPlan):
    """One prefill's draws."""

    def __init__(self, layer: int, ratio: float, seed: int, rows: TokenRows) -> None:
        self.layer, self.ratio, self.seed, self.rows = layer, ratio, seed, rows
        self.enters = layer == 0 and ratio > 0

    def enter(
        self, hidden_BND: Tensor, carried_BN: Tensor, places_BN3: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The states as they are, of fewer tokens."""
        return hidden_BND, self.keep(0, carried_BN, None)

    def drops(self, k: int) -> bool:
        """Do tokens leave after layer k?"""
        return k == self.layer > 0 and self.ratio > 0

    def keep(self, k: int, carried_BN: Tensor, scores_BN: Tensor | None) -> Tensor:
        """Text, and a drawn share of the visual tokens."""
        visual_BN = carried_BN & self.rows.spans.visual_BN
        kept_BN = carried_BN & ~visual_BN
        num_kept_B = floor_share(visual_BN.sum(1), 1 - self.ratio).tolist()
        for row, sample_id in enumerate(self.rows.sample_ids):
            # Counted from the row's first visual token, so padding and batch do not matter.
            candidates = visual_BN[row].nonzero().flatten()
            order = drawn_order(self.seed, sample_id, len(candidates))
            kept_BN[row, candidates[order[: num_kept_B[row]]]] = True
        return kept_BN


@REDUCTIONS.register
class RandomVisual(Reduction):
    """After layer K the share R of the visual tokens leaves, drawn at random.

    As many stay as under FastV: floor((1 - R) n) of a row's n visual tokens; they keep their positions.

    Parameters
    ----------
    layer
        K, 0..L-1. 0: before the first layer, as pre-decoder methods select.
    ratio
        R, 0..1.
    seed
        The draw is a function of (seed, sample id).

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    name = "random_visual"
    usage = "random_visual:K:R[:SEED]"

    def __init__(self, layer: int, ratio: float, seed: int = 0) -> None:
        check_share(self.name, ratio)
        self.layer, self.ratio, self.seed = layer, ratio, seed

    def __repr__(self) -> str:
        return f"random_visual:{self.layer}:{self.ratio:g}:{self.seed}"

    @classmethod
    def parse(cls, argument: str) -> RandomVisual:
        """Make the reduction from the text after its name."""
        match = re.fullmatch(r"(\d+):(\d*\.?\d+)(?::(\d+))?", argument)
        if match is None:
            raise ConfigError(
                f"reduction random_visual:{argument}: expected {cls.usage}, for example random_visual:2:0.5"
            )
        return cls(int(match[1]), float(match[2]), int(match[3] or 0))

    def check(self, num_layers: int) -> None:
        """Raise where the backbone has no layer behind K."""
        check_layer(self.name, self.layer, num_layers, first=0)

    def tokens_left(self, visual_BL: Tensor) -> Tensor:
        """(B, L): the share R is gone behind layer K."""
        left_BL = visual_BL.clone()
        left_BL[:, self.layer :] = floor_share(visual_BL[:, self.layer :], 1 - self.ratio)
        return left_BL

    def start(self, rows: TokenRows) -> RandomVisualPlan:
        """The plan for one prefill."""
        return RandomVisualPlan(self.layer, self.ratio, self.seed, rows)
