"""The visual tokens of a pass: with each row's text, or once for all rows that ask about the same image.

In a causal decoder what stands before the question does not depend on it. Rows whose tokens up to the last
visual one enter the first layer with equal states therefore hang on one visual stream. What decides is what
the decoder is given: neither a path nor an id.

Shape letters: B rows, N tokens, G images, S tokens up to the last visual one, P prefix tokens, V visual
tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones import Backbone
from dyvte.decoder import Picker, Slots, hidden_of
from dyvte.decoder.attention import KeysAlone
from dyvte.decoder.caches import Capture, Given, KeysValues, keys_and_values
from dyvte.decoder.content import Content, contents_of
from dyvte.decoder.masks import sees
from dyvte.spans import Spans, text_between, up_to_image
from dyvte.teacher.calls import LayerCall, take_tokens
from dyvte.teacher.slots import StreamSlots
from dyvte.teacher.texts import TextStreams


class FrozenImages:
    """Visual tokens as they were after a layer, and what deeper layers make of them.

    Parameters
    ----------
    visual:
        Their slots in the rows that hold them.
    rows_G:
        Those rows; None: all.
    batch, tokens:
        B and N.
    """

    def __init__(self, visual: Slots, rows_G: Tensor | None, batch: int, tokens: int) -> None:
        self.states: list[Tensor] = []
        self._alone = KeysAlone()
        device = visual.index.device
        rows_G = torch.arange(batch, device=device) if rows_G is None else rows_G
        self._pick = Picker(batch, tokens, rows_G, visual.index, device)

    def add(self, visual_GVD: Tensor) -> None:
        """What the decoder adds to visual tokens between layers, it adds to frozen ones."""
        self.states = [states_GVD + visual_GVD.to(states_GVD.device) for states_GVD in self.states]

    def keys_values(self, call: LayerCall, prefix: KeysValues) -> Iterator[KeysValues]:
        """Of each frozen state in turn: by the layer's own norm, projections and rotary embedding."""
        own = {**self._pick(call.kwargs), "attention_mask": None}
        for states_GVD in self.states:
            if states_GVD.shape[1]:
                yield call.read_only(states_GVD, own, self._alone)
            else:  # a batch without an image
                yield prefix[0][:, :, :0], prefix[1][:, :, :0]


class WholeRows:
    """Every row runs through the decoder on its own, image and text together, as the model has it.

    Parameters
    ----------
    spans, slots:
        Of the batch.
    hidden_BND:
        What enters the first layer.
    """

    def __init__(self, spans: Spans, slots: StreamSlots, hidden_BND: Tensor) -> None:
        batch, tokens = spans.valid_BN.shape
        self.spans, self.slots = spans, slots
        self.num_images = int(spans.visual_BN.any(1).sum())
        self.frozen = FrozenImages(slots.visual, None, batch, tokens)
        self._hidden_BND = self._handed_BND = hidden_BND

    def enter(self, hidden_BND: Tensor, texts: Sequence[TextStreams]) -> None:
        """What the decoder calls the layer on."""
        if hidden_BND is not self._handed_BND:
            if self.frozen.states:
                added_BND = hidden_BND - self._handed_BND.to(hidden_BND.device)
                self.frozen.add(self.slots.visual.take(added_BND))
            texts[0].full_RTD = self.slots.suffix.take(hidden_BND)
        self._hidden_BND = hidden_BND

    def freeze(self) -> None:
        """Keep the visual tokens as they are now."""
        self.frozen.states.append(self.slots.visual.take(self._hidden_BND))

    def run(self, call: LayerCall, texts: Sequence[TextStreams], *, cut: bool) -> tuple[Any, KeysValues]:
        """The layer on image and full text; what it returns, and keys and values of the prefix.

        ``cut``: only the suffix is read of its output; all other tokens give keys and values.
        """
        (text,) = texts
        kwargs = {**call.kwargs, "attention_mask": call.mask}
        if cut:
            known = keys_and_values(call.forward, self._hidden_BND, **kwargs)
            batch, tokens = self.spans.valid_BN.shape
            order_BN = torch.arange(tokens, device=self._hidden_BND.device).expand(batch, -1)
            mask = call.cut(self.slots.suffix, Slots(order_BN, self.spans.valid_BN))
            read = {**text.of_suffix(call.kwargs), "attention_mask": mask, "past_key_values": Given(*known)}
            output = call.forward(self.slots.suffix.take(self._hidden_BND), **read)
            text.full_RTD = hidden_of(output)
        else:
            recorder = Capture()
            output = call.forward(self._hidden_BND, **{**kwargs, "past_key_values": recorder})
            known = (recorder.keys, recorder.values)
            self._hidden_BND = self._handed_BND = hidden_of(output)
            text.full_RTD = self.slots.suffix.take(self._hidden_BND)
        return output, take_tokens(known, self.slots.prefix)

    def of_rows(self, text: TextStreams, known: KeysValues, tokens: int) -> KeysValues:
        """Keys and values that a text's rows read of their images."""
        return known

    def states_of(self, text: TextStreams, visual_GVD: Tensor | None = None) -> Tensor:
        """(R, V, D) visual tokens of a text's rows, as they are given, or (None) as they are now."""
        return self.slots.visual.take(self._hidden_BND) if visual_GVD is None else visual_GVD


