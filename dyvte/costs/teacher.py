"""FLOPs of a teacher pass, and of a step of the reference trainer for comparison.

Two FLOPs per multiply-add, attention counted over all query-key pairs it is given (masked or not); the
language model's decoder layers, features and output head, no vision tower. Equal to what torch's
``FlopCounterMode`` counts on a plain decoder (gated FFN, no experts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyvte.backbones.sizes import DecoderShape
from dyvte.gates import DEFAULT_FEATURES


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """Tokens of one sample: before the image, of the image, and after it, the answer included at the end."""

    prefix: int
    visual: int
    text: int
    answer: int
    """Answer tokens, closing EOS included: so many positions are compared."""

    @property
    def read(self) -> int:
        """Tokens after the image that an exit runs: the last answer token is a label alone."""
        return self.text - 1

    @property
    def total(self) -> int:
        """All tokens."""
        return self.prefix + self.visual + self.text


def teacher_flops(
    shape: DecoderShape,
    sample: SampleShape,
    exits: Sequence[int] | None = None,
    *,
    freezes: Sequence[int] = (),
    questions: int = 1,
    num_features: int = len(DEFAULT_FEATURES),
) -> int:
    """FLOPs of one pass over samples of one shape that ask about one image.

    Parameters
    ----------
    shape:
        Sizes of the decoder.
    sample:
        Tokens of each sample.
    exits:
        Labelled exits; L is always among them. None: all, 0..L.
    freezes:
        Freeze layers behind which the exits are labelled too.
    questions:
        Samples, all behind the same text; two or more share the image.
    num_features:
        Parts that gates read.
    """
    num_layers = shape.num_layers
    exits = sorted({*(range(num_layers) if exits is None else exits), num_layers})
    text, keys, before = sample.read, sample.prefix + sample.read, sample.prefix + sample.visual
    feature = 2 * num_features * text * shape.hidden_size
    shared, own = 0, feature if freezes else 0
    for layer in range(num_layers):
        last = layer == num_layers - 1
        left = sum((1 + sum(f < k for f in freezes)) for k in exits[:-1] if k <= layer)
        frozen = sum(f <= layer for f in freezes)
        if questions > 1:  # the image, then each text that reads it
            shared += _projections(shape, before) if last else _layer(shape, layer, before, before)
            own += _layer(shape, layer, text, before + text)
        elif last:  # only what is read goes on; the other tokens give keys and values
            own += _projections(shape, sample.total) + _layer(shape, layer, text, sample.total)
        else:
            own += _layer(shape, layer, sample.total, sample.total)
        shared += frozen * _keys_and_values(shape, sample.visual)
        own += frozen * _layer(shape, layer, text, before + text)
        if last:
            own += left * (_projections(shape, text) + _layer(shape, layer, sample.answer, keys))
        else:
            own += left * _layer(shape, layer, text, keys)
        own += (1 + frozen) * feature
    schedules = len(exits) + sum(sum(f < k for k in exits) for f in freezes)
    own += schedules * sample.answer * _head(shape)
    return shared + questions * own


def reference_step_flops(shape: DecoderShape, sample: SampleShape, layer: int) -> int:
    """FLOPs for one sample in a step of DyVTE's reference trainer that drew this exit layer, 1..L.

    All tokens run through all layers, and through those after ``layer`` twice: the batch is doubled there,
    and its second half masks the visual keys, which saves nothing. Logits are computed at every position of
    both halves. The gate, and the gradient that goes through nothing else, are not counted.

    Parameters
    ----------
    shape
        Of the decoder.
    sample
        Tokens of each kind.
    layer
        That the step drew.
    """
    whole = [_layer(shape, index, sample.total, sample.total) for index in range(shape.num_layers)]
    return sum(whole) + sum(whole[layer:]) + 2 * sample.total * _head(shape)


def mean_reference_step_flops(shape: DecoderShape, sample: SampleShape) -> float:
    """The mean of :func:`reference_step_flops` over the layer, drawn evenly from 1..L.

    Parameters
    ----------
    shape
        Of the decoder.
    sample
        Tokens of each kind.
    """
    layers = range(1, shape.num_layers + 1)
    return sum(reference_step_flops(shape, sample, k) for k in layers) / shape.num_layers


def _layer(shape: DecoderShape, layer: int, queries: int, keys: int) -> int:
    """One decoder layer."""
    width = shape.num_heads * shape.head_dim
    output = width * shape.hidden_size
    ffn = 3 * shape.hidden_size * shape.ffn_sizes_L[layer]
    return _projections(shape, queries) + 2 * queries * (output + ffn) + 4 * queries * keys * width


def _projections(shape: DecoderShape, tokens: int) -> int:
    """Queries, keys and values."""
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return 2 * tokens * shape.hidden_size * width


def _keys_and_values(shape: DecoderShape, tokens: int) -> int:
    """Keys and values alone."""
    return 2 * tokens * shape.hidden_size * 2 * shape.num_kv_heads * shape.head_dim


def _head(shape: DecoderShape) -> int:
    """The output head at one position."""
    return 2 * shape.hidden_size * shape.vocab_size
