"""A layer on images that a pass computes: several in one call, each as if it came alone.

What an image becomes must not depend on which others are new in the same pass, or a run that goes on after a
kill would end otherwise.

Shapes: B rows, N tokens of the padded batch, R images of a call, S tokens of each, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dyvte.decoder import Layout, hidden_of, returns_early
from dyvte.decoder.caches import KeysValues
from dyvte.decoder.row_by_row import row_by_row, taken_by_row
from dyvte.runtime.shared_groups import Borrowed, Call, Group, Lane
from dyvte.runtime.stack import Stack

Made = tuple[Tensor | None, KeysValues]
"""(S, D) states that a layer made of some tokens, None where it stopped early, and their keys and values."""


@dataclass(frozen=True)
class Piece:
    """Tokens of a lane that a layer runs on.

    Attributes
    ----------
    lane, tokens_S
        The lane, and which of its tokens.
    before
        What they read beside themselves.
    states_SD
        What enters the layer.
    """

    lane: Lane
    tokens_S: Tensor
    before: Borrowed | None
    states_SD: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Equal for pieces that one call takes without padding."""
        return len(self.tokens_S), -1 if self.before is None else len(self.before.lane.segment)


class ApartLayers:
    """Runs layers on the images of one pass.

    Parameters
    ----------
    stack, layout
        The decoder and the batch.
    """

    def __init__(self, stack: Stack, layout: Layout) -> None:
        self.stack, self.layout = stack, layout
        self._groups: dict[tuple[tuple[int, ...], ...], Group] = {}
        self._products: dict[int, list[nn.Module] | None] = {}
        self._may_stop: dict[int, bool] = {}

    def may_stop(self, index: int) -> bool:
        """May layer `index` stop after its keys and values?"""
        if index not in self._may_stop:
            self._may_stop[index] = returns_early(self.stack.backbone.layers[index])
        return self._may_stop[index]

    def run(self, call: Call, pieces: Sequence[Piece], *, alone: bool) -> list[Made]:
        """The layer on each piece, in their order.

        Parameters
        ----------
        call
            The layer.
        pieces
            What it runs on.
        alone
            Make keys and values, and nothing else.
        """
        alike: dict[tuple[int, int], list[int]] = {}
        for place, piece in enumerate(pieces):
            alike.setdefault(piece.shape, []).append(place)
        made: dict[int, Made] = {}
        for places in alike.values():
            made.update(zip(places, self._run_alike(call, [pieces[at] for at in places], alone), strict=True))
        return [made[place] for place in range(len(pieces))]

    def _run_alike(self, call: Call, pieces: list[Piece], alone: bool) -> Iterator[Made]:
        products = self._products_of(call.index) if len(pieces) > 1 else None
        if products is not None:
            with row_by_row(products, len(pieces)) as watch:
                made = list(self._call(call, pieces, alone))
            if watch.apart:
                yield from made
                return
            self.stack.mixes_rows.add(type(self.stack.backbone.layers[call.index]))
            del self._products[call.index]
        for piece in pieces:
            yield from self._call(call, [piece], alone)

    def _call(self, call: Call, pieces: list[Piece], alone: bool) -> Iterator[Made]:
        group = self._group(call, pieces)
        states_RSD = torch.stack([piece.states_SD for piece in pieces])
        if alone:
            output, (keys, values) = None, group.keys_alone(call, states_RSD)
        else:
            output, (keys, values) = group.run(call, states_RSD)
        for row in range(len(pieces)):
            own = (keys[row : row + 1], values[row : row + 1])
            states_SD = None if output is None else hidden_of(output)[row]
            if len(pieces) > 1:
                # In memory of its own: one image may leave the store before others.
                own = (own[0].clone(), own[1].clone())
                states_SD = None if states_SD is None else states_SD.clone()
            yield states_SD, own

    def _group(self, call: Call, pieces: Sequence[Piece]) -> Group:
        key = tuple((id(piece.lane), *piece.shape) for piece in pieces)
        if key not in self._groups:
            own_BN = torch.zeros_like(self.layout.text_BN)
            for piece in pieces:
                own_BN[piece.lane.row, piece.lane.first + piece.tokens_S] = True
            rows, before = [piece.lane.row for piece in pieces], [(piece.before,) for piece in pieces]
            device = call.hidden_BND.device
            self._groups[key] = Group(self.stack, self.layout, rows, own_BN, before, device)
        return self._groups[key]

    def _products_of(self, index: int) -> list[nn.Module] | None:
        """What must be taken row by row in layer `index`; None where that is not known to be all."""
        if index not in self._products:
            layer, found = self.stack.backbone.layers[index], None
            modules = list(layer.modules())
            is_known = str(self.stack.config._attn_implementation) == "sdpa"
            # Hooks that move weights would move them for every row.
            if is_known and not any(hasattr(one, "_hf_hook") for one in modules):
                found = None if type(layer) in self.stack.mixes_rows else taken_by_row(modules)
            self._products[index] = found
        return self._products[index]
