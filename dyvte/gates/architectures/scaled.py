"""As shared, on features standardised layer by layer: states of one layer have much in common.

Shapes: B rows, N features of a row, L decoder layers, F gate features, h gate width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyvte.gates.architectures.base import ARCHITECTURES, Architecture, Layers, Trunk, normed
from dyvte.gates.architectures.shared import ModulatedGate

SHRINKAGE = 0.01
"""Added to every variance: the features have mean square 1, and what hardly varies shall not be blown up."""


@ARCHITECTURES.register
class Scaled(Architecture):
    """As shared, but every layer's normalised features are standardised first, by the training samples'
    mean and deviation."""

    name = "scaled"
    width = 64

    @staticmethod
    def trunk(feature_size: int, width: int, num_parts: int, num_layers: int) -> Trunk:
        """The standardisation of every layer and the Linear that all gates share."""
        return _Trunk(feature_size, width, num_parts, num_layers)

    @staticmethod
    def gate(feature_size: int, width: int, num_parts: int) -> nn.Module:
        """One layer's own part."""
        return ModulatedGate(width)


class _Trunk(Trunk):
    """``mean`` and ``scale`` (L+1, F) are constants of the training samples, row 0 before the first layer."""

    def __init__(self, feature_size: int, width: int, num_parts: int, num_layers: int) -> None:
        super().__init__()
        self.num_parts = num_parts
        self.register_buffer("mean", torch.zeros(num_layers + 1, feature_size))
        self.register_buffer("scale", torch.ones(num_layers + 1, feature_size))
        self.w1 = nn.Linear(feature_size, width)

    def forward(self, features: Tensor, layers: Layers) -> Tensor:
        mean, scale = self.mean[layers].float(), self.scale[layers].float()
        standard = (normed(features, self.num_parts) - mean) * scale
        return self.w1(standard.to(self.w1.weight.dtype))

    @torch.no_grad()
    def fit(self, layer: int, features_NF: Tensor) -> None:
        """Mean and deviation of a layer's normalised features."""
        normal_NF = normed(features_NF, self.num_parts).double()
        self.mean[layer] = normal_NF.mean(0)
        self.scale[layer] = (normal_NF.var(0, unbiased=False) + SHRINKAGE).rsqrt()
