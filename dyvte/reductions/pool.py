"""Down-sampling, the control at equal compute: visual tokens averaged before the decoder.

Shapes: B rows, N tokens of the padded batch, V visual tokens of a row, W windows, L decoder layers, D hidden
size.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from dyvte.backbones import Backbone, has_deepstack
from dyvte.errors import ConfigError, UnsupportedBackboneError
from dyvte.reductions.base import REDUCTIONS, Reduction, ReductionPlan, TokenRows


class PoolPlan(ReductionPlan):
    """One prefill's windows."""

    def __init__(self, side: int, visual_BN: Tensor) -> None:
        self.side, self.visual_BN = side, visual_BN
        self.enters = side > 1

    def enter(
        self, hidden_BND: Tensor, carried_BN: Tensor, places_BN3: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Each window's first token carries the mean of the window; the others are gone."""
        assert places_BN3 is not None  # noqa: S101  (the runtime gives what `needs_grid` asks for)
        hidden_BND, kept_BN = hidden_BND.clone(), carried_BN & ~self.visual_BN
        for row, visual_N in enumerate(carried_BN & self.visual_BN):
            columns_V = visual_N.nonzero().flatten()
            if not len(columns_V):
                continue
            window_V, first_W = windows(places_BN3[row, columns_V], self.side)
            there = columns_V.to(hidden_BND.device), window_V.to(hidden_BND.device)
            means_WD = window_means(hidden_BND[row, there[0]], there[1], len(first_W))
            hidden_BND[row, columns_V[first_W].to(hidden_BND.device)] = means_WD.to(hidden_BND.dtype)
            kept_BN[row, columns_V[first_W]] = True
        return hidden_BND, kept_BN


def windows(places_V3: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The window of each visual token, and the first token of each window.

    Parameters
    ----------
    places_V3
        (V, 3) int64 image, row and column, in the order of the tokens.
    side
        Tokens along a side of a window; windows at the right and lower edge hold what is left.
    """
    cells_V3 = torch.cat([places_V3[:, :1], places_V3[:, 1:] // side], 1)
    cells_W3, window_V = torch.unique(cells_V3, dim=0, return_inverse=True)
    first_W = torch.full((len(cells_W3),), len(places_V3))
    first_W.scatter_reduce_(0, window_V, torch.arange(len(places_V3)), "amin")
    return window_V, first_W


def window_means(states_VD: Tensor, window_V: Tensor, num_windows: int) -> Tensor:
    """(W, D) float32 means of the states of each window."""
    sums_WD = torch.zeros(num_windows, states_VD.shape[1], device=states_VD.device)
    sums_WD = sums_WD.index_add(0, window_V, states_VD.float())
    return sums_WD / torch.bincount(window_V, minlength=num_windows)[:, None]


@REDUCTIONS.register
class Pool(Reduction):
    """Before the first layer each image's visual tokens are averaged in windows of S x S.

    A window's first token, top left, stays in its place with the mean of the window's states; the others
    leave. Windows at the right and lower edge hold what is left of them.

    Parameters
    ----------
    side
        S, 1 or more. 1 changes nothing.

    Raises
    ------
    ConfigError
        If it is less than 1.
    """

    name = "pool"
    usage = "pool:S"
    needs_grid = True

    def __init__(self, side: int) -> None:
        if side < 1:
            raise ConfigError(f"pool averages S x S visual tokens: expected S >= 1, got {side}")
        self.side = side

    def __repr__(self) -> str:
        return f"pool:{self.side}"

    @classmethod
    def parse(cls, argument: str) -> Pool:
        """Make the reduction from the text after its name."""
        if re.fullmatch(r"\d+", argument) is None:
            raise ConfigError(f"reduction pool:{argument}: expected {cls.usage}, for example pool:2")
        return cls(int(argument))

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise where a visual token is more than its state before the first layer, or no part of an image.

        Raises
        ------
        UnsupportedBackboneError
            Deepstack, or newline tokens behind each row of an image.
        """
        kind = backbone.model.config.model_type
        if has_deepstack(backbone):
            raise UnsupportedBackboneError(
                f"{kind} adds vision features at several layers (deepstack): visual tokens cannot be pooled "
                "before the first"
            )
        if any(getattr(module, "image_newline", None) is not None for module in backbone.path):
            raise UnsupportedBackboneError(
                f"{kind} ends each row of an image with a newline token, which is no part of the image: its "
                "visual tokens cannot be pooled by their grid"
            )

    def tokens_left(self, visual_BL: Tensor) -> Tensor:
        """(B, L): windows of square images, as few and as large as the number of tokens allows."""
        left = {int(count): self._left_of(int(count)) for count in visual_BL.unique()}
        return torch.tensor([[left[int(count)] for count in row] for row in visual_BL])

    def _left_of(self, count: int) -> int:
        side = next((side for side in range(math.isqrt(count), 0, -1) if count % side**2 == 0), 1)
        return count // side**2 * (-(-side // self.side)) ** 2

    def start(self, rows: TokenRows) -> PoolPlan:
        """The plan for one prefill."""
        return PoolPlan(self.side, rows.spans.visual_BN)
