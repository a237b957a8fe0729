"""What an architecture is: how one gate is made, and what all gates of a stack share.

Shapes: B rows, F gate features, h gate width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dyvte.registry import Registry

Layers = int | Tensor


class Trunk(nn.Module):
    """What the gates of a stack share: from (..., F) features to what a gate reads."""

    def forward(self, features: Tensor, layers: Layers) -> Tensor:
        """``layers`` is the layer after which the features were taken, 0 before the first: one for all of
        them, or (N,) for those of (B, N, F)."""
        raise NotImplementedError(f"{type(self).__name__} defines no `forward`")

    def fit(self, layer: int, features_NF: Tensor) -> None:
        """Take in what must be known of all training features after a layer; most need nothing."""


class Architecture:
    """Base of all architectures; a subclass gives `name`, `width` and `gate`, and is registered.

    Attributes
    ----------
    name
        What ``gate_config.json``, configurations and the command line call it.
    width
        h where none is asked for.
    """

    name = ""
    width = 0

    @staticmethod
    def trunk(feature_size: int, width: int, num_parts: int, num_layers: int) -> Trunk | None:
        """What the gates of a stack share; None: nothing.

        Parameters
        ----------
        feature_size
            F.
        width
            h.
        num_parts
            Of how many parts of equal size the features consist.
        num_layers
            L.
        """
        return None

    @staticmethod
    def gate(feature_size: int, width: int, num_parts: int) -> nn.Module:
        """One layer's gate, from (B, F) features, or the trunk's output, to (B,) float32 logits.

        Parameters
        ----------
        feature_size
            F.
        width
            Of the hidden layer.
        num_parts
            Of equal size that the features consist of.
        """
        raise NotImplementedError("this architecture defines no `gate`")


ARCHITECTURES: Registry[type[Architecture]] = Registry("gate architecture", "dyvte.gates.architectures")


def normed(features_BF: Tensor, num_parts: int) -> Tensor:
    """Each part of the features divided by its root mean square, float32.

    Parameters
    ----------
    features_BF
        Parts of equal size, one after the other.
    num_parts
        How many.
    """
    parts = features_BF.float().unflatten(-1, (num_parts, -1))
    return F.rms_norm(parts, parts.shape[-1:], eps=1e-6).flatten(-2)
