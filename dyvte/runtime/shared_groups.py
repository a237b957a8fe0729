"""Tokens of a prefill that run behind keys and values which are known already.

Shapes: B rows, N tokens of the padded batch, R rows and T own tokens of a group, K keys that a group sees,
S tokens of a segment, D hidden size, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dyvte.decoder import Layout, Slots
from dyvte.decoder.attention import attention_of, query_projections
from dyvte.decoder.caches import Behind, Capture, KeysValues, keys_and_values
from dyvte.decoder.masks import cut_mask
from dyvte.errors import ExitRuntimeError
from dyvte.runtime.image_store import Segment
from dyvte.runtime.shared_reading import Read, may_read_apart, own_mask, reading_apart
from dyvte.runtime.stack import Stack
from dyvte.runtime.streams import Stream


@dataclass(frozen=True)
class Call:
    """A decoder layer (0-based), its own forward, and what the decoder called it with in this pass."""

    index: int
    forward: Callable[..., Any]
    hidden_BND: Tensor
    mask: Any
    kwargs: dict[str, Any]


@dataclass
class Lane:
    """A segment in one pass.

    Attributes
    ----------
    segment
        What the store holds of it.
    row, first
        A row of the batch that holds it, and where it begins there.
    made, entered
        The layer that states of this pass enter, and those: as the layer before made them, and as the decoder
        handed them on. What a pass does not come to enter is not kept, so that one that fails leaves no harm.
    added
        What the decoder added to its states before each layer.
    """

    segment: Segment
    row: int
    first: int
    made: tuple[int, Tensor] | None = None
    entered: tuple[int, Tensor] | None = None
    added: dict[int, Tensor] = field(default_factory=dict)

    def enter(self, index: int, added_SD: Tensor | None, wanted: set[int]) -> None:
        """The decoder has come to layer `index`, and added something to the states on the way."""
        segment = self.segment
        if added_SD is not None:
            self.added[index] = added_SD
        if self.made is not None and self.made[0] == index:
            states_SD = self.made[1] if added_SD is None else self.made[1] + added_SD
            self.made, self.entered = None, (index, states_SD)
            if len(segment.text_S):
                text_SD = states_SD[segment.text_S.to(states_SD.device)]
                segment.text_states.setdefault(index, text_SD)
            # A segment that is deeper passes here only on the way to where it is frozen.
            if index in wanted or segment.depth <= index:
                segment.states[index] = states_SD
                if index - 1 not in segment.kept:
                    segment.states.pop(index - 1, None)
        if index in wanted and index in segment.states:
            segment.kept.add(index)

    def states_at(self, index: int) -> Tensor:
        """(S, D) that enter layer `index`."""
        found = self.segment.states.get(index)
        if found is None and self.entered is not None and self.entered[0] == index:
            found = self.entered[1]
        if found is None:
            raise ExitRuntimeError(f"no states of a stored image at layer {index + 1}: please report this")
        return found

    def must_run(self, index: int, *, ends: bool, wanted: set[int]) -> bool:
        """Must layer `index` run whole, for the states behind it?

        ``ends``: no row reads deeper; ``wanted``: layers before which states may be frozen.
        """
        segment = self.segment
        if ends or index + 1 in segment.states:
            return False
        missing = [f for f in wanted if f > index and f not in segment.states]
        on_the_way = any(max(k for k in segment.states if k <= f) <= index for f in missing)
        return on_the_way or segment.depth <= index + 1

    def take(self, index: int, keys_values: KeysValues, states_SD: Tensor | None) -> None:
        """Take in what layer `index` made of the segment."""
        if self.segment.depth == index:
            self.segment.keys_values.append(keys_values)
        if states_SD is not None:
            self.made = (index + 1, states_SD)


@dataclass(frozen=True)
class Borrowed:
    """What a row reads of a lane: keys and values of all its tokens, or of its frozen visual ones.

    Attributes
    ----------
    lane, first
        The lane, and where in the row it begins.
    frozen_at
        After how many layers its visual tokens were frozen; None: they are updated.
    """

    lane: Lane
    first: int
    frozen_at: int | None = None

    @property
    def key(self) -> tuple[int, int | None]:
        """Equal for what is the same."""
        return (id(self.lane), self.frozen_at)

    @property
    def tokens_S(self) -> Tensor:
        """Which tokens of the lane, from its first."""
        visual_S = self.lane.segment.visual_S
        return torch.arange(len(visual_S)) if self.frozen_at is None else visual_S.nonzero().flatten()

    def keys_values(self, index: int) -> KeysValues:
        """Of layer `index`."""
        segment = self.lane.segment
        if self.frozen_at is None:
            return segment.keys_values[index]
        return segment.frozen[self.frozen_at][index]


class Group:
    """Tokens of some rows that run together.

    Parameters
    ----------
    stack, layout
        The decoder and the batch.
    rows
        Which rows they belong to.
    own_BN
        (B, N) bool: the tokens.
    borrowed
        For each row what else it reads, in the order of its tokens; None where others read something and it
        does not.
    """

    def __init__(
        self,
        stack: Stack,
        layout: Layout,
        rows: Sequence[int],
        own_BN: Tensor,
        borrowed: Sequence[Sequence[Borrowed | None]],
        device: torch.device,
    ) -> None:
        self.stack, self.rows, self.borrowed = stack, list(rows), borrowed
        self.own = Stream(layout, torch.tensor(self.rows), own_BN, device, compact=True)
        self._pieces, known = _pieces(borrowed)
        self._queries = Slots(self.own.order_RT.to(device), self.own.real_RT.to(device))
        self._keys = Slots(
            torch.cat((known.index, self.own.order_RT), 1).to(device),
            torch.cat((known.valid, self.own.real_RT), 1).to(device),
        )
        self._buffers: KeysValues | None = None
        self._masks: dict[int, tuple[Any, Any]] = {}
        self._reads = [Read(rows, start, len(one.tokens_S)) for rows, start, one in self._pieces]
        self._own_masks: dict[int, Tensor | None] = {}

    def run(self, call: Call, states_RTD: Tensor, *, may_split: bool = False) -> tuple[Any, KeysValues]:
        """What the layer returns, and keys and values of the group's own tokens.

        Parameters
        ----------
        call
            The layer.
        states_RTD
            What enters it.
        may_split
            What is borrowed may be read by all rows at once: the last bits then depend on the other rows.
        """
        arguments = {**self._arguments(call), "attention_mask": self._mask(call)}
        own = self._own_mask(call, states_RTD.device) if may_split else None
        if own is None:
            cache = self._cache(call.index, states_RTD.device)
            output = call.forward(states_RTD, past_key_values=cache, **arguments)
            return output, (cache.keys, cache.values)
        cache = Capture()
        known = [one.keys_values(call.index) for _, _, one in self._pieces]

        def copied(keys: Tensor, values: Tensor) -> KeysValues:
            return self._cache(call.index, states_RTD.device).update(keys, values)

        with reading_apart(self.stack.backbone.layers[call.index], self._reads, known, own, copied):
            output = call.forward(states_RTD, past_key_values=cache, **arguments)
        return output, (cache.keys, cache.values)

    def _own_mask(self, call: Call, device: torch.device) -> Tensor | None:
        """Of the group's own tokens alone; None where keys and values are to be copied for each row, as where
        hardly two rows read the same."""
        layer = self.stack.backbone.layers[call.index]
        if not may_read_apart(str(self.stack.config._attn_implementation), device):
            return None
        if not self._reads or 2 * len(self._reads) > len(self.rows) or attention_of(layer) is None:
            return None
        if id(call.mask) not in self._own_masks:
            self._own_masks[id(call.mask)] = own_mask(self._mask(call), self._reads, self._queries.valid)
        return self._own_masks[id(call.mask)]

    def keys_alone(self, call: Call, states_RTD: Tensor) -> KeysValues:
        """Keys and values of the group's own tokens, and nothing else of the layer."""
        layer, arguments = self.stack.backbone.layers[call.index], self._arguments(call)
        if query_projections(layer):
            return self.stack.keys_alone(layer, call.forward, states_RTD, attention_mask=None, **arguments)
        return keys_and_values(call.forward, states_RTD, attention_mask=None, **arguments)

    def _arguments(self, call: Call) -> dict[str, Any]:
        return self.stack.without_jumps(self.own.arguments(call.kwargs))

    def _cache(self, index: int, device: torch.device) -> Capture:
        """Takes the group's own keys and values, behind those it borrows."""
        if not self._pieces:
            return Capture()
        like = self._pieces[0][2].keys_values(index)
        if self._buffers is None or not _fits(self._buffers, like, device):
            # Filled anew for every layer: fresh memory of this size costs more than what is written to it.
            shape = (len(self.rows), self._keys.index.shape[1])
            keys, values = (
                torch.zeros(shape[0], one.shape[1], shape[1], one.shape[3], dtype=one.dtype, device=device)
                for one in like
            )
            self._buffers = (keys, values)
        for rows, start, borrowed in self._pieces:
            for buffer, known in zip(self._buffers, borrowed.keys_values(index), strict=True):
                buffer[rows, :, start : start + known.shape[2]] = known.to(device)
        return Behind(*self._buffers)

    def _mask(self, call: Call) -> Any:
        # Layers share a few masks; holding one keeps its id its own.
        if id(call.mask) not in self._masks:
            mask = call.mask
            if isinstance(mask, Tensor) and mask.shape[0] > 1:
                mask = mask.index_select(0, self.own.rows.to(mask.device))
            cut = cut_mask(mask, self._queries, self._keys, str(self.stack.config._attn_implementation))
            self._masks[id(call.mask)] = (call.mask, cut)
        return self._masks[id(call.mask)][1]


