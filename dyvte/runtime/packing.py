"""How the K/V of a prefill's streams become one cache layer.

Shapes: B rows, N tokens of the padded batch, R rows and T tokens of a stream, K columns, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyvte.runtime.cache import Columns
from dyvte.runtime.streams import Partition, Stream


class Packing:
    """What every layer of one partition keeps, from column `first` on (a sliding window drops the rest).

    Attributes
    ----------
    columns
        Shared by all those layers.
    floor
        Columns that a cache must keep: up to there some row holds fewer tokens.
    """

    def __init__(self, part: Partition, first: int, *, with_places: bool) -> None:
        layout, device = part.layout, part.device
        kept_BN = part.carried_BN.clone()
        kept_BN[:, :first] = False
        kept_B = kept_BN.sum(1)
        # What an earlier token sees of a window has been dropped with what the next one does not.
        whole = 0 if first > 0 else int(kept_BN.all(0).flip(0).cumprod(0).sum())
        self.floor = layout.tokens - whole
        length = int(kept_B.max())
        streams = [stream.keys for stream in part.streams]
        only = streams[0]
        # Nothing but one compact stream, all rows of one length, all kept: (B, H, K, d) as it is.
        self.is_dense = len(streams) == 1 and only.is_compact and only.is_uniform
        self.is_dense &= bool((kept_B == only.length).all())
        places = self._places(layout, kept_BN, length, device) if with_places else None
        if self.is_dense:
            self.columns = Columns(None, None, length, places=places, shift_B=part.shift_B)
            return
        self._take = [_kept_slots(stream, kept_BN, device) for stream in streams]
        num_slots = int(kept_B.sum())
        # Slots run over the rows of one stream, then over those of the other.
        order = torch.cat([stream.rows_R for stream in streams])
        first_B = torch.empty_like(kept_B)
        first_B[order] = kept_B[order].cumsum(0) - kept_B[order]
        offset_KB = torch.arange(length)[:, None] - (length - kept_B)
        slots_KB = (first_B + offset_KB.clamp(min=0)).clamp(max=max(num_slots - 1, 0)).to(device)
        valid_BK = None
        if not (kept_B == length).all():
            valid_BK = (offset_KB >= 0).T.contiguous().to(device)
        self.columns = Columns(slots_KB, valid_BK, length, num_slots, places=places, shift_B=part.shift_B)

    def states(self, parts: Sequence[Tensor]) -> Tensor:
        """The streams' K (or V), each (R, H, T, d), as the cache stores them: (B, H, K, d) or (S, H, d)."""
        if self.is_dense:
            return parts[0].contiguous()
        kept = []
        for states, take in zip(parts, self._take, strict=True):
            flat = _tokens_first(states)
            kept.append(flat if take is None else flat.index_select(0, take))
        return torch.cat(kept) if len(kept) > 1 else kept[0].contiguous()

    @staticmethod
    def _places(layout, kept_BN: Tensor, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of kept tokens, right-aligned, and position minus column of later ones."""
        start_B = layout.spans.valid_BN.to(torch.uint8).argmax(1)
        # Stable: kept tokens go to the end of each row and stay in order.
        order_BK = torch.argsort(kept_BN.to(torch.uint8), dim=1, stable=True)[:, layout.tokens - length :]
        return (order_BK - start_B[:, None]).to(device), (layout.tokens - length - start_B).to(device)


def whole_states(part: Partition, parts: Sequence[Tensor]) -> Tensor:
    """The streams' K (or V), each (R, H, T, d), as a stock cache layer takes them: (B, H, N, d).

    For rows that carry all of their tokens; padding gets zeros.
    """
    streams, (batch, tokens) = [stream.keys for stream in part.streams], part.carried_BN.shape
    heads, size = parts[0].shape[1], parts[0].shape[3]
    if len(streams) == 1 and streams[0].is_uniform and streams[0].length == tokens:
        return parts[0]
    out_BNX = parts[0].new_zeros(batch, tokens, heads * size)
    for states, stream in zip(parts, streams, strict=True):
        stream.scatter(out_BNX, states.transpose(1, 2).flatten(2))
    return out_BNX.unflatten(2, (heads, size)).transpose(1, 2)


def _kept_slots(stream: Stream, kept_BN: Tensor, device: torch.device) -> Tensor | None:
    """Which of a stream's R * T slots are kept; None: all."""
    kept_RT = kept_BN[stream.rows_R].gather(1, stream.order_RT) & stream.real_RT
    return None if kept_RT.all() else kept_RT.flatten().nonzero().flatten().to(device)


def _tokens_first(states_BHNd: Tensor) -> Tensor:
    """(B, H, N, d) to (B * N, H, d)."""
    return states_BHNd.transpose(1, 2).reshape(-1, states_BHNd.shape[1], states_BHNd.shape[3])
