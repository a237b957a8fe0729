"""Whose turn it is, and what the event loop is woken for."""

from __future__ import annotations

import asyncio

import pytest

from dyvte.serving.errors import RequestError
from dyvte.serving.events import all_at_once, one_by_one
from dyvte.serving.jobs import Ended, Failed, Finished, Piece
from dyvte.serving.scheduler import FIRST_TOKENS, TURN_TOKENS, Scheduler
from tests.serving.test_groups import jobs_of

EVENTS = [Piece(0, "a"), Piece(0, "b"), Ended(0, "stop", 3), Finished()]


def test_who_waits_starts_after_a_few_tokens(answerer):
    """A group is not interrupted at every token, nor for jobs that there is no room for."""
    scheduler = Scheduler(answerer, max_rows=2, max_waiting=8)
    job = jobs_of(answerer)[0][0]
    assert not scheduler._pause(FIRST_TOKENS), "nobody waits"
    scheduler._waiting.append(job)
    assert [scheduler._pause(count) for count in (1, FIRST_TOKENS - 1, FIRST_TOKENS)] == [False, False, True]
    scheduler._groups = [type("Full", (), {"live_rows": 2})()]
    assert not scheduler._pause(FIRST_TOKENS), "two rows are running, and there is room for two"
    scheduler._groups *= 2
    assert scheduler._pause(TURN_TOKENS), "another group has its turn"


@pytest.mark.parametrize("last", [Finished(), Failed(RequestError("no"))])
def test_a_reply_that_is_not_streamed_wakes_the_loop_once(last):
    calls = []

    class Loop:
        def call_soon_threadsafe(self, call, *given):
            calls.append(given)
            call(*given)

    events = [*EVENTS[:-1], last]
    whole, each = asyncio.Queue(), asyncio.Queue()
    emit = all_at_once(whole, Loop())
    for event in events:
        emit(event)
    assert calls == [(events,)]
    assert whole.get_nowait() == events
    emit = one_by_one(each, Loop())
    for event in events:
        emit(event)
    assert len(calls) == 1 + len(events)
    assert [each.get_nowait() for _ in events] == events


def test_a_server_that_has_stopped_is_told_nothing():
    loop = asyncio.new_event_loop()
    loop.close()
    all_at_once(asyncio.Queue(), loop)(Finished())
    one_by_one(asyncio.Queue(), loop)(Finished())
