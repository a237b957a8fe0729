"""DivPrune: keep the visual tokens that are most unlike each other (Alvar et al., arXiv 2503.02175).

Shapes: B rows, N tokens of the padded batch, V visual tokens of a row, L decoder layers, D hidden size.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn import functional

from dyvte.errors import ConfigError
from dyvte.reductions.base import REDUCTIONS, Reduction, ReductionPlan, TokenRows, check_share


class DivPrunePlan(ReductionPlan):
    """One prefill's choice."""

    def __init__(self, ratio: float, visual_BN: Tensor) -> None:
        self.ratio, self.visual_BN = ratio, visual_BN
        self.enters = ratio > 0

    def enter(
        self, hidden_BND: Tensor, carried_BN: Tensor, places_BN3: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The states as they are, of text and of the most diverse visual tokens."""
        visual_BN = carried_BN & self.visual_BN
        kept_BN = carried_BN & ~visual_BN
        for row, visual_N in enumerate(visual_BN):
            columns_V = visual_N.nonzero().flatten()
            count = num_kept(len(columns_V), self.ratio)
            states_VD = hidden_BND[row, columns_V.to(hidden_BND.device)]
            kept_BN[row, columns_V[most_diverse(states_VD, count).cpu()]] = True
        return hidden_BND, kept_BN


def num_kept(num_visual: int, ratio: float) -> int:
    """Of so many visual tokens: rounded to the nearest whole number, as the published code does."""
    return round(num_visual * (1 - ratio))


@torch.no_grad()
def most_diverse(states_VD: Tensor, count: int) -> Tensor:
    """(count,) int64 indices of states, the first chosen first.

    The greedy solution of the max-min diversity problem in cosine distance: first the state that is farthest
    from its nearest other, then again and again the one that is farthest from its nearest chosen one. A state
    is never chosen twice, which the published code can do where distances are 0.
    """
    if count >= len(states_VD):
        return torch.arange(len(states_VD), device=states_VD.device)
    unit_VD = functional.normalize(states_VD.detach().float(), dim=1)
    far_VV = 1 - unit_VD @ unit_VD.T
    # Two states that are each other's nearest tie for the first choice. The product's two halves may differ
    # in the last bit, which must not decide: the first of them wins.
    far_VV = torch.minimum(far_VV, far_VV.T)
    least_V = far_VV.clone().fill_diagonal_(torch.inf).amin(1)
    taken_V = torch.zeros(len(far_VV), dtype=torch.bool, device=far_VV.device)
    chosen: list[Tensor] = []
    for _ in range(count):
        best = least_V.masked_fill(taken_V, -torch.inf).argmax()
        least_V = torch.minimum(least_V, far_VV[best]) if chosen else far_VV[best]
        taken_V = taken_V | (torch.arange(len(taken_V), device=taken_V.device) == best)
        chosen.append(best)
    return torch.stack(chosen) if chosen else torch.zeros(0, dtype=torch.long, device=far_VV.device)


@REDUCTIONS.register
class DivPrune(Reduction):
    """Before the first layer the share R of the visual tokens leaves: those most like others that stay.

    The choice is made on the states that enter the decoder, for all visual tokens of a prompt together.
    Kept tokens keep their positions; the published code, made for one image, lets them count on.

    Parameters
    ----------
    ratio
        R, 0..1: what leaves (the published setting names what stays, 0.098).

    Raises
    ------
    ConfigError
        If it is out of its range.
    """

    name = "divprune"
    usage = "divprune:R"

    def __init__(self, ratio: float) -> None:
        check_share(self.name, ratio)
        self.ratio = ratio

    def __repr__(self) -> str:
        return f"divprune:{self.ratio:g}"

    @classmethod
    def parse(cls, argument: str) -> DivPrune:
        """Make the reduction from the text after its name."""
        if re.fullmatch(r"\d*\.?\d+", argument) is None:
            raise ConfigError(
                f"reduction divprune:{argument}: expected {cls.usage}, for example divprune:0.5"
            )
        return cls(float(argument))

    def tokens_left(self, visual_BL: Tensor) -> Tensor:
        """(B, L): the share R never enters."""
        return (visual_BL.double() * (1 - self.ratio)).round().long()

    def selection_flops(self, num_visual: int, hidden_size: int) -> float:
        """The similarities of all pairs: 0.03 % of LLaVA-1.5-7B's prefill."""
        return 2.0 * num_visual**2 * hidden_size if self.ratio > 0 else 0.0

    def start(self, rows: TokenRows) -> DivPrunePlan:
        """The plan for one prefill."""
        return DivPrunePlan(self.ratio, rows.spans.visual_BN)
