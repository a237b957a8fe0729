"""One decoder layer as a pass calls it, and what it takes from its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.decoder import Slots, returns_early
from dyvte.decoder.attention import KeysAlone
from dyvte.decoder.caches import Capture, KeysValues
from dyvte.decoder.masks import cut_mask


@dataclass(frozen=True)
class LayerCall:
    """A decoder layer, and what the model called it with.

    Attributes
    ----------
    layer, forward:
        The module, and its own forward.
    kwargs, mask:
        The arguments beside the states; the attention mask on its own.
    implementation:
        The attention implementation's name in transformers.
    """

    layer: nn.Module
    forward: Callable[..., Any]
    kwargs: dict[str, Any]
    mask: Any
    implementation: str

    def cut(self, queries: Slots, keys: Slots, rows_R: Tensor | None = None) -> Any:
        """The attention mask of these tokens, of all rows or of some."""
        mask = self.mask
        if rows_R is not None and isinstance(mask, Tensor) and mask.shape[0] > 1:
            mask = mask.index_select(0, rows_R.to(mask.device))
        return cut_mask(mask, queries, keys, self.implementation)

    def read_only(self, states: Tensor, arguments: dict[str, Any], alone: KeysAlone) -> KeysValues:
        """Keys and values of states, without queries; where the layer cannot stop early, after all of it."""
        if returns_early(self.layer):
            return alone(self.layer, self.forward, states, **arguments)
        cache = Capture()
        self.forward(states, **{**arguments, "past_key_values": cache})
        return cache.keys, cache.values


def take_tokens(known: KeysValues, slots: Slots) -> KeysValues:
    """Keys and values of some of the tokens."""
    keys, values = (slots.take(states.transpose(1, 2)).transpose(1, 2) for states in known)
    return keys, values


def joined(*parts: KeysValues) -> KeysValues:
    """Those of several groups of tokens, one group after the other."""
    keys, values = (torch.cat(states, -2) for states in zip(*parts, strict=True))
    return keys, values
