"""LLaVA conversation files: what becomes a sample, what is refused, and what a selection records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dyvte.data.llava import load_llava, select, selection_sha256
from dyvte.errors import DataError


def entry(sample_id: Any = "a", image: Any = "x/1.png", *values: str) -> dict[str, Any]:
    values = values or ("<image>\nWhat is it?", "A cat.")
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": value} for i, value in enumerate(values)]
    made = {"id": sample_id, "conversations": turns}
    return made if image is None else {**made, "image": image}


def write(folder: Path, entries: Any, images: tuple[str, ...] = ("x/1.png",)) -> Path:
    for name in images:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(b"not opened here")
    path = folder / "data.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return path


def read(folder: Path, entries: Any, **kwargs: Any):
    return load_llava(write(folder, entries), folder / "images", **kwargs)


def test_first_exchange_becomes_a_sample(tmp_path: Path) -> None:
    data = read(
        tmp_path,
        [
            entry(7, "x/1.png", "<image>\nFirst?", " One. "),
            entry("b", "./x//1.png", "At the end? \n<image>", "Two.", "More?", "Three."),
            entry("c", None, "Hello", "Hi"),
        ],
    )
    first, second, third = data.samples
    assert (first.id, first.question, first.answer) == ("7", "First?", "One.")
    assert first.image == tmp_path / "images" / "x" / "1.png"
    assert (second.question, second.answer, second.num_turns) == ("At the end?", "Two.", 2)
    assert first.image_id == second.image_id == "x/1.png"
    assert third.image is None


def test_repeated_ids_stay_distinct(tmp_path: Path) -> None:
    data = read(tmp_path, [entry("a"), entry("a"), entry("a")])
    assert [sample.id for sample in data.samples] == ["a", "a#2", "a#3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"id": 1}', "expected a JSON list"),
        ("[]", "empty"),
    ],
)
def test_not_a_conversation_list(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, content)
    assert "data.json" in str(caught.value)


def gpt_first() -> dict[str, Any]:
    made = entry("a")
    made["conversations"].reverse()
    return made


@pytest.mark.parametrize(
    ("bad", "field", "problem"),
    [
        (gpt_first(), "conversations[0].from", "starts with 'gpt'"),
        (entry("a", "x/1.png", "<image>\nQ", "  "), "conversations[1].value", "answer is empty"),
        (entry("a", "x/1.png", "<image>\n", "A"), "conversations[0].value", "question is empty"),
        (entry("a", "x/1.png", "<image>\nQ"), "conversations", "no answer turn"),
        (entry("a", "x/1.png", "<image><image>\nQ", "A"), "conversations", "2 <image>"),
        (entry("a", "x/1.png", "Q", "A"), "conversations[0].value", "no <image>"),
        (entry("a", None, "<image>\nQ", "A"), "image", "no image is given"),
        (entry("a", ["x/1.png", "x/2.png"]), "image", "2 images"),
        (entry("a", 3), "image", "expected a path"),
        ({"id": "a", "image": "x/1.png"}, "conversations", "non-empty list"),
        (
            {"id": "a", "image": "x/1.png", "conversations": [{"from": "human"}]},
            "conversations[0]",
            "expected",
        ),
        (3, "entry", "JSON object"),
    ],
)
def test_defects_name_file_sample_and_field(tmp_path: Path, bad: Any, field: str, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, [bad, entry("fine")])
    message = str(caught.value)
    assert "data.json" in message
    assert field in message
    assert problem in message
    assert "1 unusable" in message

    allowed = read(tmp_path, [bad, entry("fine")], max_bad_samples=1)
    assert [sample.id for sample in allowed.samples] == ["fine"]
    assert [defect.field for defect in allowed.defects] == [field]


@pytest.mark.parametrize("image", ["../secret.png", "x/../../secret.png", "/etc/passwd", ".."])
def test_image_outside_the_folder_is_always_fatal(tmp_path: Path, image: str) -> None:
    with pytest.raises(DataError, match="leaves the image folder"):
        read(tmp_path, [entry("a", image)], max_bad_samples=99)


def test_text_only_conversations_may_start_with_gpt(tmp_path: Path) -> None:
    made = entry("a", None, "Hi", "Hello")
    made["conversations"].reverse()
    assert read(tmp_path, [made]).samples[0].image is None


def test_missing_image_is_counted_named_and_limited(tmp_path: Path) -> None:
    data = read(tmp_path, [entry("here"), entry("gone", "x/2.png")])
    with pytest.raises(DataError, match=r"gone.*image.*2\.png"):
        select(data)
    chosen = select(data, max_bad_samples=1)
    assert [sample.id for sample in chosen.samples] == ["here"]
    assert chosen.counts["missing_images"] == 1
    assert chosen.defects[0].sample_id == "gone"


def test_selection_filters_counts_and_digest(tmp_path: Path) -> None:
    entries = [entry(f"s{i}", "x/1.png", "<image>\nQ", f"A{i}") for i in range(200)]
    entries += [entry("t", None, "Q", "A"), entry("m", "x/1.png", "<image>\nQ", "A", "Q2", "A2")]
    data = read(tmp_path, entries)

    tenth = select(data, fraction=0.1, seed=3)
    assert len(tenth.samples) == 20
    assert tenth.counts == {
        "conversations": 202, "unusable": 0, "text_only": 1, "multi_turn": 1, "eligible": 200,
        "missing_images": 0, "chosen": 20,
    }  # fmt: skip
    order = [int(sample.id[1:]) for sample in tenth.samples]
    assert order == sorted(order)
    assert select(data, fraction=0.1, seed=3) == tenth
    assert select(data, fraction=0.1, seed=4).sha256 != tenth.sha256
    assert tenth.sha256 == selection_sha256(tenth.samples) != selection_sha256(tenth.samples[::-1])

    assert len(select(data, single_turn=False).samples) == 201
    assert len(select(data, single_turn=False, image_only=False).samples) == 202
    assert len(select(data, limit=7).samples) == 7
    # The draw must not be the first n: a file ordered by image would give few images.
    assert [sample.id for sample in select(data, limit=7).samples] != [f"s{i}" for i in range(7)]


def test_nothing_left_says_why(tmp_path: Path) -> None:
    data = read(tmp_path, [entry("t", None, "Q", "A")])
    with pytest.raises(DataError, match="text only 1"):
        select(data)
    with pytest.raises(ValueError, match="fraction"):
        select(data, fraction=0)
