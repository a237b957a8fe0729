"""Bytes of the KV cache.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyvte.backbones.sizes import DecoderShape


def kv_bytes(
    shape: DecoderShape,
    num_text_B: Any,
    num_visual_B: Any,
    exit_layers_B: Any,
    *,
    bytes_per_value: int = 2,
) -> Tensor:
    """Bytes of each sample's keys and values after prefill, padding excluded.

    Text tokens lie in the caches of all L layers, visual tokens in those of the k layers in which they can be
    read. Where they freeze does not matter: a frozen token's key and value are cached like an updated one's.

    Parameters
    ----------
    shape : sizes of the decoder.
    num_text_B, num_visual_B : (B,) tokens of each kind.
    exit_layers_B : (B,) exit layers k, 0..L; -1 for a row without an image.
    bytes_per_value : of the cache's dtype: 2 for half precision, 4 for float32.

    Returns
    -------
    (B,) float64 tensor
    """
    text_B, visual_B, exits_B = (
        torch.as_tensor(values, dtype=torch.float64) for values in (num_text_B, num_visual_B, exit_layers_B)
    )
    token_layers_B = shape.num_layers * text_B + exits_B.clamp(min=0) * visual_B
    return 2 * shape.num_kv_heads * shape.head_dim * bytes_per_value * token_layers_B
