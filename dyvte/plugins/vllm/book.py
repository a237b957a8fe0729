"""Which prompt each row of vLLM's batch belongs to, and what was decided about it. It imports no vLLM.

vLLM's model sees rows, not requests. What a row's prompt is, where its visual tokens lie and where it ends is
told beforehand, on the host, to logits processors (`dyvte.plugins.vllm.keeper`); they write it down here.

Shape letters: N tokens of a prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class Prompt:
    """One prompt, for as long as it is answered.

    Attributes
    ----------
    num_tokens
        N.
    visual_N, num_visual
        (N,) bool: its visual tokens; how many there are.
    freeze_layer, exit_layer
        Layers that update them, and in which text can read them; None while nothing is decided.
    tag
        What the user gave as ``dyvte_id`` in the request's ``extra_args``.
    """

    __slots__ = ("exit_layer", "freeze_layer", "num_tokens", "num_visual", "tag", "text_before_N", "visual_N")

    def __init__(self, visual_N: np.ndarray, tag: str | None = None) -> None:
        self.num_tokens = len(visual_N)
        self.visual_N = visual_N
        self.num_visual = int(visual_N.sum())
        self.text_before_N = np.cumsum(~visual_N) - ~visual_N
        self.freeze_layer: int | None = None
        self.exit_layer: int | None = None
        self.tag = tag

    @property
    def text_start(self) -> int:
        """Where its prompt text starts: behind the last visual token."""
        return int(np.flatnonzero(self.visual_N)[-1]) + 1 if self.visual_N.any() else 0

    @property
    def num_text(self) -> int:
        """Tokens of its prompt text."""
        return self.num_tokens - self.text_start

    def decide(self, freeze_layer: int, exit_layer: int) -> None:
        """Set both layers; a prompt is frozen where it leaves at the latest."""
        self.freeze_layer, self.exit_layer = min(freeze_layer, exit_layer), exit_layer

    def visual(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) bool of positions that may go on behind the prompt, into its answer."""
        found = np.zeros(stop - start, bool)
        own = self.visual_N[start:stop]
        found[: len(own)] = own
        return found

    def text_before(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int64: text tokens before each position."""
        positions = np.arange(start, stop)
        inside = positions < self.num_tokens
        found = positions - self.num_visual
        found[inside] = self.text_before_N[positions[inside]]
        return found


class RequestBook:
    """Prompts by their row in the batch.

    Parameters
    ----------
    visual_token_ids
        Ids of the placeholders that vision features overwrite.
    max_num_seqs
        Requests that run at a time, at most.
    """

    def __init__(self, visual_token_ids: Sequence[int], max_num_seqs: int) -> None:
        self.visual_token_ids = np.asarray(visual_token_ids)
        self.rows: dict[int, Prompt] = {}
        # A request that is passed over for a step leaves the batch and comes back with the same list.
        self._known: OrderedDict[int, tuple[Any, Prompt]] = OrderedDict()
        self._most_known = 4 * max_num_seqs + 256

    def update(
        self,
        removed: Iterable[int],
        added: Iterable[tuple[int, Sequence[int], str | None]],
        moved: Iterable[tuple[int, int, bool]],
    ) -> None:
        """Follow the batch, in this order.

        Parameters
        ----------
        removed
            Rows that are free now.
        added
            Row, prompt token ids and tag of requests that come in.
        moved
            From which row to which; True: the two change places.
        """
        for row in removed:
            self.rows.pop(row, None)
        for row, tokens, tag in added:
            self.rows[row] = self._prompt(tokens, tag)
        for one, other, swap in moved:
            first, second = self.rows.pop(one, None), self.rows.pop(other, None)
            if first is not None:
                self.rows[other] = first
            if swap and second is not None:
                self.rows[one] = second

    def _prompt(self, tokens: Sequence[int], tag: str | None) -> Prompt:
        key = id(tokens)
        if key not in self._known:
            visual_N = np.isin(np.asarray(tokens, dtype=np.int64), self.visual_token_ids)
            self._known[key] = (
                tokens,
                Prompt(visual_N, tag),
            )  # the list is kept, so that its id stays its own
        self._known.move_to_end(key)
        while len(self._known) > self._most_known:
            self._known.popitem(last=False)
        return self._known[key][1]
