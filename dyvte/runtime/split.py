"""A decoder layer run on the streams of a partition, and what its cache layer keeps of them.

Shapes: B rows, N tokens of the padded batch, R rows and T tokens of a stream, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dyvte.decoder import Layout, hidden_of
from dyvte.decoder.caches import Capture, KeysValues
from dyvte.runtime.cache import ExitLayer, holds_exits, put_layer, records_past
from dyvte.runtime.frozen import FrozenCall, text_mask
from dyvte.runtime.masks import causal_mask, window_needs_mask
from dyvte.runtime.packing import Packing, whole_states
from dyvte.runtime.positions import close_up
from dyvte.runtime.shared_groups import Call
from dyvte.runtime.stack import Stack
from dyvte.runtime.streams import FrozenStream, Partition, Stream

Around = Callable[[Stream | FrozenStream], AbstractContextManager[Any]]


class SplitLayers:
    """Runs the layers of one prefill where its rows are in different states.

    Parameters
    ----------
    stack, layout
        The decoder and the batch.
    plain
        The decoder makes an ordinary causal mask itself.
    """

    def __init__(self, stack: Stack, layout: Layout, plain: bool) -> None:
        self.stack, self.layout, self.plain = stack, layout, plain
        self._packings: tuple[Partition, dict[int, Packing]] | None = None
        self._text_masks: dict[Any, tuple[Any, FrozenStream, Tensor]] = {}
        # Bytes of each cache layer if every row had its own image; whether the rows would be split then, and
        # whether anything would have left so far.
        self.bytes_alone: dict[int, int] = {}
        self.alone_splits, self._alone_left = True, False

    def run(
        self,
        part: Partition,
        index: int,
        forward: Callable[..., Any],
        hidden_BND: Tensor,
        kwargs: dict[str, Any],
        around: Around,
        exit_layers_B: Tensor,
    ) -> Any:
        """Layer `index` on each stream; its output, and its cache layer where there is a cache.

        Parameters
        ----------
        part
            The streams.
        index
            0-based.
        forward
            The layer's own.
        hidden_BND, kwargs
            What the layer was called with.
        around
            What to enter around the call on a stream that carries visual tokens.
        exit_layers_B
            As known so far, L where not decided.
        """
        mask, cache = kwargs.pop("attention_mask", None), kwargs.pop("past_key_values", None)
        if part.shared is not None:
            is_alone = part.visual is None and part.frozen is None
            out_BND = part.shared.rows.blank(hidden_BND, alone=is_alone)
        else:
            # What is in no stream keeps its last state: frozen and departed visual tokens, and dropped ones.
            out_BND = hidden_BND.clone(memory_format=torch.contiguous_format)
        captures, output, shared = [], None, []
        if part.visual is not None:
            with around(part.visual):
                output = self._run(part.visual, index, forward, hidden_BND, mask, kwargs, captures, cache)
            part.visual.scatter(out_BND, hidden_of(output))
        if part.frozen is not None:
            with around(part.frozen):
                output = self._run_frozen(part.frozen, index, forward, hidden_BND, mask, kwargs, captures)
            part.frozen.text.scatter(out_BND, hidden_of(output))
        if part.text is not None:
            output = self._run(part.text, index, forward, hidden_BND, mask, kwargs, captures, cache)
            part.text.scatter(out_BND, hidden_of(output))
        if part.shared is not None:
            call = Call(index, forward, hidden_BND, mask, kwargs)
            output, shared = part.shared.run(call, out_BND, exit_layers_B)
        # Under gradient checkpointing a layer drops its cache, as in the stock model.
        layer = self.stack.backbone.layers[index]
        is_dropped = getattr(layer, "gradient_checkpointing", False) and layer.training
        if cache is not None and not is_dropped:
            self._store(part, index, [(one.keys, one.values) for one in captures] + shared, cache)
        return (out_BND, *output[1:]) if isinstance(output, tuple) else out_BND

    def _run(
        self,
        stream: Stream,
        index: int,
        forward: Callable[..., Any],
        hidden_BND: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
        captures: list[Capture],
        cache: Any,
    ) -> Any:
        capture = Capture()
        captures.append(capture)
        hidden_RTD = stream.gather(hidden_BND)
        return forward(
            hidden_RTD,
            attention_mask=self._mask(stream, index, mask, hidden_RTD),
            past_key_values=None if cache is None else capture,
            **self._arguments(stream, kwargs, hidden_RTD),
        )

    def _run_frozen(
        self,
        stream: FrozenStream,
        index: int,
        forward: Callable[..., Any],
        hidden_BND: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
        captures: list[Capture],
    ) -> Any:
        implementation = str(self.stack.config._attn_implementation)
        layer = self.stack.backbone.layers[index]
        call = FrozenCall(layer, forward, stream, implementation, self.stack.keys_alone)
        key = (id(mask), self.stack.windows[index])
        known = self._text_masks.get(key)
        if known is None or known[1] is not stream:
            made = text_mask(stream, mask, self.stack.windows[index], implementation, hidden_BND)
            # Holding the mask keeps its id its own.
            known = self._text_masks[key] = (mask, stream, made)
        visual, text = (
            self.stack.without_jumps(part.arguments(kwargs)) for part in (stream.visual, stream.text)
        )
        output, capture = call(hidden_BND, known[2], visual, text)
        captures.append(capture)
        return output

    def _arguments(self, stream: Stream, kwargs: dict[str, Any], hidden_RTD: Tensor) -> dict[str, Any]:
        given = stream.arguments(kwargs)
        if not stream.is_compact:
            return given
        if stream.dropped_RT is not None:
            if stream.closed_up is None:
                stream.closed_up = close_up(self.stack.rotary, hidden_RTD, given, stream.dropped_RT)
            given = {**given, **stream.closed_up}
        return self.stack.without_jumps(given)

    def _mask(self, stream: Stream, index: int, mask: Any, hidden_RTD: Tensor) -> Any:
        if not stream.is_compact:
            return stream.mask(mask) if isinstance(mask, Tensor) else mask
        window = self.stack.windows[index]
        is_short = window is not None and window.size < self.layout.tokens
        if isinstance(mask, Tensor) and mask.dim() == 4 and (is_short or not self.plain):
            return stream.mask(mask)
        if is_short:
            raise window_needs_mask(self.stack.config._attn_implementation)
        # Without a 4D mask the attention function is causal by itself; compact rows have no padding to hide.
        if stream.causal_mask is None:
            stream.causal_mask = (causal_mask(self.stack.config, hidden_RTD),)
        return stream.causal_mask[0]

    def _store(self, part: Partition, index: int, known: Sequence[KeysValues], cache: Any) -> None:
        keys, values = (list(one) for one in zip(*known, strict=True))
        if part.frozen is not None and part.is_whole and part.shared is None and not holds_exits(cache):
            # Nothing has left so far: the layer is the cache's own. Behind one that is not it must not be, or
            # the decoder would make its mask by the other's sizes.
            cache.update(whole_states(part, keys), whole_states(part, values), index)
            return
        windows, tokens = self.stack.windows, self.layout.tokens
        first = 0
        # Assisted generation asks the cache to keep more than its window, to be able to go back.
        if windows[index] is not None and not records_past(cache, index):
            first = windows[index].first_needed(tokens)
        packing = self._packing(part, first)
        if part.shared is not None:
            width = sum(one[0].shape[1] * one[0].shape[3] * one[0].element_size() for one in (keys, values))
            self.bytes_alone[index] = width * self._num_alone(part, packing, first)
        layer = ExitLayer(
            packing.states(keys), packing.states(values), packing.columns, tokens, windows[index],
            floor=packing.floor,
        )  # fmt: skip
        put_layer(cache, index, layer)

    def _num_alone(self, part: Partition, packing: Packing, first: int) -> int:
        """Tokens that this cache layer would hold if every row had its own image."""
        splits = self.alone_splits and bool(part.in_text_B.any() or part.frozen_B.any())
        if part.is_whole and not self._alone_left and (not splits or bool(part.frozen_B.any())):
            # The stock cache's, padding included.
            return part.carried_BN[:, first:].numel()
        self._alone_left = True
        return packing.num_kept

    def _packing(self, part: Partition, first: int) -> Packing:
        """What the layers of a partition keep from column `first` on: worked out once for all of them."""
        if self._packings is None or self._packings[0] is not part:
            self._packings = (part, {})
        known = self._packings[1]
        if first not in known:
            known[first] = Packing(part, first, with_places=any(self.stack.windows))
        return known[first]
