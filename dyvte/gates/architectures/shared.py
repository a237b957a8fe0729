"""One wide layer serves all gates; each adds a few numbers of its own. The default.

Shapes: B rows, F gate features, h gate width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dyvte.gates.architectures.base import ARCHITECTURES, Architecture, Layers, Trunk, normed


@ARCHITECTURES.register
class Shared(Architecture):
    """As compact, but one Linear(F, h) serves all layers; the rest is a layer's own.

    Each layer scales and shifts the h outputs before GELU, and has a Linear(h, 1) of its own.
    """

    name = "shared"
    width = 64

    @staticmethod
    def trunk(feature_size: int, width: int, num_parts: int, num_layers: int) -> Trunk:
        """The Linear that all gates share."""
        return _Trunk(feature_size, width, num_parts)

    @staticmethod
    def gate(feature_size: int, width: int, num_parts: int) -> nn.Module:
        """One layer's own part."""
        return ModulatedGate(width)


class _Trunk(Trunk):
    def __init__(self, feature_size: int, width: int, num_parts: int) -> None:
        super().__init__()
        self.num_parts = num_parts
        self.w1 = nn.Linear(feature_size, width)

    def forward(self, features: Tensor, layers: Layers) -> Tensor:
        return self.w1(normed(features, self.num_parts).to(self.w1.weight.dtype))


class ModulatedGate(nn.Module):
    """A layer's own part: it scales and shifts the trunk's h outputs before GELU, then Linear(h, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.w2 = nn.Linear(width, 1)

    def forward(self, inner_Bh: Tensor) -> Tensor:
        """(B,) float32 logits from the trunk's (B, h) outputs."""
        return self.w2(F.gelu(inner_Bh * (1 + self.gain) + self.shift)).float().squeeze(-1)
