"""A gate of its own for each layer, narrow, on normalised features.

Shapes: B rows, F gate features, h gate width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dyvte.gates.architectures.base import ARCHITECTURES, Architecture, normed


@ARCHITECTURES.register
class Compact(Architecture):
    """Each feature part RMS-normalised, Linear(F, h), GELU, Linear(h, 1), with biases."""

    name = "compact"
    width = 16

    @staticmethod
    def gate(feature_size: int, width: int, num_parts: int) -> nn.Module:
        """One layer's gate."""
        return _Gate(feature_size, width, num_parts)


class _Gate(nn.Module):
    def __init__(self, feature_size: int, width: int, num_parts: int) -> None:
        super().__init__()
        self.num_parts = num_parts
        self.w1 = nn.Linear(feature_size, width)
        self.w2 = nn.Linear(width, 1)

    def forward(self, features_BF: Tensor) -> Tensor:
        normed_BF = normed(features_BF, self.num_parts)
        return self.w2(F.gelu(self.w1(normed_BF.to(self.w1.weight.dtype)))).float().squeeze(-1)
