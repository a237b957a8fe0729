"""One question, answered here and now: what the terminal's commands do, and programs that hold the model."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dyvte.serving.answerer import Answerer
from dyvte.serving.groups import RowGroup
from dyvte.serving.jobs import (
    Conversation,
    Decoding,
    Ended,
    Event,
    ExitReport,
    Failed,
    Piece,
    Started,
    TokenLogprob,
)
from dyvte.serving.schedules import ServedSchedule


@dataclass(frozen=True)
class FullAnswer:
    """A job's answers.

    Attributes
    ----------
    texts, reasons, num_tokens, logprobs
        One for each answer: its text, why it ended ("stop" or "length"), its tokens (an end token included),
        and those of its text with their log-probabilities, if asked for.
    prompt_tokens
        Of the prompt, visual ones included.
    report
        What became of the visual tokens.
    first_token, total
        Seconds from when the job was made to its first token, and to its end.
    """

    texts: tuple[str, ...]
    reasons: tuple[str, ...]
    num_tokens: tuple[int, ...]
    logprobs: tuple[tuple[TokenLogprob, ...], ...]
    prompt_tokens: int
    report: ExitReport
    first_token: float
    total: float


class Collected:
    """A job's events, put together.

    Parameters
    ----------
    num_choices
        Answers of the job.
    """

    def __init__(self, num_choices: int = 1) -> None:
        self._begun = self._first = time.perf_counter()
        self._prompt: Started | None = None
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(num_choices)]
        self._ends: dict[int, Ended] = {}

    def add(self, event: Event) -> None:
        """Take in an event.

        Raises
        ------
        Exception
            That of a job that failed.
        """
        if isinstance(event, Started):
            self._prompt, self._first = event, event.at
        elif isinstance(event, Piece):
            self._texts[event.choice].append(event.text)
            self._logprobs[event.choice].extend(event.logprobs)
        elif isinstance(event, Ended):
            self._ends[event.choice] = event
        elif isinstance(event, Failed):
            raise event.error

    @property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return self._first - self._begun

    def answer(self) -> FullAnswer:
        """The whole, once the job has finished."""
        ends = [self._ends[choice] for choice in range(len(self._texts))]
        return FullAnswer(
            texts=tuple("".join(pieces) for pieces in self._texts),
            reasons=tuple(end.reason for end in ends),
            num_tokens=tuple(end.num_tokens for end in ends),
            logprobs=tuple(map(tuple, self._logprobs)),
            prompt_tokens=self._prompt.prompt_tokens,
            report=self._prompt.report,
            first_token=self.first_token,
            total=time.perf_counter() - self._begun,
        )


def ask(
    answerer: Answerer,
    conversation: Conversation,
    *,
    schedule: ServedSchedule | None = None,
    decoding: Decoding | None = None,
    num_choices: int = 1,
    show: Callable[[str], Any] | None = None,
) -> FullAnswer:
    """Answer one question.

    Parameters
    ----------
    schedule, decoding
        None: the answerer's own schedule; greedy.
    show
        Takes pieces of the first answer as they come.

    Raises
    ------
    RequestError
        If the conversation cannot be a prompt of this model.
    """
    collected = Collected(num_choices)

    def emit(event: Event) -> None:
        collected.add(event)  # raises what a job failed with, through the generation to who asked
        if show is not None and isinstance(event, Piece) and event.choice == 0:
            show(event.text)

    job = answerer.job(
        conversation,
        id=uuid.uuid4().hex,
        emit=emit,
        schedule=schedule,
        decoding=decoding,
        num_choices=num_choices,
        streams=show is not None,
    )
    group = RowGroup(answerer, [job])
    while not group.is_over:
        group.go_on()
    return collected.answer()
