"""What a pass was given: the arguments of each module on the way down to the decoder.

A family's outer module is given `input_ids` and images, the decoder only embeddings and a mask of its own; a
block that hooks the decoder has to know all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

IMAGE_ARGUMENTS = (
    "pixel_values",
    "pixel_values_videos",
    "pixel_values_images",
    "image_patches",
    "image_embeds",
    "mm_encoder_outputs",  # encoded beforehand: `generate` does so
)
"""Names under which models take images."""


class PassArguments:
    """The arguments of the pass in progress, by depth: 0 is the outermost module, the last the decoder."""

    def __init__(self) -> None:
        self._seen: dict[int, dict[str, Any]] = {}

    def watch(self, path: Sequence[nn.Module]) -> Callable[[], None]:
        """Note what each module is called with, and forget it once the module is done.

        Parameters
        ----------
        path
            From the outermost module down to the decoder.

        Returns
        -------
        Callable
            Ends the watching.
        """
        handles = []

        def stop() -> None:
            while handles:
                handles.pop().remove()

        try:
            for depth, module in enumerate(path):
                note = self._noting(depth, inspect.signature(module.forward))
                handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
                handles.append(module.register_forward_hook(lambda *_: self.forget(), always_call=True))
        except BaseException:
            stop()
            raise
        return stop

    def forget(self) -> None:
        """The pass is over, or its arguments have been used."""
        self._seen.clear()

    def find(self, name: str) -> Any:
        """The innermost value given under this name on the way down to the decoder."""
        for depth in sorted(self._seen, reverse=True):
            if (value := self._seen[depth].get(name)) is not None:
                return value
        return None

    def at(self, depth: int, name: str) -> Any:
        """What one module was given under this name; None: nothing."""
        return self._seen.get(depth, {}).get(name)

    def images(self) -> list[Any]:
        """What was given under each of `IMAGE_ARGUMENTS`."""
        return [self.find(name) for name in IMAGE_ARGUMENTS]

    def has_images(self) -> bool:
        """Whether any argument brings images."""
        return any(_is_given(value) for value in self.images())

    def mask_BN(self) -> Tensor | None:
        """The innermost two-dimensional attention mask."""
        # gemma3 and paligemma hand a 4D or dict mask to their text model; the 2D one is higher up.
        for depth in sorted(self._seen, reverse=True):
            mask = self._seen[depth].get("attention_mask")
            if isinstance(mask, Tensor) and mask.dim() == 2:
                return mask
        return None

    def _noting(self, depth: int, signature: inspect.Signature) -> Any:
        var_keywords = [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # An outer module starts a new pass: what deeper ones were given before is over.
            for deeper in [d for d in self._seen if d >= depth]:
                del self._seen[deeper]
            try:
                self._seen[depth] = signature.bind_partial(*args, **kwargs).arguments
            except TypeError:
                self._seen[depth] = dict(kwargs)
            for name in var_keywords:
                self._seen[depth].update(self._seen[depth].pop(name, None) or {})

        return note


def _is_given(value: Any) -> bool:
    if isinstance(value, dict):
        return any(item is not None for item in value.values())
    return value is not None
