"""VTW's control "Rand" (arXiv 2405.05803, Table 2): random tokens leave in place of the visual ones.

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
    drawn_order,
)


class RandomTokensPlan(ReductionPlan):
    """One prefill's draws."""

    def __init__(self, layer: int, seed: int, rows: TokenRows) -> None:
        self.layer, self.seed, self.rows = layer, seed, rows

    def drops(self, k: int) -> bool:
        """Do tokens leave after layer k?"""
        return k == self.layer

    def keep(self, k: int, carried_BN: Tensor, scores_BN: Tensor | None) -> Tensor:
        """All but as many random tokens as there are visual ones; the last prompt token always stays."""
        kept_BN = carried_BN.clone()
        num_visual_B = (carried_BN & self.rows.spans.visual_BN).sum(1).tolist()
        for row, sample_id in enumerate(self.rows.sample_ids):
            # Counted from the row's first token, so padding and batch do not matter.
            candidates = carried_BN[row].nonzero().flatten()[:-1]
            order = drawn_order(self.seed, sample_id, len(candidates))
            kept_BN[row, candidates[order[: num_visual_B[row]]]] = False
        return kept_BN


@REDUCTIONS.register
class RandomTokens(Reduction):
    """After layer K as many random tokens leave as the row carries visual ones, of all kinds.

    Parameters
    ----------
    layer
        K, 1..L-1.
    seed
        The draw is a function of (seed, sample id).
    """

    name = "random_tokens"
    usage = "random_tokens:K[:SEED]"

    def __init__(self, layer: int, seed: int = 0) -> None:
        self.layer, self.seed = layer, seed

    def __repr__(self) -> str:
        return f"random_tokens:{self.layer}:{self.seed}"

    @classmethod
    def parse(cls, argument: str) -> RandomTokens:
        """Make the reduction from the text after its name."""
        match = re.fullmatch(r"(\d+)(?::(\d+))?", argument)
        if match is None:
            raise ConfigError(
                f"reduction random_tokens:{argument}: expected random_tokens:K or random_tokens:K:SEED"
            )
        return cls(int(match[1]), int(match[2] or 0))

    def check(self, num_layers: int) -> None:
        """Raise where the backbone has no layer behind K."""
        check_layer(self.name, self.layer, num_layers)

    def start(self, rows: TokenRows) -> RandomTokensPlan:
        """The plan for one prefill."""
        return RandomTokensPlan(self.layer, self.seed, rows)
