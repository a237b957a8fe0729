"""Every image through the vision tower once, however many rows of a batch hold it.

Shape letters: I images of a call, U different ones.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones import Backbone

_METHOD = "get_image_features"
# What the models read of an encoded batch; in each, images come one after the other.
_PER_IMAGE, _PER_LAYER_AND_IMAGE = "pooler_output", "deepstack_features"


@contextmanager
def each_image_once(backbone: Backbone) -> Iterator[None]:
    """Inside, the model encodes equal images of a call once and repeats what they become.

    Equal means equal pixels and sizes, as the processor made them. Calls whose images cannot be told apart go
    through as they are.
    """
    # The innermost alone: others call it.
    modules = [module for module in backbone.path if callable(getattr(module, _METHOD, None))]
    inner = modules[-1:] if modules and _METHOD not in modules[-1].__dict__ else []
    for module in inner:
        object.__setattr__(module, _METHOD, _once(getattr(module, _METHOD)))
    try:
        yield
    finally:
        for module in inner:
            module.__dict__.pop(_METHOD, None)


def _once(stock: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(stock).parameters)

    @functools.wraps(stock)
    def encode(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        images = _images(given)
        if images is None:
            return stock(*args, **kwargs)
        which_I, first_U = _numbered(images)
        if len(first_U) == len(which_I):
            return stock(*args, **kwargs)
        output = stock(**{**given, **_chosen(given, images, first_U)})
        if not _repeat(output, which_I, len(first_U)):
            return stock(*args, **kwargs)
        return output

    return encode


def _images(given: Mapping[str, Any]) -> list[tuple[Tensor, ...]] | None:
    """Of each image everything that is given of it; None where that cannot be told."""
    pixels, grid = given.get("pixel_values"), given.get("image_grid_thw")
    if not isinstance(pixels, Tensor):
        return None
    per_row = given.get("batch_num_images")
    if isinstance(per_row, Tensor) and not bool((per_row == 1).all()):
        return None
    if isinstance(grid, Tensor):
        counts = grid.prod(-1).tolist()
        if sum(counts) != len(pixels):
            return None
        return list(zip(pixels.split(counts), grid, strict=True))
    beside = [value for name, value in given.items() if isinstance(value, Tensor) and name != "pixel_values"]
    if any(value.dim() == 0 or len(value) != len(pixels) for value in beside):
        return None
    return list(zip(pixels, *beside, strict=True))


def _numbered(images: list[tuple[Tensor, ...]]) -> tuple[list[int], list[int]]:
    """Which of the different images each one is, and the first of each."""
    known: dict[Any, list[int]] = {}
    which_I, first_U = [], []
    for number, image in enumerate(images):
        # A few numbers tell most images apart.
        pixels = image[0].flatten()
        key = (*(part.shape for part in image), *pixels[:: max(1, len(pixels) // 16)].tolist())
        same = known.setdefault(key, [])
        found = next(
            (one for one in same if all(map(torch.equal, images[first_U[one]], image))), len(first_U)
        )
        if found == len(first_U):
            same.append(found)
            first_U.append(number)
        which_I.append(found)
    return which_I, first_U


def _chosen(given: Mapping[str, Any], images: list[Any], first_U: list[int]) -> dict[str, Any]:
    """The arguments of some images alone."""
    index = torch.tensor(first_U)
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    found = {name: value[index.to(value.device)] for name, value in tensors.items()}
    if "image_grid_thw" in found:
        found["pixel_values"] = torch.cat([images[number][0] for number in first_U])
    return found


def _repeat(output: Any, which_I: list[int], different: int) -> bool:
    """Put every image's own features into an output that holds different ones; can it be done?"""
    features = getattr(output, _PER_IMAGE, None)
    layers = getattr(output, _PER_LAYER_AND_IMAGE, None)
    if features is None or len(features) != different:
        return False
    if layers is not None and any(len(of_layer) != different for of_layer in layers):
        return False
    output[_PER_IMAGE] = _picked(features, which_I)
    if layers is not None:
        output[_PER_LAYER_AND_IMAGE] = [_picked(of_layer, which_I) for of_layer in layers]
    return True


def _picked(values: Any, which_I: list[int]) -> Any:
    if isinstance(values, Tensor):
        return values[torch.tensor(which_I, device=values.device)]
    return type(values)(values[number] for number in which_I)
