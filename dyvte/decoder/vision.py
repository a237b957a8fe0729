"""Every image through the vision tower once, however many rows of a batch hold it, or of later ones.

Shape letters: I images of a call, U different ones.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dyvte.backbones import Backbone
from dyvte.decoder.row_by_row import row_by_row, taken_by_row

_METHOD = "get_image_features"
# What the models read of an encoded batch; in each, images come one after the other.
_PER_IMAGE, _PER_LAYER_AND_IMAGE = "pooler_output", "deepstack_features"


@dataclass(frozen=True)
class Encoded:
    """What the vision tower made of one image.

    Attributes
    ----------
    features, by_layer
        As the decoder's placeholders take them, and, where there are such, those that are added deeper.
    output, container
        Of which kinds the tower's output and its list of features are.
    """

    features: Tensor
    by_layer: tuple[Tensor, ...] | None
    output: type
    container: type

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(one.numel() * one.element_size() for one in (self.features, *(self.by_layer or ())))


class Memory(Protocol):
    """Remembers encoded images from call to call, by a digest of all that they were made from."""

    def bind(self, backbone: Backbone) -> None:
        """Forget what another model, or the same with other weights, has seen."""

    def features(self, digest: bytes) -> Encoded | None:
        """What is known of an image."""

    def keep_features(self, digest: bytes, encoded: Encoded) -> None:
        """Remember it.

        Parameters
        ----------
        digest
            Of the pixels and sizes.
        encoded
            What they became.
        """


@contextmanager
def each_image_once(backbone: Backbone, memory: Memory | None = None) -> Iterator[None]:
    """Inside, the model encodes equal images of a call once and repeats what they become.

    Equal means equal pixels and sizes, as the processor made them. Calls whose images cannot be told apart go
    through as they are. With a ``memory``, images of earlier calls are not encoded again.

    Parameters
    ----------
    backbone
        Whose vision side is wrapped.
    memory
        Of earlier calls.
    """
    inner = [module for module in _encoding(backbone) if _METHOD not in module.__dict__]
    for module in inner:
        object.__setattr__(module, _METHOD, _once(getattr(module, _METHOD), backbone, memory))
    try:
        yield
    finally:
        for module in inner:
            module.__dict__.pop(_METHOD, None)


def repeats_images(backbone: Backbone, inputs: Mapping[str, Any]) -> bool:
    """Do rows of a batch hold equal images? False also where that cannot be told.

    Parameters
    ----------
    backbone
        Whose vision side takes them.
    inputs
        As the processor made them.
    """
    for module in _encoding(backbone):
        names = inspect.signature(getattr(module, _METHOD)).parameters
        images = _images({name: inputs[name] for name in names if name in inputs})
        if images is not None:
            return len(_numbered(images)[1]) < len(images)
    return False


def _encoding(backbone: Backbone) -> list[Any]:
    """The module whose method encodes images, if there is one: the innermost alone, others call it."""
    return [module for module in backbone.path if callable(getattr(module, _METHOD, None))][-1:]


def _once(stock: Callable[..., Any], backbone: Backbone, memory: Memory | None) -> Callable[..., Any]:
    names = list(inspect.signature(stock).parameters)

    @functools.wraps(stock)
    def encode(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        images = _images(given)
        if images is None:
            return stock(*args, **kwargs)
        which_I, first_U = _numbered(images)
        if memory is not None:
            memory.bind(backbone)
            output = _remembered(stock, backbone, memory, given, images, which_I, first_U)
            return stock(*args, **kwargs) if output is None else output
        if len(first_U) == len(which_I):
            return stock(*args, **kwargs)
        output = stock(**{**given, **_chosen(given, images, first_U)})
        encoded = _encoded(output, len(first_U))
        if encoded is None:
            return stock(*args, **kwargs)
        return _filled(output, [encoded[number] for number in which_I])

    return encode


def _remembered(
    stock: Callable[..., Any],
    backbone: Backbone,
    memory: Memory,
    given: Mapping[str, Any],
    images: list[Any],
    which_I: Sequence[int],
    first_U: Sequence[int],
) -> Any:
    """An output of what is known of the images, and of the others, encoded. None where images cannot be told
    apart in the output."""
    if _has_empty_images(given):
        return None
    digests = [_digest(images[first], given) for first in first_U]
    known_U = [memory.features(digest) for digest in digests]
    new = [number for number, encoded in enumerate(known_U) if encoded is None]
    if new:
        found = _each_alone(stock, backbone, given, images, [first_U[number] for number in new])
        if found is None:
            return None
        for number, encoded in zip(new, found, strict=True):
            known_U[number] = encoded
            if not encoded.features.requires_grad:
                memory.keep_features(digests[number], encoded)
    return _filled(known_U[0].output(), [known_U[number] for number in which_I])


def _each_alone(
    stock: Callable[..., Any],
    backbone: Backbone,
    given: Mapping[str, Any],
    images: list[Any],
    chosen: Sequence[int],
) -> list[Encoded] | None:
    """Images encoded such that the features of none depend on which others are new beside it: in one call,
    where every product can be taken image by image, else in as many calls."""

    def encoded(some: list[int]) -> list[Encoded] | None:
        return _encoded(stock(**{**given, **_chosen(given, images, some)}), len(some))

    tower = _encoding(backbone)[0]
    if len(chosen) > 1 and type(tower) not in _MIXING:
        products = _products(tower, backbone.decoder)
        if products is not None:
            with row_by_row(products, len(chosen)) as watch:
                together = encoded(list(chosen))
            if watch.apart and together is not None:
                return [_own(one) for one in together]
            _MIXING.add(type(tower))
    found = []
    for one in chosen:
        alone = encoded([one])
        if alone is None:
            return None
        found += alone
    return found


# Kinds of models whose vision side takes products of several images in one; found out once.
_MIXING: set[type] = set()


def _products(tower: nn.Module, decoder: nn.Module) -> list[nn.Module] | None:
    """What multiplies by a matrix on the vision side; None where that is not known to be all, or where
    attention could mix images."""
    inside = {id(module) for module in decoder.modules()}
    modules = [module for module in tower.modules() if id(module) not in inside and module is not tower]
    attends = {str(getattr(getattr(one, "config", None), "_attn_implementation", "sdpa")) for one in modules}
    if attends != {"sdpa"} or any(hasattr(one, "_hf_hook") for one in modules):
        return None
    return taken_by_row(modules)


def _own(encoded: Encoded) -> Encoded:
    """The same in memory of its own: one image may be forgotten before others."""
    by_layer = None if encoded.by_layer is None else tuple(one.clone() for one in encoded.by_layer)
    return replace(encoded, features=encoded.features.clone(), by_layer=by_layer)


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


def _has_empty_images(given: Mapping[str, Any]) -> bool:
    """Do rows of several images hold some that stand for none? The tower omits those, but not where a
    row has no other."""
    pixels = given["pixel_values"]
    rows_of_images = pixels.dim() == 5 and given.get("image_sizes") is None
    return rows_of_images and not bool(pixels.flatten(2).any(2).all())


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


def _digest(image: tuple[Tensor, ...], given: Mapping[str, Any]) -> bytes:
    """Of one image's tensors, and of how it is to be encoded."""
    how = sorted((name, repr(value)) for name, value in given.items() if not isinstance(value, Tensor))
    digest = hashlib.blake2b(repr(how).encode(), digest_size=20)
    for part in image:
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _chosen(given: Mapping[str, Any], images: list[Any], first_U: list[int]) -> dict[str, Any]:
    """The arguments of some images alone."""
    index = torch.tensor(first_U)
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    found = {name: value[index.to(value.device)] for name, value in tensors.items()}
    if "image_grid_thw" in found:
        found["pixel_values"] = torch.cat([images[number][0] for number in first_U])
    return found


def _encoded(output: Any, count: int) -> list[Encoded] | None:
    """An output image by image; None where that cannot be told."""
    features = getattr(output, _PER_IMAGE, None)
    layers = getattr(output, _PER_LAYER_AND_IMAGE, None)
    if features is None or len(features) != count:
        return None
    if layers is not None and any(len(of_layer) != count for of_layer in layers):
        return None
    return [
        Encoded(
            features=features[number],
            by_layer=None if layers is None else tuple(of_layer[number] for of_layer in layers),
            output=type(output),
            container=type(features),
        )
        for number in range(count)
    ]


def _filled(output: Any, images_I: Sequence[Encoded]) -> Any:
    """An output that holds these images' features."""
    container = images_I[0].container
    output[_PER_IMAGE] = _joined([one.features for one in images_I], container)
    if images_I[0].by_layer is not None:
        of_layers = zip(*(one.by_layer for one in images_I), strict=True)
        output[_PER_LAYER_AND_IMAGE] = [_joined(of_layer, container) for of_layer in of_layers]
    return output


def _joined(values: Sequence[Tensor], container: type) -> Any:
    return torch.stack(list(values)) if issubclass(container, Tensor) else container(values)
