"""Requests that are wrong: each gets a named 4xx; none reaches a file, another machine or another request."""

from __future__ import annotations

import base64
import http.server
import io
import json
import struct
import threading
import zlib

import pytest
from PIL import Image

from tests.helpers.models import random_image
from tests.helpers.served import GOOD, about, send, serving, with_url


def bomb(width: int, height: int) -> str:
    """A PNG of a few bytes that says it is this large, and of black lines to fill it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = zlib.compress(b"\0" * (1 << 20), 9)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(content).decode()


def with_fields(**fields):
    return {**GOOD, **fields}


def saved(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def as_data(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


PNG = saved(random_image(2), "PNG")
NAMED = {
    # body -> status, code, what the message holds
    "unknown field": (with_fields(temprature=1), 422, "unknown_field", "did you mean 'temperature'"),
    "unknown field inside": (with_fields(visual_exit={"polcy": "never"}), 422, "unknown_field", "'policy'"),
    "tools": (with_fields(tools=[{"type": "function"}]), 400, "unsupported", "tools"),
    "json mode": (
        with_fields(response_format={"type": "json_object"}),
        400,
        "unsupported",
        "response_format",
    ),
    "penalty": (with_fields(frequency_penalty=0.5), 400, "unsupported", "frequency_penalty"),
    "model": (with_fields(model="gpt-4"), 404, "model_not_found", "'tiny'"),
    "n": (with_fields(n=99), 400, "invalid_value", "n: 99: expected 1..8"),
    "n of a wrong type": (with_fields(n="2"), 400, "invalid_value", "expected a whole number, found a text"),
    "temperature": (with_fields(temperature=9), 400, "invalid_value", "temperature"),
    "true is no number": (with_fields(max_tokens=True), 400, "invalid_value", "max_tokens"),
    "stop": (with_fields(stop=["a"] * 17), 400, "invalid_value", "stop"),
    "empty stop": (with_fields(stop=""), 400, "invalid_value", "stop"),
    "logprobs": (with_fields(top_logprobs=2), 400, "invalid_value", "logprobs"),
    "stream options": (with_fields(stream_options={"include_usage": True}), 400, "invalid_value", "stream"),
    "no messages": (with_fields(messages=[]), 400, "invalid_value", "at least one message"),
    "messages of a wrong type": (with_fields(messages={"role": "user"}), 400, "invalid_value", "a list"),
    "role": (with_fields(messages=[{"role": "robot", "content": "x"}]), 400, "invalid_value", "robot"),
    "tool message": (with_fields(messages=[{"role": "tool", "content": "x"}]), 400, "unsupported", "tools"),
    "begins with an answer": (
        with_fields(messages=[{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]),
        400,
        "invalid_value",
        "begins and ends with a message of the user",
    ),
    "audio": (
        with_fields(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
        400,
        "unsupported",
        "messages[0].content[0].type",
    ),
    "half a character": (
        with_fields(messages=[{"role": "user", "content": "\ud83d"}]),
        400,
        "invalid_value",
        "half",
    ),
    "special token": (
        with_fields(messages=[{"role": "user", "content": "a </s> b"}]),
        400,
        "invalid_value",
        "</s>",
    ),
    "too many images": (
        with_fields(messages=about("?", *[random_image(1)] * 33)),
        400,
        "invalid_value",
        "33 images",
    ),
    "policy": (with_fields(visual_exit={"policy": "fixd:2"}), 400, "invalid_value", "did you mean 'fixed'"),
    "layer": (with_fields(visual_exit={"policy": "fixed:9"}), 400, "invalid_value", "expected 0..4"),
    "two wishes": (with_fields(visual_exit={"budget": 0.5, "max_risk": 0.1}), 400, "invalid_value", "one of"),
    "file as policy": (
        with_fields(visual_exit={"policy": "gates:/etc"}),
        400,
        "invalid_value",
        "cannot name files",
    ),
    "oracle": (
        with_fields(visual_exit={"policy": "oracle:/etc/passwd"}),
        400,
        "invalid_value",
        "cannot name files",
    ),
    "threshold": (with_fields(visual_exit={"threshold": 1.5}), 400, "invalid_value", "expected 0..1"),
    "risk": (with_fields(visual_exit={"max_risk": 0.01}), 400, "not_certified", "certified at 0.05, 0.2"),
    "budget": (with_fields(visual_exit={"budget": 0.1}), 400, "not_calibrated", "calibrated to 0.3 or more"),
    "file url": (with_url("file:///etc/passwd"), 400, "image_not_available", "fetches none"),
    "path": (with_url("/etc/passwd"), 400, "image_not_available", "fetches none"),
    "remote url": (with_url("http://127.0.0.1:1/x.png"), 400, "image_not_available", "fetches none"),
    "no base64": (with_url("data:image/png;base64,@@@@"), 400, "invalid_image", "base64"),
    "no data": (with_url("data:image/png,abc"), 400, "invalid_image", "base64,..."),
    "text as image": (with_url(as_data(b"hello", "text/plain")), 400, "invalid_image", "text/plain"),
    "no image": (with_url(as_data(b"hello")), 400, "invalid_image", "none of PNG"),
    "truncated image": (with_url(as_data(PNG[:-30])), 400, "invalid_image", "no image can be read"),
    "svg": (with_url(as_data(b"<svg xmlns='http://www.w3.org/2000/svg'/>")), 400, "invalid_image", "none of"),
    "eps": (
        with_url(as_data(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
        400,
        "invalid_image",
        "none",
    ),
    "bomb": (with_url(bomb(40_000, 40_000)), 400, "invalid_image", "Bomb"),
    "large image": (with_url(bomb(1001, 1000)), 413, "image_too_large", "1001 x 1000"),
    "empty image": (with_url(bomb(0, 10)), 400, "invalid_image", ""),
    "large file": (with_url("data:image/png;base64," + "A" * 1_600_000), 413, "image_too_large", "1 MB"),
    "long prompt": (
        with_fields(messages=about("how many " * 1500, random_image(1))),
        400,
        "context_length_exceeded",
        "2048",
    ),
    "many images": (
        with_fields(messages=about("?", *[random_image(1)] * 32), max_tokens=2000),
        400,
        "context_length_exceeded",
        "images",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_wrong_is_named(http_client, served, name):
    body, status, code, text = NAMED[name]
    found = send(http_client, served, body)
    error = found.json()["error"]
    assert (found.status_code, error["code"]) == (status, code), error
    assert text in error["message"]
    assert len(error["message"]) < 1000


def test_bodies_that_are_no_requests(http_client, served):
    whole = json.dumps(GOOD).encode()
    for content, code in (
        (whole[: len(whole) // 2], "invalid_json"),
        (b"", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"n": ' + b"1" * 5000 + b"}", "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b"[1, 2]", "invalid_value"),
        (b"null", "invalid_value"),
    ):
        found = send(http_client, served, content)
        assert (found.status_code, found.json()["error"]["code"]) == (400, code)
    found = send(http_client, served, whole, headers={"content-type": "text/plain"})
    assert (found.status_code, found.json()["error"]["code"]) == (415, "not_json")
    found = send(http_client, served, b" " * (5 << 20))
    assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")
    assert http_client.get(f"{served.url}/v1/nothing").status_code == 404
    assert http_client.get(f"{served.url}/v1/chat/completions").status_code == 405
    for path in ("..%2f..%2fapp.py", "%2e%2e/app.py", "%2e%2e", "app.py", "....//"):
        assert http_client.get(f"{served.url}/page/{path}").status_code == 404
    assert send(http_client, served, GOOD).status_code == 200


def test_a_server_without_gates_says_so(pipeline, http_client):
    from dyvte.serving.answerer import Answerer

    with serving(Answerer.of(pipeline, "fixed:2")) as running:
        for wish in ({"policy": "gates"}, {"threshold": 0.5}, {"max_risk": 0.1}, {"budget": 0.5}):
            found = send(http_client, running, with_fields(visual_exit=wish))
            assert (found.status_code, found.json()["error"]["code"]) == (400, "no_gates")
        assert send(http_client, running, GOOD).json()["visual_exit"]["exit_layer"] == 2


# --- images that may be fetched ---


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """An image at /pictures/a.png, the same beside the folder, a redirect, and one that never ends."""

    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/pictures/moved.png":
            self.send_response(302)
            self.send_header("Location", "/pictures/a.png")
            self.end_headers()
            return
        if self.path == "/pictures/missing.png":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        try:
            self.wfile.write(PNG)
            while self.path == "/pictures/endless.png":
                self.wfile.write(b"\0" * 65536)
        except OSError:  # the other side has had enough
            self.close_connection = True

    def log_message(self, *_):
        pass


def test_only_allowed_urls_are_fetched(answerer, http_client, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Elsewhere.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        port = elsewhere.server_address[1]
        base = f"http://127.0.0.1:{port}"
        with serving(answerer, allow_url_prefix=(f"{base}/pictures",), max_image_mb=1) as running:
            found = send(http_client, running, with_url(f"{base}/pictures/a.png"))
            assert found.json()["visual_exit"]["visual_tokens"] == 16
            assert Elsewhere.asked == ["/pictures/a.png"]
            for url in (
                f"{base}/a.png",
                f"{base}/picturesque/a.png",
                f"{base}/pictures/../a.png",
                f"{base}/pictures/%2e%2e/a.png",
                f"{base}/pictures/%252e%252e/a.png",
                f"{base}/pictures\\..\\a.png",
                f"http://127.0.0.1:{port}@evil.example/pictures/a.png",
                f"http://user@127.0.0.1:{port}/pictures/a.png",
                f"http://127.0.0.1:{port + 1}/pictures/a.png",
                f"https://127.0.0.1:{port}/pictures/a.png",
                f"http://127.0.0.1.evil.example:{port}/pictures/a.png",
                f"ftp://127.0.0.1:{port}/pictures/a.png",
                "file:///pictures/a.png",
                f"{base}/pictures/a.png\r\nX: y",
                f"//127.0.0.1:{port}/pictures/a.png",
                "http://",
                "http://[::1/pictures/",
                "http://127.0.0.1:99999/pictures/",
            ):
                found = send(http_client, running, with_url(url))
                error = found.json()["error"]
                assert (found.status_code, error["code"]) == (400, "image_not_available"), url
            assert Elsewhere.asked == ["/pictures/a.png"], "nothing else was asked for"
            for name, status, text in (
                ("moved.png", 400, "redirect"),
                ("missing.png", 400, "status 404"),
                ("endless.png", 413, "more than"),
            ):
                found = send(http_client, running, with_url(f"{base}/pictures/{name}"))
                assert (found.status_code, text in found.json()["error"]["message"]) == (status, True)
        elsewhere.shutdown()
