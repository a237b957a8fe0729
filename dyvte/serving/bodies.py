"""Reading requests' bodies within limits, before anything is made of them."""

from __future__ import annotations

from typing import Any

from dyvte.serving.config import MEGABYTE
from dyvte.serving.errors import OverloadedError, RequestError

_AT_ONCE = 4
"""Bodies of the largest size that may be held while they are read."""

_DRAINED = 512 * MEGABYTE
"""How much of a body that is too large is read and thrown away, so that its client sees why."""


class BodyReader:
    """Reads bodies of JSON requests.

    Parameters
    ----------
    max_bytes
        Of one body.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self._held = max_bytes, 0

    async def read(self, request: Any) -> bytes:
        """The whole body of a request.

        Raises
        ------
        RequestError
            Status 415 if it does not say that it is JSON, 413 if it is too large.
        OverloadedError
            If many large bodies are being read.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(
                f"content-type {kind[:60]!r}: expected application/json", status=415, code="not_json"
            )
        length = request.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self.max_bytes):
            await _drain(request)
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async for chunk in request.stream():
                size += len(chunk)
                self._held += len(chunk)
                if size > self.max_bytes:
                    break
                if self._held > _AT_ONCE * self.max_bytes:
                    held = f"{self._held // MEGABYTE} MB of requests are being read"
                    raise OverloadedError(held, 2)
                parts.append(chunk)
        finally:
            self._held -= size
        if size > self.max_bytes:
            parts.clear()
            await _drain(request)
            raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> RequestError:
        return RequestError(
            f"the body is larger than {self.max_bytes / MEGABYTE:g} MB: send fewer or smaller images",
            status=413,
            code="body_too_large",
        )


async def _drain(request: Any) -> None:
    """Read on without keeping anything: most clients look at the reply only when they have sent all."""
    left = _DRAINED
    async for chunk in request.stream():
        left -= len(chunk)
        if left < 0:
            return
