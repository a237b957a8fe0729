"""What the vision tower was last called with: the sizes of images are told there and nowhere else.

`generate` encodes images before the first forward pass and keeps their sizes from it, so a hook on the
forward pass would look in vain.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from dyvte.runtime.replay import Replay

_METHODS = ("get_image_features", "get_video_features")


class VisionCalls:
    """Listens to the methods of a model that encode images; `undo` holds what takes the listening away."""

    def __init__(self, modules: Iterable[nn.Module], replay: Replay | None = None) -> None:
        self._replay = replay
        self._given: dict[str, Any] = {}
        self._is_read = False
        self.undo: list[Callable[[], None]] = []
        for module in modules:
            for name in _METHODS:
                if callable(getattr(module, name, None)) and name not in module.__dict__:
                    self._listen(module, name)

    def __call__(self, name: str) -> Any:
        """An argument of the calls for this prefill; None where it was not given."""
        self._is_read = True
        return self._given.get(name)

    def _listen(self, module: nn.Module, name: str) -> None:
        stock = getattr(module, name)
        signature = inspect.signature(stock)

        # `generate` asks for the signature.
        @functools.wraps(stock)
        def heard(*args: Any, **kwargs: Any) -> Any:
            if self._is_read:
                # Another prompt's images: those before are done with.
                self._given, self._is_read = {}, False
            given = signature.bind_partial(*args, **kwargs).arguments
            self._given.update({key: value for key, value in given.items() if value is not None})
            if self._replay is None:
                return stock(*args, **kwargs)
            return self._replay.encoded((id(module), name), lambda: stock(*args, **kwargs))

        # The instance's own name for it hides the class's until it is deleted.
        object.__setattr__(module, name, heard)
        self.undo.append(lambda: module.__dict__.pop(name, None))
