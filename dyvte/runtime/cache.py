"""Cache layers that hold only what their rows kept.

A layer after some exit keeps other tokens than layer 0. It still reports the length of layer 0 (positions
and outer masks are built from it), and it stores one tensor without gaps:

- rows that kept equally many tokens: (B, H, K, d) as usual;
- else: all kept tokens of all rows back to back, (S, H, d), and a table of slots. Beams and return
  sequences share slots, so reordering moves no state.

Shapes: B rows, H heads, d head size, K columns (longest row), S slots, Q new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from dyvte.decoder import Window
from dyvte.errors import ExitRuntimeError

# New columns come in blocks, so that the buffer is not copied at every decode step.
BLOCK = 64


class Columns:
    """Where each row's tokens lie, for all cache layers of equal content; rows are right-aligned.

    `slots_KB` is None where rows are stored densely; `valid_BK` is None where no row is padded.
    """

    def __init__(
        self,
        slots_KB: Tensor | None,
        valid_BK: Tensor | None,
        length: int,
        next_slot: int = 0,
        *,
        places: tuple[Tensor, Tensor] | None = None,
        shift_B: Tensor | None = None,
    ) -> None:
        self.slots_KB, self.valid_BK, self.length = slots_KB, valid_BK, length
        # Where positions are closed up: what is taken off the position id of every later token.
        self.shift_B = shift_B
        # Where windows matter: each kept token's position, and each row's position minus column afterwards.
        self.places = places
        self._origin = (length, next_slot)
        self._derived: tuple[Tensor | int, int, Columns] | None = None

    def positions(self, start: int, stop: int) -> Tensor:
        """(B, stop - start) positions of columns, counted from each row's first real token."""
        known_BK, shift_B = self.places
        have = known_BK.shape[1]
        columns = torch.arange(max(start, have), max(stop, have), device=known_BK.device)
        return torch.cat([known_BK[:, start:stop], columns + shift_B[:, None]], 1)

    @property
    def batch(self) -> int:
        """Rows; -1 where nothing depends on them."""
        if self.slots_KB is not None:
            return self.slots_KB.shape[1]
        return -1 if self.valid_BK is None else self.valid_BK.shape[0]

    def slot(self, column: int) -> int:
        """First of the B slots of a column added after the prefill."""
        return self._origin[1] + (column - self._origin[0]) * self.batch

    def grow(self, length: int, new_valid_BQ: Tensor | None) -> None:
        """Know columns up to `length`. The first layer of a forward pass adds them, the others find them."""
        added = length - self.length
        if added <= 0:
            return
        if self.slots_KB is not None and length > self.slots_KB.shape[0]:
            have = self.slots_KB.shape[0]
            first = self.slot(have)
            count = -(-(length - have) // BLOCK) * BLOCK
            block = torch.arange(first, first + count * self.batch, device=self.slots_KB.device)
            self.slots_KB = torch.cat([self.slots_KB, block.view(count, self.batch)])
        if self.valid_BK is not None or new_valid_BQ is not None:
            old = self.valid_BK
            if old is None:
                old = new_valid_BQ.new_ones(new_valid_BQ.shape[0], self.length)
            self.valid_BK = torch.cat(
                [old, old.new_ones(old.shape[0], added) if new_valid_BQ is None else new_valid_BQ], 1
            )
        self.length = length

    def truncate(self, length: int) -> None:
        """Forget columns from `length` on."""
        if length >= self.length:
            return
        if self.valid_BK is not None:
            self.valid_BK = self.valid_BK[:, :length]
        if self.slots_KB is not None:
            first = self.slot(length) if length >= self._origin[0] else self._origin[1]
            self.slots_KB, self._origin = self.slots_KB[:length], (length, first)
        if self.places is not None:
            self.places = (self.places[0][:, :length], self.places[1])
        self.length = length

    def select(self, rows: Tensor | int, length: int) -> Columns:
        """Columns of other rows: indices, or each row repeated. Layers that share these get one answer."""
        if self._derived is None or self._derived[0] is not rows or self._derived[1] != length:
            slots, valid, places = self.slots_KB, self.valid_BK, self.places
            if slots is not None:
                slots = _pick(slots[:length], rows, 1)
            if valid is not None:
                valid = _pick(valid[:, :length], rows, 0)
            if places is not None:
                places = (_pick(places[0], rows, 0), _pick(places[1], rows, 0))
            shift = None if self.shift_B is None else _pick(self.shift_B, rows, 0)
            # Columns beyond `length` are new again, from the first slot that no column holds.
            at = length if length >= self._origin[0] else self._origin[0]
            next_slot = self.slot(at) if self.slots_KB is not None else 0
            derived = Columns(slots, valid, length, next_slot, places=places, shift_B=shift)
            self._derived = (rows, length, derived)
        return self._derived[2]

    def compacted(self, length: int) -> tuple[Columns, Tensor]:
        """Columns up to `length` without the slots that no row has any more, and the old slots that stay."""
        slots_KB = self.slots_KB[:length]
        kept_S, new_S = slots_KB.reshape(-1).unique(return_inverse=True)
        valid_BK = None if self.valid_BK is None else self.valid_BK[:, :length]
        places = None if self.places is None else (self.places[0][:, :length], self.places[1])
        shared = {"places": places, "shift_B": self.shift_B}
        return Columns(new_S.view_as(slots_KB), valid_BK, length, len(kept_S), **shared), kept_S


class ExitLayer(DynamicLayer):
    """A cache layer behind an exit. Only the exit runtime may append to it: nobody else knows its mask.

    Attributes
    ----------
    columns
        Which tokens it holds; shared with the layers that hold the same.
    seen
        Tokens that layer 0 of a stock cache would hold: what `get_seq_length` answers.
    window
        How far this layer's tokens see.
    floor
        Tokens that a crop must leave: up to there, some row holds fewer (visual tokens left, padding, or what
        a sliding window no longer sees).
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        columns: Columns,
        seen: int,
        window: Window | None = None,
        *,
        floor: int = 0,
    ) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.columns, self.seen, self.window = columns, seen, window
        self.is_sliding = window is not None
        self.length = columns.length
        self.floor = floor
        self._expected: tuple[int, Tensor | None] | None = None

    def expect(self, num_new: int, new_valid_BQ: Tensor | None) -> None:
        """Announce the next update; the runtime does so right before it calls the decoder layer."""
        self.columns.grow(self.length + num_new, new_valid_BQ)
        self._expected = (num_new, new_valid_BQ)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append announced tokens; returns all K/V as (B, H, K, d)."""
        expected, self._expected = self._expected, None
        if expected is None or expected[0] != key_states.shape[-2]:
            raise ExitRuntimeError(
                "this KV cache was filled inside a dyvte block and lacks visual tokens in some layers: "
                "keep using it inside `with exits(model)`, or start a new cache"
            )
        self.length += key_states.shape[-2]
        self.seen += key_states.shape[-2]
        if self.columns.slots_KB is None:
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
            return self.keys, self.values
        self.keys, keys = self._append(self.keys, key_states)
        self.values, values = self._append(self.values, value_states)
        return keys, values

    def _append(self, buffer_SHd: Tensor, new_BHQd: Tensor) -> tuple[Tensor, Tensor]:
        rows, heads, num_new, size = new_BHQd.shape
        start = self.columns.slot(self.length - num_new)
        stop = start + rows * num_new
        if stop > buffer_SHd.shape[0]:
            room = buffer_SHd.new_zeros(stop + (BLOCK - 1) * rows - buffer_SHd.shape[0], heads, size)
            buffer_SHd = torch.cat([buffer_SHd, room])
        buffer_SHd[start:stop] = new_BHQd.permute(2, 0, 1, 3).reshape(-1, heads, size)
        slots = self.columns.slots_KB[: self.length].reshape(-1)
        gathered = buffer_SHd.index_select(0, slots).view(self.length, rows, heads, size)
        return buffer_SHd, gathered.permute(1, 2, 0, 3)

    def get_seq_length(self) -> int:
        """Length of a stock cache, dropped tokens included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of a stock cache: outer masks are replaced layer by layer."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Refused: what the rows kept would be lost."""
        raise ExitRuntimeError("a cache behind an exit cannot be reset: make a new one")

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; the number is negative, as in transformers."""
        if tokens_to_remove > 0:
            raise ExitRuntimeError("crop takes the negative number of tokens to remove")
        removed = abs(tokens_to_remove)
        if removed == 0:
            return
        if self.seen - removed < self.floor:
            raise ExitRuntimeError(
                f"this cache cannot go back to {self.seen - removed} tokens, at least {self.floor} must "
                "stay: of earlier ones it does not hold all (visual tokens that left, padding, or what a "
                "sliding window dropped)"
            )
        self.length -= removed
        self.seen -= removed
        self.columns.truncate(self.length)
        if self.columns.slots_KB is None:
            self.keys = self.keys[..., : self.length, :]
            self.values = self.values[..., : self.length, :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of a beam search in their new order."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        self._select(repeats)

    def _select(self, rows: Tensor | int) -> None:
        if self.columns.slots_KB is None:
            self.keys, self.values = _pick(self.keys, rows, 0), _pick(self.values, rows, 0)
        self.columns = self.columns.select(rows, self.length)


_SERVED = {DynamicLayer, DynamicSlidingWindowLayer, ExitLayer}


def check_cache(cache: Any) -> None:
    """Raise where a cache's layers cannot differ in content.

    Raises
    ------
    ExitRuntimeError
        Naming the kind of cache or layer.
    """
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise ExitRuntimeError(f"visual tokens cannot leave a {type(cache).__name__}: use a DynamicCache")
    if getattr(cache, "offloading", False):
        raise ExitRuntimeError("visual tokens cannot leave an offloaded cache: use a DynamicCache")
    kinds = {type(layer) for layer in cache.layers} | {cache.layer_class_to_replicate or DynamicLayer}
    if foreign := sorted(kind.__name__ for kind in kinds - _SERVED):
        raise ExitRuntimeError(
            f"visual tokens cannot leave a cache with layers of kind {', '.join(foreign)}: "
            "only a DynamicCache with full or sliding attention holds layers of different content "
            "(drop cache_implementation)"
        )


def put_layer(cache: Cache, index: int, layer: DynamicLayer) -> None:
    """Make `layer` the cache's layer `index`."""
    check_cache(cache)
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    cache.layers[index] = layer


def compact(cache: Cache) -> None:
    """Give back the room of rows that a cache was told to drop: a buffer that rows share has it still."""
    compacted: dict[int, tuple[Columns, Tensor]] = {}
    for layer in cache.layers:
        if not isinstance(layer, ExitLayer) or layer.columns.slots_KB is None:
            continue
        key = id(layer.columns)
        if key not in compacted:  # layers of equal content share their columns, and go on sharing them
            compacted[key] = layer.columns.compacted(layer.length)
        layer.columns, kept_S = compacted[key]
        layer.keys, layer.values = layer.keys.index_select(0, kept_S), layer.values.index_select(0, kept_S)


def holds_exits(cache: Any) -> bool:
    """Have visual tokens left some layer of this cache?"""
    return any(isinstance(layer, ExitLayer) for layer in getattr(cache, "layers", ()))


def records_past(cache: Cache, index: int) -> bool:
    """Was a sliding layer told to keep what is out of its window?"""
    return index < len(cache.layers) and getattr(cache.layers[index], "record_past", False)


def layer_bytes(layer: object) -> int:
    """Bytes of a cache layer's keys and values."""
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _pick(tensor: Tensor, rows: Tensor | int, dim: int) -> Tensor:
    if isinstance(rows, int):
        return tensor.repeat_interleave(rows, dim)
    return tensor.index_select(dim, rows.to(tensor.device))
