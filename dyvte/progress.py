"""How far a command is: a bar on a terminal, and elsewhere one plain line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 10.0
"""Between two lines where the output is not a terminal."""

Advance = Callable[[int], None]


@contextmanager
def progress(
    total: int | None, description: str, unit: str, *, shown: bool = True, done: int = 0, delay: float = 0.0
) -> Iterator[Advance]:
    """Show on stderr how much is done, how fast and how long it still takes.

    Parameters
    ----------
    total : int or None
        How many there are; None: not known.
    description : str
        What is done.
    unit : str
        What one of them is called.
    shown : bool
        False: show nothing, for the other processes of a launcher.
    done : int
        How many were done before.
    delay : float
        Show nothing for the first so many seconds, for what is mostly quick.

    Yields
    ------
    Callable
        ``advance(n)``: n more are done.
    """
    from tqdm import tqdm

    if shown and not sys.stderr.isatty():
        lines = _Lines(total, description, unit, done, delay)
        try:
            yield lines.advance
        finally:
            lines.close()
        return
    look = {"desc": description, "unit": unit, "mininterval": 0.5, "delay": delay}
    with tqdm(total=total, initial=done, disable=not shown, **look) as bar:
        yield bar.update


class _Lines:
    """Progress in a log file: no carriage returns, and few lines."""

    def __init__(self, total: int | None, description: str, unit: str, done: int, delay: float) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = self.initial = self.shown = done
        self.started = time.monotonic()
        self.quiet_until = self.started + delay
        self.due = max(self.quiet_until, self.started + SECONDS)

    def advance(self, count: int = 1) -> None:
        """Print a line if the last one is long enough ago."""
        self.done += count
        now = time.monotonic()
        if now >= self.due:
            self.due = now + SECONDS
            self._print(now)

    def close(self) -> None:
        """Say how far it came."""
        now = time.monotonic()
        if now >= self.quiet_until and self.done > self.shown:
            self._print(now)

    def _print(self, now: float) -> None:
        from tqdm import tqdm

        self.shown = self.done
        form = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        text = tqdm.format_meter(
            self.done,
            self.total,
            now - self.started,
            prefix=self.description,
            unit=self.unit,
            initial=self.initial,
            bar_format=form if self.total else None,
        )
        print(text, file=sys.stderr, flush=True)
