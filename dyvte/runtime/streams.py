"""Index arithmetic of a prefill: which rows run together, on which of their tokens.

Everything is worked out on the host from one copy of the token masks, so no layer waits for the device.

Shapes: B rows, N tokens of the padded batch, R rows of a stream, T tokens of a stream's longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dyvte.decoder import Layout, Picker, Slots

if TYPE_CHECKING:
    from dyvte.runtime.shared_rows import SharedPart

# Beyond, one gather is cheaper than many small copies.
_MOST_RUNS = 64


class Stream:
    """Rows of a prefill that a layer runs in one call.

    Either whole: rows as they stand in the batch, padding included. Or compact: the tokens that each row
    still carries, padded on the right; under a causal mask no token can see that padding, so the stream needs
    no padding mask. A pad slot repeats its row's first token and its result is dropped.

    Attributes
    ----------
    rows_R
        Indices of the rows, on the host.
    order_RT, real_RT
        Position in the batch of every slot, and whether it is a token of the row; on the host.
    at_R
        Which row of the stream's tensors each of the rows is: its own.
    """

    def __init__(
        self, layout: Layout, rows_R: Tensor, carried_BN: Tensor, device: torch.device, *, compact: bool
    ) -> None:
        self.rows_R, self.num_rows, self.is_compact = rows_R, len(rows_R), compact
        carried_RN = carried_BN[rows_R]
        num_R = carried_RN.sum(1)
        self.length = int(num_R.max()) if compact else layout.tokens
        self.is_uniform = bool((num_R == self.length).all())
        if compact:
            slots = Slots.of(carried_RN)
            self.order_RT, self.real_RT = slots.index, slots.valid
        else:
            self.order_RT = torch.arange(layout.tokens).expand(self.num_rows, -1)
            self.real_RT = carried_RN
        self.rows, self.at_R = rows_R.to(device), torch.arange(self.num_rows)
        self._device = device
        self._pick = Picker(layout.batch, layout.tokens, rows_R, self.order_RT if compact else None, device)
        if compact:
            self._put = (self.order_RT + rows_R[:, None] * layout.tokens)[self.real_RT].to(device)
            self._put_from = None if self.is_uniform else _indices(self.real_RT, device)
        # Made once by the engine, in a tuple because None is an answer.
        self.causal_mask: tuple[Tensor | None] | None = None
        # Where positions are closed up: what to take off the ids of the stream's tokens, and the arguments of
        # the layers that come of it.
        self.dropped_RT: Tensor | None = None
        self.closed_up: dict[str, Any] | None = None

    @property
    def keys(self) -> Stream:
        """The tokens whose keys and values a layer makes for these rows."""
        return self

    def gather(self, hidden_BND: Tensor) -> Tensor:
        """(R, T, D) states of the stream."""
        return self._pick(hidden_BND, remember=False)

    def arguments(self, value: Any) -> Any:
        """The stream's part of a layer argument: tensors, or tuples and dicts of them."""
        return self._pick(value)

    def scatter(self, out_BND: Tensor, states_RTD: Tensor) -> None:
        """Write the stream's states into those of the batch."""
        states_RTD = states_RTD.to(out_BND.dtype)
        if not self.is_compact:
            out_BND.index_copy_(0, self.rows, states_RTD)
            return
        flat = states_RTD.reshape(-1, states_RTD.shape[-1])
        flat = flat if self._put_from is None else flat.index_select(0, self._put_from)
        out_BND.view(-1, out_BND.shape[-1]).index_copy_(0, self._put, flat)

    def mask(self, mask: Tensor) -> Tensor:
        """The stream's part of a 2D or 4D mask; pad columns of a compact stream are hidden."""
        return self._pick.mask(mask, self.real_RT if self.is_compact else None)

    def at_places(self, values_RT: Tensor, fill: float) -> Tensor:
        """(R, T) values of the stream's tokens at their places in the batch, (B, N)."""
        out_BN = values_RT.new_full((self._pick.batch, self._pick.tokens), fill)
        take = _indices(self.real_RT, self._device)
        put = (self.order_RT + self.rows_R[:, None] * self._pick.tokens)[self.real_RT].to(self._device)
        out_BN.view(-1)[put] = values_RT.flatten()[take]
        return out_BN


@dataclass(frozen=True)
class Source:
    """Keys and values that are there once, and stand in several rows of the batch.

    Attributes
    ----------
    rows_R, order_RT, real_RT, at_R
        As of a stream; all rows are the one of its tensors.
    """

    rows_R: Tensor
    order_RT: Tensor
    real_RT: Tensor
    at_R: Tensor

    @staticmethod
    def of_all(rows: Sequence[int], order_RT: Tensor) -> Source:
        """Tokens that stand in these rows at these places."""
        real_RT = torch.ones_like(order_RT, dtype=torch.bool)
        return Source(torch.tensor(rows), order_RT, real_RT, torch.zeros(len(rows), dtype=torch.long))


