"""A server of a test's own, on a free port of this machine, in a thread."""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from dyvte.backbones import BackboneConfig
from dyvte.serving.answerer import Answerer
from dyvte.serving.app import Service, create_app
from dyvte.serving.config import ServeConfig
from dyvte.serving.server import http_server
from tests.helpers.models import random_image


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    service: Service
    server: uvicorn.Server


@contextlib.contextmanager
def serving(answerer: Answerer, **settings: Any) -> Iterator[Served]:
    """A server with these settings; it has stopped when the block is left."""
    config = ServeConfig(model=BackboneConfig(path="tiny"), **{"stop_seconds": 10, **settings})
    app = create_app(answerer, config)
    listening = socket.create_server((config.host, 0))
    server = http_server(app, config)
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


GOOD = {"model": "tiny", "messages": about("what ?", random_image(1)), "max_tokens": 2}
"""A request that is answered."""


def with_url(url: Any) -> dict[str, Any]:
    """That request with another image."""
    body = copy.deepcopy(GOOD)
    body["messages"][0]["content"][1]["image_url"]["url"] = url
    return body


def send(http_client: httpx.Client, served: Served, body: Any, **how: Any) -> httpx.Response:
    """Plain bytes, as a client would send that makes mistakes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
    headers = {"content-type": "application/json", **how.pop("headers", {})}
    return http_client.post(f"{served.url}/v1/chat/completions", content=content, headers=headers, **how)
