"""A server of a test's own, on a free port of this machine, in a thread."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from dyvte.backbones import BackboneConfig
from dyvte.serving.answerer import Answerer
from dyvte.serving.app import Service, create_app
from dyvte.serving.config import ServeConfig


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    service: Service
    server: uvicorn.Server


@contextlib.contextmanager
def serving(answerer: Answerer, **settings: Any) -> Iterator[Served]:
    """A server with these settings; it has stopped when the block is left."""
    config = ServeConfig(model=BackboneConfig(path="tiny"), **settings)
    app = create_app(answerer, config)
    listening = socket.create_server((config.host, 0))
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, lifespan="on")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.service, server)
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()
        assert not thread.is_alive()


def data_url(image: Any, form: str = "PNG") -> str:
    """A PIL image as a data: URL."""
    buffer = io.BytesIO()
    image.save(buffer, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def about(question: str, *images: Any) -> list[dict[str, Any]]:
    """Messages that ask a question about images, as OpenAI's clients write them: text first."""
    shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [{"type": "text", "text": question}, *shown]}]
