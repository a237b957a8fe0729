"""Which tokens an exit stream holds, and how a layer's inputs are cut down to them.

An exit stream is the batch without its visual tokens. Text before the first visual token never sees an image
in a causal decoder, so its keys and values are those of the full stream: a stream then holds only the text
after it (the suffix) and borrows the prefix.

Shape letters: B rows, N tokens, P prefix slots, T suffix slots, A prediction slots, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.errors import UnsupportedBackboneError
from dyvte.spans import Spans


@dataclass(frozen=True)
class Slots:
    """Token positions of each row, packed to the left: (B, S) indices and which of them are real."""

    index: Tensor
    valid: Tensor

    @staticmethod
    def of(mask_BN: Tensor) -> Slots:
        """Slots for the True positions of a mask; empty slots point at position 0."""
        width = int(mask_BN.sum(1).max()) if mask_BN.numel() else 0
        order_BN = mask_BN.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        valid = mask_BN.gather(1, order_BN)
        return Slots(order_BN.masked_fill(~valid, 0), valid)

    def take(self, values_BN: Tensor) -> Tensor:
        """(B, S, ...) entries of a (B, N, ...) tensor; a batch dimension of 1 is expanded."""
        rows = self.index.shape[0]
        values_BN = values_BN.expand(rows, *values_BN.shape[1:])
        index = self.index.reshape(*self.index.shape, *(1,) * (values_BN.dim() - 2))
        return values_BN.gather(1, index.expand(-1, -1, *values_BN.shape[2:]))


@dataclass(frozen=True)
class Layout:
    """The slots of one batch: borrowed prefix, suffix of the streams, and predicted positions.

    ``predict`` indexes the full sequence, ``predict_suffix`` the same positions within the suffix.
    """

    prefix: Slots
    suffix: Slots
    predict: Slots
    predict_suffix: Slots

    @staticmethod
    def build(spans: Spans, predict_BN: Tensor, mask: Any = None) -> Layout:
        """Lay out a batch; ``predict_BN`` marks text positions whose next-token logits are wanted.

        Two kinds of text need no place in a stream where ``mask``, the decoder's, is causal: that before the
        image is borrowed, and that after a row's last predicted position (a closing EOS, which is a label
        alone) is read by nobody.
        """
        text_BN = spans.valid_BN & ~spans.visual_BN
        prefix_BN = spans.prefix_BN & ~predict_BN
        if sees(mask, spans.prefix_BN, spans.valid_BN & ~spans.prefix_BN):
            prefix_BN = torch.zeros_like(text_BN)
        unread_BN = text_BN & (predict_BN.flip(1).cumsum(1).flip(1) == 0)
        if sees(mask, spans.valid_BN & ~unread_BN, unread_BN):
            unread_BN = torch.zeros_like(text_BN)
        suffix = Slots.of(text_BN & ~prefix_BN & ~unread_BN)
        return Layout(
            prefix=Slots.of(prefix_BN),
            suffix=suffix,
            predict=Slots.of(predict_BN),
            predict_suffix=Slots.of(suffix.take(predict_BN) & suffix.valid),
        )

    @property
    def keys(self) -> Slots:
        """Keys of an exit stream: prefix slots, then suffix slots."""
        return Slots(
            torch.cat((self.prefix.index, self.suffix.index), 1),
            torch.cat((self.prefix.valid, self.suffix.valid), 1),
        )


def mask_of_streams(mask: Tensor | None, layout: Layout, implementation: str) -> Any:
    """The attention mask of an exit stream's layer; see :func:`cut_mask`.

    An empty query slot attends to itself: a row of nothing would be NaN, and NaN spreads to later layers.
    """
    queries, keys = layout.suffix, layout.keys
    cut = cut_mask(mask, queries, keys, implementation)
    if cut.dim() == 2:
        return cut
    own = torch.arange(keys.index.shape[1], device=cut.device) - layout.prefix.index.shape[1]
    own = own[None, None, None, :] == torch.arange(queries.index.shape[1], device=cut.device)[:, None]
    own = own & ~queries.valid[:, None, :, None]
    return cut | own if cut.dtype == torch.bool else cut.masked_fill(own, 0.0)


def cut_mask(mask: Tensor | None, queries: Slots, keys: Slots, implementation: str) -> Tensor:
    """An attention mask of some queries and keys, cut out of the mask that a layer was given.

    Whatever rule the model put into the mask (windows, bidirectional images, prefix text) is kept, because
    only rows and columns are removed from it. Empty query slots see nothing.

    Parameters
    ----------
    mask:
        (B, 1, N, N) bool or additive, (B, N) padding (flash), or None (causal, no padding).
    implementation:
        The attention implementation's name in transformers.
    """
    if "flash" in implementation:
        return _flash_mask(mask, keys, implementation)
    if mask is None:
        mask = queries.index[:, None, :, None] >= keys.index[:, None, None, :]
    elif mask.dim() == 4:
        rows = torch.arange(queries.index.shape[0], device=mask.device)[:, None, None]
        mask = mask.expand(len(rows), -1, -1, -1)
        mask = mask[rows, :, queries.index[:, :, None], keys.index[:, None, :]].permute(0, 3, 1, 2)
    else:
        raise UnsupportedBackboneError(
            f"the teacher cannot read an attention mask of shape {tuple(mask.shape)} of implementation "
            f"{implementation!r}; load the backbone with attn_implementation='sdpa' or 'eager'"
        )
    hidden = ~keys.valid[:, None, None, :] | ~queries.valid[:, None, :, None]
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def _flash_mask(mask: Tensor | None, keys: Slots, implementation: str) -> Tensor:
    """2D padding mask; flash attention aligns the queries to the last keys by itself.

    Always given: without one, transformers reads gaps in the position ids as borders of packed sequences.
    """
    if mask is not None and mask.dim() != 2:
        raise UnsupportedBackboneError(
            f"the teacher cannot read an attention mask of shape {tuple(mask.shape)} of implementation "
            f"{implementation!r}; load the backbone with attn_implementation='sdpa'"
        )
    return keys.valid.to(torch.int64)


def sees(mask: Any, queries_BN: Tensor, keys_BN: Tensor) -> bool:
    """May any of some tokens attend to any of some later tokens (as in a prefix-LM)? Not under causal masks,
    which are those that are not 4D."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return False
    allowed_BNN = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
    return bool((allowed_BNN & queries_BN[:, :, None] & keys_BN[:, None, :]).any())


