"""From a configuration to a server that listens until it is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dyvte.errors import ConfigError
from dyvte.serving.answerer import Answerer
from dyvte.serving.asking import ask
from dyvte.serving.config import ServeConfig
from dyvte.serving.hosts import is_loopback
from dyvte.serving.images import ImageReader
from dyvte.serving.jobs import Conversation, Decoding

if TYPE_CHECKING:
    import uvicorn

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open. Longer than clients keep theirs (5 seconds in httpx and the openai
package, as long as uvicorn's own number): who closes first must not be the side that is about to be asked."""


def serve(config: ServeConfig, say: Callable[[str], None] = print) -> None:
    """Load the model, and answer requests until the process is told to stop (SIGINT, SIGTERM).

    Answers in progress are finished first, for ``stop_seconds`` at most.

    Parameters
    ----------
    say
        Takes the line that says where the server listens.

    Raises
    ------
    ConfigError
        If the address cannot be listened on, or FastAPI, uvicorn or the Prometheus client are missing.
    DyvteError
        If backbone, policy or gates cannot be used.
    """
    try:
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401

        from dyvte.serving.app import create_app
    except ImportError as error:
        raise ConfigError(
            f"the server needs FastAPI, uvicorn and prometheus_client: pip install 'dyvte[serve]' ({error})"
        ) from error
    ImageReader.of(config)  # what may be fetched is checked before anything expensive is loaded
    listening = _listen(config.host, config.port)
    with listening:
        answerer = Answerer.open(config)
        _try_once(answerer)
        app = create_app(answerer, config)
        host, port = listening.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if not is_loopback(config.host):
            say(f"note: {config.host} can be reached from other machines, and there is no password")
        say(f"serving {app.state.service.name} at {where} (policy {answerer.menu.own.text})")
        http_server(app, config).run(sockets=[listening])


def http_server(app: Any, config: ServeConfig) -> uvicorn.Server:
    """What speaks HTTP for an application, not started yet."""
    import uvicorn

    settings = uvicorn.Config(
        app,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(config.stop_seconds)),
        lifespan="on",
    )
    return uvicorn.Server(settings)


def _try_once(answerer: Answerer) -> None:
    """One short answer before anybody waits: what cannot work is found now, and what is made at a first pass
    is no part of the first request's time."""
    from PIL import Image

    image = Image.new("RGB", (64, 64), "white")
    ask(answerer, Conversation("What is this?", [[image]]), decoding=Decoding(max_tokens=2))
    if answerer.images is not None:
        answerer.images.clear()


def _listen(host: str, port: int) -> socket.socket:
    """A socket before anything expensive is loaded: an address in use is found at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; use another --host or --port") from error
    return listening
