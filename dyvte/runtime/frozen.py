"""Rows whose visual tokens are frozen: one layer on their text, which reads the image's keys and values.

The layer runs twice. Once on the visual tokens, with queries that cost nothing, and only until it hands its
keys and values to the cache; once on the text, with a cache that puts those keys and values where they
belong. So norms, projections and rotary embeddings are the layer's own, whatever the family.

Shapes: B rows, N tokens of the padded batch, R rows, T text tokens and K tokens of a frozen stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones import Backbone
from dyvte.decoder import Slots, Window
from dyvte.decoder.attention import KeysAlone, attention_of, query_projections, use_attention
from dyvte.decoder.caches import Interleaved
from dyvte.decoder.masks import cut_mask, hide_keys
from dyvte.errors import UnsupportedBackboneError
from dyvte.runtime.streams import FrozenStream

# Attention functions that take any mask; the rest is replaced by the first of them.
_TAKE_MASKS = ("sdpa", "eager")
# Attention options that `sdpa` does not know.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


def check_can_freeze(backbone: Backbone) -> None:
    """Raise where keys and values cannot be had without queries.

    Raises
    ------
    UnsupportedBackboneError
        Naming the family and the layer.
    """
    for index, layer in enumerate(backbone.layers[: backbone.num_layers]):
        if query_projections(layer):
            continue
        children = dict(getattr(layer, "self_attn", layer).named_children())
        raise UnsupportedBackboneError(
            f"visual tokens of {backbone.model.config.model_type} cannot be frozen: the attention of layer "
            f"{index + 1} has no query projection of its own (found {', '.join(children) or 'nothing'}), so "
            "keys and values cannot be computed alone. Let them leave instead (a policy without freezing)"
        )


class FrozenCall:
    """A decoder layer on one frozen stream.

    Parameters
    ----------
    layer, forward
        The decoder layer, and its own forward.
    stream
        The rows.
    implementation
        The model's attention implementation.
    keys_alone
        Makes keys and values without queries.
    """

    def __init__(
        self,
        layer: nn.Module,
        forward: Callable[..., Any],
        stream: FrozenStream,
        implementation: str,
        keys_alone: KeysAlone,
    ) -> None:
        self.layer, self.forward, self.stream, self.keys_alone = layer, forward, stream, keys_alone
        self.implementation = implementation

    def __call__(
        self, hidden_BND: Tensor, mask: Tensor, visual: dict[str, Any], text: dict[str, Any]
    ) -> tuple[Any, Interleaved]:
        """The layer's output for the text, and the cache that holds keys and values of both.

        Parameters
        ----------
        hidden_BND
            States of the batch.
        mask
            From `text_mask`.
        visual, text
            The layer's other arguments for each.
        """
        with _without_checkpointing(self.layer):
            keys, values = self.keys_alone(
                self.layer,
                self.forward,
                self.stream.visual.gather(hidden_BND),
                **{**visual, "attention_mask": None},
            )
            cache = Interleaved(keys, values, self.stream.order)
            with taking_masks(self.layer, self.implementation):
                output = self.forward(
                    self.stream.text.gather(hidden_BND), attention_mask=mask, past_key_values=cache, **text
                )
        return output, cache


@contextmanager
def taking_masks(layer: nn.Module, implementation: str) -> Iterator[None]:
    """Inside, a layer's attention takes any mask, whatever the model's implementation does.

    Parameters
    ----------
    layer
        A decoder layer.
    implementation
        The model's attention implementation.

    Raises
    ------
    UnsupportedBackboneError
        If the layer's attention cannot be replaced.
    """
    if implementation in _TAKE_MASKS:
        yield
        return
    module = attention_of(layer)
    if module is None:
        raise UnsupportedBackboneError(
            f"visual tokens cannot be frozen under '{implementation}': "
            f"{type(layer).__name__} has no attention module `self_attn` with a config; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    undo = use_attention(module, _attend)
    try:
        yield
    finally:
        undo()


def text_mask(
    stream: FrozenStream, mask: Any, window: Window | None, implementation: str, hidden_BND: Tensor
) -> Tensor:
    """(R, 1, T, K): what each text token sees, bool, or additive for eager attention.

    Parameters
    ----------
    mask
        What the layer was given. A 4D mask is cut, with whatever rule it holds; else attention is causal.
    window
        The layer's reach, for masks that are not 4D.
    """
    device = hidden_BND.device
    rows = stream.text.rows
    queries, keys = (
        Slots(part.order_RT.to(device), part.real_RT.to(device)) for part in (stream.text, stream.keys)
    )
    if isinstance(mask, Tensor) and mask.dim() == 4:
        mask = mask.index_select(0, rows) if mask.shape[0] == hidden_BND.shape[0] else mask
        return cut_mask(mask, queries, keys, "sdpa")
    query_RT1, key_R1K = queries.index[:, :, None], keys.index[:, None]
    allowed_RTK = key_R1K <= query_RT1
    if window is not None:
        first_R11 = stream.first_R.to(device)[:, None, None]
        allowed_RTK = allowed_RTK & window.reaches(query_RT1 - first_R11, key_R1K - first_R11)
    allowed = hide_keys(allowed_RTK[:, None], keys.valid)
    if implementation != "eager":
        return allowed
    lowest = torch.finfo(hidden_BND.dtype).min
    return torch.zeros_like(allowed, dtype=hidden_BND.dtype).masked_fill(~allowed, lowest)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if found := [name for name in _UNKNOWN if options.get(name) is not None]:
        raise UnsupportedBackboneError(
            f"visual tokens cannot be frozen with this attention: it uses {', '.join(found)}; load the model "
            "with attn_implementation='eager'"
        )
    return sdpa_attention_forward(module, query, key, value, mask, **options)


@contextmanager
def _without_checkpointing(layer: nn.Module) -> Iterator[None]:
    # A checkpointed layer is given no cache, and would be computed anew without us. There is little to save:
    # a frozen layer's activations are those of its text.
    own = layer.__dict__.get("gradient_checkpointing")
    if not own:
        yield
        return
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = own
