"""Every exit in one forward: the full stream and all exit streams run side by side through the decoder.

While :func:`all_exits` is active, each decoder layer is called on the full batch, and again on the exit
streams started so far (stream k leaves its visual tokens behind after k layers), batched along the batch
axis. The model around the layers sees one batch of the usual shape until the last layer, which hands on the
states of all streams at the predicted positions: the model's own norm and head turn them into logits.

Shape letters: B rows, N tokens, T suffix tokens, A predicted positions, D hidden, F features, L layers,
S exit streams.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dyvte.backbones import Backbone
from dyvte.errors import ExitRuntimeError, UnsupportedBackboneError
from dyvte.gates import DEFAULT_FEATURES, check_features, prompt_features, reads_visual
from dyvte.spans import Spans
from dyvte.teacher.layout import (
    Layout,
    mask_of_streams,
    prefix_sees_beyond,
    repeat_streams,
    take_suffix,
)

_MISSING = object()
# The attribute by which dyvte's wrappers of a layer's forward know each other.
_MARK = "_dyvte_engine"


class _Recorder:
    """Stands in for a layer's cache and remembers the keys and values it is given."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0


class _Prefixed:
    """Stands in for a layer's cache and puts the prefix's keys and values before those it is given."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat((self.keys, keys), dim=-2), torch.cat((self.values, values), dim=-2)

    def get_seq_length(self, *_: Any) -> int:
        return self.keys.shape[-2]


class ExitStreams:
    """State of one pass; see :func:`all_exits`.

    Attributes
    ----------
    layout:
        Where suffix and predicted positions lie; set when the first layer runs.
    features_BF:
        One entry per layer that has run: what the gate after it reads.
    """

    def __init__(
        self,
        backbone: Backbone,
        spans: Spans,
        predict_BN: Tensor,
        exits_per_chunk: int | None,
        features: Sequence[str] = DEFAULT_FEATURES,
    ) -> None:
        self.features = check_features(features)
        self.backbone, self.spans, self.predict_BN = backbone, spans, predict_BN
        self.exits_per_chunk = exits_per_chunk
        self.implementation = getattr(backbone.decoder.config, "_attn_implementation", None) or "eager"
        self.layout: Layout | None = None
        self.features_BF: list[Tensor] = []
        self._streams: list[Tensor] = []
        self._masks: dict[int, tuple[Any, Any]] = {}

    def run_layer(
        self, index: int, original: Callable[..., Any], hidden_BND: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """One decoder layer (0-based) on the full stream and on the exit streams started so far."""
        if self.layout is None:
            borrow = not prefix_sees_beyond(kwargs.get("attention_mask"), self.spans)
            self.layout = Layout.build(self.spans, self.predict_BN, borrow_prefix=borrow)
        self._streams.append(self.layout.suffix.take(hidden_BND))
        recorder = _Recorder()
        output = original(hidden_BND, **{**kwargs, "past_key_values": recorder})
        full_BND = output[0] if isinstance(output, tuple) else output
        self._advance(original, hidden_BND.shape[1], recorder, kwargs)
        self.features_BF.append(self._features(full_BND))
        if index < self.backbone.num_layers - 1:
            return output
        result = self._predicted(full_BND)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def _advance(
        self, original: Callable[..., Any], num_tokens: int, recorder: _Recorder, kwargs: dict[str, Any]
    ) -> None:
        layout = self._layout
        rows, width = layout.suffix.index.shape
        keys = layout.prefix.take(recorder.keys.transpose(1, 2)).transpose(1, 2)
        values = layout.prefix.take(recorder.values.transpose(1, 2)).transpose(1, 2)
        own = {name: take_suffix(name, value, layout.suffix, num_tokens) for name, value in kwargs.items()}
        own["attention_mask"] = self._mask(kwargs.get("attention_mask"), keys.dtype)
        # By default no call is larger than the full stream's own, so the pass needs no more memory for it.
        chunk = self.exits_per_chunk or max(1, num_tokens // max(1, width))
        for start in range(0, len(self._streams), chunk):
            part = self._streams[start : start + chunk]
            arguments = {name: repeat_streams(value, len(part), rows) for name, value in own.items()}
            arguments["past_key_values"] = _Prefixed(
                repeat_streams(keys, len(part), rows), repeat_streams(values, len(part), rows)
            )
            output = original(torch.cat(part), **arguments)
            output = output[0] if isinstance(output, tuple) else output
            self._streams[start : start + chunk] = output.split(rows)

    def _mask(self, mask: Any, dtype: torch.dtype) -> Any:
        # Layers share a few mask objects; the mask itself is kept so that its id stays its own.
        if id(mask) not in self._masks:
            made = mask_of_streams(mask, self._layout, self.implementation, dtype)
            self._masks[id(mask)] = (mask, made)
        return self._masks[id(mask)][1]

    def _features(self, full_BND: Tensor) -> Tensor:
        if reads_visual(self.features):
            return prompt_features(full_BND, self.spans.prompt_BN, self.spans.visual_BN, self.features)
        suffix = self._layout.suffix
        prompt_BT = suffix.take(self.spans.prompt_BN) & suffix.valid
        return prompt_features(suffix.take(full_BND), prompt_BT, names=self.features)

    def _predicted(self, full_BND: Tensor) -> Tensor:
        """((L+1) B, A, D): exits 0..L-1, then the full stream."""
        layout = self._layout
        exits = [layout.predict_suffix.take(stream) for stream in self._streams]
        return torch.cat([*exits, layout.predict.take(full_BND)])

    @property
    def _layout(self) -> Layout:
        if self.layout is None:
            raise RuntimeError("no decoder layer has run yet")
        return self.layout


@contextmanager
def all_exits(
    backbone: Backbone,
    spans: Spans,
    predict_BN: Tensor,
    *,
    exits_per_chunk: int | None = None,
    features: Sequence[str] = DEFAULT_FEATURES,
) -> Iterator[ExitStreams]:
    """Make the model's next forward return logits of all exits; nothing is left on the model afterwards.

    The forward must run without a cache over exactly the batch that ``spans`` describes. Its logits come as
    ((L+1) B, A, V): row k B + b is exit layer k of row b, at the positions of ``predict_BN`` packed to the
    left.

    Parameters
    ----------
    predict_BN:
        (B, N) bool: text positions whose next-token logits are wanted.
    exits_per_chunk:
        Exit streams per layer call. None: as many as fit the full stream's own token count.
    features:
        What is kept of each layer's output for the gates; see :func:`dyvte.gates.prompt_features`.

    Raises
    ------
    ExitRuntimeError
        If the model is inside another block of dyvte.
    """
    if exits_per_chunk is not None and exits_per_chunk < 1:
        raise ValueError(f"exits_per_chunk must be at least 1, found {exits_per_chunk}")
    streams = ExitStreams(backbone, spans, predict_BN, exits_per_chunk, features)
    layers = list(backbone.layers)[: backbone.num_layers]
    if "flash" in streams.implementation:
        _check_windows(layers, predict_BN.shape[1])
    before = [layer.__dict__.get("forward", _MISSING) for layer in layers]
    if any(hasattr(forward, _MARK) for forward in before):
        raise ExitRuntimeError("this model is inside a dyvte block already: leave that one before tracing it")
    try:
        for index, layer in enumerate(layers):
            layer.forward = _wrapped(layer, index, streams)
        yield streams
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is _MISSING:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _check_windows(layers: list[nn.Module], num_tokens: int) -> None:
    """Flash attention counts a window in keys, and an exit stream has fewer of them than its positions
    span."""
    windows = [getattr(getattr(layer, "self_attn", None), "sliding_window", None) for layer in layers]
    if any(window and window < num_tokens for window in windows):
        raise UnsupportedBackboneError(
            f"flash attention cannot express a sliding window of {min(filter(None, windows))} over "
            f"{num_tokens} tokens that visual tokens have left: load the backbone with "
            "attn_implementation='sdpa' or 'eager'"
        )


def _wrapped(layer: nn.Module, index: int, streams: ExitStreams) -> Callable[..., Any]:
    original = layer.forward
    signature = inspect.signature(original)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:  # some families pass the mask by position
            bound = signature.bind_partial(hidden_states, *args, **kwargs).arguments
            kwargs = {**bound.pop("kwargs", {}), **bound}
            kwargs.pop(next(iter(signature.parameters)))
        return streams.run_layer(index, original, hidden_states, kwargs)

    setattr(forward, _MARK, streams)
    return forward
