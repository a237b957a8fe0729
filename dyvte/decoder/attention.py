"""A decoder layer's attention module, and how it is made to run another attention function for a while."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_NAME = "dyvte"


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The module `self_attn` that reads its attention function from a config; None where there is no such."""
    module = getattr(layer, "self_attn", None)
    return module if isinstance(module, nn.Module) and hasattr(module, "config") else None


def use_attention(module: nn.Module, function: str | Callable[..., Any]) -> Callable[[], None]:
    """Let this module alone run another attention function; returns what undoes it.

    The choice is made in a copy of the config that all of a model's layers share.

    Parameters
    ----------
    module
        From `attention_of`.
    function
        The name of one that transformers knows, or the function itself: called as those are, with the module,
        queries, keys, values, the mask and options.
    """
    shared, own = module.config, copy.copy(module.config)
    if callable(function):
        _register()
        own._dyvte_attention = function
    own._attn_implementation_internal = _NAME if callable(function) else function
    module.config = own
    return lambda: setattr(module, "config", shared)


@functools.cache
def _register() -> None:
    """Tell transformers of the one name behind which all our functions stand: once in a process."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module.config._dyvte_attention(module, *args, **kwargs)
