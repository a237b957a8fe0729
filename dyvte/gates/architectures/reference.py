"""The gate of DyVTE's paper and code (arXiv 2411.19628, Eq. 1).

Shapes: B rows, F gate features, h gate width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dyvte.gates.architectures.base import ARCHITECTURES, Architecture


@ARCHITECTURES.register
class Reference(Architecture):
    """Linear(F, h), erf GELU, Linear(h, 2), no biases; DyVTE's own.

    The logit is the second output minus the first.
    """

    name = "reference"
    width = 2048

    @staticmethod
    def gate(feature_size: int, width: int, num_parts: int) -> nn.Module:
        """One layer's gate."""
        return _Gate(feature_size, width)


class _Gate(nn.Module):
    def __init__(self, feature_size: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(feature_size, width, bias=False)
        self.w2 = nn.Linear(width, 2, bias=False)

    def forward(self, features_BF: Tensor) -> Tensor:
        both_B2 = self.w2(F.gelu(self.w1(features_BF.to(self.w1.weight.dtype)))).float()
        return both_B2[..., 1] - both_B2[..., 0]
