"""What a gate reads. Shapes: B rows, N tokens, D hidden size."""

from __future__ import annotations

import torch
from torch import Tensor

FEATURES = ("mean_prompt", "last_prompt")


def prompt_features(hidden_BND: Tensor, prompt_mask_BN: Tensor) -> Tensor:
    """What a gate reads: [mean of the prompt text without its last token, its last token], (B, 2D) float32.

    A single prompt token is its own mean. A row without prompt text gives zeros: it must not be asked.
    Source: DyVTE, Eq. 1.
    """
    count_BN = prompt_mask_BN.cumsum(1)
    total_B1 = count_BN[:, -1:]
    last_BN = prompt_mask_BN & (count_BN == total_B1)
    before_BN = prompt_mask_BN & ((count_BN < total_B1) | (total_B1 == 1))
    weights_B2N = torch.stack([before_BN / before_BN.sum(1, keepdim=True).clamp(min=1), last_BN.float()], 1)
    # Where not a prompt token, the weight is 0, but 0 * inf would still be NaN.
    hidden_BND = hidden_BND.float().masked_fill(~prompt_mask_BN[..., None], 0.0)
    return torch.bmm(weights_B2N.to(hidden_BND.dtype), hidden_BND).flatten(1)
