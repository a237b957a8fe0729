"""Attention weights of a model, layer by layer, as its own eager function computes them.

Shapes: B rows, N tokens, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from dyvte.backbones.describe import Backbone
from dyvte.errors import UnsupportedBackboneError


@contextmanager
def watched_attention(backbone: Backbone, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside, ``see(index, weights_BHNN)`` is called for every decoder layer (0-based) of a forward pass.

    The decoder runs its eager attention meanwhile, whatever the model was loaded with; nothing stays. Weights
    are (B, H, queries, keys) after the softmax; rows of padding mean nothing.

    Parameters
    ----------
    backbone
        Whose decoder is watched.
    see
        Called with the layer and its weights.

    Raises
    ------
    UnsupportedBackboneError
        If a layer has no attention module `self_attn`, or returns no weights.
    """
    config = backbone.decoder.config
    stock = config._attn_implementation

    def look(index: int, module: nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor):
            raise UnsupportedBackboneError(
                f"layer {index + 1} of {backbone.model.config.model_type} returns no attention weights"
            )
        see(index, weights)

    handles = []
    try:
        for index, layer in enumerate(backbone.layers[: backbone.num_layers]):
            if not isinstance(getattr(layer, "self_attn", None), nn.Module):
                raise UnsupportedBackboneError(
                    f"layer {index + 1} of {backbone.model.config.model_type} has no attention `self_attn`"
                )
            handles.append(layer.self_attn.register_forward_hook(partial(look, index)))
        config._attn_implementation = "eager"
        yield
    finally:
        config._attn_implementation = stock
        for handle in handles:
            handle.remove()
