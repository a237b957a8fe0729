"""Index arithmetic of a prefill: which rows run with their visual tokens, which with text only.

Everything is worked out on the host from one copy of the token masks, so no layer waits for the device.

Shapes: B rows, N tokens of the padded batch, T text tokens of the longest exited row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spans import Spans
from .packing import Packing


class Layout:
    """Token masks of one prefill, on the host."""

    def __init__(self, spans: Spans) -> None:
        self.spans = spans
        self.batch, self.tokens = spans.valid_BN.shape
        text_BN = spans.valid_BN & ~spans.visual_BN
        self.num_text_B = text_BN.sum(1)
        self.num_valid_B = spans.valid_BN.sum(1)
        self.num_visual_B = spans.visual_BN.sum(1)
        self.num_prompt_B = spans.prompt_BN.sum(1)
        # Text positions of each row first, in order: the compact layout of an exited row.
        self.text_order_BN = torch.argsort((~text_BN).to(torch.uint8), dim=1, stable=True)

    @property
    def has_image_B(self) -> Tensor:
        """(B,) bool."""
        return self.num_visual_B > 0


class Partition:
    """Rows of a prefill split into the full stream F and the text stream T, with device indices.

    T rows are compact and padded on the right: under a causal mask no text token can see that padding, so
    the stream needs no padding mask. A pad slot repeats its row's first token and its result is dropped.
    """

    def __init__(
        self,
        layout: Layout,
        in_text_B: Tensor,
        device: torch.device,
        dropped_BN: Tensor | None = None,
    ) -> None:
        self.layout, self.device = layout, device
        self.in_text_B = in_text_B
        rows_T = in_text_B.nonzero().flatten()
        rows_F = (~in_text_B).nonzero().flatten()
        self.num_text_rows, self.num_full_rows = len(rows_T), len(rows_F)
        self.rows_F = rows_F.to(device)
        self.rows_T = rows_T.to(device)
        lengths = layout.num_text_B[rows_T]
        self.text_length = int(lengths.max()) if len(rows_T) else 0
        self.is_uniform = bool((lengths == self.text_length).all())
        order = layout.text_order_BN[rows_T, : self.text_length]
        real = torch.arange(self.text_length) < lengths[:, None]
        self.order, self.real = order, real
        positions = torch.where(real, order, order[:, :1])
        flat = positions + rows_T[:, None] * layout.tokens
        self.positions_T = positions.to(device)
        self.take = flat.flatten().to(device)
        self.put = flat[real].to(device)
        self.put_from = None if self.is_uniform else real.flatten().nonzero().flatten().to(device)
        # Made once per partition by the engine, in a tuple because None is an answer.
        self.causal_mask: tuple[Tensor | None] | None = None
        # Where positions are closed up: what to take off the ids of text tokens, of later tokens, and the
        # text stream's arguments that come of it.
        self.dropped_T = self.shift_B = None
        if dropped_BN is not None:
            self.dropped_T = dropped_BN[rows_T].gather(1, positions).to(device)
            self.shift_B = (dropped_BN[:, -1] * in_text_B).to(device)
        self.closed_up: dict[str, Any] | None = None
        self._cache: dict[Any, tuple[Any, Any]] = {}
        self._packings: dict[int, Packing] = {}

    # -- hidden states ---------------------------------------------------------------------------------
    def gather(self, hidden_BND: Tensor) -> Tensor:
        """Compact states of the T rows."""
        flat = hidden_BND.reshape(-1, hidden_BND.shape[-1]).index_select(0, self.take)
        return flat.view(self.num_text_rows, self.text_length, -1)

    def scatter(self, hidden_BND: Tensor, text: Tensor | None, full: Tensor | None) -> Tensor:
        """A copy of `hidden_BND` with the streams' results; visual tokens of T rows keep their last state."""
        out = hidden_BND.clone(memory_format=torch.contiguous_format)
        if full is not None:
            out.index_copy_(0, self.rows_F, full.to(out.dtype))
        if text is not None:
            flat = text.reshape(-1, text.shape[-1])
            flat = flat if self.put_from is None else flat.index_select(0, self.put_from)
            out.view(-1, out.shape[-1]).index_copy_(0, self.put, flat.to(out.dtype))
        return out

    # -- other layer arguments -------------------------------------------------------------------------
    def for_full(self, value: Any) -> Any:
        """The F rows of a layer argument."""
        return self._memo("F", value, lambda t: self._rows(t, self.rows_F))

    def for_text(self, value: Any) -> Any:
        """The T rows' text tokens of a layer argument."""
        return self._memo("T", value, self._text_tokens)

    def _rows(self, tensor: Tensor, rows: Tensor) -> Tensor:
        axis = self._token_axis(tensor)
        axis = 0 if axis is None else axis - 1
        # A one-dimensional tensor has no rows.
        if tensor.dim() > 1 and tensor.shape[axis] == self.layout.batch:
            return tensor.index_select(axis, rows)
        return tensor

    def _text_tokens(self, tensor: Tensor) -> Tensor:
        axis = self._token_axis(tensor)
        if axis is None:
            return self._rows(tensor, self.rows_T)
        index = self.take if tensor.shape[axis - 1] == self.layout.batch else self.positions_T.flatten()
        flat = tensor.flatten(axis - 1, axis).index_select(axis - 1, index)
        return flat.unflatten(axis - 1, (self.num_text_rows, self.text_length))

    def _token_axis(self, tensor: Tensor) -> int | None:
        """Index of the token axis: the one of size N right after one of size B or 1."""
        shape = tensor.shape
        for axis in range(1, len(shape)):
            if shape[axis] == self.layout.tokens and shape[axis - 1] in (1, self.layout.batch):
                return axis
        return None

    def _memo(self, stream: str, value: Any, select: Any) -> Any:
        if isinstance(value, Tensor):
            key = (stream, id(value))
            # The same cos and sin go to every layer: select once. Holding `value` keeps its id its own.
            if key not in self._cache:
                self._cache[key] = (value, select(value))
            return self._cache[key][1]
        if isinstance(value, (tuple, list)):
            return type(value)(self._memo(stream, item, select) for item in value)
        if isinstance(value, dict):
            return {name: self._memo(stream, item, select) for name, item in value.items()}
        return value

    def full_mask(self, mask: Tensor | None) -> Tensor | None:
        """F rows of a 2D or 4D mask."""
        if not isinstance(mask, Tensor) or mask.shape[0] != self.layout.batch:
            return mask
        key = ("F", id(mask))
        if key not in self._cache:
            self._cache[key] = (mask, mask.index_select(0, self.rows_F))
        return self._cache[key][1]

    def text_mask(self, mask: Tensor) -> Tensor:
        """T rows and columns of a 4D mask, pad columns hidden."""
        key = ("mask", id(mask))
        if key not in self._cache:
            picked = mask.index_select(0, self.rows_T) if mask.shape[0] == self.layout.batch else mask
            picked = picked.expand(self.num_text_rows, -1, -1, -1)
            index = self.positions_T[:, None, :, None].expand(-1, picked.shape[1], -1, picked.shape[-1])
            picked = picked.gather(2, index)
            index = self.positions_T[:, None, None, :].expand(-1, picked.shape[1], self.text_length, -1)
            picked = picked.gather(3, index)
            pads = ~self.real.to(self.device)[:, None, None, :]
            hidden = False if picked.dtype == torch.bool else torch.finfo(picked.dtype).min
            self._cache[key] = (mask, picked.masked_fill(pads, hidden))
        return self._cache[key][1]

    # -- cache -----------------------------------------------------------------------------------------
    def packing(self, first: int = 0, *, with_places: bool = False) -> Packing:
        """What layers keep that drop all columns before `first`."""
        if first not in self._packings:
            self._packings[first] = Packing(self, first, with_places=with_places)
        return self._packings[first]
