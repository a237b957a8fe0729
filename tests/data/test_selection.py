"""Selections: filters, the seeded draw against its definition by brute force, counts and digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from dyvte.data import open_conversations, select, selection_sha256
from dyvte.data.samples import Sample
from dyvte.data.selection import Draw
from dyvte.errors import DataError
from tests.helpers.conversations import entry, write


def sample(i: int) -> Sample:
    return Sample(id=f"s{i}", image=Path("x.png"), question="Q", answer="A", image_id="x.png")


def smallest(ids: list[str], size: int, seed: int) -> list[str]:
    """The rule: the ids of the smallest sha256("seed\\0id"), in their own order."""
    keys = {name: hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8] for name in ids}
    chosen = set(sorted(ids, key=keys.__getitem__)[:size])
    return [name for name in ids if name in chosen]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("limit", [None, 1, 50])
def test_the_draw_is_the_smallest_keys_of_a_stream(fraction: float, limit: int | None, seed: int) -> None:
    samples = [sample(i) for i in range(4_000)]
    for num in (1, 7, 4_000):
        draw = Draw(fraction, limit, seed)
        for one in samples[:num]:
            draw.offer(one)
        size = max(1, round(fraction * num))
        size = size if limit is None else min(size, limit)
        assert [one.id for one in draw.taken()] == smallest([s.id for s in samples[:num]], size, seed)


def test_a_stream_is_not_kept() -> None:
    draw, most = Draw(0.01, None, 0), 0
    for i in range(20_000):
        draw.offer(sample(i))
        most = max(most, len(draw._kept))
    assert len(draw.taken()) == 200
    assert most < 2500  # the 200, 6 standard deviations, and what gathers between two cuts


def test_filters_counts_and_digest(tmp_path: Path) -> None:
    entries = [entry(f"s{i}", "x/1.png", "<image>\nQ", f"A{i}") for i in range(200)]
    entries += [entry("t", None, "Q", "A"), entry("m", "x/1.png", "<image>\nQ", "A", "Q2", "A2")]
    data = open_conversations(write(tmp_path, entries))

    tenth = select(data, fraction=0.1, seed=3)
    assert tenth.counts == {
        "conversations": 202, "unusable": 0, "several_images": 0, "repeated_ids": 0, "moved_placeholders": 0,
        "text_only": 1, "multi_turn": 1, "eligible": 200, "missing_images": 0, "chosen": 20, "images": 1,
    }  # fmt: skip
    assert [s.id for s in tenth.samples] == smallest([f"s{i}" for i in range(200)], 20, 3)
    assert select(data, fraction=0.1, seed=3) == tenth
    assert select(data, fraction=0.1, seed=4).sha256 != tenth.sha256
    assert tenth.sha256 == selection_sha256(tenth.samples) != selection_sha256(tenth.samples[::-1])

    assert len(select(data, turns="first").samples) == 201
    everything = select(data, turns="all")
    assert [s.id for s in everything.samples[-2:]] == ["m", "m:turn2"]
    assert everything.counts["multi_turn"] == 1
    assert everything.counts["eligible"] == 202
    assert len(select(data, turns="first", image_only=False).samples) == 202
    assert len(select(data, limit=7).samples) == 7


def test_order_of_the_file_does_not_change_the_choice(tmp_path: Path) -> None:
    entries = [entry(f"s{i}") for i in range(100)]
    forward = select(open_conversations(write(tmp_path, entries)), fraction=0.2)
    backward = select(open_conversations(write(tmp_path, entries[::-1])), fraction=0.2)
    assert forward.samples == backward.samples[::-1]


def test_the_digest_covers_every_text_and_the_history() -> None:
    base = {"id": "a", "image": None, "question": "Q", "answer": "A", "image_id": "x"}
    history = (("Q0", "A0"),)
    variants = [
        base, {**base, "id": "b"}, {**base, "question": "R"}, {**base, "answer": "B"},
        {**base, "image_id": "y"}, {**base, "history": history}, {**base, "history": (("Q0", "A1"),)},
    ]  # fmt: skip
    assert len({selection_sha256([Sample(**v)]) for v in variants}) == len(variants)
    one_line = json.dumps(["a", "x", "Q", "A"]).encode() + b"\n"
    assert selection_sha256([Sample(**base)]) == hashlib.sha256(one_line).hexdigest()


def test_missing_images_are_counted_named_and_limited(tmp_path: Path) -> None:
    data = open_conversations(write(tmp_path, [entry("here"), entry("gone", "x/2.png")]))
    with pytest.raises(DataError, match=r"data\.json: sample 'gone': image: there is no file .*2\.png"):
        select(data)
    chosen = select(data, max_bad_samples=1)
    assert [s.id for s in chosen.samples] == ["here"]
    assert chosen.counts["missing_images"] == 1
    assert [defect.sample_id for defect in chosen.defects] == ["gone"]


def test_the_limit_on_bad_samples_counts_all_kinds(tmp_path: Path) -> None:
    entries = [
        entry("here"),
        entry("gone", "x/2.png"),
        entry("two", ["x/1.png", "x/1.png"]),
        entry("text", None, "Q"),
    ]
    data = open_conversations(write(tmp_path, entries))
    with pytest.raises(DataError, match="2 unusable samples, 1 allowed"):
        select(data, max_bad_samples=1)
    chosen = select(data, max_bad_samples=2)
    assert (chosen.counts["unusable"], chosen.counts["several_images"]) == (1, 1)
    assert chosen.counts["text_only"] == 1  # skipped, but no defect
    with pytest.raises(DataError, match="sample 'two': image: 2 images, one per sample is supported"):
        select(data)


def test_a_hopeless_source_is_given_up_early(tmp_path: Path) -> None:
    data = open_conversations(
        write(tmp_path, [entry(i, "x/1.png", "no placeholder", "A") for i in range(5000)])
    )
    with pytest.raises(DataError, match="unusable samples, 10 allowed") as caught:
        select(data, max_bad_samples=10)
    assert "1011 unusable" in str(caught.value)


def test_nothing_left_says_why(tmp_path: Path) -> None:
    data = open_conversations(write(tmp_path, [entry("t", None, "Q", "A")]))
    with pytest.raises(DataError, match="text only 1"):
        select(data)
    for wrong in ({"fraction": 0}, {"fraction": 1.1}, {"limit": 0}, {"turns": "some"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            select(data, **wrong)
