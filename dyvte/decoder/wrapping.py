"""A module's forward, replaced for a while and given back as it was."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dyvte.errors import ExitRuntimeError

# By this attribute the wrappers of decoder layers know each other.
_MARK = "_dyvte_wrapper"
# The module of transformers whose hooks note outputs, and stay on a model once they were needed.
_CAPTURING = "transformers.utils.output_capturing"

RunLayer = Callable[[int, Callable[..., Any], Tensor, dict[str, Any]], Any]
"""Called with a layer's index (0-based), its own forward, its states and its other arguments by name."""


def wrap_layers(layers: Sequence[nn.Module], run_layer: RunLayer) -> Callable[[], None]:
    """Let `run_layer` stand in for the forward of each layer.

    Parameters
    ----------
    layers
        Decoder layers, in order.
    run_layer
        What runs in their place; see `RunLayer`.

    Returns
    -------
    Callable
        What gives the layers back.

    Raises
    ------
    ExitRuntimeError
        If one of the layers is wrapped already.
    """
    if any(hasattr(layer.__dict__.get("forward"), _MARK) for layer in layers):
        raise ExitRuntimeError("this model is inside a dyvte block already: leave that one first")
    undo: list[Callable[[], None]] = []

    def give_back() -> None:
        while undo:
            undo.pop()()

    try:
        for index, layer in enumerate(layers):
            undo.append(replace_forward(layer, _wrapper(index, layer.forward, run_layer)))
    except BaseException:
        give_back()
        raise
    return give_back


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Give one module another forward; returns what undoes it.

    Where another tool has replaced the forward since, its version stays, with a warning.

    Parameters
    ----------
    module
        Its own attribute ``forward`` hides the one of its class.
    forward
        Takes what the stock one takes.
    """
    own = module.__dict__.get("forward")
    module.forward = forward

    def give_back() -> None:
        if module.__dict__.get("forward") is not forward:
            warnings.warn(
                f"another tool replaced the forward of a {type(module).__name__} inside the block; "
                "its version stays",
                stacklevel=4,
            )
        elif own is None:
            del module.forward
        else:
            # Another tool's, such as accelerate's.
            module.forward = own

    return give_back


def hidden_of(output: Any) -> Tensor:
    """The states that a decoder layer returns, alone or first in a tuple.

    Parameters
    ----------
    output
        A tensor (B, N, D), or a tuple that begins with one.
    """
    return output[0] if isinstance(output, tuple) else output


def returns_early(layer: nn.Module) -> bool:
    """May a layer stop after its keys and values? Not under hooks that expect every submodule to return
    (offloading, gathering). Those that transformers leaves on a model that was once asked for attentions or
    states only note what passes.

    Parameters
    ----------
    layer
        Of the decoder, with whatever hooks it has now.
    """
    inner = [module for module in layer.modules() if module is not layer]
    hooked = any(
        getattr(hook, "__module__", None) != _CAPTURING
        for module in inner
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    return not hooked and not any(hasattr(module, "_hf_hook") for module in layer.modules())


def _wrapper(index: int, forward: Callable[..., Any], run_layer: RunLayer) -> Callable[..., Any]:
    names: list[str] = []

    def wrapped(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:  # Some families pass the mask by position.
            if not names:
                names.extend(list(inspect.signature(forward).parameters)[1:])
            kwargs.update(zip(names, args, strict=False))
        return run_layer(index, forward, hidden_states, kwargs)

    setattr(wrapped, _MARK, True)
    return wrapped
