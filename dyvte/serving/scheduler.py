"""The one thread that owns the model while a server runs: who waits, who is generated, whose turn it is."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from dyvte.serving.answerer import Answerer
from dyvte.serving.errors import OverloadedError, StoppingError
from dyvte.serving.groups import RowGroup
from dyvte.serving.jobs import Failed, Job

Result = TypeVar("Result")
TURN_TOKENS = 8
"""Tokens that a group grows by before the next group has its turn."""
FIRST_TOKENS = 4
"""Tokens that a group grows by before waiting jobs may start: to begin a turn anew costs more than to go on,
many short answers end meanwhile, and more jobs start together then."""
_log = logging.getLogger("dyvte.serving")


class Scheduler:
    """Waiting jobs become groups, groups have turns.

    Jobs that wait when there is room start together, as one batch; those that are being answered go on
    between. A job whose batch fails is tried again alone, unless a part of its answer has been told.

    Parameters
    ----------
    answerer
        The model.
    max_rows
        Answers generated at the same time.
    max_waiting
        Answers that may wait.
    on_group
        Told the rows of every batch that starts.

    Attributes
    ----------
    image_bytes
        What the store of images held after the last turn.
    """

    def __init__(
        self,
        answerer: Answerer,
        max_rows: int,
        max_waiting: int,
        on_group: Callable[[int], Any] = lambda _: None,
    ) -> None:
        self.answerer, self.max_rows, self.max_waiting = answerer, max_rows, max_waiting
        self._on_group = on_group
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._works: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._groups: list[RowGroup] = []
        self._ends: deque[float] = deque(maxlen=64)
        self._stop_at: float | None = None
        self.image_bytes = 0
        self._thread = threading.Thread(target=self._run, name="dyvte-model", daemon=True)

    # -- what other threads call ------------------------------------------------------------------------
    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Is the thread there, and not about to stop?"""
        return self._thread.is_alive() and self._stop_at is None

    @property
    def waiting_rows(self) -> int:
        """Answers that wait."""
        return sum(job.num_choices for job in tuple(self._waiting))

    @property
    def running_rows(self) -> int:
        """Answers that are being generated."""
        return sum(group.live_rows for group in tuple(self._groups))

    def check_open(self) -> None:
        """Raise StoppingError if no more jobs are taken."""
        if not self.is_running:
            raise StoppingError("the server is about to stop, and takes no more requests")

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises
        ------
        OverloadedError
            If too many answers wait already.
        StoppingError
            If the server is about to stop.
        """
        with self._changed:
            self.check_open()
            waiting = self.waiting_rows
            if waiting and waiting + job.num_choices > self.max_waiting:
                raise self._overloaded(waiting)
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for a job any more; its rows are free at the next token."""
        job.is_cancelled = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def do(self, work: Callable[[], Result]) -> Future[Result]:
        """Run something else on the model, between turns; cancelling the future keeps it from starting."""
        with self._changed:
            self.check_open()
            if len(self._works) >= self.max_waiting:
                raise self._overloaded(len(self._works))
            future: Future[Result] = Future()
            self._works.append((work, future))
            self._changed.notify()
            return future

    def stop(self, seconds: float) -> None:
        """Take no more jobs; let those that are there finish for so many seconds, then give them up."""
        with self._changed:
            self._stop_at = time.monotonic() + seconds
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(seconds + 60)

    # -- the thread --------------------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._groups or self._works or self._stop_at):
                    self._changed.wait()
                if self._is_late() or (self._stop_at and not (self._waiting or self._groups or self._works)):
                    break
                jobs = self._admitted()
                works = [self._works.popleft() for _ in range(len(self._works))]
            for work, future in works:
                _do(work, future)
            for shares in (True, False):
                if own := [job for job in jobs if job.shares_images == shares]:
                    self._start(own)
            for group in list(self._groups):
                self._turn(group)
            if self.answerer.images is not None:
                self.image_bytes = self.answerer.images.nbytes
        self._give_up()

    def _admitted(self) -> list[Job]:
        """Jobs that start now: in the order in which they came, as many as there is room for."""
        room, jobs = self.max_rows - self.running_rows, []
        while self._waiting and self._waiting[0].num_choices <= room:
            job = self._waiting.popleft()
            room -= job.num_choices
            jobs.append(job)
        return jobs

    def _start(self, jobs: list[Job]) -> None:
        """Read the prompts of some jobs as one batch; each alone, where that fails."""
        try:
            group = RowGroup(self.answerer, jobs)
        except Exception as error:
            self._alone(jobs, error)
            return
        if group.rows:
            self._on_group(len(group.rows))
            self._groups.append(group)

    def _alone(self, jobs: list[Job], error: Exception) -> None:
        """A batch has failed: try its jobs again, each alone; one that was alone already has failed."""
        for job in jobs:
            if len(jobs) == 1 or job.has_told:
                job.tell(Failed(error))
                continue
            try:
                self._groups.append(RowGroup(self.answerer, [job]))
            except Exception as own_error:
                job.tell(Failed(own_error))

    def _turn(self, group: RowGroup) -> None:
        before = group.live_rows
        try:
            group.go_on(self._pause)
        except Exception as error:
            _log.exception("a batch of %d rows failed", len(group.rows))
            self._groups.remove(group)
            self._alone([job for job in group.jobs if not job.is_cancelled], error)
            return
        self._ends.extend([time.monotonic()] * (before - group.live_rows))
        if group.is_over:
            self._groups.remove(group)

    def _pause(self, count: int) -> bool:
        """Should the group whose turn it is let others go on, after so many tokens of this turn?"""
        if self._works or self._is_late() or (count >= TURN_TOKENS and len(self._groups) > 1):
            return True
        first = self._waiting[0] if self._waiting and count >= FIRST_TOKENS else None
        return first is not None and first.num_choices <= self.max_rows - self.running_rows

    def _is_late(self) -> bool:
        return self._stop_at is not None and time.monotonic() >= self._stop_at

    def _give_up(self) -> None:
        with self._changed:
            left = [*self._waiting, *(job for group in self._groups for job in group.jobs)]
            works = list(self._works)
            self._waiting.clear()
            self._groups.clear()
            self._works.clear()
        for job in left:
            job.tell(Failed(StoppingError("the server stopped before this was answered")))
        for _, future in works:
            future.cancel()

    def _overloaded(self, waiting: int) -> OverloadedError:
        text = f"{waiting} answers wait already, and at most {self.max_waiting} may (--max-waiting)"
        return OverloadedError(text, self._seconds_until_free(waiting))

    def _seconds_until_free(self, waiting: int) -> int:
        """About how long until those that wait have been answered."""
        if len(self._ends) < 2 or self._ends[-1] <= self._ends[0]:
            return 1
        rate = len(self._ends) / (self._ends[-1] - self._ends[0])
        return max(1, min(60, math.ceil(waiting / rate)))


def _do(work: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
