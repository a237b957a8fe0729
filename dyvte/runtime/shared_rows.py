"""Rows of a prefill that read stored images: their own text alone runs, and every image once.

Before a layer runs on a row's text, what that text reads is there: keys and values of the text before the
image, and of the image. Where the store does not have them yet, the layer runs on those tokens first. So an
image gets as deep as the rows that read it, and no deeper.

Text between visual tokens belongs to the image as long as a row reads that as it is; then it is the row's
own.

Shapes: B rows, N tokens of the padded batch, R rows and T own tokens of a group, S tokens of a segment, D
hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.decoder import Layout, hidden_of
from dyvte.decoder.caches import KeysValues
from dyvte.runtime.image_store import ImageStore
from dyvte.runtime.shared_apart import ApartLayers, Piece
from dyvte.runtime.shared_groups import Borrowed, Call, Group, Lane, places
from dyvte.runtime.stack import Stack
from dyvte.runtime.streams import Source, Stream
from dyvte.spans import up_to_image


@dataclass(frozen=True)
class SharedRow:
    """A row and what it begins with; ``before`` is None where that is its image."""

    row: int
    before: Borrowed | None
    image: Borrowed


class SharedRows:
    """The rows of one prefill that read stored images.

    Parameters
    ----------
    stack, layout
        The decoder and the batch.
    rows
        Those rows.
    wanted
        Indices of layers before which rows of this pass freeze, or may.
    store
        Whose images they read.

    Attributes
    ----------
    suffix_BN, text_BN
        (B, N) bool: all tokens behind a row's image; and with them the text between visual tokens.
    image_BN
        (B, N) bool: all tokens of the images of these rows.
    """

    def __init__(
        self,
        stack: Stack,
        layout: Layout,
        rows: Sequence[SharedRow],
        wanted: set[int],
        store: ImageStore,
    ) -> None:
        self.stack, self.layout, self.wanted, self.store = stack, layout, wanted, store
        # Neighbours that read the same image share a copy of it. Lanes are numbered as they appear, not by
        # their address: a product's last bits depend on the order of its rows.
        order: dict[int, int] = {}
        for one in rows:
            order.setdefault(id(one.image.lane), len(order))
        self.rows = sorted(rows, key=lambda one: order[id(one.image.lane)])
        spans = layout.spans
        self.suffix_BN = spans.valid_BN & ~up_to_image(spans)
        self.text_BN = layout.text_BN & ~spans.prefix_BN
        self.is_shared_B = torch.zeros(layout.batch, dtype=torch.bool)
        self.is_shared_B[[one.row for one in self.rows]] = True
        self.image_BN = up_to_image(spans) & ~spans.prefix_BN & self.is_shared_B[:, None]
        self._apart = ApartLayers(stack, layout)
        self._before = {id(one.image.lane): one.before for one in rows if one.row == one.image.lane.row}
        every = [one for of in self.rows for one in (of.before, of.image) if one is not None]
        self._lanes = list({id(one.lane): one.lane for one in every}.values())
        self._reading = {one.row for one in self.rows}
        # What the last layer handed on; nobody else holds it, unless hooks take note of what layers return.
        self._handed: Tensor | None = None
        self._watched = any(layer._forward_hooks for layer in stack.backbone.layers)

    def part(
        self, in_text_B: Tensor, frozen_B: Tensor, freeze_layers_B: Tensor, device: torch.device
    ) -> SharedPart:
        """What runs while these rows are text alone, and those read frozen tokens."""
        reading: list[tuple[int, tuple[Borrowed | None, ...]]] = []
        frozen, text = list(reading), list(reading)
        for one in self.rows:
            if in_text_B[one.row]:
                text.append((one.row, (one.before,)))
            elif frozen_B[one.row]:
                image = Borrowed(one.image.lane, one.image.first, int(freeze_layers_B[one.row]))
                frozen.append((one.row, (one.before, image)))
            else:
                reading.append((one.row, (one.before, one.image)))
        groups = []
        for chosen, own_BN in ((reading, self.suffix_BN), (frozen, self.text_BN), (text, self.text_BN)):
            if chosen:
                rows, borrowed = zip(*chosen, strict=True)
                groups.append(Group(self.stack, self.layout, rows, own_BN, borrowed, device))
        read_on = {row for row, _ in reading}
        turned = [one for one in self.rows if one.row in self._reading - read_on]
        self._reading = read_on
        return SharedPart(self, groups, turned)

    def blank(self, hidden_BND: Tensor, *, alone: bool) -> Tensor:
        """What a layer hands on before its text is written there; ``alone``: all rows with an image share.

        Nobody reads the places of stored images there. What the decoder adds to visual tokens between layers
        (deepstack) is found there, and so these are zeros, unless the decoder is known to add nothing.
        Padding is masked, not omitted: it has to be finite, so no memory is left as it was found.
        """
        tells = self.store.adds_features is not False
        if alone and not tells and hidden_BND is self._handed and not self._watched:
            return hidden_BND  # this pass's own, of the layer before: its text is read before it is written
        if alone:
            out_BND = torch.zeros_like(hidden_BND)
        else:
            out_BND = hidden_BND.clone(memory_format=torch.contiguous_format)
            if tells:
                out_BND.masked_fill_(self.image_BN.to(out_BND.device)[..., None], 0)
        self._handed = out_BND
        return out_BND

    def enter(self, call: Call) -> None:
        """The decoder has come to a layer."""
        adds = self.store.adds_features
        for lane in self._lanes:
            added_SD = None
            if adds is not False and call.index and lane.segment.is_image:
                added_SD = call.hidden_BND[lane.row, lane.first : lane.first + len(lane.segment)].clone()
                # Text between may be the row's own by now.
                added_SD[lane.segment.text_S.to(added_SD.device)] = 0
                if adds is None and not added_SD.any():
                    added_SD = None
            if added_SD is not None:
                self.store.adds_features = True
            lane.enter(call.index, added_SD, self.wanted)
        if call.index + 1 == self.stack.backbone.num_layers and self.store.adds_features is None:
            self.store.adds_features = False

    def deepen(self, call: Call, lanes: Sequence[Lane], ends: Callable[[Lane], bool]) -> None:
        """Make the keys and values that this layer lacks of some lanes, and states where they go on."""
        whole, cut = [], []
        for lane in lanes:
            if lane.must_run(call.index, ends=ends(lane), wanted=self.wanted):
                whole.append(self._all_of(lane, call))
            elif lane.segment.depth <= call.index:
                cut.append(self._all_of(lane, call))
        if cut and not self._apart.may_stop(call.index):
            whole, cut = [*whole, *cut], []
        for alone, chosen in ((False, whole), (True, cut)):
            for one, (states_SD, known) in zip(
                chosen, self._apart.run(call, chosen, alone=alone), strict=True
            ):
                one.lane.take(call.index, known, states_SD)

    def freeze(self, call: Call, frozen: Sequence[Borrowed]) -> None:
        """Keys and values that this layer makes of frozen visual tokens, where they are not known yet."""
        missing = []
        for borrowed in frozen:
            if call.index not in borrowed.lane.segment.frozen.setdefault(borrowed.frozen_at, {}):
                missing.append(borrowed)
        if not missing:
            return
        chosen = [self._frozen(one, call) for one in missing]
        made = self._apart.run(call, chosen, alone=self._apart.may_stop(call.index))
        for borrowed, (_, known) in zip(missing, made, strict=True):
            borrowed.lane.segment.frozen[borrowed.frozen_at][call.index] = known

    def _all_of(self, lane: Lane, call: Call) -> Piece:
        states_SD = lane.states_at(call.index).to(call.hidden_BND.device)
        return Piece(lane, torch.arange(len(lane.segment)), self._before.get(id(lane)), states_SD)

    def _frozen(self, borrowed: Borrowed, call: Call) -> Piece:
        """The visual tokens as they were frozen, and what the decoder added since."""
        lane, f = borrowed.lane, borrowed.frozen_at
        states_SD = lane.states_at(f).to(call.hidden_BND.device)
        for index, added_SD in lane.added.items():
            if f < index <= call.index:
                states_SD = states_SD + added_SD.to(states_SD.device)
        visual_S = lane.segment.visual_S
        return Piece(lane, visual_S.nonzero().flatten(), None, states_SD[visual_S.to(states_SD.device)])


class SharedPart:
    """Shared rows while each of them does what it does now.

    Attributes
    ----------
    groups
        Those that read updated visual tokens, frozen ones, and none.
    sources
        Where the keys and values stand that `run` returns.
    """

    def __init__(self, rows: SharedRows, groups: Sequence[Group], turned: Sequence[SharedRow]) -> None:
        self.rows, self.groups = rows, groups
        # Rows that read their images as they are no longer, until a layer has run on their text between.
        self._turned = [one for one in turned if len(one.image.lane.segment.text_S)]
        users: dict[Any, list[tuple[int, Borrowed]]] = {}
        for group in groups:
            for row, of_row in zip(group.rows, group.borrowed, strict=True):
                for one in of_row:
                    if one is not None:
                        users.setdefault(one.key, []).append((row, one))
        self._borrowed = [of[0][1] for of in users.values()]
        self._readers = {key: [row for row, _ in of] for key, of in users.items()}
        self.sources: list[Stream | Source] = [
            Source.of_all([row for row, _ in of], places([one for _, one in of])) for of in users.values()
        ]
        self.sources += [group.own for group in groups]

    def run(self, call: Call, out_BND: Tensor, exit_layers_B: Tensor) -> tuple[Any, list[KeysValues]]:
        """The layer on all of it; what it returned last, and keys and values in the order of `sources`.

        Parameters
        ----------
        call
            The layer.
        out_BND
            Where the text's states are written.
        exit_layers_B
            As known so far, L where not decided.
        """
        self.rows.enter(call)
        is_last = call.index + 1 == self.rows.stack.backbone.num_layers

        def ends(lane: Lane) -> bool:
            # Text between goes on where the image does not.
            if is_last or len(lane.segment.text_S):
                return is_last
            readers = self._readers[id(lane), None]
            return bool((exit_layers_B[readers] <= call.index + 1).all())

        lanes = [one.lane for one in self._borrowed if one.frozen_at is None]
        # An image reads the text before it.
        self.rows.deepen(call, [lane for lane in lanes if not lane.segment.is_image], lambda _: is_last)
        self.rows.deepen(call, [lane for lane in lanes if lane.segment.is_image], ends)
        self.rows.freeze(call, [one for one in self._borrowed if one.frozen_at is not None])
        output, own = None, []
        for group in self.groups:
            output, known = group.run(call, self._states(group, call), may_split=True)
            group.own.scatter(out_BND, hidden_of(output))
            own.append(known)
        self._turned = []
        return output, [one.keys_values(call.index) for one in self._borrowed] + own

    def _states(self, group: Group, call: Call) -> Tensor:
        """(R, T, D) states of a group's own tokens."""
        states_RTD = group.own.gather(call.hidden_BND)
        for one in self._turned:
            if one.row not in group.rows or call.index == 0:
                continue
            row, segment = group.rows.index(one.row), one.image.lane.segment
            is_text_T = torch.isin(group.own.order_RT[row], segment.text_S + one.image.first)
            at_T = (is_text_T & group.own.real_RT[row]).nonzero().flatten().to(states_RTD.device)
            states_RTD[row, at_T] = segment.text_states[call.index].to(states_RTD.device)
        return states_RTD
