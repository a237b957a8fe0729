"""Tokens of each row of a batch, packed to the left.

Shapes: B rows, N tokens of the padded batch, S slots of the row that has most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """Token positions of each row, packed to the left in their order.

    An empty slot, behind the last token of a row, repeats the row's first token: what is computed there is
    finite, and dropped.

    Attributes
    ----------
    index
        (B, S) int64 positions in the batch.
    valid
        (B, S) bool: the slot holds a token.
    """

    index: Tensor
    valid: Tensor

    @staticmethod
    def of(mask_BN: Tensor) -> Slots:
        """Slots for the True positions of a mask.

        Parameters
        ----------
        mask_BN
            (B, N) bool; the widest row decides how many slots there are.
        """
        width = int(mask_BN.sum(1).max()) if mask_BN.numel() else 0
        # Stable: chosen tokens first, in order.
        order_BS = mask_BN.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        valid_BS = mask_BN.gather(1, order_BS)
        return Slots(torch.where(valid_BS, order_BS, order_BS[:, :1]), valid_BS)

    def take(self, values_BN: Tensor) -> Tensor:
        """(B, S, ...) entries of a (B, N, ...) tensor; a batch dimension of 1 is expanded.

        Parameters
        ----------
        values_BN
            (B, N, ...) or (1, N, ...), on the device of the slots.
        """
        rows = self.index.shape[0]
        values_BN = values_BN.expand(rows, *values_BN.shape[1:])
        index = self.index.reshape(*self.index.shape, *(1,) * (values_BN.dim() - 2))
        return values_BN.gather(1, index.expand(-1, -1, *values_BN.shape[2:]))
