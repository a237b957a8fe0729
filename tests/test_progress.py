"""Progress in a log: few whole lines, the last one says how far it came; a bar on a terminal alone."""

from __future__ import annotations

import io

import pytest

from dyvte import progress as module
from dyvte.progress import progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def test_a_log_gets_a_line_every_few_seconds(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", log := io.StringIO())
    with progress(1000, "teacher", "sample") as advance:
        for _ in range(1000):
            clock.now += 0.125
            advance(1)
    text = log.getvalue()
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) == pytest.approx(125 / module.SECONDS, abs=1.5)
    assert lines[0].startswith("teacher:   8% 80/1000 [00:10<01:55")
    assert lines[-1].startswith("teacher: 100% 1000/1000 [02:05<00:00")
    assert "8.00sample/s" in lines[-1]


def test_the_end_is_not_said_twice(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", log := io.StringIO())
    with progress(4, "teacher", "sample") as advance:
        clock.now += 100
        advance(4)
    assert len(log.getvalue().splitlines()) == 1


def test_what_was_done_before_does_not_count_as_fast(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", log := io.StringIO())
    with progress(100, "gates", "step", done=90) as advance:
        clock.now += 20
        advance(5)
    assert "95/100" in log.getvalue()
    assert "4.00s/step" in log.getvalue()


def test_quick_work_with_a_delay_hidden_work_and_idle_work_say_nothing(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", log := io.StringIO())
    with progress(9, "read", "sample", delay=5) as advance:
        clock.now += 1
        advance(9)
    with progress(9, "read", "sample", shown=False) as advance:
        clock.now += 100
        advance(9)
    with progress(9, "read", "sample"):
        clock.now += 100
    assert log.getvalue() == ""


def test_a_broken_loop_says_how_far_it_came(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", log := io.StringIO())

    def broken():
        with progress(None, "read", "sample") as advance:
            advance(7)
            clock.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert "7sample" in log.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with progress(4, "teacher", "sample") as advance:
        advance(4)
    assert "\rteacher: 100%|" in terminal.getvalue()
