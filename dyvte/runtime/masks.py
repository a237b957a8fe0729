"""Attention masks of streams and of shortened cache layers, made by transformers' own mask functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cache import ExitLayer


class _Sizes:
    """What transformers' mask functions ask a cache: how many keys, and where the queries start."""

    is_compileable = False

    def __init__(self, past: int) -> None:
        self.past = past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.past + query_length, 0


def causal_mask(config: Any, hidden: Tensor) -> Tensor | None:
    """Plain causal mask for a stream without a past; None where the attention function needs none."""
    from transformers.masking_utils import create_causal_mask

    return create_causal_mask(
        config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, layer_idx=0
    )


def decode_mask(config: Any, hidden: Tensor, layer: ExitLayer, new_tokens: int) -> Tensor | None:
    """Mask of new tokens over a shortened cache layer; call after `ExitLayer.expect`."""
    from transformers.masking_utils import create_causal_mask

    total = layer.length + new_tokens
    valid_BK = layer.columns.valid_BK
    if valid_BK is None and new_tokens == 1:
        # Every key is visible to the one query: all attention functions take None for that.
        return None
    return create_causal_mask(
        config=config,
        inputs_embeds=hidden,
        attention_mask=None if valid_BK is None else valid_BK[:, :total],
        past_key_values=_Sizes(layer.length),
        layer_idx=0,
        # A skipped mask is found by looking at the values: a wait for the device at every step.
        allow_is_causal_skip=valid_BK is None,
    )
