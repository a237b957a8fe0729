"""Answers that hold a mask: the head that makes it, and where it stands in the answer.

Shape letters: B rows, A new tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dyvte.backbones.segmenter import FOLDER, Segmenter, load_segmenter
from dyvte.backbones.sizes import decoder_shape
from dyvte.tasks.answers.masks import mask_text

if TYPE_CHECKING:
    from dyvte.evaluation.runner import EvalConfig


def open_segmenter(model: nn.Module, config: EvalConfig) -> Segmenter:
    """The mask head of an evaluation, on the backbone's device and in its precision.

    Parameters
    ----------
    model
        The backbone.
    config
        Names the head's folder.

    Raises
    ------
    ConfigError, CheckpointError
        If there is none, or it is another model's.
    """
    folder = config.mask_head or Path(config.model.path) / FOLDER
    return load_segmenter(folder, decoder_shape(model.config).hidden_size, model.device, model.dtype)


def masks_of(
    segmenter: Segmenter,
    model: nn.Module,
    images: Sequence[Sequence[Any]],
    new_BA: Tensor,
    states: Sequence[Tensor],
) -> list[np.ndarray | None]:
    """The (H, W) bool mask of each row; None where its answer asks for none.

    Parameters
    ----------
    segmenter
        Makes them.
    model
        The backbone.
    images
        RGB PIL images of each row; the first is segmented.
    new_BA
        Generated tokens.
    states
        (B, D) for each new token, as `token_states` collected them.
    """
    steps = segmenter.steps(new_BA, model)
    rows = [row for row, step in enumerate(steps) if step is not None and images[row]]
    found: list[np.ndarray | None] = [None] * len(steps)
    if rows:
        states_BD = torch.stack([states[steps[row]][row] for row in rows])
        masks = segmenter.masks(states_BD, [images[row][0] for row in rows])
        for row, mask in zip(rows, masks, strict=True):
            found[row] = mask
    return found


def with_masks(
    segmenter: Segmenter,
    model: nn.Module,
    images: Sequence[Sequence[Any]],
    texts: Sequence[str],
    new_BA: Tensor,
    states: Sequence[Tensor],
) -> list[str]:
    """Answers, each with its mask behind it where one was asked for; parameters are those of `masks_of`, and:

    Parameters
    ----------
    texts
        The answers.
    """
    masks = masks_of(segmenter, model, images, new_BA, states)
    return [
        text if mask is None else f"{text.strip()} {mask_text(mask)}"
        for text, mask in zip(texts, masks, strict=True)
    ]
