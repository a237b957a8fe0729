"""LLaVA conversations: what becomes a sample, and what is refused by file, sample and field."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dyvte.data import load_image, open_conversations, select
from dyvte.data.defects import check_defects
from dyvte.data.llava import Tally
from dyvte.data.samples import EmbeddedImage
from dyvte.errors import DataError
from tests.helpers.conversations import entry, write


def read(folder: Path, entries: Any, turns: str = "first", max_bad_samples: int = 0, **kwargs: Any):
    tally = Tally()
    samples = list(open_conversations(write(folder, entries)).samples(turns, tally, **kwargs))
    check_defects(tally.defects, max_bad_samples)
    return samples, tally


def test_first_exchange_becomes_a_sample(tmp_path: Path) -> None:
    (first, second, third), tally = read(
        tmp_path,
        [
            entry(7, "x/1.png", "<image>\nFirst?", "One."),
            entry("b", "./x//1.png", "At the end? \n<image>", "Two.", "More?", "Three."),
            entry("c", None, "Hello", "Hi"),
        ],
    )
    assert (first.id, first.question, first.answer) == ("7", "First?", "One.")
    assert first.image == tmp_path / "images" / "x" / "1.png"
    assert (second.question, second.answer, second.num_turns) == ("At the end?", "Two.", 2)
    assert second.history == ()
    assert first.image_id == second.image_id == "x/1.png"
    assert third.image is None
    assert tally.conversations == 3


def test_every_exchange_becomes_a_sample_with_the_earlier_ones_in_its_history(tmp_path: Path) -> None:
    samples, _ = read(
        tmp_path,
        [entry("a", "x/1.png", "<image>\nQ1", "A1", "Q2 ", " A2", "Q3", "A3"), entry("b")],
        turns="all",
    )
    assert [sample.id for sample in samples] == ["a", "a:turn2", "a:turn3", "b"]
    assert [(s.question, s.answer) for s in samples[:3]] == [("Q1", "A1"), ("Q2 ", " A2"), ("Q3", "A3")]
    assert samples[2].history == (("Q1", "A1"), ("Q2 ", " A2"))
    assert samples[2].num_characters == len("Q1A1Q2  A2Q3A3")
    assert {s.image_id for s in samples} == {"x/1.png"}
    assert [s.num_turns for s in samples] == [3, 3, 3, 1]


def test_text_is_what_the_original_trains_on(tmp_path: Path) -> None:
    """preprocess_multimodal (llava/train/train.py): only turns that hold the placeholder are touched."""

    def original(value: str) -> str:
        if "<image>" in value:
            value = value.replace("<image>", "").strip()
            value = ("<image>" + "\n" + value).strip()
        return value

    written = ["<image>\nQ", "Q\n<image>", "What <image> is it?", "  <image>Q \n", "\n<image>\n\nQ? "]
    answers = ["A", " A ", "A\n", "\tA", "A."]
    entries = [entry(i, "x/1.png", q, a) for i, (q, a) in enumerate(zip(written, answers, strict=True))]
    samples, tally = read(tmp_path, entries)
    assert [f"<image>\n{s.question}" for s in samples] == [original(q) for q in written]
    assert [s.answer for s in samples] == answers
    assert tally.moved_placeholders == 1  # the one inside a sentence


def test_ids_stay_unique(tmp_path: Path) -> None:
    two_turns = entry("a", "x/1.png", "<image>\nQ1", "A1", "Q2", "A2")
    entries = [two_turns, two_turns, entry("a#2"), entry("a:turn2"), entry(""), entry(None), entry("a")]
    samples, tally = read(tmp_path, entries, turns="all")
    ids = [sample.id for sample in samples]
    assert len(set(ids)) == len(ids) == 9
    assert ids[0] == "a"
    assert ids[2] == "a#2"
    assert tally.repeated_ids == 4  # the second and third "a", "a#2" and "a:turn2", which were given out


def test_repeated_ids_are_refused_on_request(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.json: sample 'a#2': id: 'a' was there before"):
        read(tmp_path, [entry("a"), entry("a")], repeated_ids="refuse")
    samples, _ = read(tmp_path, [entry("a"), entry("a")], repeated_ids="refuse", max_bad_samples=1)
    assert [sample.id for sample in samples] == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not valid JSON"),
        ('{"id": 1}', "expected a JSON list of conversations, or one a line; found an object of 'id'"),
        ("3", "expected a JSON list"),
        ("", "found an empty file"),
        (" [ ] ", "empty"),
        ('[{"id": 1} {"id": 2}]', "not valid JSON near character 11"),
        ('[{"id": 1}] x', "text after the list"),
        ('[{"id": 1},]', "not valid JSON"),
        ('[{"id": "', "not valid JSON"),
    ],
)
def test_not_a_conversation_list(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, content, max_bad_samples=9)
    assert "data.json" in str(caught.value)


def gpt_first() -> dict[str, Any]:
    made = entry("a")
    made["conversations"].reverse()
    return made


def turn(at: int, **changes: Any) -> dict[str, Any]:
    made = entry("a", "x/1.png", "<image>\nQ1", "A1", "Q2", "A2")
    made["conversations"][at].update(changes)
    return made


BAD = [
    (gpt_first(), "conversations[0].from", "starts with 'gpt'"),
    (turn(2, **{"from": "gpt"}), "conversations[2].from", "expected 'human', found 'gpt'"),
    (entry("a", "x/1.png", "<image>\nQ", "  "), "conversations[1].value", "answer is empty"),
    (entry("a", "x/1.png", "<image>\n", "A"), "conversations[0].value", "question is empty"),
    (turn(3, value="\n"), "conversations[3].value", "answer is empty"),
    (turn(2, value=""), "conversations[2].value", "question is empty"),
    (entry("a", "x/1.png", "<image>\nQ"), "conversations[0]", "no answer turn"),
    (entry("a", "x/1.png", "<image>\nQ", "A", "Q2"), "conversations[2]", "no answer turn"),
    (entry("a", "x/1.png", "<image><image>\nQ", "A"), "conversations", "2 <image>"),
    (turn(2, value="<image> Q2"), "conversations", "2 <image>"),
    (entry("a", "x/1.png", "Q", "A"), "conversations[0].value", "no <image>"),
    (
        entry("a", "x/1.png", "Q", "A", "<image> Q2", "A2"),
        "conversations[0].value",
        "stands in conversations[2]",
    ),
    (entry("a", None, "<image>\nQ", "A"), "image", "no image is given"),
    (entry("a", ["x/1.png", "x/2.png"]), "image", "2 images"),
    (entry("a", 3), "image", "expected a path"),
    (entry("a", "x\\1.png"), "image", "forward slashes"),
    (entry("a", "x/1\0.png"), "image", "no path"),
    ({"id": "a", "image": "x/1.png"}, "conversations", "non-empty list"),
    ({"id": "a", "image": "x/1.png", "conversations": []}, "conversations", "non-empty list"),
    ({"id": "a", "image": "x/1.png", "conversations": [{"from": "human"}]}, "conversations[0]", "expected"),
    (turn(1, value=["A"]), "conversations[1].value", "expected text, found list"),
    (turn(1, value=None), "conversations[1].value", "expected text, found NoneType"),
    (3, "entry", "JSON object"),
]


@pytest.mark.parametrize(("bad", "field", "problem"), BAD)
def test_defects_name_file_sample_and_field(tmp_path: Path, bad: Any, field: str, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, [entry("fine"), bad], turns="all")
    sample_id = "a" if isinstance(bad, dict) else "entry 1"
    assert f"data.json: sample {sample_id!r}: {field}: " in str(caught.value)
    assert problem in str(caught.value)
    assert "1 unusable" in str(caught.value)

    samples, tally = read(tmp_path, [bad, entry("fine")], turns="all", max_bad_samples=1)
    assert [sample.id for sample in samples] == ["fine"]
    assert [defect.field for defect in tally.defects] == [field]


def test_later_exchanges_that_are_not_used_are_not_checked(tmp_path: Path) -> None:
    cut = entry("a", "x/1.png", "<image>\nQ", "A", "Q2")
    samples, _ = read(tmp_path, [cut, turn(3, value="")], turns="first")
    assert [sample.question for sample in samples] == ["Q", "Q1"]


OUTSIDE = ["../secret.png", "x/../../secret.png", "/etc/passwd", ".."]
OUTSIDE += [
    "..\\secret.png",
    "x\\..\\..\\secret.png",
    "C:\\secret.png",
    "c:/secret.png",
    "\\\\host\\share\\1.png",
]


@pytest.mark.parametrize("image", OUTSIDE)
def test_image_outside_the_folder_is_always_fatal(tmp_path: Path, image: str) -> None:
    with pytest.raises(DataError, match=r"data\.json: sample 'a': image: .* leaves the image folder"):
        read(tmp_path, [entry("a", image)], max_bad_samples=99)


@pytest.mark.parametrize("linked", ["file", "folder", "dangling out"])
def test_symbolic_links_out_of_the_folder_are_fatal(tmp_path: Path, linked: str) -> None:
    path = write(tmp_path, [entry("a", "y/2.png")])
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "2.png").write_bytes(b"secret")
    folder = tmp_path / "images" / "y"
    if linked == "folder":
        folder.symlink_to(outside)
    else:
        folder.mkdir()
        target = outside / "2.png" if linked == "file" else outside / "none.png"
        (folder / "2.png").symlink_to(target)
    data = open_conversations(path)
    if linked == "dangling out":
        with pytest.raises(DataError, match="there is no file"):
            select(data)
        return
    with pytest.raises(DataError, match=r"data\.json: sample 'a': image: .*symbolic link that leaves"):
        select(data, max_bad_samples=99)
    assert len(select(data, follow_links=True).samples) == 1


def test_symbolic_links_that_stay_inside_are_followed(tmp_path: Path) -> None:
    path = write(tmp_path, [entry("a", "y/1.png")])
    (tmp_path / "images" / "y").symlink_to(tmp_path / "images" / "x")
    real = tmp_path / "real"
    os.rename(tmp_path / "images", real)
    (tmp_path / "images").symlink_to(real)  # the folder itself may be a link
    (real / "y").unlink()
    (real / "y").symlink_to("x")
    assert len(select(open_conversations(path)).samples) == 1


def test_text_only_conversations_may_start_with_gpt(tmp_path: Path) -> None:
    made = entry("a", None, "Hi", "Hello")
    made["conversations"].reverse()
    assert read(tmp_path, [made])[0][0].image is None


def test_images_are_read_as_llava_reads_them(tmp_path: Path) -> None:
    """Image.open(path).convert("RGB"): EXIF rotation is ignored, alpha dropped, grey and palette spread."""
    wide = Image.new("RGB", (4, 2), (10, 20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    wide.save(tmp_path / "exif.png", exif=exif)
    assert load_image(tmp_path / "exif.png").size == (4, 2)
    Image.new("RGBA", (2, 2), (1, 2, 3, 0)).save(tmp_path / "alpha.png")
    assert load_image(tmp_path / "alpha.png").getpixel((0, 0)) == (1, 2, 3)
    Image.new("L", (2, 2), 7).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png").getpixel((1, 1)) == (7, 7, 7)
    wide.convert("P").save(tmp_path / "palette.png")
    assert load_image(tmp_path / "palette.png").mode == "RGB"
    packed = EmbeddedImage((tmp_path / "alpha.png").read_bytes())
    assert load_image(packed).tobytes() == load_image(tmp_path / "alpha.png").tobytes()


@pytest.mark.parametrize("broken", ["text", "truncated", "missing", "folder"])
def test_broken_images_are_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "1.png"
    if broken == "text":
        path.write_text("no image")
    elif broken == "truncated":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:1000])
    elif broken == "folder":
        path.mkdir()
    with pytest.raises(DataError, match=r"1\.png"):
        load_image(path)
