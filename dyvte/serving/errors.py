"""What a request can be refused with; each has an HTTP status and a short code for programs."""

from __future__ import annotations

from dyvte.errors import DyvteError


class RequestError(DyvteError, ValueError):
    """A request that cannot be served as it stands.

    Parameters
    ----------
    text
        What was wrong, what was expected and what to do.
    status
        HTTP status, 4xx.
    code
        The kind of problem, for programs.
    param
        The field at fault, by its path, such as ``messages[0].content``; None: the request as a whole.
    """

    def __init__(
        self, text: str, *, status: int = 400, code: str = "invalid_value", param: str | None = None
    ) -> None:
        super().__init__(text)
        self.status, self.code, self.param = status, code, param


class OverloadedError(DyvteError, RuntimeError):
    """More waits than the server holds; ``retry_after`` are seconds."""

    def __init__(self, text: str, retry_after: int) -> None:
        super().__init__(f"{text}: try again in {retry_after} s")
        self.retry_after = retry_after


class StoppingError(DyvteError, RuntimeError):
    """The server is about to stop and takes no more requests."""
