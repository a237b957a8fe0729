"""How much memory a teacher pass takes, from shapes alone, and how it is cut to a budget.

The estimate covers what the decoder and the output head hold beside the weights. The vision tower runs before
them, and its memory is free again by then.

Shape letters: B rows, N tokens, P prefix slots, V visual slots, T suffix slots, R predicted positions of all
rows, D hidden, F feature size, W vocabulary, S schedules (the full model included), G images that rows share
and their tokens up to the last visual one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dyvte.backbones.sizes import decoder_shape
from dyvte.errors import MemoryBudgetError, UnsupportedBackboneError
from dyvte.formatting import GIB
from dyvte.teacher.schedules import Schedules
from dyvte.teacher.slots import StreamSlots

_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class PassSizes:
    """Everything that the memory of a pass depends on; letters as in the module's text."""

    rows: int
    tokens: int
    prefix: int
    suffix: int
    predicted: int
    schedules: int
    num_layers: int
    hidden: int
    query_width: int
    """Heads times head size."""
    key_width: int
    """Key-value heads times head size."""
    heads: int
    ffn: int
    vocab: int
    features: int
    element_size: int
    """Bytes of a number of the model."""
    eager: bool
    """Attention scores are held (no fused attention)."""
    visual: int = 0
    frozen: int = 0
    """Freeze layers."""
    frozen_features: int = 0
    """Layers of frozen streams whose features are kept."""
    images: int = 0
    """Images that rows share; 0: every row computes its own."""
    image_tokens: int = 0
    """Of an image, up to its last visual one, where rows share it."""

    def call(self, rows: int, queries: int, keys: int, borrowed: int = 0) -> int:
        """Bytes that come and go inside one layer call on ``rows`` rows of ``queries`` tokens; ``borrowed``
        keys and values are copied for it before."""
        e, beside = self.element_size, 3 * self.hidden * self.element_size  # input, residual, normed states
        # Mask, cosines and sines, in every part of the layer.
        given = queries * (keys * (e if self.eager else 1) + 2 * self.query_width // self.heads * e)
        norm = self.hidden * (self.element_size + 2 * _FP32)
        # Queries, keys and values, and the products of the rotary embedding before they are summed.
        projected = (2 * self.query_width + 5 * self.key_width) * e
        repeated = 2 * self.query_width * e if self.query_width != self.key_width else 0
        seen = keys * (4 * self.key_width * e + repeated)
        scores = keys * (self.heads * (2 * e + _FP32) if self.eager else e)
        attention = queries * (beside + projected + scores) + seen
        mlp = queries * (beside + 3 * self.ffn * e)
        copies = borrowed * 4 * self.key_width * e
        return rows * (max(attention, mlp, queries * norm) + given + copies)

    def kept(self) -> int:
        """Bytes held through all layers, however the streams are cut up."""
        e, rows, pair = self.element_size, self.rows, 2 * self.key_width
        streams = self.schedules * rows * self.suffix * self.hidden * e
        features = (self.num_layers + self.frozen_features) * rows * self.features * _FP32
        own_rows = self.images or rows
        if self.images:  # the embeddings, and the images
            full = rows * self.tokens * self.hidden * e
            full += self.images * self.image_tokens * (2 * self.hidden + 2 * pair) * e
        else:
            full = rows * self.tokens * (2 * self.hidden + pair) * e
        # All frozen states, and what a layer makes of one of them.
        frozen = own_rows * self.visual * (self.frozen * self.hidden + 2 * pair * bool(self.frozen)) * e
        keys = self.prefix + self.suffix + (self.visual if self.frozen or self.images else 0)
        masks = rows * (self.tokens**2 + self.suffix * keys) + self.images * self.image_tokens**2
        return streams + features + full + frozen + masks * (e if self.eager else 1)

    def head(self, positions: int) -> int:
        """Bytes of the logits of all schedules at some positions, and of their comparison in float32."""
        logits = self.element_size * self.vocab + 2 * self.hidden * (self.element_size + _FP32)
        return positions * (self.schedules * logits + 7 * self.vocab * _FP32)

    def states(self) -> int:
        """Bytes of the last layer's states of all schedules at all predicted positions."""
        return 2 * self.schedules * self.predicted * self.hidden * self.element_size

    def full_call(self) -> int:
        """Bytes inside the largest call that no budget can cut: on the visual tokens, or on text that reads
        them."""
        reading = self.call(
            self.rows,
            self.suffix,
            self.prefix + self.visual + self.suffix,
            borrowed=self.prefix + self.visual,
        )
        if self.images:
            return max(self.call(self.images, self.image_tokens, self.image_tokens), reading)
        full = self.call(self.rows, self.tokens, self.tokens)
        return max(full, reading) if self.frozen else full

    def least(self, may_cut_head: bool = True) -> int:
        """Bytes of a pass that takes one exit, and one position (if it may), at a time."""
        one_exit = self.call(self.rows, self.suffix, self.prefix + self.suffix)
        head = self.head(1 if may_cut_head else max(1, self.predicted))
        return self.kept() + self.states() + max(self.full_call(), one_exit, head)


def pass_sizes(
    config: Any,
    hidden_BND: Tensor,
    slots: StreamSlots,
    schedules: Schedules,
    *,
    images: Sequence[int] | None,
    features: int,
    eager: bool,
) -> PassSizes:
    """The sizes of a pass.

    Parameters
    ----------
    config:
        The model's.
    hidden_BND:
        What enters the first layer.
    slots, schedules:
        Of the pass.
    images:
        Images that rows share, and their tokens up to the last visual one; None: every row has its own.
    features:
        How many parts gates read.
    eager:
        Attention scores are held.
    """
    rows, tokens, hidden = hidden_BND.shape
    try:
        shape = decoder_shape(config)
        query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        heads, ffn, vocab = shape.num_heads, max(shape.ffn_sizes_L), shape.vocab_size
    except UnsupportedBackboneError:  # a config without these names: a usual shape
        query, key, heads, ffn, vocab = hidden, hidden, max(1, hidden // 64), 4 * hidden, 32 * hidden
    return PassSizes(
        rows=rows,
        tokens=tokens,
        prefix=slots.prefix.index.shape[1],
        suffix=slots.suffix.index.shape[1],
        predicted=int(slots.predict.valid.sum()),
        schedules=len(schedules.pairs),
        num_layers=schedules.num_layers,
        hidden=hidden,
        query_width=query,
        key_width=key,
        heads=heads,
        ffn=ffn,
        vocab=vocab,
        features=features * hidden,
        element_size=hidden_BND.element_size(),
        eager=eager,
        visual=slots.visual.index.shape[1],
        frozen=len(schedules.freezes),
        frozen_features=len(schedules.stream_layers) + bool(schedules.freezes),
        images=images[0] if images else 0,
        image_tokens=images[1] if images else 0,
    )


@dataclass(frozen=True)
class PassPlan:
    """How a pass is cut up.

    Attributes
    ----------
    exits_per_call:
        Streams without visual tokens in one call of a layer.
    positions_per_head:
        Predicted positions whose logits (of all exits) exist at once.
    peak_bytes:
        Estimated peak beside the weights.
    """

    exits_per_call: int
    positions_per_head: int
    peak_bytes: int


def plan_pass(
    sizes: PassSizes,
    *,
    budget: int | None = None,
    exits_per_call: int | None = None,
    may_cut_head: bool = True,
) -> PassPlan:
    """Cut a pass so that its estimated peak stays within ``budget`` bytes.

    Without a budget no layer call has more tokens than the full model's own, and no block of logits takes
    more than such a call. With one, calls grow as far as it allows: larger calls are faster on a GPU.

    Parameters
    ----------
    sizes
        Of the batch and the model.
    budget
        In bytes; None: without one.
    exits_per_call
        Exits in a layer call; None: as many as fit.
    may_cut_head
        May the logits be made in blocks?

    Raises
    ------
    MemoryBudgetError
        If even one exit and one position at a time do not fit: the full model itself needs that much.
    """
    streams = max(1, sizes.schedules - 1)
    one_call = sizes.call(sizes.rows, sizes.suffix, sizes.prefix + sizes.suffix)
    one_head = sizes.head(1)
    smallest_head = 1 if may_cut_head else max(1, sizes.predicted)
    room = sizes.call(sizes.rows, sizes.tokens, sizes.tokens)
    if budget is not None:
        room = budget - sizes.kept() - sizes.states()
        if budget < (least := sizes.least(may_cut_head)):
            raise MemoryBudgetError(
                f"a teacher pass over {sizes.rows} rows of {sizes.tokens} tokens takes about "
                f"{least / GIB:.3g} GiB beside the weights, the memory budget is "
                f"{budget / GIB:.3g} GiB: give fewer rows at a time, thin the exits, or raise the budget"
            )
    if exits_per_call is None:
        by_tokens = sizes.tokens // max(1, sizes.suffix)
        exits_per_call = by_tokens if budget is None else room // max(1, one_call)
    exits_per_call = min(max(1, exits_per_call), streams)
    positions = min(max(smallest_head, room // one_head), max(1, sizes.predicted))
    inside = max(sizes.full_call(), exits_per_call * one_call, positions * one_head)
    return PassPlan(exits_per_call, positions, sizes.kept() + sizes.states() + inside)
