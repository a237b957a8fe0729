"""Which runs of tokens are the same: what the first layer is given decides, neither a path nor an id.

Shapes: B rows, S tokens of a run, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.decoder.picking import Picker
from dyvte.decoder.slots import Slots

# Angles of the same position may differ in their last bits, by where they stand in the tensor they come from.
_ANGLES = 1e-5


@dataclass(frozen=True)
class Content:
    """A run of tokens as it enters the first layer.

    Attributes
    ----------
    states_SD
        Its states.
    beside
        What layers get beside them, by token: positions, angles; (S, ...) each.
    probe
        A few of its numbers, which tell most runs apart.
    """

    states_SD: Tensor
    beside: tuple[Tensor, ...]
    probe: bytes

    def __len__(self) -> int:
        return len(self.states_SD)

    def is_same(self, other: Content) -> bool:
        """Are states equal bit by bit, and positions too?"""
        return (
            len(self) == len(other)
            and len(self.beside) == len(other.beside)
            and torch.equal(self.states_SD, other.states_SD)
            and all(map(_is_same_place, self.beside, other.beside))
        )

    def copy(self) -> Content:
        """The same in memory of its own, for whoever keeps it longer than its batch."""
        return Content(self.states_SD.clone(), tuple(one.clone() for one in self.beside), self.probe)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(one.numel() * one.element_size() for one in (self.states_SD, *self.beside))


def contents_of(slots: Slots, hidden_BND: Tensor, beside: dict[str, Any]) -> list[Content]:
    """The tokens in each row's slots; of a row without any, an empty content.

    Parameters
    ----------
    hidden_BND, beside
        What the first layer is called with: states, and its other arguments without the mask.
    """
    slots = Slots(slots.index.to(hidden_BND.device), slots.valid.to(hidden_BND.device))
    rows, tokens = slots.index.shape
    states_BSD = slots.take(hidden_BND)
    picked = Picker.of(slots, hidden_BND.shape[1])(beside, remember=False)
    parts = _per_token(picked, rows, tokens)
    length_B = slots.valid.sum(1)
    last_BD = states_BSD[torch.arange(rows, device=length_B.device), (length_B - 1).clamp(min=0)]
    lengths, probes = length_B.tolist(), last_BD.float().cpu().numpy()
    return [
        Content(states_BSD[row, :count], tuple(part[row, :count] for part in parts), probes[row].tobytes())
        for row, count in enumerate(lengths)
    ]


def _is_same_place(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    other = other.to(one.device)
    if one.equal(other):
        return True
    return one.is_floating_point() and torch.allclose(one, other, rtol=0, atol=_ANGLES)


def _per_token(picked: Any, rows: int, tokens: int) -> list[Tensor]:
    """All tensors among layer arguments that say something of each token, as (rows, tokens, ...)."""
    if isinstance(picked, dict):
        picked = tuple(picked.values())
    if isinstance(picked, (tuple, list)):
        return [tensor for value in picked for tensor in _per_token(value, rows, tokens)]
    if isinstance(picked, Tensor):
        for axis in range(picked.dim() - 1):
            if tuple(picked.shape[axis : axis + 2]) == (rows, tokens):
                return [picked.movedim((axis, axis + 1), (0, 1))]
    return []
