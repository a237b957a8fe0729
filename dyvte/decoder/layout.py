"""Which tokens a batch holds before its prefill.

Shapes: B rows, N tokens of the padded batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dyvte.spans import Spans


class Layout:
    """Token masks of one batch, on the host: layers work out their indices without a wait for the device.

    Parameters
    ----------
    spans
        Where image and text sit.

    Attributes
    ----------
    batch, tokens
        B and N.
    text_BN
        (B, N) bool: real tokens that are not visual.
    num_visual_B, num_prompt_B
        (B,) int64: visual tokens, and text tokens after the last of them.
    last_B
        (B,) int64 index of each prompt's last real token: the answer's first token is read there.
    """

    def __init__(self, spans: Spans) -> None:
        self.spans = spans
        self.batch, self.tokens = spans.valid_BN.shape
        self.text_BN = spans.valid_BN & ~spans.visual_BN
        self.num_visual_B = spans.visual_BN.sum(1)
        self.num_prompt_B = spans.prompt_BN.sum(1)
        prompt_BN = spans.valid_BN & ~spans.answer_BN
        self.last_B = self.tokens - 1 - prompt_BN.flip(1).to(torch.uint8).argmax(1)

    @property
    def has_image_B(self) -> Tensor:
        """(B,) bool."""
        return self.num_visual_B > 0
