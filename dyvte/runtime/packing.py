"""How the K/V of a prefill's streams become one cache layer.

Shapes: B rows, N tokens of the padded batch, R rows and T tokens of a stream, K columns, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyvte.runtime.cache import Columns
from dyvte.runtime.streams import Partition


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
        self.num_kept = int(kept_B.sum())
        length = int(kept_B.max())
        only = part.streams[0] if len(part.sources) == 1 else None
        # Nothing but one compact stream, all rows of one length, all kept: (B, H, K, d) as it is.
        self.is_dense = only is not None and only.keys.is_compact and only.keys.is_uniform
        self.is_dense = self.is_dense and bool((kept_B == only.keys.length).all())
        places = self._places(layout, kept_BN, length, device) if with_places else None
        if self.is_dense:
            self.columns = Columns(None, None, length, places=places, shift_B=part.shift_B)
            return
        slots_BN, sizes = _slots(part)
        used = torch.zeros(sum(sizes), dtype=torch.bool)
        used[slots_BN[kept_BN]] = True
        num_slots = int(used.sum())
        self._take = [_indices(own, device) for own in used.split(sizes)]
        # Right-aligned; an empty column repeats its row's first token.
        order_BK = torch.argsort(kept_BN.to(torch.uint8), dim=1, stable=True)[:, layout.tokens - length :]
        valid_BK = torch.arange(length) >= (length - kept_B)[:, None]
        if length:
            first_B1 = order_BK.gather(1, (length - kept_B).clamp(max=length - 1)[:, None])
            order_BK = torch.where(valid_BK, order_BK, first_B1)
        slots_BK = slots_BN.gather(1, order_BK).clamp(min=0)
        slots_KB = (used.cumsum(0) - 1).clamp(min=0)[slots_BK].T.contiguous().to(device)
        valid_BK = None if valid_BK.all() else valid_BK.to(device)
        self.columns = Columns(slots_KB, valid_BK, length, num_slots, places=places, shift_B=part.shift_B)

    def states(self, parts: Sequence[Tensor]) -> Tensor:
        """K (or V) of all sources, each (R, H, T, d), as the cache stores them: (B, H, K, d) or (S, H, d)."""
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


def _slots(part: Partition) -> tuple[Tensor, list[int]]:
    """(B, N) where each token's keys and values lie in those of all sources, back to back (-1: nowhere), and
    how many each source has. Where two have a token, the later one counts."""
    slots_BN = torch.full(part.carried_BN.shape, -1)
    sizes: list[int] = []
    for source in part.sources:
        real_RT, tokens = source.real_RT, source.order_RT.shape[1]
        slots_RT = sum(sizes) + source.at_R[:, None] * tokens + torch.arange(tokens)
        rows_RT = source.rows_R[:, None].expand(-1, tokens)
        slots_BN[rows_RT[real_RT], source.order_RT[real_RT]] = slots_RT[real_RT]
        sizes.append((int(source.at_R.max()) + 1) * tokens)
    return slots_BN, sizes


def _indices(used: Tensor, device: torch.device) -> Tensor | None:
    """Which of a source's slots are used; None: all."""
    return None if used.all() else used.nonzero().flatten().to(device)


def _tokens_first(states_BHNd: Tensor) -> Tensor:
    """(B, H, N, d) to (B * N, H, d)."""
    return states_BHNd.transpose(1, 2).reshape(-1, states_BHNd.shape[1], states_BHNd.shape[3])
