"""How the K/V of a prefill's two streams become one cache layer.

Shapes: B rows, N tokens of the padded batch, T text tokens of the longest exited row, K columns, S slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import Columns

if TYPE_CHECKING:
    from .streams import Partition


class Packing:
    """What every layer of one partition keeps, from column `first` on (a sliding window drops the rest).

    Attributes
    ----------
    columns
        Shared by all those layers.
    """

    def __init__(self, part: Partition, first: int, *, with_places: bool) -> None:
        layout, device = part.layout, part.device
        spans, in_text_B1 = layout.spans, part.in_text_B[:, None]
        kept_BN = torch.where(in_text_B1, spans.valid_BN & ~spans.visual_BN, spans.valid_BN)
        kept_BN[:, :first] = False
        kept_B = kept_BN.sum(1)
        length = int(kept_B.max())
        # Nothing but whole streams of text, all of one length: (B, H, K, d) as they are.
        self.is_dense = part.num_full_rows == 0 and part.is_uniform and length == part.text_length
        self.is_dense &= bool((kept_B == length).all())
        places = self._places(layout, kept_BN, length, device) if with_places else None
        if self.is_dense:
            self.columns = Columns(None, None, length, places=places, shift_B=part.shift_B)
            return
        self._take_full = kept_BN[~part.in_text_B].flatten().nonzero().flatten().to(device)
        text_BT = kept_BN[part.in_text_B].gather(1, part.order) & part.real
        self._take_text = None if text_BT.all() else text_BT.flatten().nonzero().flatten().to(device)
        num_slots = int(kept_B.sum())
        # Slots run over the rows of the full stream first, then over those of the text stream.
        order = torch.cat([(~part.in_text_B).nonzero().flatten(), part.in_text_B.nonzero().flatten()])
        first_B = torch.empty_like(kept_B)
        first_B[order] = kept_B[order].cumsum(0) - kept_B[order]
        offset_KB = torch.arange(length)[:, None] - (length - kept_B)
        slots_KB = (first_B + offset_KB.clamp(min=0)).clamp(max=max(num_slots - 1, 0)).to(device)
        valid_BK = None
        if not (kept_B == length).all():
            valid_BK = (offset_KB >= 0).T.contiguous().to(device)
        self.columns = Columns(slots_KB, valid_BK, length, num_slots, places=places, shift_B=part.shift_B)

    def states(self, text: Tensor | None, full: Tensor | None) -> Tensor:
        """One stream's K (or V), and the other's, as the cache stores them: (B, H, K, d) or (S, H, d)."""
        if self.is_dense:
            return text.contiguous()
        parts = []
        if full is not None:
            parts.append(_tokens_first(full).index_select(0, self._take_full))
        if text is not None:
            flat = _tokens_first(text)
            parts.append(flat if self._take_text is None else flat.index_select(0, self._take_text))
        return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()

    @staticmethod
    def _places(layout, kept_BN: Tensor, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of kept tokens, right-aligned, and position minus column of later ones."""
        start_B = layout.spans.valid_BN.to(torch.uint8).argmax(1)
        # Stable: kept tokens go to the end of each row and stay in order.
        order_BK = torch.argsort(kept_BN.to(torch.uint8), dim=1, stable=True)[:, layout.tokens - length :]
        return (order_BK - start_B[:, None]).to(device), (layout.tokens - length - start_B).to(device)


def _tokens_first(states_BHNd: Tensor) -> Tensor:
    """(B, H, N, d) to (B * N, H, d)."""
    return states_BHNd.transpose(1, 2).reshape(-1, states_BHNd.shape[1], states_BHNd.shape[3])
