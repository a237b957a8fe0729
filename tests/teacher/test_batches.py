"""Which samples run together."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyvte.data import EmbeddedImage, Sample
from dyvte.teacher import TeacherConfig
from dyvte.teacher.batches import LONG_TEXT, batches_of


def sample(name: str, image, words: int = 1) -> Sample:
    return Sample(id=name, image=image, question="word " * words, answer="yes", image_id=str(image))


def ids(batches) -> list[list[str]]:
    return [[one.id for one in batch] for batch in batches]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path, data in zip(paths, (b"one", b"two", b"one"), strict=True):
        path.write_bytes(data)
    return paths


def test_what_an_image_holds_decides_not_its_name(pictures) -> None:
    a, b, same_as_a = pictures
    samples = [sample("0", a), sample("1", b), sample("2", same_as_a), sample("3", EmbeddedImage(b"two"))]
    config = TeacherConfig(batch_size=2)
    assert ids(batches_of(samples, config)) == [["0", "2"], ["1", "3"]]
    assert ids(batches_of(samples, config, by_length=False)) == [["0", "2"], ["1", "3"]]
    a.write_bytes(b"changed")
    assert ids(batches_of(samples, config)) == [["0", "2"], ["1", "3"]]  # alone now, and of no other length
    assert ids(batches_of(samples, TeacherConfig(batch_size=3))) == [["0", "2"], ["1", "3"]]
    apart = TeacherConfig(batch_size=2, share_images=False)
    assert ids(batches_of(samples, apart)) == [["0", "1"], ["2", "3"]]


def test_groups_stay_together_where_they_fit_and_lengths_are_alike(pictures) -> None:
    a, b, _ = pictures
    long = [sample(f"a{i}", a, 20 + i) for i in range(5)]
    short = [sample(f"b{i}", b, i + 1) for i in range(2)]
    assert ids(batches_of([*long, *short], TeacherConfig(batch_size=6))) == [
        ["b0", "b1"],
        ["a0", "a1", "a2", "a3", "a4"],
    ]
    # A group larger than a batch fills up what is there.
    assert ids(batches_of([*long, *short], TeacherConfig(batch_size=3))) == [
        ["b0", "b1", "a0"],
        ["a1", "a2", "a3"],
        ["a4"],
    ]
    assert ids(batches_of([*long, *short], TeacherConfig(batch_size=7))) == [
        ["b0", "b1", "a0", "a1", "a2", "a3", "a4"]
    ]


def test_long_samples_never_run_with_short_ones(pictures) -> None:
    a, b, _ = pictures
    mixed = [sample("a0", a, 10), sample("a1", a, LONG_TEXT + 50), sample("a2", a, 12)]
    others = [sample("b0", b, LONG_TEXT + 20), sample("b1", b, 11)]
    config = TeacherConfig(batch_size=8)
    assert ids(batches_of([*mixed, *others], config)) == [["b1", "a0", "a2"], ["b0", "a1"]]
    # in their own order all run as they come
    assert ids(batches_of([*mixed, *others], config, by_length=False)) == [["a0", "a1", "a2", "b0", "b1"]]


def test_images_that_cannot_be_read_are_left_to_who_opens_them(tmp_path: Path) -> None:
    gone = [sample("0", tmp_path / "gone.png"), sample("1", None), sample("2", Path("a\0b"))]
    assert ids(batches_of(gone, TeacherConfig(batch_size=8))) == [["0", "1", "2"]]
    assert batches_of([], TeacherConfig()) == []
