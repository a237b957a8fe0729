"""Clients that people have, against the server: live-vlm-webui's requests, LangChain's ChatOpenAI."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import json
import os
import subprocess
import sys

import httpx
import openai
import pytest
from PIL import Image

from dyvte.serving.asking import ask
from dyvte.serving.jobs import Conversation, Decoding
from dyvte.serving.schedules import ScheduleWish
from tests.helpers.models import random_image
from tests.helpers.served import data_url
from tests.helpers.tool_runs import ROOT

QUESTION = "what color is the circle ?"
PROMPT = "Describe what you see in this image in one sentence."


def frame(seed):
    """A JPEG frame of a camera, and what a server sees of it."""
    buffer = io.BytesIO()
    random_image(seed).resize((160, 120)).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode(), Image.open(buffer).convert("RGB")


def live_messages(encoded, prompt=PROMPT):
    """As live-vlm-webui's VLMService writes them."""
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}
    return [{"role": "user", "content": [{"type": "text", "text": prompt}, image]}]


def by_hand(answerer, image, question, decoding=None, **wish):
    conversation = Conversation(question, [[image]])
    schedule = answerer.menu.choose(ScheduleWish(**wish))
    return ask(answerer, conversation, schedule=schedule, decoding=decoding)


def test_a_camera_page_finds_the_server_and_asks_about_frame_after_frame(served):
    """live-vlm-webui: the first model of /v1/models, JPEG frames as data: URLs, temperature 0.7, a new prompt
    between; while a frame is asked about, others are passed over."""

    async def watch():
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="EMPTY", max_retries=0)
        async with httpx.AsyncClient() as http:
            found = (await http.get(f"{served.url}/v1/models", timeout=10)).json()
        name = next(model.get("id", "") for model in found["data"])
        assert [model.id for model in (await client.models.list()).data] == [name]
        busy, replies = asyncio.Lock(), []

        async def process(encoded, prompt):
            if busy.locked():
                return
            async with busy:
                reply = await client.chat.completions.create(
                    model=name, messages=live_messages(encoded, prompt), max_tokens=12, temperature=0.7
                )
                replies.append(reply)

        tasks, seed = [], 100
        while len(replies) < 4:  # a camera does not wait for answers
            encoded, _ = frame(seed := seed + 1)
            tasks.append(asyncio.create_task(process(encoded, PROMPT if len(replies) < 2 else QUESTION)))
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)
        return replies

    replies = asyncio.run(watch())
    for reply in replies:
        choice = reply.choices[0]  # drawn, so its first token may end it; one that was cut has its words
        assert choice.message.content.strip() or choice.finish_reason == "stop"
        assert choice.finish_reason in ("stop", "length")
        dumped = reply.model_dump()  # its page shows the whole reply
        assert dumped["visual_exit"]["visual_tokens"] == 16
        assert dumped["usage"]["completion_tokens"] <= 12
    assert served.service.scheduler.running_rows == 0


def test_frames_in_a_loop_over_plain_http_get_the_runtimes_answers(served, answerer):
    with httpx.Client(timeout=120) as http:
        for seed in range(4):
            encoded, image = frame(seed)
            body = {"model": "tiny", "messages": live_messages(encoded), "max_tokens": 12, "temperature": 0.0}
            reply = http.post(f"{served.url}/v1/chat/completions", json=body)
            known = by_hand(answerer, image, PROMPT, Decoding(max_tokens=12))
            found = reply.json()
            assert found["choices"][0]["message"]["content"] == known.texts[0]
            assert found["visual_exit"]["exit_layer"] == known.report.exit_layer
            # For clients that drop what OpenAI's replies do not have.
            head = json.loads(reply.headers["x-visual-exit"])
            assert head == {name: found["visual_exit"][name] for name in head}
            assert {"schedule", "freeze_layer", "exit_layer", "num_layers", "visual_compute"} <= set(head)
        streamed = {**body, "stream": True, "visual_exit": {"policy": "freeze:1:3"}}
        with http.stream("POST", f"{served.url}/v1/chat/completions", json=streamed) as reply:
            head = json.loads(reply.headers["x-visual-exit"])
            assert (head["schedule"], head["freeze_layer"], head["exit_layer"]) == ("freeze:1:3", 1, 3)
            assert list(reply.iter_lines())[-2] == "data: [DONE]"


def test_idle_connections_outlive_the_clients_own_patience(served):
    """Where both close at the same moment a request is lost: seen with 64 clients and 5 seconds at both."""
    patience = (httpx.Limits().keepalive_expiry, openai.DEFAULT_CONNECTION_LIMITS.keepalive_expiry)
    assert served.server.config.timeout_keep_alive >= 10 * max(patience)


# --- LangChain ---


def langchain_python() -> str:
    """A python that has langchain-openai; skips the test where there is none."""
    named = os.environ.get("DYVTE_LANGCHAIN_PYTHON")
    if named is None and importlib.util.find_spec("langchain_openai") is None:
        pytest.skip("langchain-openai is not installed: DYVTE_LANGCHAIN_PYTHON names a python that has it")
    return named or sys.executable


@pytest.mark.full
def test_langchains_chat_model_works_unchanged(served, answerer, tmp_path):
    """Text, images in both of its forms, histories, streams, batches, and the schedule in the headers."""
    python, image = langchain_python(), random_image(1)
    (tmp_path / "image").write_text(data_url(image))
    script = ROOT / "tests" / "helpers" / "langchain_client.py"
    done = subprocess.run(
        [python, script, served.url, tmp_path / "image", QUESTION],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    own = by_hand(answerer, image, QUESTION)
    text = ask(answerer, Conversation("how many ?"))
    later = ask(answerer, Conversation("what color ?", [[image], []], [("how many ?", "two")], "answer"))
    assert found["text"] == text.texts[0]
    for form in ("image", "block"):
        assert found[form]["content"] == own.texts[0]
        assert found[form]["finish_reason"] == own.reasons[0]
        assert found[form]["usage"]["input_tokens"] == own.prompt_tokens
        assert found[form]["usage"]["output_tokens"] == own.num_tokens[0]
    fixed = by_hand(answerer, image, QUESTION, Decoding(max_tokens=3), policy="fixed:1")
    assert found["fixed"]["content"] == " ".join(found["fixed"]["tokens"]) == fixed.texts[0]
    assert json.loads(found["fixed"]["metadata"]["headers"]["x-visual-exit"])["exit_layer"] == 1
    assert found["history"]["content"] == later.texts[0]
    assert "".join(found["stream"]) == own.texts[0]
    assert len([piece for piece in found["stream"] if piece]) > 1
    assert found["usage"]["output_tokens"] == own.num_tokens[0]
    assert found["batch"] == [own.texts[0], text.texts[0], later.texts[0]]
    assert found["async"] == [own.texts[0]] * 4
    assert "400 - tools: this server knows the field" in found["tools"]
