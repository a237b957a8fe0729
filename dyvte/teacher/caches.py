"""Stand-ins for a layer's cache: by them the teacher reads, and hands over, keys and values of one layer.

Keys and values are (rows, heads, tokens, head size), as transformers' caches hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Recorder:
    """Remembers the keys and values it is given."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep them, and give them back."""
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """No token came before."""
        return 0


class Prefixed:
    """Puts keys and values of earlier tokens before those it is given."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Earlier tokens, then these."""
        return torch.cat((self.keys, keys), dim=-2), torch.cat((self.values, values), dim=-2)

    def get_seq_length(self, *_: Any) -> int:
        """Number of earlier tokens."""
        return self.keys.shape[-2]


class Given:
    """Answers every update with keys and values that are known already, those of the new tokens included."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All tokens'."""
        del keys
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        """Nothing is appended, so nothing came before."""
        return 0


class _Recorded(Exception):
    """Ends a layer's forward once its keys and values are known."""


class _Interrupting(Recorder):
    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        raise _Recorded


def keys_and_values(forward: Callable[..., Any], hidden_BND: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer's input, without its attention, output projection and MLP."""
    cache = _Interrupting()
    try:
        forward(hidden_BND, **{**kwargs, "past_key_values": cache})
    except _Recorded:
        return cache.keys, cache.values
    raise RuntimeError("a decoder layer ran without giving its keys and values to a cache")
