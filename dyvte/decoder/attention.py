"""A decoder layer's attention module, and how it is made to run another attention function for a while."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from dyvte.decoder.caches import keys_and_values
from dyvte.decoder.wrapping import replace_forward

_NAME = "dyvte"
# Llama's one projection; the two of latent attention.
_QUERY = re.compile(r"q(_[ab])?_proj")


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The module `self_attn` that reads its attention function from a config; None where there is no such."""
    module = getattr(layer, "self_attn", None)
    return module if isinstance(module, nn.Module) and hasattr(module, "config") else None


def query_projections(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of a layer's attention that make queries and nothing else; empty where there are none."""
    module = getattr(layer, "self_attn", None)
    if not isinstance(module, nn.Module):
        return ()
    named = [child for name, child in module.named_children() if _QUERY.fullmatch(name)]
    return tuple(child for child in named if isinstance(getattr(child, "out_features", None), int))


@contextmanager
def without_queries(layer: nn.Module, size: int | None = None) -> Iterator[None]:
    """Inside, a layer's queries are zeros that cost nothing.

    For calls that end once keys and values are made. The layer must have `query_projections`.

    Parameters
    ----------
    layer
        A decoder layer.
    size
        Width of the zeros; None: that of all heads.
    """
    with ExitStack() as undo:
        for projection in query_projections(layer):
            zeros = _zeros(projection.out_features if size is None else size)
            undo.callback(replace_forward(projection, zeros))
        yield


class KeysAlone:
    """Keys and values of a layer's input, by its own norms, projections and positions, without its queries.

    The layer must have `query_projections`. They are swapped for ones that give zeros: of one head where the
    layer takes that (nothing then goes on with them), else of all.
    """

    def __init__(self) -> None:
        # Kinds of layers that ask for all heads; found out once.
        self._whole: set[type] = set()

    def __call__(
        self, layer: nn.Module, forward: Callable[..., Any], hidden_BND: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(B, H, N, d) keys and values.

        Parameters
        ----------
        layer, forward
            The decoder layer, and its own forward.
        hidden_BND, kwargs
            What that is called with.

        Raises
        ------
        UnsupportedBackboneError
            If the layer gives them to no cache.
        """
        size = getattr(layer.self_attn, "head_dim", None)
        if len(query_projections(layer)) == 1 and isinstance(size, int) and type(layer) not in self._whole:
            try:
                with without_queries(layer, size):
                    return keys_and_values(forward, hidden_BND, **kwargs)
            except RuntimeError:
                # A shape that names the number of heads. Whatever else it was shows again below.
                self._whole.add(type(layer))
        with without_queries(layer):
            return keys_and_values(forward, hidden_BND, **kwargs)


def _zeros(size: int) -> Callable[..., Tensor]:
    def forward(states: Tensor, *_: Any, **__: Any) -> Tensor:
        return states.new_zeros(*states.shape[:-1], size)

    return forward


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