def _fits(buffers: KeysValues, like: KeysValues, device: torch.device) -> bool:
    return all(
        buffer.dtype == one.dtype and buffer.device == device and buffer.shape[1::2] == one.shape[1::2]
        for buffer, one in zip(buffers, like, strict=True)
    )


def places(borrowed: Sequence[Borrowed]) -> Tensor:
    """(R, S) where in each of some rows the tokens stand that all of them borrow."""
    return borrowed[0].tokens_S + torch.tensor([one.first for one in borrowed])[:, None]


def _pieces(
    borrowed: Sequence[Sequence[Borrowed | None]],
) -> tuple[list[tuple[slice, int, Borrowed]], Slots]:
    """For neighbouring rows that borrow the same: the rows, the first of its columns, and what it is; and
    where in each row the tokens of all columns stand."""
    pieces: list[tuple[slice, int, Borrowed]] = []
    index, valid = [torch.zeros(len(borrowed), 0).long()], [torch.zeros(len(borrowed), 0).bool()]
    start = 0
    for of_rows in zip(*borrowed, strict=True):
        runs, first = [], 0
        for key, run in groupby(of_rows, lambda one: one and one.key):
            alike = list(run)
            rows, first = slice(first, first + len(alike)), first + len(alike)
            if key is not None:
                runs.append((rows, places(alike)))
                pieces.append((rows, start, alike[0]))
        width = max((place_RS.shape[1] for _, place_RS in runs), default=0)
        index.append(torch.zeros(len(of_rows), width).long())
        valid.append(torch.zeros(len(of_rows), width).bool())
        for rows, place_RS in runs:
            index[-1][rows, : place_RS.shape[1]] = place_RS
            valid[-1][rows, : place_RS.shape[1]] = True
        start += width
    return pieces, Slots(torch.cat(index, 1), torch.cat(valid, 1))
