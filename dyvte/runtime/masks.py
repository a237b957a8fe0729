"""Attention masks of streams and of shortened cache layers, made by transformers' own mask functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyvte.errors import ExitRuntimeError
from dyvte.runtime.cache import ExitLayer


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
    if layer.window is not None and layer.seen + new_tokens > layer.window.size:
        return _window_mask(config, hidden, layer, new_tokens)
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


def _window_mask(config: Any, hidden: Tensor, layer: ExitLayer, new_tokens: int) -> Tensor:
    total = layer.length + new_tokens
    columns, device = layer.columns, hidden.device
    positions_BK = columns.positions(0, total).to(device)
    query_BQ1 = positions_BK[:, layer.length :, None]
    column_K = torch.arange(total, device=device)
    # Causal by column: both of a row's orders agree, and padding has no position.
    allowed_BQK = column_K <= column_K[layer.length :, None]
    allowed_BQK = allowed_BQK & layer.window.reaches(query_BQ1, positions_BK[:, None])
    if columns.valid_BK is not None:
        allowed_BQK = allowed_BQK & columns.valid_BK[:, None, :total].to(device)
    attention = config._attn_implementation
    if attention == "sdpa":
        return allowed_BQK[:, None]
    if attention == "eager":
        hidden_value = torch.finfo(hidden.dtype).min
        return torch.zeros_like(allowed_BQK, dtype=hidden.dtype).masked_fill(~allowed_BQK, hidden_value)[
            :, None
        ]
    if attention.startswith("flash_attention") and new_tokens == 1:
        # One query sees one set of keys: a padding mask says it all.
        return allowed_BQK[:, 0]
    raise window_needs_mask(attention)


def window_needs_mask(attention: str) -> ExitRuntimeError:
    """The error for an attention function that cannot be told which tokens a short window still reaches."""
    return ExitRuntimeError(
        f"'{attention}' cannot express a sliding window over a sequence that visual tokens have left: "
        "load the model with attn_implementation='sdpa' or 'eager'"
    )
