"""Stand-ins for a layer's cache: by them one layer's keys and values are read, and handed over.

Keys and values are (rows, heads, tokens, head size), as transformers' caches hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyvte.errors import UnsupportedBackboneError

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of some tokens of some rows, each (rows, heads, tokens, head size)."""


class Capture:
    """Remembers the keys and values it is given, and stores nothing.

    Attributes
    ----------
    keys, values
        Those of the last update; None before.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Remember and give back."""
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, *_: Any) -> int:
        """No token came before."""
        return 0


class Tee(Capture):
    """Remembers the keys and values that a cache, which may be None, answers with."""

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hand on and remember."""
        if self._cache is not None:
            key_states, value_states = self._cache.update(key_states, value_states, *args, **kwargs)
        return super().update(key_states, value_states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)


class Prefixed:
    """Puts keys and values of earlier tokens before those it is given."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Earlier tokens, then these."""
        return torch.cat((self.keys, key_states), dim=-2), torch.cat((self.values, value_states), dim=-2)

    def get_seq_length(self, *_: Any) -> int:
        """Number of earlier tokens."""
        return self.keys.shape[-2]


class Behind(Capture):
    """Writes what it is given behind keys and values that stand in a buffer already.

    Parameters
    ----------
    keys, values
        Buffers with room for the new tokens at their end.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._all = (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All of them; the new ones alone are remembered."""
        super().update(key_states, value_states)
        keys, values = self._all
        keys[..., -key_states.shape[-2] :, :] = key_states
        values[..., -value_states.shape[-2] :, :] = value_states
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Number of earlier tokens."""
        return self._all[0].shape[-2] - (0 if self.keys is None else self.keys.shape[-2])


class Interleaved(Capture):
    """Adds keys and values that are known already to those it is given, and puts them into a given order.

    Parameters
    ----------
    keys, values
        Those known already.
    order
        For each place, which of the known and then the given ones stands there: (R, K) int64, or runs
        (start, stop) that are the same in all rows.
    """

    def __init__(self, keys: Tensor, values: Tensor, order: Tensor | Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self._known, self._order = (keys, values), order

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All of them, in order."""
        known_keys, known_values = self._known
        return super().update(self._merged(known_keys, key_states), self._merged(known_values, value_states))

    def _merged(self, known: Tensor, given: Tensor) -> Tensor:
        if not isinstance(self._order, Tensor):
            count = known.shape[-2]
            parts = [
                known[..., start:stop, :] if stop <= count else given[..., start - count : stop - count, :]
                for start, stop in self._order
            ]
            return torch.cat(parts, dim=-2)
        both = torch.cat((known, given), dim=-2)
        index = self._order[:, None, :, None]
        return both.gather(2, index.expand(-1, both.shape[1], -1, both.shape[3]))


class Given:
    """Answers every update with keys and values that are known already, those of the new tokens included."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All tokens'."""
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        """Nothing is appended, so nothing came before."""
        return 0


class _Captured(Exception):
    """Ends a layer's forward once its keys and values are known."""


class _Interrupting(Capture):
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states)
        raise _Captured


def keys_and_values(forward: Callable[..., Any], hidden_BND: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer's input, without its attention, output projection and MLP.

    Parameters
    ----------
    forward
        Of the layer.
    hidden_BND
        Its input.
    **kwargs
        The other arguments of the layer.

    Raises
    ------
    UnsupportedBackboneError
        If the layer gives them to no cache.
    """
    cache = _Interrupting()
    try:
        forward(hidden_BND, **{**kwargs, "past_key_values": cache})
    except _Captured:
        return cache.keys, cache.values
    raise UnsupportedBackboneError("a decoder layer ran without giving its keys and values to a cache")
