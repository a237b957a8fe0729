"""Layers that see only nearby tokens: sliding windows and chunks.

Both are rules about positions in the padded batch, so they must be told where a kept token once stood.

Shapes: B rows, Q new tokens, K kept tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A layer's reach.

    Attributes
    ----------
    kind
        "sliding": a token sees the last `size` tokens, itself included. "chunked": it sees its own chunk
        of `size` tokens, counted from the row's first real token.
    size
        In tokens.
    """

    kind: str
    size: int

    def reaches(self, query_BQ1: Tensor, key_B1K: Tensor) -> Tensor:
        """(B, Q, K) bool for positions counted from each row's first real token.

        Parameters
        ----------
        query_BQ1, key_B1K
            Positions, counted from each row's first real token.
        """
        if self.kind == "sliding":
            return key_B1K > query_BQ1 - self.size
        return key_B1K.div(self.size, rounding_mode="floor") == query_BQ1.div(
            self.size, rounding_mode="floor"
        )

    def first_needed(self, tokens: int) -> int:
        """First column that a token after `tokens` columns can still see, whatever the row's padding.

        Parameters
        ----------
        tokens
            How many columns come before the token, padding included.
        """
        return max(tokens - self.size + 1, 0) if self.kind == "sliding" else 0


def layer_windows(config: Any, num_layers: int) -> tuple[Window | None, ...]:
    """The reach of every layer of a text config; None: everything before it.

    Parameters
    ----------
    config
        Of the text model.
    num_layers
        L.
    """
    kinds = getattr(config, "layer_types", None)
    sizes = {
        "sliding_attention": getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    if kinds is None:
        # Without a list, one rule holds for all layers (Mistral).
        kind = next((name for name, size in sizes.items() if size is not None), "full_attention")
        kinds = [kind] * num_layers
    return tuple(
        Window(kind.removesuffix("_attention"), sizes[kind]) if sizes.get(kind) is not None else None
        for kind in kinds[:num_layers]
    )
