"""Sizes of a decoder that its cost in FLOPs and memory depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dyvte.errors import UnsupportedBackboneError


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder that its cost depends on.

    ``ffn_sizes_L`` holds the intermediate size each token meets per layer: for experts, the sum over the
    active and shared ones.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_sizes_L: tuple[int, ...]
    vocab_size: int

    @property
    def num_layers(self) -> int:
        """Number of decoder layers L."""
        return len(self.ffn_sizes_L)


def decoder_shape(config: Any) -> DecoderShape:
    """Sizes from a transformers config (the whole model's or its text part's).

    Raises
    ------
    UnsupportedBackboneError
        A size that the count needs is not in the config.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = {}
    for name in (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
    ):
        sizes[name] = getattr(text, name, None)
        if sizes[name] is None:
            raise UnsupportedBackboneError(f"cannot count FLOPs of {type(text).__name__}: it has no {name}")
    heads = sizes["num_attention_heads"]
    return DecoderShape(
        hidden_size=sizes["hidden_size"],
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or sizes["hidden_size"] // heads,
        ffn_sizes_L=tuple(_ffn_size(text, layer) for layer in range(sizes["num_hidden_layers"])),
        vocab_size=sizes["vocab_size"],
    )


def _ffn_size(text: Any, layer: int) -> int:
    """Intermediate size that a token meets in one layer."""
    expert_size = getattr(text, "moe_intermediate_size", None)
    active = getattr(text, "num_experts_per_tok", None)
    num_experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    num_experts = num_experts or getattr(text, "n_routed_experts", None)
    sparse_step = getattr(text, "decoder_sparse_step", None) or 1
    dense = (
        not active
        or not num_experts
        or layer < (getattr(text, "first_k_dense_replace", None) or 0)
        or layer in (getattr(text, "mlp_only_layers", None) or ())
        or (layer + 1) % sparse_step != 0
    )
    if dense:
        return text.intermediate_size
    expert_size = expert_size or text.intermediate_size
    shared = getattr(text, "shared_expert_intermediate_size", None)
    if shared is None:
        shared = (getattr(text, "n_shared_experts", None) or 0) * expert_size
    return active * expert_size + shared
