"""How much memory a teacher pass takes, from shapes alone, and how it is cut to a budget.

The estimate covers what the decoder and the output head hold beside the weights. The vision tower runs before
them, and its memory is free again by then.

Shape letters: B rows, N tokens, P prefix slots, T suffix slots, R predicted positions of all rows, D hidden,
F feature size, V vocabulary, K exits (the full model included).
"""

from __future__ import annotations

from dataclasses import dataclass

from dyvte.errors import MemoryBudgetError

GIB = 2**30
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class PassSizes:
    """Everything that the memory of a pass depends on; letters as in the module's text."""

    rows: int
    tokens: int
    prefix: int
    suffix: int
    predicted: int
    exits: int
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

    def call(self, rows: int, queries: int, keys: int) -> int:
        """Bytes that come and go inside one layer call on ``rows`` rows of ``queries`` tokens."""
        e, beside = self.element_size, 2 * self.hidden * self.element_size  # residual and normed states
        norm = self.hidden * (self.element_size + 2 * _FP32)
        # Queries, keys and values, and the products of the rotary embedding before they are summed.
        projected = (2 * self.query_width + 5 * self.key_width) * e
        repeated = 2 * self.query_width * e if self.query_width != self.key_width else 0
        seen = keys * (4 * self.key_width * e + repeated)
        scores = keys * (self.heads * (2 * e + _FP32) if self.eager else e)
        attention = queries * (beside + projected + scores) + seen
        mlp = queries * (beside + 3 * self.ffn * e)
        return rows * max(attention, mlp, queries * norm)

    def kept(self) -> int:
        """Bytes held through all layers, however the exits are cut up."""
        e, rows = self.element_size, self.rows
        streams = (self.exits - 1) * rows * self.suffix * self.hidden * e
        features = self.num_layers * rows * self.features * _FP32
        full = rows * self.tokens * (2 * self.hidden + 2 * self.key_width) * e
        masks = rows * (self.tokens**2 + self.suffix * (self.prefix + self.suffix)) * (e if self.eager else 1)
        return streams + features + full + masks

    def head(self, positions: int) -> int:
        """Bytes of the logits of all exits at some positions, and of their comparison in float32."""
        logits = self.exits * (self.element_size * self.vocab + 2 * self.hidden * (self.element_size + _FP32))
        return positions * (logits + 7 * self.vocab * _FP32)

    def states(self) -> int:
        """Bytes of the last layer's states of all exits at all predicted positions."""
        return 2 * self.exits * self.predicted * self.hidden * self.element_size

    def least(self, may_cut_head: bool = True) -> int:
        """Bytes of a pass that takes one exit, and one position (if it may), at a time."""
        full = self.call(self.rows, self.tokens, self.tokens)
        one_exit = self.call(self.rows, self.suffix, self.prefix + self.suffix)
        head = self.head(1 if may_cut_head else max(1, self.predicted))
        return self.kept() + self.states() + max(full, one_exit, head)


@dataclass(frozen=True)
class PassPlan:
    """How a pass is cut up.

    Attributes
    ----------
    exits_per_call:
        Exit streams in one call of a layer.
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

    Raises
    ------
    MemoryBudgetError
        If even one exit and one position at a time do not fit: the full model itself needs that much.
    """
    streams = max(1, sizes.exits - 1)
    full_call = sizes.call(sizes.rows, sizes.tokens, sizes.tokens)
    one_call = sizes.call(sizes.rows, sizes.suffix, sizes.prefix + sizes.suffix)
    one_head = sizes.head(1)
    smallest_head = 1 if may_cut_head else max(1, sizes.predicted)
    room = full_call
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
    inside = max(full_call, exits_per_call * one_call, positions * one_head)
    return PassPlan(exits_per_call, positions, sizes.kept() + sizes.states() + inside)
