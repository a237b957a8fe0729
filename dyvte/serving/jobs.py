"""What is asked and what comes of it: typed records between whoever asks and whoever generates.

Shape letters: L decoder layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dyvte.backbones import RenderedPrompt
from dyvte.serving.schedules import ServedSchedule


@dataclass(frozen=True)
class Conversation:
    """What was said: earlier exchanges, and the question that is asked now.

    Attributes
    ----------
    question
        The last thing the user said.
    images
        For each question, earlier ones first: its images, which stand before its text.
    history
        Earlier (question, answer) pairs.
    system
        A system prompt; "": the template's own.
    """

    question: str
    images: Sequence[Sequence[Any]] = ((),)
    history: Sequence[tuple[str, str]] = ()
    system: str = ""


@dataclass(frozen=True)
class Decoding:
    """How an answer's tokens are chosen.

    Attributes
    ----------
    max_tokens
        Tokens of the answer at most; None: the server's number, or what the context holds.
    temperature
        0: greedy, the one of `dyvte.backbones.greedy`; else tokens are drawn.
    top_p
        Draw from the smallest set of tokens that holds this probability.
    seed
        Of what is drawn; None: another one each time.
    stop
        Texts at which the answer ends; they are not part of it.
    top_logprobs
        Report each token's log-probability and those of this many others; None: none.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its log-probability in nats, and the most probable ones (id, log-probability)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ExitReport:
    """What became of a request's visual tokens.

    Attributes
    ----------
    schedule
        The policy's short name.
    freeze_layer, exit_layer
        f and k; -1 without an image.
    num_layers
        L.
    visual_tokens
        Of the prompt.
    visual_compute
        Share of the full model's work on them that was spent; None without an image.
    kv_bytes
        Bytes of the prompt's keys and values, padding excluded.
    gate_probabilities
        (L,) chance of leaving that each gate gave; None where none was asked.
    freeze_probabilities
        (L,) likewise of freezing, entry j after layer j; empty without a freeze head.
    threshold
        What a gate's probability must exceed; None where no gates decide. Of gates that decide by group,
        that of the question's group.
    certified
        alpha, delta and loss of the bound that holds for this schedule, and the group that it is of, if any;
        None without one.
    not_certified
        Where gates decided and nothing is certified of it: why.
    """

    schedule: str
    freeze_layer: int
    exit_layer: int
    num_layers: int
    visual_tokens: int
    visual_compute: float | None
    kv_bytes: int
    gate_probabilities: tuple[float | None, ...]
    freeze_probabilities: tuple[float | None, ...]
    threshold: float | None
    certified: dict[str, Any] | None
    not_certified: str | None


@dataclass(frozen=True)
class Started:
    """The prompt has been read: its tokens (visual ones among them), its layers, and when (seconds of
    `time.perf_counter`)."""

    prompt_tokens: int
    report: ExitReport
    at: float


@dataclass(frozen=True)
class Piece:
    """More of an answer."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Ended:
    """An answer is complete: "stop" (an end token or stop text) or "length"."""

    choice: int
    reason: str
    num_tokens: int


@dataclass(frozen=True)
class Finished:
    """All answers of the job are complete."""


@dataclass(frozen=True)
class Failed:
    """The job came to nothing."""

    error: Exception


Event = Started | Piece | Ended | Finished | Failed


@dataclass
class Job:
    """One request while it is served.

    Attributes
    ----------
    id
        Tells it from others in logs.
    prompt, images
        As the template rendered it, and RGB PIL images in the order of its placeholders.
    schedule
        When its visual tokens freeze and leave.
    decoding
        How its tokens are chosen.
    num_choices
        Answers to give.
    emit
        Takes its events, in the thread that generates.
    streams
        Does anybody look at pieces before an answer is complete?
    shares_images
        May it read images that the model has seen before? False: it pays for its own, so that its time to
        the first token is that of a fresh image.
    submitted, started
        When it was made, and when its prompt had been read; seconds of `time.perf_counter`.
    is_cancelled
        Does nobody wait for it any more? Its rows are given up at the next token.
    has_told
        Has any part of an answer been told?
    """

    id: str
    prompt: RenderedPrompt
    images: Sequence[Any]
    schedule: ServedSchedule
    decoding: Decoding
    emit: Callable[[Event], None]
    num_choices: int = 1
    streams: bool = False
    shares_images: bool = True
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    is_cancelled: bool = False
    has_told: bool = False

    def tell(self, event: Event) -> None:
        """Hand an event to whoever waits."""
        self.has_told |= isinstance(event, Piece | Ended)
        self.emit(event)
