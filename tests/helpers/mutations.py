"""Damaged copies of good inputs, for tests that whatever a reader meets ends as a value or a named error.

``seeded`` prints its seed, and ``DYVTE_SEED`` sets another one. ``mutated`` works on the bytes of any file,
``mutated_json`` on what a JSON (or JSON-lines) file holds: a value replaced, a key lost, a row doubled.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from typing import Any


def seeded(default: int) -> random.Random:
    """A generator whose seed is printed: the test's own, or that of ``DYVTE_SEED``."""
    seed = int(os.environ.get("DYVTE_SEED", default))
    print(f"seed {seed} (DYVTE_SEED={seed} repeats this)")
    return random.Random(seed)


INSERTS = (
    *(b"\0", b"\n", b"\r\n", b"\t", b'"', b"{", b"}", b"[", b"]", b",", b"\xff", b"\xef\xbb\xbf", b"null"),
    *(b"\xe2\x80\xa8", b"\\ud83d", b"1e999", b"NaN", b"-1", b"9" * 20, b"../", b"PAR1", b"PK\x03\x04"),
)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one to three of: a byte changed, a piece cut out, put in, doubled or swapped; the end
    cut off; nothing left at all."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at, length = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 8, 64, 512))
        kind = draw.choice(("flip", "flip", "cut", "insert", "insert", "double", "end", "swap", "empty"))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes((data[at] ^ (1 << draw.randrange(8)),)) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + length :]
        elif kind == "insert":
            data = data[:at] + draw.choice(INSERTS) + data[at:]
        elif kind == "double":
            data = data[: at + length] + data[at:]
        elif kind == "swap":
            other = draw.randrange(len(data) + 1)
            data = data[:at] + data[other : other + length] + data[at + length :]
        elif kind == "end":
            data = data[:at]
        elif kind == "empty" and draw.random() < 0.1:
            data = b""
    return data


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 7, 2.5, 1e300, float("nan"), float("inf"), 10**30, "", " ", "x"),
    *("A", "Z", "yes", "../x", "a/b", "x" * 300, "\0", "\ud83d", "<image>", "</s>", "[", "\u2028"),
    *([], [None], ["a", None, 3], "['a', None]", [[]], {}, {"a": 1}, {"bytes": "x"}, [{"answer": 1}]),
)
"""What a careless writer may have put where something else belongs."""


def mutated_json(content: Any, draw: random.Random) -> Any:
    """A copy with one to three values replaced, or keys or rows lost, doubled or renamed, at any depth."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(content))
        if not places or draw.random() < 0.03:
            return copy.deepcopy(draw.choice(VALUES))
        holder, key = draw.choice(places)
        kind = draw.choice(("value", "value", "value", "lose", "double", "rename"))
        if kind == "value":
            holder[key] = copy.deepcopy(draw.choice(VALUES))
        elif kind == "lose":
            del holder[key]
        elif kind == "double" and isinstance(holder, list):
            holder.insert(draw.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw.choice(("x", "", "question", "answer", "image", "id", str(key).upper()))] = (
                holder.pop(key)
            )
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every (list or dictionary, index or key) within."""
    if isinstance(content, list | dict):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


def json_bytes(content: Any, *, lines: bool = False) -> bytes:
    """As a file holds it, lone surrogates escaped; with ``lines`` one item a line."""
    if lines and isinstance(content, list):
        return "".join(f"{json.dumps(item)}\n" for item in content).encode()
    return json.dumps(content).encode()
