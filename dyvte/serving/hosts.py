"""A server on this machine alone answers to this machine's names alone.

Otherwise a web page elsewhere could point a name of its own at 127.0.0.1 and talk to the server through the
browser of whoever visits it (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
from typing import Any

from dyvte.serving.errors import RequestError
from dyvte.serving.replies import error_reply, to_json


class HostGuard:
    """Refuses requests for another host, where the server listens on a loopback address.

    Parameters
    ----------
    app
        What is guarded.
    host
        The address that the server listens on.
    """

    def __init__(self, app: Any, host: str) -> None:
        self.app, self.is_local = app, is_loopback(host)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] == "http" and self.is_local:
            named = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if len(named) != 1 or not is_loopback(_without_port(named[0])):
                await _refuse(send, named)
                return
        await self.app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Does a name or address mean this machine alone?"""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


async def _refuse(send: Any, named: list[str]) -> None:
    shown = named[0][:60] if named else "none"
    error = RequestError(
        f"host {shown!r}: this server answers to localhost alone (--host lets it listen to others)",
        status=421,
        code="wrong_host",
    )
    status, body, _ = error_reply(error)
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": to_json(body)})
