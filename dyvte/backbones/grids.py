"""Where each visual token lies on its image: image, row and column.

Families differ in how many tokens an image becomes and in what shape; the tokens themselves always come image
by image, row by row. Each family that is known tells the blocks of an image's tokens; the rest is one
algorithm.

Shapes: B rows, N tokens of the padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones.describe import Backbone
from dyvte.errors import UnsupportedBackboneError

# A block of tokens on one grid: height, width. A newline token at the end of each row is one more column.
Block = tuple[int, int]
# Looks up what the vision tower was called with, such as "image_grid_thw"; None where it was not given.
Given = Callable[[str], Any]


def visual_places(backbone: Backbone, visual_BN: Tensor, given: Given) -> Tensor:
    """(B, N, 3) int64 on the CPU: image, row and column of every visual token; -1 elsewhere.

    Tiles of one image, and frames of one video, count as images of their own.

    Parameters
    ----------
    backbone
        Its family says how an image becomes tokens.
    visual_BN
        (B, N) bool on the CPU.
    given
        Arguments that the vision tower was called with, by name.

    Raises
    ------
    UnsupportedBackboneError
        If the family's grid is not known, or does not fit the tokens.
    """
    kind = backbone.model.config.model_type
    if kind not in _BLOCKS:
        raise UnsupportedBackboneError(
            f"the grid of {kind}'s visual tokens is not known (known: {', '.join(sorted(_BLOCKS))}): "
            "reductions that look at neighbours cannot serve it"
        )
    blocks = _BLOCKS[kind](backbone.model.config, given)
    times = 1
    if isinstance(blocks, list):
        # With beams or return sequences the rows of a prompt come several times, its sizes once.
        told, found = sum(height * width for height, width in blocks), int(visual_BN.sum())
        times = found // told if told and found % told == 0 and len(visual_BN) % (found // told) == 0 else 1
    places_BN3 = _places(visual_BN[::times], iter(blocks), kind)
    return places_BN3.repeat_interleave(times, 0)


def _places(visual_BN: Tensor, blocks: Iterator[Block], kind: str) -> Tensor:
    places_BN3 = torch.full((*visual_BN.shape, 3), -1)
    for row, visual_N in enumerate(visual_BN):
        columns, image = visual_N.nonzero().flatten(), 0
        while len(columns):
            height, width = next(blocks, (0, 0))
            if not 0 < height * width <= len(columns):
                raise UnsupportedBackboneError(
                    f"row {row} holds {int(visual_N.sum())} visual tokens, which is no whole number of "
                    f"images of {kind} (next block: {height} x {width}): "
                    "pass the processor's outputs unchanged"
                )
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            places = torch.stack([torch.full_like(y, image), y, x], -1).view(-1, 3)
            places_BN3[row, columns[: height * width]] = places
            columns, image = columns[height * width :], image + 1
    return places_BN3


def _sizes(config: Any, given: Given, name: str) -> list[list[int]]:
    sizes = given(name)
    if sizes is None:
        raise UnsupportedBackboneError(
            f"the grid of {config.model_type}'s visual tokens is in {name}, which was not given to the "
            "vision tower inside the block: pass pixel_values and sizes, not features encoded beforehand"
        )
    return sizes.tolist()


def _vision_side(config: Any) -> int:
    """Patches along a side of the square image that the vision tower takes."""
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    return (size if isinstance(size, int) else size[0]) // (patch if isinstance(patch, int) else patch[0])


def _square(config: Any, given: Given) -> Iterator[Block]:
    """One square of patches for each image."""
    side = _vision_side(config)
    while True:
        yield side, side


def _shrunk_square(name: str) -> Callable[[Any, Given], Iterator[Block]]:
    """One square of patches for each image or tile, shrunk by what the config calls `name` (per side)."""

    def blocks(config: Any, given: Given) -> Iterator[Block]:
        factor = getattr(config, name)
        side = int(_vision_side(config) * factor) if factor < 1 else _vision_side(config) // int(factor)
        while True:
            yield side, side

    return blocks


def _fixed_count(config: Any, given: Given) -> Iterator[Block]:
    """A fixed number of tokens for each image, on a square."""
    side = round(config.mm_tokens_per_image**0.5)
    while True:
        yield side, side


def _merged(config: Any, given: Given) -> list[Block]:
    """Patches of any aspect ratio, merged by squares: the processor says how many (time, height, width)."""
    if given("image_grid_thw") is not None and given("video_grid_thw") is not None:
        raise UnsupportedBackboneError(
            f"{config.model_type}: the grid is known for images or for videos, not for both in one batch"
        )
    merge = config.vision_config.spatial_merge_size
    sizes = _sizes(config, given, "image_grid_thw" if given("video_grid_thw") is None else "video_grid_thw")
    return [(height // merge, width // merge) for frames, height, width in sizes for _ in range(frames)]


def _tiled_with_newlines(config: Any, given: Given) -> list[Block]:
    """LLaVA-NeXT: the whole image on a square, then its unpadded tiles, a newline behind each row."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side, size = _vision_side(config), config.vision_config.image_size
    blocks = []
    for image_size in _sizes(config, given, "image_sizes"):
        rows, columns = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, size)
        whole = torch.empty(1, rows * side, columns * side, device="meta")
        height, width = unpad_image(whole, image_size).shape[1:]
        blocks += [(side, side), (height, width + 1)]
    return blocks


def _by_size(config: Any, given: Given) -> list[Block]:
    """Pixtral in Mistral 3: patches of any aspect ratio, merged by squares; the text breaks between rows."""
    step = config.vision_config.patch_size * config.spatial_merge_size
    return [(height // step, width // step) for height, width in _sizes(config, given, "image_sizes")]


_BLOCKS: dict[str, Callable[[Any, Given], Iterator[Block] | list[Block]]] = {
    "llava": _square,
    "vipllava": _square,
    "paligemma": _square,
    "gemma3": _fixed_count,
    "internvl": _shrunk_square("downsample_ratio"),
    "idefics3": _shrunk_square("scale_factor"),
    "smolvlm": _shrunk_square("scale_factor"),
    "llava_next": _tiled_with_newlines,
    "mistral3": _by_size,
    "qwen2_vl": _merged,
    "qwen2_5_vl": _merged,
    "qwen3_vl": _merged,
}