class SharedImages:
    """One stream for each image, up to its last visual token; the text of all its rows reads it.

    Parameters
    ----------
    spans, slots, hidden_BND:
        As for `WholeRows`.
    image_B:
        (B,) which of the images a row asks about; for a row without one, any.
    rows_G:
        (G,) for each image a row that holds it.
    """

    def __init__(
        self, spans: Spans, slots: StreamSlots, hidden_BND: Tensor, image_B: Tensor, rows_G: Tensor
    ) -> None:
        batch, tokens = spans.valid_BN.shape
        self.image_B, self.rows_G, self.num_images = image_B, rows_G, len(rows_G)
        self.image = Slots.of(up_to_image(spans)[rows_G])
        own = slots.rows(rows_G)
        rank_GN = spans.valid_BN[rows_G].cumsum(1) - 1
        self._prefix, self._visual = (
            Slots(rank_GN.gather(1, part.index).clamp(min=0), part.valid) for part in (own.prefix, own.visual)
        )
        self._pick = Picker(batch, tokens, rows_G, self.image.index, rows_G.device)
        self.frozen = FrozenImages(own.visual, rows_G, batch, tokens)
        self.states_GSD = self.image.take(hidden_BND[rows_G])
        # The decoder gets nothing to hand from layer to layer; what it makes of that is what it adds.
        self._nothing_BND = hidden_BND.new_zeros(1).expand_as(hidden_BND)
        self._masks: dict[int, tuple[Any, Any]] = {}
        self._is_first = True

    def enter(self, hidden_BND: Tensor, texts: Sequence[TextStreams]) -> None:
        """What the decoder calls the layer on."""
        if not self._is_first and hidden_BND is not self._nothing_BND:
            added_GSD = self.image.take(hidden_BND[self.rows_G.to(hidden_BND.device)])
            self.states_GSD = self.states_GSD.to(added_GSD.device) + added_GSD
            self.frozen.add(self._visual.take(added_GSD))
            for text in texts:
                added_RTD = text.slots.suffix.take(hidden_BND[text.rows_R.to(hidden_BND.device)])
                text.full_RTD = text.full_RTD.to(added_RTD.device) + added_RTD
        self._is_first = False

    def freeze(self) -> None:
        """Keep the visual tokens as they are now."""
        self.frozen.states.append(self._visual.take(self.states_GSD))

    def run(self, call: LayerCall, texts: Sequence[TextStreams], *, cut: bool) -> tuple[Any, KeysValues]:
        """The layer on the images, then on the full text; what to hand on, and the prefix's keys and values.

        ``cut``: nobody reads the images' states behind this layer.
        """
        own = {**self._pick(call.kwargs), "attention_mask": self._mask(call)}
        handed: Any = self._nothing_BND
        if cut:
            known = keys_and_values(call.forward, self.states_GSD, **own)
        else:
            recorder = Capture()
            output = call.forward(self.states_GSD, **{**own, "past_key_values": recorder})
            self.states_GSD, known = hidden_of(output), (recorder.keys, recorder.values)
            if isinstance(output, tuple):
                handed = (self._nothing_BND, *output[1:])
        prefix, visual = take_tokens(known, self._prefix), take_tokens(known, self._visual)
        for text in texts:
            text.full_RTD = text.read(
                call,
                text.full_RTD,
                self.of_rows(text, prefix, text.slots.prefix.index.shape[1]),
                self.of_rows(text, visual, text.slots.visual.index.shape[1]),
            )
        return handed, prefix

    def of_rows(self, text: TextStreams, known: KeysValues, tokens: int) -> KeysValues:
        """Keys and values that a text's rows read of their images."""
        keys, values = (
            states[:, :, :tokens].index_select(0, self.image_B[text.rows_R].to(states.device))
            for states in known
        )
        return keys, values

    def states_of(self, text: TextStreams, visual_GVD: Tensor | None = None) -> Tensor:
        """(R, V, D) visual tokens of a text's rows, as they are given, or (None) as they are now."""
        if visual_GVD is None:
            visual_GVD = self._visual.take(self.states_GSD)
        image_R = self.image_B[text.rows_R].to(visual_GVD.device)
        return visual_GVD[image_R, : text.slots.visual.index.shape[1]]

    def _mask(self, call: LayerCall) -> Any:
        if id(call.mask) not in self._masks:
            self._masks[id(call.mask)] = (call.mask, call.cut(self.image, self.image, self.rows_G))
        return self._masks[id(call.mask)][1]


