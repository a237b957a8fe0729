"""``dyvte serve`` and ``dyvte chat`` as processes of their own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from dyvte.cli import main
from tests.helpers.models import random_image
from tests.helpers.served import about
from tests.helpers.world import World

ROOT = Path(__file__).resolve().parents[2]
WORLD = World()


def test_serve_answers_and_stops_when_told(world):
    command = [sys.executable, "-m", "dyvte", "serve", str(world / "backbone"), "--policy", "fixed:2"]
    running = subprocess.Popen(
        [*command, "--port", "0", "--served-name", "tiny"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = running.stdout.readline()
        found = re.search(r"serving tiny at (http://127\.0\.0\.1:\d+) \(policy fixed:2\)", line)
        assert found, running.communicate(timeout=60)
        body = {"model": "tiny", "messages": about("what ?", random_image(1)), "max_tokens": 2}
        reply = httpx.post(f"{found[1]}/v1/chat/completions", json=body, timeout=60)
        assert reply.json()["visual_exit"]["exit_layer"] == 2
        page = httpx.get(found[1])
        assert "page.js" in page.text
        assert "default-src 'self'" in page.headers["content-security-policy"]
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=60)
        assert running.returncode in (0, -signal.SIGTERM)
        assert "Traceback" not in errors
    finally:
        running.kill()
        running.wait()


def test_serve_refuses_before_it_loads_anything(world, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(world / "backbone"), "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert main(["serve", str(world / "backbone"), "--port", "0", "--policy", "fixd:2"]) == 2
    assert "did you mean 'fixed'" in capsys.readouterr().err
    assert main(["serve", str(world / "nowhere"), "--port", "0"]) == 2
    wrong = ["--port", "0", "--allow-url-prefix", "file:///etc"]
    assert main(["serve", str(world / "backbone"), *wrong]) == 2
    assert "allow_url_prefix 'file:///etc'" in capsys.readouterr().err


@pytest.mark.full
def test_chat_reads_lines(world):
    random_image(1).save(world / "scene.png")
    done = subprocess.run(
        [sys.executable, "-m", "dyvte", "chat", str(world / "backbone"), "--image", str(world / "scene.png")],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        input="what color ?\n/policy fixed:1\n/again\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "stayed through all 4 ████" in done.stdout
    assert "left after layer 1 of 4 █···" in done.stdout
