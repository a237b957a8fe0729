"""Which tokens a text stream holds, and which keys it borrows.

An exit stream is the batch without its visual tokens. Text before the first visual token never sees an image
in a causal decoder, so its keys and values are those of the full stream: a stream then holds only the text
after it (the suffix) and borrows the prefix. A stream that reads visual tokens borrows their keys and values
too.

Shape letters: B rows, N tokens, P prefix slots, V visual slots, T suffix slots, A prediction slots, D hidden
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.decoder import Slots
from dyvte.decoder.masks import sees
from dyvte.spans import Spans


@dataclass(frozen=True)
class StreamSlots:
    """The slots of some rows: borrowed prefix and visual tokens, suffix of the streams, predicted positions.

    ``predict`` indexes the full sequence, ``predict_suffix`` the same positions within the suffix.
    """

    prefix: Slots
    visual: Slots
    suffix: Slots
    predict: Slots
    predict_suffix: Slots

    @staticmethod
    def build(spans: Spans, predict_BN: Tensor, mask: Any = None) -> StreamSlots:
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
        return StreamSlots(
            prefix=Slots.of(prefix_BN),
            visual=Slots.of(spans.visual_BN),
            suffix=suffix,
            predict=Slots.of(predict_BN),
            predict_suffix=Slots.of(suffix.take(predict_BN) & suffix.valid),
        )

    @property
    def keys(self) -> Slots:
        """Keys of an exit stream: prefix slots, then suffix slots."""
        return _joined(self.prefix, self.suffix)

    @property
    def read_keys(self) -> Slots:
        """Keys of a stream that reads visual tokens: prefix, visual, then suffix slots."""
        return _joined(self.prefix, self.visual, self.suffix)

    def rows(self, rows_R: Tensor) -> StreamSlots:
        """Some rows alone, each kind of slot no wider than they need."""
        return StreamSlots(
            **{name: _narrowed(getattr(self, name), rows_R) for name in self.__dataclass_fields__}
        )


def repeat_streams(value: Any, count: int, rows: int, tokens: int) -> Any:
    """A layer argument of B rows and T tokens as that of ``count`` streams, stream by stream."""
    if isinstance(value, tuple):
        return tuple(repeat_streams(item, count, rows, tokens) for item in value)
    if not isinstance(value, Tensor) or count == 1:
        return value
    for axis in range(value.dim() - 1):
        if tuple(value.shape[axis : axis + 2]) == (rows, tokens):
            return value.repeat(*(1,) * axis, count, *(1,) * (value.dim() - axis - 1))
    return value


def _joined(*parts: Slots) -> Slots:
    return Slots(torch.cat([part.index for part in parts], 1), torch.cat([part.valid for part in parts], 1))


def _narrowed(slots: Slots, rows_R: Tensor) -> Slots:
    valid_RS = slots.valid[rows_R]
    width = int(valid_RS.sum(1).max()) if valid_RS.numel() else 0
    return Slots(slots.index[rows_R, :width], valid_RS[:, :width])
