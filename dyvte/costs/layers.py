"""Multiply-adds of one token in a decoder layer, part by part: what every other count is made of.

Shape letters: L decoder layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.backbones.sizes import DecoderShape


@dataclass(frozen=True)
class LayerMacs:
    """Multiply-adds of a token in a layer; all layers have the same attention, each its own FFN.

    Attributes
    ----------
    projections : query, key, value and output projections.
    key_value : key and value projections alone: all that a frozen visual token costs.
    ffn_L : (L,) float64, the FFN's matrices; of experts, the active and the shared ones.
    width : of one product (scores, or the weighted sum) of one query with one key, over all heads.
    """

    projections: int
    key_value: int
    ffn_L: Tensor
    width: int

    @staticmethod
    def of(shape: DecoderShape, ffn_matrices: int = 3) -> LayerMacs:
        """Those of a decoder; ``ffn_matrices`` is how many matrices of the FFN are counted (gated: 3).

        Parameters
        ----------
        shape
            Of the decoder.
        ffn_matrices
            Convention: DyVTE and VTW count three, FastV two.
        """
        width, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        ffn_sizes_L = torch.tensor(shape.ffn_sizes_L, dtype=torch.float64)
        return LayerMacs(
            projections=2 * shape.hidden_size * (width + key_value),
            key_value=2 * shape.hidden_size * key_value,
            ffn_L=ffn_matrices * shape.hidden_size * ffn_sizes_L,
            width=width,
        )

    @property
    def linear_L(self) -> Tensor:
        """(L,) float64: all linear work, projections and FFN."""
        return self.projections + self.ffn_L
