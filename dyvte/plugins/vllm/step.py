"""One step of vLLM's model: what each layer does with each request's rows. It imports no vLLM.

A step is a flat batch: the rows of all requests, one after the other. A request is in one of three states
before a layer. FULL: all its rows are computed. FROZEN: its text rows are computed and read the keys and
values of its visual tokens, which are written without queries. GONE: its text rows are computed and nothing
is there of its visual tokens, neither rows nor memory: text counts on in the paged cache without a gap.

So a layer is run on a smaller batch. A frozen request is several ones there, one for each run of text rows,
with the same blocks and a sequence that ends where the run ends: causal attention needs no mask.

Shape letters: n rows of the step, Q of one request, R that a layer computes, V requests of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np

from dyvte.plugins.vllm.book import Prompt


class State(Enum):
    """What a layer does with a request."""

    FULL = "full"
    FROZEN = "frozen"
    GONE = "gone"


@dataclass(frozen=True)
class Part:
    """One request's share of a step.

    Attributes
    ----------
    row
        Of the batch's block table.
    start, stop
        Its rows of the flat batch.
    seq_len
        Tokens of its sequence, those of this step included.
    prompt
        What is known of it.
    """

    row: int
    start: int
    stop: int
    seq_len: int
    prompt: Prompt

    @property
    def computed(self) -> int:
        """Tokens of earlier steps."""
        return self.seq_len - (self.stop - self.start)

    @cached_property
    def visual_Q(self) -> np.ndarray:
        """(Q,) bool."""
        return self.prompt.visual(self.computed, self.seq_len)

    @cached_property
    def has_visual(self) -> bool:
        """Are there visual tokens among its rows?"""
        return bool(self.visual_Q.any())

    @cached_property
    def text_before_Q(self) -> np.ndarray:
        """(Q,) int64: text tokens of the sequence before each row."""
        return self.prompt.text_before(self.computed, self.seq_len)

    @cached_property
    def num_text(self) -> int:
        """Text tokens of the sequence up to here."""
        return int(self.text_before_Q[-1]) + int(not self.visual_Q[-1])

    @cached_property
    def seen_visual(self) -> bool:
        """Are there visual tokens in the sequence up to here?"""
        return self.num_text < self.seq_len

    @property
    def ends_prompt(self) -> bool:
        """Is the prompt's last token among its rows?"""
        return self.computed < self.prompt.num_tokens <= self.seq_len

    def state(self, done: int, num_layers: int) -> State:
        """Its state after ``done`` layers; a prompt that is not decided yet counts as never frozen."""
        freeze, leave = (
            num_layers if layer is None else layer
            for layer in (self.prompt.freeze_layer, self.prompt.exit_layer)
        )
        if leave <= done and self.seen_visual:
            return State.GONE
        return State.FROZEN if freeze <= done and self.has_visual else State.FULL


@dataclass(frozen=True)
class Selection:
    """The smaller batch of a layer.

    Attributes
    ----------
    rows_R
        (R,) int64 rows of the step.
    lengths_V, seq_lens_V
        (V,) int64: rows, and length of the sequence, of each of its requests.
    table_rows_V
        (V,) int64: row of the block table.
    gone_R
        (R,) bool: rows whose slot is another than the step's.
    places_R
        (R,) int64: where these lie in their sequence as the cache holds it.
    """

    rows_R: np.ndarray
    lengths_V: np.ndarray
    seq_lens_V: np.ndarray
    table_rows_V: np.ndarray
    gone_R: np.ndarray
    places_R: np.ndarray

    @property
    def table_rows_R(self) -> np.ndarray:
        """(R,) int64: row of the block table of each row."""
        return np.repeat(self.table_rows_V, self.lengths_V)

    @staticmethod
    def of(parts: Sequence[Part], states: Sequence[State], short: int = 0) -> Selection:
        """The rows that a layer computes.

        Parameters
        ----------
        short
            Requests of at most so many rows come first, as some attention backends want it.
        """
        pieces = [piece for part, state in zip(parts, states, strict=True) for piece in _pieces(part, state)]
        pieces.sort(key=lambda piece: len(piece.rows) > short)
        gone = [np.full(len(piece.rows), piece.gone) for piece in pieces]
        return Selection(
            rows_R=_joined([piece.rows for piece in pieces]),
            lengths_V=np.array([len(piece.rows) for piece in pieces], np.int64),
            seq_lens_V=np.array([piece.seq_len for piece in pieces], np.int64),
            table_rows_V=np.array([piece.table_row for piece in pieces], np.int64),
            gone_R=_joined(gone).astype(bool),
            places_R=_joined([piece.places for piece in pieces]),
        )


class Decoding:
    """A step in which every request gets one more token of its answer: no visual token is among its rows.

    Parameters
    ----------
    prompts
        Of its rows, in their order.
    seq_lens_V
        (V,) int64 lengths of their sequences, this token included.
    """

    def __init__(self, prompts: Sequence[Prompt], seq_lens_V: np.ndarray) -> None:
        self.seq_lens_V = seq_lens_V
        self.num_visual_V = np.array([prompt.num_visual for prompt in prompts], np.int64)
        self.exits_V = np.array([prompt.exit_layer for prompt in prompts], np.int64)
        self._exits = np.unique(self.exits_V[self.num_visual_V > 0])

    def behind(self, done: int) -> tuple[int, Selection | None]:
        """After ``done`` layers: how many of the exits lie before, and the batch; None: the step's own."""
        number = int(np.searchsorted(self._exits, done, side="right"))
        if number == 0:
            return 0, None
        gone_V = (self.exits_V <= done) & (self.num_visual_V > 0)
        seq_lens_V = self.seq_lens_V - np.where(gone_V, self.num_visual_V, 0)
        rows_V = np.arange(len(gone_V))
        return number, Selection(rows_V, np.ones_like(rows_V), seq_lens_V, rows_V, gone_V, seq_lens_V - 1)


@dataclass(frozen=True)
class _Piece:
    rows: np.ndarray
    places: np.ndarray
    seq_len: int
    table_row: int
    gone: bool


def _pieces(part: Part, state: State) -> list[_Piece]:
    own, places = np.arange(part.start, part.stop), np.arange(part.computed, part.seq_len)
    if state is State.FULL:
        return [_Piece(own, places, part.seq_len, part.row, False)]
    text = ~part.visual_Q
    if state is State.GONE:
        if not text.any():
            return []
        return [_Piece(own[text], part.text_before_Q[text], part.num_text, part.row, True)]
    edges = np.flatnonzero(np.diff(np.concatenate(([0], text.astype(np.int8), [0]))))
    return [
        _Piece(own[a:b], places[a:b], part.computed + int(b), part.row, False)
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, np.int64)