def take_slots(name: str, value: Any, slots: Slots, num_tokens: int) -> Any:
    """A layer argument that runs along the sequence, at some slots only; others as they are.

    Known forms: (B or 1, N, ...), and (3, B or 1, N) or (3, B or 1, N, d) of multi-axis rotary positions;
    tuples of such (cos and sin).
    """
    if isinstance(value, tuple):
        return tuple(take_slots(name, item, slots, num_tokens) for item in value)
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    rows = slots.index.shape[0]
    if value.shape[1] == num_tokens and value.shape[0] in (1, rows):
        return slots.take(value)
    if name.startswith("position") and value.dim() >= 3 and value.shape[2] == num_tokens:
        return torch.stack([slots.take(axis) for axis in value.unbind(0)])
    return value


def repeat_streams(value: Any, count: int, rows: int) -> Any:
    """A layer argument of B rows as that of ``count`` streams of B rows, stream by stream."""
    if isinstance(value, tuple):
        return tuple(repeat_streams(item, count, rows) for item in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or count == 1:
        return value
    if value.shape[0] == rows:
        return value.repeat(count, *(1,) * (value.dim() - 1))
    if value.dim() >= 3 and value.shape[1] == rows:  # (3, B, T): multi-axis positions
        return value.repeat(1, count, *(1,) * (value.dim() - 2))
    return value
