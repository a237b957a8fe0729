"""FastV: keep the visual tokens that the last prompt token attends to (Chen et al., arXiv 2403.06764).

Shapes: B rows, N tokens of the padded batch.
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
    floor_share,
    top_share,
)


class FastVPlan(ReductionPlan):
    """One prefill's share of visual tokens to drop."""

    def __init__(self, layer: int, ratio: float, visual_BN: Tensor) -> None:
        self.layer, self.ratio, self.visual_BN = layer, ratio, visual_BN

    def drops(self, k: int) -> bool:
        """Do tokens leave after layer k?"""
        return k == self.layer and self.ratio > 0

    def reads_attention(self, k: int) -> bool:
        """Does the ranking come from layer k?"""
        return self.drops(k)

    def keep(self, k: int, carried_BN: Tensor, scores_BN: Tensor | None) -> Tensor:
        """Text and the best-attended visual tokens."""
        visual_BN = carried_BN & self.visual_BN
        return (carried_BN & ~self.visual_BN) | top_share(scores_BN, visual_BN, 1 - self.ratio)


@REDUCTIONS.register
class FastV(Reduction):
    """After layer K the share R of the visual tokens leaves: those that the last prompt token looks at least.

    As the published code does it: the ranking is by attention in layer K (index K - 1), mean over heads, from
    the last prompt token; kept tokens keep their positions; a row keeps floor((1 - R) n) of its n visual
    tokens. The paper's text averages over all tokens instead.

    Parameters
    ----------
    layer
        K, 1..L-1.
    ratio
        R, 0..1. 0 drops nothing; 1 is an exit after layer K.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    name = "fastv"
    usage = "fastv:K:R"

    def __init__(self, layer: int, ratio: float) -> None:
        check_share(self.name, ratio)
        if layer < 1:
            raise ConfigError(f"fastv ranks by the attention of layer K: expected K >= 1, got {layer}")
        self.layer, self.ratio = layer, ratio

    def __repr__(self) -> str:
        return f"fastv:{self.layer}:{self.ratio:g}"

    @classmethod
    def parse(cls, argument: str) -> FastV:
        """Make the reduction from the text after its name."""
        match = re.fullmatch(r"(\d+):(\d*\.?\d+)", argument)
        if match is None:
            raise ConfigError(f"reduction fastv:{argument}: expected fastv:K:R, for example fastv:2:0.5")
        return cls(int(match[1]), float(match[2]))

    def check(self, num_layers: int) -> None:
        """Raise where the backbone has no layer behind K."""
        check_layer(self.name, self.layer, num_layers)

    def tokens_left(self, visual_BL: Tensor) -> Tensor:
        """(B, L): the share R is gone behind layer K."""
        left_BL = visual_BL.clone()
        left_BL[:, self.layer :] = floor_share(visual_BL[:, self.layer :], 1 - self.ratio)
        return left_BL

    def start(self, rows: TokenRows) -> FastVPlan:
        """The plan for one prefill."""
        return FastVPlan(self.layer, self.ratio, rows.spans.visual_BN)
