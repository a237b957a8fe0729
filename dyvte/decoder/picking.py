"""Selecting rows and tokens from whatever tensors a decoder hands its layers.

Shapes: B rows, N tokens of the padded batch, R selected rows, T selected tokens of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyvte.decoder.masks import cut_square, hide_keys
from dyvte.decoder.slots import Slots


class Picker:
    """Picks R rows, and T tokens of each, from tensors that have a (B or 1, N) pair of axes somewhere.

    Parameters
    ----------
    batch, tokens
        B and N.
    rows_R
        Rows to pick, on the host or on `device`.
    positions_RT
        Tokens to pick from each, likewise; None: all N.
    device
        Where the tensors are.
    """

    def __init__(
        self, batch: int, tokens: int, rows_R: Tensor, positions_RT: Tensor | None, device: torch.device
    ) -> None:
        self.batch, self.tokens = batch, tokens
        self._rows = rows_R.to(device)
        self._positions_RT = self._take = None
        if positions_RT is not None:
            self._positions_RT = positions_RT.to(device)
            self._take = (positions_RT + rows_R[:, None] * tokens).flatten().to(device)
        self._cache: dict[Any, tuple[Any, Any]] = {}

    @staticmethod
    def of(slots: Slots, tokens: int) -> Picker:
        """Picks the tokens of these slots, of all rows.

        Parameters
        ----------
        slots
            (B, S) tokens of each row.
        tokens
            N, the length of the rows that is picked from.
        """
        rows_B = torch.arange(len(slots.index), device=slots.index.device)
        return Picker(len(rows_B), tokens, rows_B, slots.index, slots.index.device)

    def __call__(self, value: Any, *, remember: bool = True) -> Any:
        """The picked part of a tensor, or of all tensors of a tuple, list or dict; others as they are."""
        if isinstance(value, Tensor):
            if not remember:
                return self._tensor(value)
            # The same cos and sin go to every layer: select once. Holding `value` keeps its id its own.
            if id(value) not in self._cache:
                self._cache[id(value)] = (value, self._tensor(value))
            return self._cache[id(value)][1]
        if isinstance(value, (tuple, list)):
            return type(value)(self(item, remember=remember) for item in value)
        if isinstance(value, dict):
            return {name: self(item, remember=remember) for name, item in value.items()}
        return value

    def mask(self, mask: Tensor, real_RT: Tensor | None) -> Tensor:
        """Rows, and the tokens' rows and columns, of a 2D or 4D mask; what is not real is hidden.

        Parameters
        ----------
        mask
            As a layer takes it.
        real_RT
            (R, T) bool: tokens that are no filler; None: all.
        """
        key = ("mask", id(mask))
        if key not in self._cache:
            picked = mask.index_select(0, self._rows) if mask.shape[0] == self.batch else mask
            if self._positions_RT is not None:
                picked = cut_square(picked, self._positions_RT, self._positions_RT)
                if real_RT is not None and not real_RT.all():
                    picked = hide_keys(picked, real_RT)
            self._cache[key] = (mask, picked)
        return self._cache[key][1]

    def _tensor(self, tensor: Tensor) -> Tensor:
        axis = self._token_axis(tensor)
        if axis is None or self._take is None:
            return self._of_rows(tensor, 0 if axis is None else axis - 1)
        index = self._take if tensor.shape[axis - 1] == self.batch else self._positions_RT.flatten()
        flat = tensor.flatten(axis - 1, axis).index_select(axis - 1, index)
        return flat.unflatten(axis - 1, self._positions_RT.shape)

    def _of_rows(self, tensor: Tensor, axis: int) -> Tensor:
        # A one-dimensional tensor has no rows.
        if tensor.dim() > 1 and tensor.shape[axis] == self.batch:
            return tensor.index_select(axis, self._rows)
        return tensor

    def _token_axis(self, tensor: Tensor) -> int | None:
        """Index of the token axis: the one of size N right after one of size B or 1."""
        shape = tensor.shape
        for axis in range(1, len(shape)):
            if shape[axis] == self.tokens and shape[axis - 1] in (1, self.batch):
                return axis
        return None
