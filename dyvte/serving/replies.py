"""Replies as JSON: OpenAI's chat completions, whole or in events, with what became of the visual tokens."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from typing import Any

from dyvte.serving.asking import FullAnswer
from dyvte.serving.errors import OverloadedError, RequestError, StoppingError
from dyvte.serving.jobs import Ended, Event, ExitReport, Piece, Started, TokenLogprob

EXIT_HEADER = "X-Visual-Exit"
_IN_HEADER = (
    *("schedule", "freeze_layer", "exit_layer", "num_layers"),
    *("visual_tokens", "visual_compute", "kv_bytes", "threshold"),
)
_LONGEST_SCHEDULE = 200
_LEAST = -9999.0
"""What stands for a log-probability of minus infinity, which JSON cannot hold."""


@dataclass
class Replies:
    """The replies to one request.

    Attributes
    ----------
    id, model
        Of the completion; the model's served name.
    tokenizer
        Names the tokens of log-probabilities.
    with_logprobs
        Were they asked for?
    """

    id: str
    model: str
    tokenizer: Any
    with_logprobs: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: FullAnswer) -> dict[str, Any]:
        """All answers of a request as one object."""
        choices = [
            {
                "index": choice,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": self._logprobs(answer.logprobs[choice]),
                "finish_reason": answer.reasons[choice],
            }
            for choice, text in enumerate(answer.texts)
        ]
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": usage(answer.prompt_tokens, sum(answer.num_tokens)),
            "visual_exit": exit_values(answer.report),
            "timings": {
                "first_token_ms": round(1000 * answer.first_token, 3),
                "total_ms": round(1000 * answer.total, 3),
            },
        }

    def opening(self, started: Started, num_choices: int, first_token: float) -> list[dict[str, Any]]:
        """The first chunks: who speaks, and where the visual tokens left."""
        chunks = [self._chunk(choice, {"role": "assistant", "content": ""}) for choice in range(num_choices)]
        chunks[0]["visual_exit"] = exit_values(started.report)
        chunks[0]["timings"] = {"first_token_ms": round(1000 * first_token, 3)}
        return chunks

    def piece(self, event: Event) -> dict[str, Any] | None:
        """The chunk of an event; None for one that clients are not told."""
        if isinstance(event, Piece):
            return self._chunk(event.choice, {"content": event.text}, logprobs=event.logprobs)
        if isinstance(event, Ended):
            return self._chunk(event.choice, {}, reason=event.reason)
        return None

    def closing(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """The last chunk, where the tokens were to be counted."""
        chunk = {**self._head("chat.completion.chunk"), "choices": []}
        return {**chunk, "usage": usage(prompt_tokens, new_tokens)}

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        *,
        reason: str | None = None,
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> dict[str, Any]:
        of_tokens = self._logprobs(logprobs) if logprobs else None
        only = {"index": choice, "delta": delta, "logprobs": of_tokens, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [only]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, given: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        content = []
        for one in given:
            top = [self._token(token, logprob) for token, logprob in one.top]
            content.append({**self._token(one.token, one.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        value = logprob if math.isfinite(logprob) else _LEAST
        return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Tokens counted; those of images belong to the prompt."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def exit_values(report: ExitReport) -> dict[str, Any]:
    """A report as it stands in a reply; what is in it is not copied."""
    return dict(vars(report))


def exit_header(report: ExitReport) -> dict[str, str]:
    """A report's short form as an HTTP header, for clients that drop fields which OpenAI's replies lack."""
    values = {name: getattr(report, name) for name in _IN_HEADER}
    values["schedule"] = report.schedule[:_LONGEST_SCHEDULE]
    return {EXIT_HEADER: json.dumps(values)}


def error_reply(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers for an error, in the shape that OpenAI's clients read."""
    status, code, param, headers = 500, "internal_error", None, {}
    text = "the server failed at this request; its log says why"
    if isinstance(error, RequestError):
        status, code, param, text = error.status, error.code, error.param, str(error)
    elif isinstance(error, OverloadedError):
        status, code, text = 429, "overloaded", str(error)
        headers = {"Retry-After": str(error.retry_after)}
    elif isinstance(error, StoppingError):
        status, code, text = 503, "stopping", str(error)
        headers = {"Retry-After": "5"}
    kind = (
        "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
    )
    return status, {"error": {"message": text, "type": kind, "param": param, "code": code}}, headers


def to_json(values: Any) -> bytes:
    """Compact JSON, strictly: no NaN, no infinity."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        "utf-8", "backslashreplace"
    )


def sse(values: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(values) + b"\n\n"
