"""A decoder layer's attention module, and how it is made to run another attention function for a while."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The module `self_attn` that reads its attention function from a config; None where there is no such."""
    module = getattr(layer, "self_attn", None)
    return module if isinstance(module, nn.Module) and hasattr(module, "config") else None


def use_attention(module: nn.Module, name: str, **fields: Any) -> Callable[[], None]:
    """Let this module alone run the function called `name`; returns what undoes it.

    The choice, and further `fields` for the function to read, are made in a copy of the config that all of a
    model's layers share.
    """
    shared, own = module.config, copy.copy(module.config)
    own._attn_implementation_internal = name
    for field, value in fields.items():
        setattr(own, field, value)
    module.config = own
    return lambda: setattr(module, "config", shared)