class FrozenStream:
    """Rows whose visual tokens are read, but not updated: a layer runs on their text alone.

    Parameters
    ----------
    layout, rows_R, carried_BN, device
        As for `Stream`.

    Attributes
    ----------
    text, visual, keys
        The rows' text, their visual tokens, and both; each compact.
    order
        Of the visual tokens and then the text, which one stands at each place of `keys`: (R, K) int64, or
        runs (start, stop) where all rows are alike.
    first_R
        (R,) int64 position of each row's first real token in the batch, on the host.
    """

    is_compact = True

    def __init__(self, layout: Layout, rows_R: Tensor, carried_BN: Tensor, device: torch.device) -> None:
        is_visual_BN = layout.spans.visual_BN
        self.rows_R = rows_R
        self.first_R = layout.spans.valid_BN[rows_R].to(torch.uint8).argmax(1)
        self.text = Stream(layout, rows_R, carried_BN & ~is_visual_BN, device, compact=True)
        self.visual = Stream(layout, rows_R, carried_BN & is_visual_BN, device, compact=True)
        self.keys = Stream(layout, rows_R, carried_BN, device, compact=True)
        is_visual_RK = is_visual_BN[rows_R].gather(1, self.keys.order_RT)
        of_visual_RK, of_text_RK = is_visual_RK.cumsum(1) - 1, (~is_visual_RK).cumsum(1) - 1
        order_RK = torch.where(is_visual_RK, of_visual_RK, self.visual.length + of_text_RK)
        order_RK = order_RK.masked_fill(~self.keys.real_RT, 0)
        self.order = _runs(order_RK, self.visual.length) or order_RK.to(device)


class Partition:
    """Rows of a prefill split by what a layer does with their visual tokens; each stream may lack.

    Parameters
    ----------
    carried_BN
        (B, N) bool: tokens that each row still carries; on the host, as all masks here.
    in_text_B
        (B,) bool: rows that carry text only.
    frozen_B
        (B,) bool: rows whose visual tokens are read, but not updated.
    dropped_BN
        Where positions are closed up: visual tokens before each token, see `positions.dropped_before`.
    shared
        Rows that read stored images; the streams are those of the others.

    Attributes
    ----------
    visual, frozen, text
        Rows whose visual tokens are updated, read, and gone.
    sources
        Where the keys and values of all streams stand, and then those of the shared rows.
    """

    def __init__(
        self,
        layout: Layout,
        carried_BN: Tensor,
        in_text_B: Tensor,
        frozen_B: Tensor,
        device: torch.device,
        dropped_BN: Tensor | None = None,
        shared: SharedPart | None = None,
    ) -> None:
        self.layout, self.device, self.shared = layout, device, shared
        self.carried_BN, self.in_text_B, self.frozen_B = carried_BN, in_text_B, frozen_B
        if shared is not None:
            alone_B = ~shared.rows.is_shared_B
            in_text_B, frozen_B = in_text_B & alone_B, frozen_B & alone_B
        else:
            alone_B = torch.ones_like(in_text_B)
        self.visual, self.frozen, self.text = None, None, None
        updated_B = alone_B & ~(in_text_B | frozen_B)
        if updated_B.any():
            rows_R = updated_B.nonzero().flatten()
            is_reduced = not torch.equal(carried_BN[rows_R], layout.spans.valid_BN[rows_R])
            self.visual = Stream(layout, rows_R, carried_BN, device, compact=is_reduced)
        if frozen_B.any():
            self.frozen = FrozenStream(layout, frozen_B.nonzero().flatten(), carried_BN, device)
        if in_text_B.any():
            rows_R = in_text_B.nonzero().flatten()
            self.text = Stream(layout, rows_R, carried_BN, device, compact=True)
        streams = (self.visual, self.frozen, self.text)
        self.streams = [stream for stream in streams if stream is not None]
        self.sources: list[Stream | Source] = [stream.keys for stream in self.streams]
        if shared is not None:
            self.sources += shared.sources
        # Where positions are closed up: what to take off the ids of later tokens.
        self.shift_B = None
        if dropped_BN is not None and self.text is not None:
            dropped_RT = dropped_BN[self.text.rows_R].gather(1, self.text.order_RT)
            self.text.dropped_RT = dropped_RT.to(device)
            self.shift_B = (dropped_BN[:, -1] * in_text_B).to(device)

    @property
    def is_whole(self) -> bool:
        """Does every row carry all of its tokens?"""
        return torch.equal(self.carried_BN, self.layout.spans.valid_BN)

    def is_of(self, carried_BN: Tensor, in_text_B: Tensor, frozen_B: Tensor, device: torch.device) -> bool:
        """Would a partition of these be the same?"""
        # A model may be spread over devices, layer by layer.
        return (
            self.device == device
            and torch.equal(self.in_text_B, in_text_B)
            and torch.equal(self.frozen_B, frozen_B)
            and torch.equal(self.carried_BN, carried_BN)
        )


def _runs(order_RK: Tensor, num_visual: int) -> list[tuple[int, int]]:
    """(start, stop) of ascending stretches of the visual or the text, in order; none where rows differ."""
    order_K = order_RK[0]
    if not bool((order_RK == order_K).all()):
        return []
    ends = (order_K[1:] != order_K[:-1] + 1) | (order_K[1:] == num_visual)
    starts = torch.cat([order_K.new_zeros(1), ends.nonzero().flatten() + 1]).tolist()
    if len(starts) > _MOST_RUNS:
        return []
    lengths = [b - a for a, b in pairwise([*starts, len(order_K)])]
    return [(first, first + n) for first, n in zip(order_K[starts].tolist(), lengths, strict=True)]


def _indices(mask: Tensor, device: torch.device) -> Tensor:
    return mask.flatten().nonzero().flatten().to(device)
