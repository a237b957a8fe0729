"""Rename the keys of a state dict by a table in which each row names its published source.

Shapes: V vocabulary, D hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import CheckpointError

EMBEDDING = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """One row of a key table.

    Attributes
    ----------
    pattern
        Regular expression that a whole source key must match.
    target
        Its name in transformers (with ``\\1`` for groups); None: known, and omitted.
    source
        Repository and file that publish the key.
    """

    pattern: str
    target: str | None
    source: str


@dataclass(frozen=True)
class Converted:
    """A converted state dict.

    Attributes
    ----------
    model_class
        Name of the transformers class whose `load_state_dict` takes `state`.
    state
        The weights; tensors are shared with the source where they only change their name.
    left_out
        Source keys without a place in that class. Nothing is dropped without being named here.
    missing
        Parts of that class that the source does not hold, e.g. "model.vision_tower".
    """

    model_class: str
    state: dict[str, Tensor]
    left_out: tuple[str, ...]
    missing: tuple[str, ...]


def convert(state: Mapping[str, Tensor], rules: Sequence[Rule], model_class: str) -> Converted:
    """Apply the first matching rule to each key.

    Parameters
    ----------
    state
        Tensors by their original names.
    rules
        In the order in which they are tried.
    model_class
        Of transformers, that takes the result.

    Raises
    ------
    CheckpointError
        If a key matches no rule, or two keys get one name.
    """
    compiled = [(re.compile(rule.pattern), rule.target) for rule in rules]
    renamed: dict[str, Tensor] = {}
    left_out, unknown = [], []
    for key, tensor in state.items():
        match, target = next(((m, t) for p, t in compiled if (m := p.fullmatch(key))), (None, None))
        if match is None:
            unknown.append(key)
        elif target is None:
            left_out.append(key)
        elif (name := match.expand(target)) in renamed:
            raise CheckpointError(f"two keys of the source become {name}: the last is {key}")
        else:
            renamed[name] = tensor
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} keys are not in the published layout of this source, the first are "
            f"{unknown[:3]}: is this the right converter?"
        )
    return Converted(model_class, renamed, tuple(left_out), missing_parts(renamed))


def missing_parts(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Top-level parts of a LLaVA-shaped class of which a state dict holds nothing."""
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    return tuple(part for part in parts if not any(key.startswith(part + ".") for key in state))


def grow_vocabulary(converted: Converted, size: int) -> Converted:
    """Append rows for added tokens such as ``<image>``, each the mean of the rows that are there.

    The original repositories mark an image by an id below zero; transformers needs a real token, whose
    embedding the vision features overwrite.

    Parameters
    ----------
    converted
        With the embeddings and the output head.
    size
        Rows afterwards.

    Raises
    ------
    CheckpointError
        If there are more rows than `size`.
    """
    state = dict(converted.state)
    for name in (EMBEDDING, HEAD):
        if name in state:
            state[name] = _grown(state[name], size, name)
    return Converted(converted.model_class, state, converted.left_out, converted.missing)


def _grown(weight_VD: Tensor, size: int, name: str) -> Tensor:
    added = size - weight_VD.shape[0]
    if added < 0:
        raise CheckpointError(f"{name} has {weight_VD.shape[0]} rows, cannot grow to {size}")
    mean_1D = weight_VD.float().mean(0, keepdim=True).to(weight_VD.dtype)
    return torch.cat([weight_VD, mean_1D.expand(added, -1)])
