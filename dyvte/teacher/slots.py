"""Which tokens an exit stream holds.

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

from dyvte.decoder import Slots
from dyvte.spans import Spans


@dataclass(frozen=True)
class StreamSlots:
    """The slots of one batch: borrowed prefix, suffix of the streams, and predicted positions.

    ``predict`` indexes the full sequence, ``predict_suffix`` the same positions within the suffix.
    """

    prefix: Slots
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


def sees(mask: Any, queries_BN: Tensor, keys_BN: Tensor) -> bool:
    """May any of some tokens attend to any of some later tokens (as in a prefix-LM)? Not under causal masks,
    which are those that are not 4D."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return False
    allowed_BNN = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
    return bool((allowed_BNN & queries_BN[:, :, None] & keys_BN[:, None, :]).any())


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
