"""A thousand requests spoilt at random: each is served, or refused by name."""

from __future__ import annotations

import copy
import json
import random

import pytest

from tests.helpers.served import GOOD, send, with_url

STRANGE = [
    *(
        None,
        True,
        -1,
        0,
        1e308,
        10**30,
        "",
        "x" * 5000,
        "\ud800",
        "../../etc/passwd",
        "\0",
        [],
        {},
        [[]],
        [None],
    ),
    *(
        {"a": {"b": []}},
        "file:///etc/passwd",
        "http://169.254.169.254/latest/",
        "data:,",
        "data:image/png;base64,",
    ),
    *(
        "gates:/etc/passwd",
        "oracle:/dev/zero",
        "fixed:-1",
        "freeze:9:1",
        -0.5,
        "NaN",
        ["user"],
        {"url": None},
    ),
]


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


def mutated(draw: random.Random):
    """A good request with one to three places spoilt; bytes, where the text itself is."""
    whole = {
        **copy.deepcopy(GOOD),
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 1,
        "stop": ["x"],
        "seed": 1,
        "logprobs": True,
        "top_logprobs": 1,
        "stream": False,
        "visual_exit": {"policy": "fixed:2"},
    }
    for _ in range(draw.randint(1, 3)):
        path = draw.choice(list(places(whole))[1:])
        inside = whole
        for key in path[:-1]:
            inside = inside[key]
        kind = draw.random()
        if kind < 0.6:
            inside[path[-1]] = copy.deepcopy(draw.choice(STRANGE))
        elif kind < 0.8 and isinstance(inside, dict):
            inside[f"{path[-1]}{draw.choice('sx_')}"] = inside.pop(path[-1])
        else:
            del inside[path[-1]]
    content = json.dumps(whole).encode()
    kind = draw.random()
    if kind < 0.15:
        return content[: draw.randrange(len(content))]
    if kind < 0.3:
        at = draw.randrange(len(content))
        return content[:at] + bytes(draw.randrange(256) for _ in range(draw.randint(1, 4))) + content[at:]
    return content


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.full)])
def test_spoilt_requests_are_served_or_refused_by_name(http_client, served, count):
    draw, refused = random.Random(count), 0
    for _ in range(count):
        content = mutated(draw)
        found = send(http_client, served, content)
        if found.status_code == 200:
            continue
        error = found.json()["error"]
        assert 400 <= found.status_code < 430, (found.status_code, content)
        assert error["code"], content
        assert 0 < len(error["message"]) < 1500, content
        refused += 1
    assert refused > 0.7 * count
    assert send(http_client, served, GOOD).status_code == 200
    assert served.service.scheduler.running_rows == served.service.scheduler.waiting_rows == 0


@pytest.mark.full
def test_an_image_of_200_mb_is_refused(http_client, served):
    content = json.dumps(with_url("data:image/png;base64,#")).encode().replace(b"#", b"A" * (200 << 20))
    found = send(http_client, served, content)
    assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")

    def chunks():
        yield content[:1000]
        for _ in range(200):
            yield b"A" * (1 << 20)

    headers = {"content-type": "application/json"}
    found = http_client.post(f"{served.url}/v1/chat/completions", content=chunks(), headers=headers)
    assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")
