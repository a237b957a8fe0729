"""Conversation records as people have them: read, or refused by file, sample and field, never skipped."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from dyvte.data import EmbeddedImage, open_conversations, select
from dyvte.data.defects import check_defects
from dyvte.data.llava import Tally
from dyvte.data.records import IMAGE_KEYS
from dyvte.errors import DataError
from tests.helpers.conversations import entry, write


def read(folder: Path, entries: Any, turns: str = "all", max_bad_samples: int = 0):
    tally = Tally()
    samples = list(open_conversations(write(folder, entries)).samples(turns, tally))
    check_defects(tally.defects, max_bad_samples)
    return samples, tally


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What is it?"}
ANSWER = said("assistant", "A cat.")
PLAIN = [said("user", "<image>What is it?"), ANSWER]
PARTS = [said("user", [IMAGE, TEXT]), said("assistant", [{"type": "text", "text": "A cat."}])]
BEHIND = [said("user", [TEXT, IMAGE]), ANSWER]
# as pyarrow writes parts of several kinds into one column
PADDED = [said("user", [{"type": "image", "text": None}, {**TEXT, "image": None}]), ANSWER]
ALIKE = [
    {"image": "x/1.png", "messages": PLAIN},
    {"images": ["x/1.png"], "messages": PLAIN},
    {"images": ["x/1.png"], "messages": PARTS},
    {"images": [{"bytes": None, "path": "x/1.png"}], "messages": BEHIND},
    {"image_path": "x/1.png", "messages": PADDED},
    {"image_file": "x/1.png", "image": None, "messages": PADDED, "conversations": None},
    {"image": "x/1.png", "images": ["x/1.png"], "messages": PLAIN},
    {"messages": [said("user", [{"type": "image", "image": "x/1.png"}, TEXT]), ANSWER]},
    {"messages": [said("user", [{"type": "image", "path": "x/1.png"}, TEXT]), ANSWER]},
    {"messages": [said("user", [{"type": "image_url", "image_url": {"url": "x/1.png"}}, TEXT]), ANSWER]},
    {"images": ["x/1.png"], "messages": [said("user", [{**IMAGE, "image": "x/1.png"}, TEXT]), ANSWER]},
    {
        "image": "x/1.png",
        "messages": {"role": ["user", "assistant"], "content": ["<image>What is it?", "A cat."]},
    },
    {"image": "x/1.png", "conversations": PLAIN},
    {
        "image_paths": ["x/1.png"],
        "conversations": [
            {"from": "user", "value": "What is it?\n<image>"},
            {"from": "assistant", "value": "A cat."},
        ],
    },
]


@pytest.mark.parametrize("record", ALIKE)
def test_layouts_that_say_the_same_are_read_the_same(tmp_path: Path, record: dict[str, Any]) -> None:
    (expected,), _ = read(tmp_path, [entry("a", "x/1.png", "<image>\nWhat is it?", "A cat.")])
    (found,), _ = read(tmp_path, [{"id": "a", **record}])
    assert found == expected


def test_a_system_turn_becomes_the_system_prompt(tmp_path: Path) -> None:
    turns = [said("system", "Be short."), said("user", [IMAGE, TEXT]), ANSWER, said("user", "Why?"), ANSWER]
    samples, _ = read(tmp_path, [{"id": "a", "images": ["x/1.png"], "messages": turns}])
    assert [(s.question, s.system, len(s.history), s.num_turns) for s in samples] == [
        ("What is it?", "Be short.", 0, 2),
        ("Why?", "Be short.", 1, 2),
    ]
    llava = entry("a", "x/1.png", "<image>\nQ", "A")
    llava["conversations"].insert(0, {"from": "system", "value": "Be short."})
    path = write(tmp_path, [llava])
    with_system = select(open_conversations(path))
    without = select(open_conversations(write(tmp_path, [entry("a", "x/1.png", "<image>\nQ", "A")])))
    assert with_system.samples[0].system == "Be short."
    assert with_system.sha256 != without.sha256


def test_pictures_inside_the_file_are_taken_out_of_it(tmp_path: Path) -> None:
    address = "data:image/png;base64," + base64.b64encode(b"picture").decode()
    part = {"type": "image_url", "image_url": {"url": address}}
    (sample,), _ = read(tmp_path, [{"id": "a", "messages": [said("user", [part, TEXT]), ANSWER]}])
    assert sample.image == EmbeddedImage(b"picture")


BAD = [
    ({"img": "x/1.png"}, "img", "looks like an image"),
    ({"picture": ["photo.JPEG"]}, "picture", "looks like an image"),
    ({"media": {"path": "a/b.webp"}}, "media", "looks like an image"),
    ({"image_url": "https://example.org/a.png?size=1"}, "image_url", "looks like an image"),
    ({"image": "https://example.org/a.png"}, "image", "is an address"),
    ({"images": ["s3://bucket/a.png"]}, "images", "is an address"),
    ({"image": "data:image/png;base64,%%%"}, "image", "does not hold base64"),
    ({"image": {"file": "a.png"}}, "image", "expected a path or image bytes"),
    ({"image": {"bytes": "iVBOR", "path": None}}, "image", "expected the bytes of an image, found str"),
    ({"images": [["x/1.png"]]}, "images", "expected a path or image bytes, found list"),
    ({"images": ["x/1.png", "x/2.png"]}, "images", "2 images"),
    ({"image": "x/1.png", "image_path": "x/2.png"}, "image", "2 images"),
    ({"video": "v.mp4"}, "video", "video is not read"),
    ({"image": "x/1.png", "audios": ["a.wav"]}, "audios", "audios is not read"),
    ({"image": "x/\udc80.png"}, "image", "half of a surrogate pair"),
]


@pytest.mark.parametrize(("extra", "field", "problem"), BAD)
def test_what_looks_like_an_image_is_never_text_only(
    tmp_path: Path, extra: dict[str, Any], field: str, problem: str
) -> None:
    questions = ["<image>\nQ"] if field in IMAGE_KEYS else ["Q", "<image>\nQ"]
    for question in questions:
        with pytest.raises(DataError) as caught:
            read(tmp_path, [{**entry("a", None, question, "A"), **extra}])
        assert f"sample 'a': {field}: " in str(caught.value)
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "field", "problem"),
    [
        ([said("user", [IMAGE, {"type": "audio"}]), ANSWER], "messages[0].content[1]", "'audio'"),
        ([said("user", [IMAGE, "What?"]), ANSWER], "messages[0].content[1]", "'What?'"),
        ([said("user", [IMAGE, {"type": "text", "text": None}]), ANSWER], "messages[0].content[1]", "None"),
        ([said("user", None), ANSWER], "messages[0].content", "expected text, found NoneType"),
        ([said("user", [IMAGE, IMAGE, TEXT]), ANSWER], "messages", "2 <image>"),
        ([said("user", [TEXT]), ANSWER], "messages[0].content", "holds no <image>"),
        ([said("user", [TEXT]), said("assistant", [IMAGE])], "messages[0].content", "stands in messages[1]"),
        ([said("tool", [IMAGE, TEXT]), ANSWER], "messages[0].role", "starts with 'tool'"),
        ([said("user", [IMAGE, TEXT]), said("user", "Why?")], "messages[1].role", "expected 'gpt'"),
        ([said("user", [IMAGE, TEXT])], "messages[0]", "no answer turn"),
        ([said("user", [IMAGE, TEXT]), said("assistant", " ")], "messages[1].content", "answer is empty"),
        ([said("system", "s")], "messages[0]", "alone is no conversation"),
        ([{"content": "What?"}], "messages[0]", "expected {"),
        ([said(["user"], [IMAGE, TEXT]), ANSWER], "messages[0].role", "starts with ['user']"),
        ("What?", "messages", "non-empty list"),
        ([said("user", [IMAGE, {"type": "text", "text": "\ude00"}]), ANSWER], "messages[0].content", "half"),
    ],
)
def test_messages_that_cannot_be_used_are_named(
    tmp_path: Path, messages: Any, field: str, problem: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, [{"id": "a", "images": ["x/1.png"], "messages": messages}])
    assert f"sample 'a': {field}: " in str(caught.value)
    assert problem in str(caught.value)


def test_both_layouts_in_one_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="messages: the record has conversations and messages"):
        read(tmp_path, [{**entry("a"), "messages": PLAIN}])


def test_text_may_speak_of_the_placeholder_where_there_is_no_picture(tmp_path: Path) -> None:
    talk = [
        entry("a", None, "How do I write an <image> tag?", "<svg><image/></svg> or <img>."),
        {"id": "b", "messages": [said("user", "Is <image> a tag?"), said("assistant", "Of SVG.")]},
    ]
    samples, tally = read(tmp_path, talk)
    assert [s.image for s in samples] == [None, None]
    assert not tally.defects
    forgotten = {"id": "c", "messages": [said("user", [IMAGE, TEXT]), ANSWER]}
    with pytest.raises(DataError, match=r"sample 'c': image: the text holds <image> but no image is given"):
        read(tmp_path, [forgotten])


HALF = "\ud83d"


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (entry("a", "x/1.png", f"<image>\nWhat {HALF}", "A"), "conversations[0].value"),
        (entry("a", "x/1.png", "<image>\nQ", "A", "Q2", f"{HALF}{HALF}"), "conversations[3].value"),
        (entry(f"a{HALF}"), "id"),
        ({**entry("a"), "image": f"x/{HALF}.png"}, "image"),
    ],
)
def test_half_a_character_is_a_defect(tmp_path: Path, record: Any, field: str) -> None:
    path = tmp_path / "data.jsonl"
    write(tmp_path, [])
    path.write_text("\n".join(json.dumps(one) for one in (entry("fine"), record)))
    chosen = select(open_conversations(path), turns="all", max_bad_samples=1)
    assert [s.id for s in chosen.samples] == ["fine"]
    assert [one.field for one in chosen.defects] == [field]
    str(chosen.defects[0]).encode()  # can be printed
    with pytest.raises(DataError, match="half of a surrogate pair"):
        select(open_conversations(path), turns="all")


def test_half_a_character_in_the_id_of_a_text_only_record_hurts_nobody(tmp_path: Path) -> None:
    path = write(tmp_path, [entry(f"a{HALF}", None, "Q", "A"), entry("b")])
    assert select(open_conversations(path)).counts["text_only"] == 1
    assert len(select(open_conversations(path), image_only=False).samples) == 2


def test_json_lines_under_the_name_of_a_json_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [entry(i, "x/1.png", f"<image>\nQ{i} \u2028", "A") for i in range(20)]
    expected = read(tmp_path, rows)[0]
    for chunk in (1, 13, 1 << 20):
        monkeypatch.setattr("dyvte.data.sources._CHUNK", chunk)
        for text in ("\n".join(map(json.dumps, rows)), "\r\n\n".join(json.dumps(r, indent=1) for r in rows)):
            assert read(tmp_path, text)[0] == expected
    assert read(tmp_path, json.dumps(rows[0]))[0] == expected[:1]
    with pytest.raises(DataError, match=r"data\.json: not valid JSON near character"):
        read(tmp_path, json.dumps(rows[0]) + "\n{'id'")
    with pytest.raises(DataError, match="found an object of 'data', 'version'"):
        read(tmp_path, json.dumps({"data": rows, "version": 1}))
    with pytest.raises(DataError, match="found an object of nothing"):
        read(tmp_path, "{}")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000])
def test_json_beyond_what_python_reads_is_named(tmp_path: Path, value: str, suffix: str) -> None:
    path = tmp_path / f"odd.{suffix}"
    path.write_text(f'[{{"id": {value}}}]' if suffix == "json" else f'{{"id": {value}}}')
    with pytest.raises(DataError, match=rf"odd\.{suffix}"):
        select(open_conversations(path))
