"""What a schedule costs as plain numbers, for prices and budgets where traces are all there is.

Shape letters: L decoder layers.
"""

from __future__ import annotations

from torch import Tensor

from dyvte.backbones.sizes import DecoderShape
from dyvte.costs.layers import LayerMacs


def kv_share(shape: DecoderShape) -> float:
    """Linear work of a frozen visual token's key and value over an updated one's, mean over layers."""
    macs = LayerMacs.of(shape)
    return float(macs.key_value / macs.linear_L.mean())


def schedule_compute(
    freeze_layers: Tensor | float, exit_layers: Tensor | float, num_layers: int, kv_share: float
) -> Tensor:
    """Share of the full model's linear work on a visual token that schedules (f, k) spend: (f + r (k-f)) / L.

    Layers count alike (r is their mean); `visual_compute` counts layers of unequal width as they are.

    Parameters
    ----------
    freeze_layers, exit_layers : layers that update and that read the visual tokens, f <= k; shapes that go
        together.
    num_layers : L.
    kv_share : r, see `kv_share`.
    """
    return (freeze_layers + kv_share * (exit_layers - freeze_layers)) / num_layers
