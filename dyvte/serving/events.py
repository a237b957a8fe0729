"""From the thread that generates to the loop that replies: a job's events, unless its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request

from dyvte.serving.jobs import Event, Failed, Finished

Result = TypeVar("Result")


def one_by_one(events: asyncio.Queue[Event], loop: asyncio.AbstractEventLoop) -> Callable[[Event], None]:
    """Puts each event of a job into a queue of the loop."""

    def emit(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
            loop.call_soon_threadsafe(events.put_nowait, event)

    return emit


def all_at_once(
    whole: asyncio.Queue[list[Event]], loop: asyncio.AbstractEventLoop
) -> Callable[[Event], None]:
    """All events of a job at once, with the last: the loop is woken once for each job."""
    told: list[Event] = []

    def emit(event: Event) -> None:
        told.append(event)
        if isinstance(event, Finished | Failed):
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(whole.put_nowait, list(told))

    return emit


async def unless_gone(request: Request, waited: Awaitable[Result]) -> Result | None:
    """What is waited for; None if the client goes away before."""
    wanted = asyncio.ensure_future(waited)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        return wanted.result() if wanted.done() else None
    finally:
        for one in (wanted, gone):
            if not one.done():
                one.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
