"""An answer's text while its tokens come in: what can be shown already, and where a stop text ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"
"""What a tokenizer decodes the first bytes of a longer character to."""


class AnswerText:
    """The text of one answer; its pieces, joined, are the text of the whole without outer white space.

    Parameters
    ----------
    tokenizer
        Decodes tokens.
    stops
        Texts that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.is_stopped = False
        self._shown = ""

    def more(self, tokens: Sequence[int], *, is_last: bool = False) -> str:
        """What can be shown now that these are the answer's tokens so far, beyond what was shown before.

        Held back are white space at the end, a character of which bytes are missing, and what may be the
        beginning of a stop text.
        """
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.is_stopped, is_last, text = True, True, text[: min(found)]
        if not is_last:
            text = text.rstrip(_HALF)
            text = text[: len(text) - self._held(text)]
        text = text.strip()
        if not text.startswith(self._shown):
            # A tokenizer that tidies white space may take back what it gave; what was shown stays.
            return "" if not is_last else self._advance(text[len(self._shown) :])
        return self._advance(text[len(self._shown) :])

    def shows(self, token: int) -> bool:
        """Is a token a part of the text, and no special one?"""
        return bool(self.tokenizer.decode([token], skip_special_tokens=True))

    def _advance(self, piece: str) -> str:
        self._shown += piece
        return piece

    def _held(self, text: str) -> int:
        """Characters at the end that may begin a stop text."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                return size
        return 0
