"""A new image in a later turn of a conversation, on the cache of the earlier ones.

What the earlier turns left in each layer's cache stays as it is: their text as it was computed, their visual
tokens where they have not left. The new turn's tokens read it, and their own image freezes and leaves at its
own layers.

Shapes: B rows, Q tokens of this turn, P columns of the past, R rows and T own tokens of a group, S slots, H
heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.decoder import Layout, hidden_of
from dyvte.decoder.caches import Behind, KeysValues
from dyvte.runtime.cache import Columns, ExitLayer, put_layer
from dyvte.runtime.frozen import taking_masks
from dyvte.runtime.stack import Stack
from dyvte.runtime.streams import Stream


@dataclass(frozen=True)
class _Past:
    """What a layer's cache holds of the earlier turns: tokens back to back, and where each row's are."""

    flat_keys: Tensor
    flat_values: Tensor
    slots_BP: Tensor
    valid_BP: Tensor
    seen: int

    @staticmethod
    def of(layer: Any, valid_BP: Tensor | None) -> _Past:
        """``valid_BP``: which tokens of a stock cache layer are no padding; None: all."""
        if isinstance(layer, ExitLayer) and layer.columns.slots_KB is not None:
            columns, length = layer.columns, layer.length
            slots_BP = columns.slots_KB[:length].T.cpu()
            valid = columns.valid_BK
            valid_BP = torch.ones_like(slots_BP).bool() if valid is None else valid[:, :length].cpu()
            return _Past(layer.keys, layer.values, slots_BP, valid_BP, layer.seen)
        keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (layer.keys, layer.values))
        batch, length = layer.keys.shape[0], layer.keys.shape[2]
        slots_BP = torch.arange(batch * length).view(batch, length)
        if isinstance(layer, ExitLayer):
            valid = layer.columns.valid_BK
            valid_BP = None if valid is None else valid[:, :length].cpu()
        valid_BP = torch.ones_like(slots_BP).bool() if valid_BP is None else valid_BP
        return _Past(keys, values, slots_BP, valid_BP, layer.get_seq_length())

    @property
    def length(self) -> int:
        """P."""
        return self.slots_BP.shape[1]

    def of_rows(self, rows_R: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """(R, H, P + room, d) keys and values of some rows, with room for as many new tokens."""
        slots = self.slots_BP[rows_R].flatten().to(self.flat_keys.device)
        keys, values = (
            torch.nn.functional.pad(
                flat.index_select(0, slots).unflatten(0, (len(rows_R), -1)).transpose(1, 2), (0, 0, 0, room)
            )
            for flat in (self.flat_keys, self.flat_values)
        )
        return keys, values


class LaterTurn:
    """Runs the layers of a turn that brings an image and has a past.

    Parameters
    ----------
    stack, layout
        The decoder, and this turn's tokens.
    valid_BP
        (B, P) bool on the host: which of the past's tokens are no padding; None: all.
    """

    def __init__(self, stack: Stack, layout: Layout, valid_BP: Tensor | None) -> None:
        self.stack, self.layout, self.valid_BP = stack, layout, valid_BP

    def run(
        self,
        index: int,
        forward: Callable[..., Any],
        hidden_BND: Tensor,
        kwargs: dict[str, Any],
        in_text_B: Tensor,
        frozen_B: Tensor,
    ) -> Any:
        """Layer `index` (0-based) on rows that update this turn's image, on the text of rows that read it
        frozen, and on the text of others."""
        kwargs.pop("attention_mask", None)
        cache = kwargs.pop("past_key_values")
        past = _Past.of(cache.layers[index], self.valid_BP)
        out_BND, output, made = hidden_BND.clone(memory_format=torch.contiguous_format), None, []
        spans, text_BN = self.layout.spans, self.layout.text_BN
        for chosen_B, own_BN, reads_frozen in (
            (~(in_text_B | frozen_B), spans.valid_BN, False),
            (frozen_B, text_BN, True),
            (in_text_B, text_BN, False),
        ):
            if not chosen_B.any():
                continue
            rows_R = chosen_B.nonzero().flatten()
            own = Stream(self.layout, rows_R, own_BN, hidden_BND.device, compact=True)
            visual = None
            if reads_frozen:
                visual = Stream(self.layout, rows_R, spans.visual_BN, hidden_BND.device, compact=True)
            buffers = past.of_rows(rows_R, own.length + (0 if visual is None else visual.length))
            if visual is not None:
                frozen = self._frozen(index, forward, visual, hidden_BND, kwargs)
                for buffer, known in zip(buffers, frozen, strict=True):
                    buffer[:, :, past.length : past.length + visual.length] = known
                made.append((visual, *frozen))
            known = Behind(*buffers)
            implementation = str(self.stack.config._attn_implementation)
            layer = self.stack.backbone.layers[index]
            with nullcontext() if visual is None else taking_masks(layer, implementation):
                output = forward(
                    own.gather(hidden_BND),
                    attention_mask=self._mask(own, visual, past, hidden_BND),
                    past_key_values=known,
                    **self.stack.without_jumps(own.arguments(kwargs)),
                )
            own.scatter(out_BND, hidden_of(output))
            made.append((own, known.keys, known.values))
        put_layer(cache, index, self._grown(past, made))
        return (out_BND, *output[1:]) if isinstance(output, tuple) else out_BND

    def _frozen(
        self,
        index: int,
        forward: Callable[..., Any],
        visual: Stream,
        hidden_BND: Tensor,
        kwargs: dict[str, Any],
    ) -> KeysValues:
        """Keys and values that a layer makes of frozen visual tokens."""
        arguments = self.stack.without_jumps(visual.arguments(kwargs))
        return self.stack.keys_alone(
            self.stack.backbone.layers[index],
            forward,
            visual.gather(hidden_BND),
            **{**arguments, "attention_mask": None},
        )

    def _mask(self, own: Stream, visual: Stream | None, past: _Past, hidden_BND: Tensor) -> Tensor:
        valid_RP, real_RT = past.valid_BP[own.rows_R], own.real_RT
        implementation = str(self.stack.config._attn_implementation)
        if "flash" in implementation and visual is None:
            return torch.cat((valid_RP, real_RT), 1).to(torch.int64).to(hidden_BND.device)
        # A pad slot repeats its row's first token: it sees what that sees.
        seen = [valid_RP[:, None].expand(-1, own.length, -1)]
        for part in (visual, own):
            if part is not None:
                causal_RTK = part.order_RT[:, None] <= own.order_RT[:, :, None]
                seen.append(causal_RTK & part.real_RT[:, None])
        allowed = torch.cat(seen, 2)[:, None].to(hidden_BND.device)
        if implementation != "eager":
            return allowed
        lowest = torch.finfo(hidden_BND.dtype).min
        return torch.zeros_like(allowed, dtype=hidden_BND.dtype).masked_fill(~allowed, lowest)

    def _grown(self, past: _Past, made: list[tuple[Stream, Tensor, Tensor]]) -> ExitLayer:
        """The cache layer with this turn's tokens behind the earlier ones, in their order."""
        keys, values, base = [past.flat_keys], [past.flat_values], len(past.flat_keys)
        slots_BN = torch.full((self.layout.batch, self.layout.tokens), -1)
        for own, own_keys, own_values in made:
            slots_RT = base + torch.arange(own.num_rows * own.length).view(own.num_rows, own.length)
            rows_RT = own.rows_R[:, None].expand_as(slots_RT)
            slots_BN[rows_RT[own.real_RT], own.order_RT[own.real_RT]] = slots_RT[own.real_RT]
            keys.append(own_keys.transpose(1, 2).flatten(0, 1))
            values.append(own_values.transpose(1, 2).flatten(0, 1))
            base += own.num_rows * own.length
        rows = [
            torch.cat((past.slots_BP[row][past.valid_BP[row]], slots_BN[row][slots_BN[row] >= 0]))
            for row in range(self.layout.batch)
        ]
        length = max(map(len, rows))
        device = past.flat_keys.device
        # Right-aligned; an empty column repeats its row's first token.
        slots_BK = torch.stack([torch.cat((one[:1].expand(length - len(one)), one)) for one in rows])
        valid_BK = torch.arange(length) >= torch.tensor([[length - len(one)] for one in rows])
        columns = Columns(
            slots_BK.T.contiguous().to(device),
            None if valid_BK.all() else valid_BK.to(device),
            length,
            base,
        )
        seen = past.seen + self.layout.tokens
        return ExitLayer(torch.cat(keys), torch.cat(values), columns, seen, None, floor=seen)