Images = WholeRows | SharedImages


def find_images(
    backbone: Backbone, spans: Spans, slots: StreamSlots, hidden_BND: Tensor, call: LayerCall
) -> tuple[Images, str | None]:
    """Visual streams of a batch: one for each image where rows share one, and may.

    Parameters
    ----------
    backbone:
        For its name.
    spans, slots:
        Of the batch.
    hidden_BND, call:
        What enters the first layer, and its other arguments.

    Returns
    -------
    images, reason
        And why rows that hold the same image do not share it; None where there is no such reason.
    """
    whole = WholeRows(spans, slots, hidden_BND)
    if not spans.visual_BN.any():
        return whole, None
    image_B, rows_G = same_images(spans, hidden_BND, call.kwargs)
    if len(rows_G) == whole.num_images:
        return whole, None
    image_BN = up_to_image(spans)
    if sees(call.mask, image_BN, spans.valid_BN & ~image_BN):
        name = backbone.model.config.model_type
        return whole, f"{name}: its image tokens see the text behind them"
    if "flash" in call.implementation and text_between(spans):
        return whole, "flash attention cannot mask the text between visual tokens"
    return SharedImages(spans, slots, hidden_BND, image_B, rows_G), None


def same_images(spans: Spans, hidden_BND: Tensor, beside: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which rows hold the same image behind the same text: (B,) number of its image, (G,) a row of each.

    Rows without an image are given number 0.
    """
    contents = contents_of(Slots.of(up_to_image(spans)), hidden_BND, beside)
    known: dict[bytes, list[tuple[int, Content]]] = {}
    image_B, rows_G = [0] * len(contents), []
    for row, content in enumerate(contents):
        if not len(content):
            continue
        alike = known.setdefault(content.probe, [])
        found = next((number for number, other in alike if content.is_same(other)), len(rows_G))
        if found == len(rows_G):
            alike.append((found, content))
            rows_G.append(row)
        image_B[row] = found
    device = hidden_BND.device
    return torch.tensor(image_B, device=device), torch.tensor(rows_G, dtype=torch.long, device=device)
