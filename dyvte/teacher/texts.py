"""The text streams of some rows, taken through the decoder side by side.

A stream is the text behind the image. It differs from another in what it reads: the visual tokens of the full
model, visual tokens that are frozen, or none any more.

Shape letters: R rows, N tokens of the padded batch, V visual tokens, T suffix tokens, A predicted positions,
D hidden, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyvte.decoder import Picker, hidden_of
from dyvte.decoder.caches import Given, Prefixed, keys_and_values
from dyvte.gates import prompt_features, reads_visual
from dyvte.spans import Spans
from dyvte.teacher.calls import KeysValues, LayerCall, joined
from dyvte.teacher.slots import StreamSlots, repeat_streams


class TextStreams:
    """The streams of some rows; see the module's text.

    Parameters
    ----------
    slots:
        The rows' slots.
    rows_R:
        Which rows of the batch they are; None: all, in order.
    spans:
        Of the whole batch.
    features:
        What gates read, by name.
    streams_per_call:
        Streams without visual tokens in one call of a layer.

    Attributes
    ----------
    full_RTD:
        The full model's text; whoever runs the image sees to it.
    frozen:
        (R, T, D) streams that read frozen visual tokens, in the order of their freeze layers.
    left:
        (R, T, D) streams whose visual tokens have left, in the order of leaving.
    """

    def __init__(
        self,
        slots: StreamSlots,
        rows_R: Tensor | None,
        spans: Spans,
        features: Sequence[str],
        streams_per_call: int,
    ) -> None:
        self.slots, self.rows_R = slots, rows_R
        self.full_RTD: Tensor | None = None
        self.frozen: list[Tensor] = []
        self.left: list[Tensor] = []
        batch, tokens = spans.valid_BN.shape
        device = slots.suffix.index.device
        chosen_R = torch.arange(batch, device=device) if rows_R is None else rows_R
        self.num_rows = len(chosen_R)
        self.of_suffix = Picker(batch, tokens, chosen_R, slots.suffix.index, device)
        self._of_predict = Picker(batch, tokens, chosen_R, slots.predict.index, device)
        self._prompt_RT = slots.suffix.take(spans.prompt_BN[chosen_R]) & slots.suffix.valid
        self._features, self._per_call = features, streams_per_call
        self._masks: dict[tuple[int, bool], tuple[Any, Any]] = {}

    # --- where streams branch ---

    def leave(self) -> None:
        """Visual tokens leave: of the full stream, and of every one that is frozen by now."""
        self.left += [self.full_RTD, *self.frozen]

    def freeze(self) -> None:
        """Another frozen stream; the full one until here."""
        self.frozen.append(self.full_RTD)

    # --- one layer ---

    def read(self, call: LayerCall, states_RTD: Tensor, prefix: KeysValues, visual: KeysValues) -> Tensor:
        """A stream that reads visual tokens through the layer."""
        known = Prefixed(*joined(prefix, visual))
        own = {**self.of_suffix(call.kwargs), "attention_mask": self._mask(call, reads=True)}
        return hidden_of(call.forward(states_RTD, **{**own, "past_key_values": known}))

    def run_left(self, call: LayerCall, prefix: KeysValues) -> None:
        """All streams without visual tokens through the layer, as many in a call as fit."""
        own = {**self.of_suffix(call.kwargs), "attention_mask": self._mask(call, reads=False)}
        for part in self._parts():
            count = len(self.left[part])
            arguments = self._repeated(own, count, self.slots.suffix.index.shape[1])
            arguments["past_key_values"] = Prefixed(*self._repeated_states(prefix, count))
            output = hidden_of(call.forward(torch.cat(self.left[part]), **arguments))
            self.left[part] = output.split(self.num_rows)

    def run_left_last(self, call: LayerCall, prefix: KeysValues) -> None:
        """The same for the last layer, of which only the predicted positions are read: (R, A, D) each."""
        suffix = {**self.of_suffix(call.kwargs), "attention_mask": self._mask(call, reads=False)}
        predicted = self._of_predict(call.kwargs)
        predicted["attention_mask"] = call.cut(self.slots.predict, self.slots.keys, self.rows_R)
        for part in self._parts():
            streams = self.left[part]
            count = len(streams)
            arguments = self._repeated(suffix, count, self.slots.suffix.index.shape[1])
            own = keys_and_values(call.forward, torch.cat(streams), **arguments)
            arguments = self._repeated(predicted, count, self.slots.predict.index.shape[1])
            arguments["past_key_values"] = Given(*joined(self._repeated_states(prefix, count), own))
            queries = torch.cat([self.slots.predict_suffix.take(stream) for stream in streams])
            self.left[part] = hidden_of(call.forward(queries, **arguments)).split(self.num_rows)

    def _parts(self) -> list[slice]:
        size = self._per_call
        return [slice(start, start + size) for start in range(0, len(self.left), size)]

    def _repeated(self, own: dict[str, Any], count: int, tokens: int) -> dict[str, Any]:
        found = {name: repeat_streams(value, count, self.num_rows, tokens) for name, value in own.items()}
        mask = own["attention_mask"]
        found["attention_mask"] = mask.repeat(count, *(1,) * (mask.dim() - 1)) if count > 1 else mask
        return found

    @staticmethod
    def _repeated_states(known: KeysValues, count: int) -> KeysValues:
        keys, values = (states.repeat(count, 1, 1, 1) if count > 1 else states for states in known)
        return keys, values

    def _mask(self, call: LayerCall, *, reads: bool) -> Any:
        # Layers share a few mask objects; the mask itself is kept so that its id stays its own.
        key = (id(call.mask), reads)
        if key not in self._masks:
            keys = self.slots.read_keys if reads else self.slots.keys
            self._masks[key] = (call.mask, call.cut(self.slots.suffix, keys, self.rows_R))
        return self._masks[key][1]

    # --- what comes out ---

    def features(self, states_RTD: Tensor, visual_RVD: Tensor | None) -> Tensor:
        """(R, F) what a gate reads of a stream and, where it looks at the image, of its visual tokens."""
        if not reads_visual(self._features):
            return prompt_features(states_RTD, self._prompt_RT, names=self._features)
        visual_RV = self.slots.visual.valid
        both = torch.cat((visual_RVD, states_RTD), 1)
        prompt = torch.cat((torch.zeros_like(visual_RV), self._prompt_RT), 1)
        visual = torch.cat((visual_RV, torch.zeros_like(self._prompt_RT)), 1)
        return prompt_features(both, prompt, visual, self._features)

    def predicted(self, *, cut: bool) -> Tensor:
        """(S, .., D) last states of all schedules at all predicted positions, rows one after the other.

        ``cut``: the streams without visual tokens hold these positions alone.
        """
        predict = self.slots.predict_suffix
        left = self.left if cut else [predict.take(stream) for stream in self.left]
        reading = [predict.take(stream) for stream in (*self.frozen, self.full_RTD)]
        return torch.stack([states_RAD[predict.valid] for states_RAD in (*left, *reading)])
