"""A prompt is decided once, however often it passes through the model.

With a KV cache it passes once. Without one it comes again at every step, longer by what was answered; and
assisted decoding appends guesses to it before it has passed at all. Which columns of a pass are the prompt is
known from the call of ``generate``; in a loop of one's own, from the pass before.

Shapes: B rows, P columns of the prompt, N columns of a pass.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones.describe import unwrap
from dyvte.errors import ExitRuntimeError


@dataclass(frozen=True)
class Decided:
    """What was decided for the prompts of one pass; tensors on the CPU.

    Attributes
    ----------
    exit_layers_B, freeze_layers_B
        (B,) int64.
    kept
        By layer: (B, P) bool, what reductions left behind it.
    """

    exit_layers_B: Tensor
    freeze_layers_B: Tensor
    kept: dict[int, Tensor]


@dataclass(frozen=True)
class _Call:
    """One call of ``generate``."""

    ids_BN: Tensor | None
    expansion: int
    """Rows of a pass for each prompt: beams, or return sequences."""


@dataclass
class _Remembered:
    ids_BP: Tensor
    decided: Decided
    call: _Call | None
    images: list[weakref.ref[Tensor]]
    columns: int = field(default=0)
    """Of the last pass that began with these prompts."""


@dataclass(frozen=True)
class Prompts:
    """How a pass over prompts without a past is to be read.

    Attributes
    ----------
    columns
        P: what stands behind them is answer.
    is_part
        Whether the prompts go on in a later pass.
    decided
        What was decided when they passed before; None: this is the first time.
    """

    columns: int
    is_part: bool = False
    decided: Decided | None = None


class PromptMemory:
    """What a block knows of the prompts that pass through its model."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._last: _Remembered | None = None

    def watch(self, model: Any) -> Callable[[], None]:
        """Look at the model's calls of ``generate``; returns what undoes it."""
        inner, own = getattr(model, "generate", None), model.__dict__.get("generate")
        if inner is None:
            return lambda: None

        @functools.wraps(inner)
        def generate(*args: Any, **kwargs: Any) -> Any:
            with self._calling(_call_of(model, args, kwargs)):
                return inner(*args, **kwargs)

        model.generate = generate

        def undo() -> None:
            if model.__dict__.get("generate") is generate:
                if own is None:
                    del model.generate
                else:
                    model.generate = own

        return undo

    def prompt_of_row(self, row: int) -> int:
        """Which prompt a row of a pass belongs to."""
        return row // (self._calls[-1].expansion if self._calls else 1)

    def look(self, ids_BN: Tensor, images: Sequence[Tensor], *, cached: bool) -> Prompts:
        """How to read a pass that has no past.

        Parameters
        ----------
        images
            What the pass was given as images.
        cached
            Whether its keys and values are kept: then the prompts will not come again.
        """
        columns, last = ids_BN.shape[1], self._last
        if self._calls:
            call = self._calls[-1]
            known = columns if call.ids_BN is None else call.ids_BN.shape[1]
            if columns < known:
                return Prompts(columns, is_part=True)
            if columns > known and not _begins(ids_BN, call.ids_BN):
                return Prompts(columns)
            again = last is not None and last.call is call and _begins(ids_BN, last.ids_BP)
            if again and not cached:
                return Prompts(last.ids_BP.shape[1], decided=last.decided)
            return Prompts(known)
        # A loop of the user's own: the same images, one token more than in the pass before.
        again = last is not None and last.call is None and columns == last.columns + 1 and not cached
        if again and _begins(ids_BN, last.ids_BP) and _are_same(images, last.images):
            last.columns = columns
            return Prompts(last.ids_BP.shape[1], decided=last.decided)
        return Prompts(columns)

    def keep(self, ids_BN: Tensor, prompts: Prompts, images: Sequence[Tensor], decided: Decided) -> None:
        """Remember what was decided, for when the prompts come again."""
        call = self._calls[-1] if self._calls else None
        marks = [weakref.ref(image) for image in images]
        ids_BP = ids_BN[:, : prompts.columns]
        self._last = _Remembered(ids_BP, decided, call, marks, columns=ids_BN.shape[1])

    def forget(self) -> None:
        """Nothing that passed before will come again."""
        self._last = None

    @contextmanager
    def _calling(self, call: _Call) -> Iterator[None]:
        outer, self._last = self._last, None
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.pop()
            self._last = outer if self._calls else None


def _call_of(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> _Call:
    """What a call of ``generate`` says of its prompts.

    Raises
    ------
    ExitRuntimeError
        Naming an option that lets the model draft for itself.
    """
    given = args[0] if args else kwargs.get("inputs")
    ids = kwargs.get("input_ids", given)
    settings = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]

    def option(name: str) -> Any:
        values = [kwargs.get(name), *(getattr(one, name, None) for one in settings)]
        return next((value for value in values if value is not None), None)

    assistant = kwargs.get("assistant_model")
    if option("assistant_early_exit") is not None or (assistant is not None and unwrap(assistant) is model):
        name = "assistant_model" if assistant is not None else "assistant_early_exit"
        raise ExitRuntimeError(
            f"{name}: a model cannot draft for itself inside a block, where its drafts would be prompts that "
            "are decided again: use another model as the assistant, or prompt_lookup_num_tokens"
        )
    expansion = max(int(option("num_beams") or 1), int(option("num_return_sequences") or 1))
    is_ids = isinstance(ids, Tensor) and ids.dim() == 2
    return _Call(ids if is_ids else None, expansion)


def _begins(ids_BN: Tensor, prompts_RP: Tensor | None) -> bool:
    """Do all rows begin with their prompts? The prompts may have been multiplied for beams."""
    if prompts_RP is None or prompts_RP.shape[1] > ids_BN.shape[1] or len(ids_BN) % len(prompts_RP):
        return False
    wanted = prompts_RP.repeat_interleave(len(ids_BN) // len(prompts_RP), 0).to(ids_BN.device)
    return torch.equal(ids_BN[:, : wanted.shape[1]], wanted)


def _are_same(images: Sequence[Tensor], known: Sequence[weakref.ref[Tensor]]) -> bool:
    if len(images) != len(known):
        return False
    pairs = [(image, mark()) for image, mark in zip(images, known, strict=True)]
    return all(
        one is other or (other is not None and one.shape == other.shape and torch.equal(one, other))
        for one, other in pairs
    )


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among some arguments, those inside dictionaries and lists too."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            found += tensors_in(list(value.values()))
        elif isinstance(value, (list, tuple)):
            found += tensors_in(list(value))
    return found
