"""What one layer does with each row, and what its gates read of it; most layers are as the one before.

Shapes: B rows, N tokens of the padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.decoder import Layout
from dyvte.gates import FeatureReader, reads_visual
from dyvte.spans import Spans


@dataclass(frozen=True)
class LayerRows:
    """What one layer does with each row.

    Attributes
    ----------
    kept_BN : Tensor
        bool: tokens that no reduction has taken; exits come on top.
    in_text_B : Tensor
        bool: rows whose visual tokens have left, or that never had any.
    frozen_B : Tensor
        bool: rows whose visual tokens are read, not updated.
    carried_BN : Tensor
        bool: tokens that the layer works on or reads.
    num_visual_B, num_frozen_B, num_text_B : Tensor
        int64: of these, visual tokens that are updated, visual tokens that are not, and the others.
    """

    kept_BN: Tensor
    in_text_B: Tensor
    frozen_B: Tensor
    carried_BN: Tensor
    num_visual_B: Tensor
    num_frozen_B: Tensor
    num_text_B: Tensor

    @staticmethod
    def of(layout: Layout, kept_BN: Tensor, in_text_B: Tensor, frozen_B: Tensor) -> LayerRows:
        """Rows of a layout, from which tokens are kept and how each row stands."""
        carried_BN = torch.where(in_text_B[:, None], kept_BN & layout.text_BN, kept_BN)
        num_B = (carried_BN & layout.spans.visual_BN).sum(1)
        return LayerRows(
            kept_BN=kept_BN,
            in_text_B=in_text_B,
            frozen_B=frozen_B,
            carried_BN=carried_BN,
            num_visual_B=num_B.masked_fill(frozen_B, 0),
            num_frozen_B=num_B.masked_fill(~frozen_B, 0),
            num_text_B=carried_BN.sum(1) - num_B,
        )

    def is_of(self, kept_BN: Tensor, in_text_B: Tensor, frozen_B: Tensor) -> bool:
        """Whether these rows are still right: no token was taken since, no row has frozen or left."""
        return (
            self.kept_BN is kept_BN
            and torch.equal(self.in_text_B, in_text_B)
            and torch.equal(self.frozen_B, frozen_B)
        )


@dataclass(frozen=True)
class GateReading:
    """What gates read of the rows that ask them.

    Attributes
    ----------
    kept_BN, asking_B : Tensor
        bool: the tokens and rows that it was made for.
    device : torch.device
        Of the layer's states.
    reader : FeatureReader or None
        Of the tokens in `span`; None where the rows that ask have no prompt left.
    span : slice or None
        From the first to the last token that is read, in N.
    """

    kept_BN: Tensor
    asking_B: Tensor
    device: torch.device
    reader: FeatureReader | None = None
    span: slice | None = None

    @staticmethod
    def of(
        names: Sequence[str], spans: Spans, kept_BN: Tensor, asking_B: Tensor, device: torch.device
    ) -> GateReading:
        """What gates with features of these names read: prompt text, and visual tokens where one asks so."""
        masks = [spans.prompt_BN & kept_BN & asking_B[:, None]]
        if not masks[0].any():
            return GateReading(kept_BN, asking_B, device)
        if reads_visual(names):
            masks.append(spans.visual_BN & kept_BN & asking_B[:, None])
        used = torch.stack(masks).any(0).any(0).nonzero().flatten()
        span = slice(int(used[0]), int(used[-1]) + 1)
        masks = [mask_BN[:, span].to(device) for mask_BN in masks]
        return GateReading(kept_BN, asking_B, device, FeatureReader(*masks, names=names), span)

    def is_of(self, kept_BN: Tensor, asking_B: Tensor, device: torch.device) -> bool:
        """Whether the reader is still right for these tokens and rows, and lies on that device."""
        # A model may be spread over devices, layer by layer.
        same_rows = self.asking_B is asking_B or torch.equal(self.asking_B, asking_B)
        return self.kept_BN is kept_BN and self.device == device and same_rows
