"""Keys and values of frozen visual tokens, written into a layer's paged cache without query, attention, FFN.

Shape letters: n frozen rows, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dyvte.errors import UnsupportedBackboneError


class KeyValueWriter:
    """What one decoder layer does to write keys and values alone.

    Served are attention modules as in vLLM's Llama, Qwen2 and Qwen3 decoders: ``qkv_proj``, perhaps a norm of
    the keys by heads (``k_norm``), then ``rotary_emb``.

    Parameters
    ----------
    layer
        The decoder layer.

    Raises
    ------
    UnsupportedBackboneError
        The layer is built in another way.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.attention = layer, getattr(layer, "self_attn", None)
        wanted = ("qkv_proj", "rotary_emb", "attn", "q_size", "kv_size", "head_dim")
        missing = [name for name in wanted if not hasattr(self.attention, name)]
        if missing or not hasattr(layer, "input_layernorm"):
            raise UnsupportedBackboneError(
                f"visual tokens of {type(layer).__name__} cannot be frozen inside vLLM: its attention has no "
                f"{', '.join(missing) or 'input_layernorm before it'}; let them leave instead (fixed:K)"
            )
        self._projection: tuple[Tensor, Tensor | None] | None = None

    def keep_projection(self) -> None:
        """Keep the part of ``qkv_proj`` that makes keys and values, before vLLM packs the weights.

        A view of them, but on a CPU a copy: there the packed ones replace them. Quantised weights are left as
        they are, and the whole projection is run.
        """
        attention = self.attention
        weight = getattr(attention.qkv_proj, "weight", None)
        bias = getattr(attention.qkv_proj, "bias", None)
        whole = attention.q_size + 2 * attention.kv_size
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape[0] != whole:
            return
        kept = weight.data[attention.q_size :]
        kept = kept.clone() if kept.device.type == "cpu" else kept
        self._projection = (kept, None if bias is None else bias.data[attention.q_size :])

    @torch.no_grad()
    def write(self, hidden_nD: Tensor, positions: Tensor, slots_n: Tensor) -> None:
        """Write keys and values of states into the layer's cache.

        Parameters
        ----------
        hidden_nD
            What the layer reads.
        positions
            (n,), or (3, n) of M-RoPE.
        slots_n
            Of the cache.
        """
        attention = self.attention
        normed = self.layer.input_layernorm(hidden_nD)
        if self._projection is None:
            both = attention.qkv_proj(normed)[0][:, attention.q_size :]
        else:
            both = functional.linear(normed, *self._projection)
        keys, values = both.split([attention.kv_size, attention.kv_size], -1)
        shape = (len(hidden_nD), -1, attention.head_dim)
        keys = keys.reshape(shape)
        if getattr(attention, "k_norm", None) is not None:
            keys = attention.k_norm(keys)
        keys = keys.reshape(len(hidden_nD), -1).contiguous()
        # The operator wants a query as well, and may work in place: a head of zeros.
        query = keys.new_zeros(len(hidden_nD), attention.head_dim)
        keys = attention.rotary_emb(positions, query, keys)[1]
        inner: Any = attention.attn
        inner.impl.do_kv_cache_update(
            inner, keys.reshape(shape), values.reshape(shape), inner.kv_cache, slots_n
        )
