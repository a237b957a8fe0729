"""What people do send is read as they mean it."""

from __future__ import annotations

import pytest

from dyvte.serving.errors import RequestError
from dyvte.serving.requests import parse_chat, parse_json
from tests.helpers.models import random_image
from tests.helpers.served import GOOD, about


def parsed(**fields):
    return parse_chat({**GOOD, **fields}, max_choices=4, max_images=4)


def test_what_asks_for_nothing_is_taken():
    found = parsed(
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        user="me",
        metadata={"a": "b"},
        seed=None,
        n=None,
        stream=None,
        visual_exit=None,
        max_completion_tokens=1,
    )
    assert found.decoding.max_tokens == 1
    assert found.num_choices == 1


def test_turns_of_one_side_are_joined():
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "one"},
        *about("two", random_image(1)),
        {"role": "assistant", "content": "three", "refusal": None},
        {"role": "user", "name": "me", "content": [{"type": "text", "text": "four"}]},
    ]
    found = parsed(messages=messages)
    assert found.system == "be brief"
    assert [(one.text, len(one.images), one.answer) for one in found.exchanges] == [
        ("one\ntwo", 1, "three"),
        ("four", 0, None),
    ]


def test_json_is_read_strictly():
    assert parse_json(b'{"a": 1}') == {"a": 1}
    for body in (b"{'a': 1}", b"Infinity", b'{"a": 1} x', b'\x80"'):
        with pytest.raises(RequestError):
            parse_json(body)
    with pytest.raises(RequestError, match=r"not valid JSON: a number of too many digits$"):
        parse_json(b"1" * 5000)
    with pytest.raises(RequestError, match="not valid JSON: NaN is no JSON"):
        parse_json(b'{"temperature": NaN}')
