"""The synthetic scenes: right answers by an independent solver, no overlap, same seed same files."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")

from dyvte.data.scenes import writers
from dyvte.data.scenes.questions import MAX_COUNT, TYPES, View, all_words, ask_many
from dyvte.data.scenes.render import CELL, render
from dyvte.data.scenes.styles import NATURAL, PLAIN
from dyvte.data.scenes.world import BACKGROUNDS, COLORS, SPLITS, digits_of_split, draw_scene

STEP = {"up": -4, "down": 4, "left": -1, "right": 1}


def solve(scene, text: str) -> str:
    """Answer a question from its words and the scene's cells alone; shares no code with the makers."""
    text = text.rstrip("?").lower()
    cells = scene.cells
    shapes = [(i, c) for i, c in enumerate(cells) if c and c.kind == "shape"]
    total = sum(int(c.name) for c in cells if c and c.kind == "digit")
    yes_no = {True: "yes", False: "no"}

    def name_of(c):
        if c is None:
            return "nothing"
        return f"arrow {c.name}" if c.kind in ("start", "arrow") else f"{c.color} {c.name}"

    def walk():
        at = next(i for i, c in enumerate(cells) if c and c.kind == "start")
        while cells[at].kind in ("start", "arrow"):
            at += STEP[cells[at].name]
        return name_of(cells[at])

    def number(what):
        what = what.removesuffix(" shapes")
        return sum(what in (c.color, c.name, c.name + "s", c.name + "es") for _, c in shapes)

    def spot(name):
        (found,) = [i for i, c in shapes if c.name == name]
        return found

    if m := re.fullmatch(r"skip if (\w+), (.*)", text):
        return "skipped" if scene.background == m[1] else solve(scene, m[2])
    if text == "what does the orange arrow ask":
        start = next(c for c in cells if c and c.kind == "start")
        return {
            "up": scene.background,
            "down": str(len(shapes)),
            "left": str(total),
            "right": walk(),
        }[start.name]
    if text == "where does the orange arrow lead":
        return walk()
    if text == "what color is the background":
        return scene.background
    if m := re.fullmatch(r"is the background (\w+)", text):
        return yes_no[scene.background == m[1]]
    if m := re.fullmatch(r"is there a (\w+) (\w+)", text):
        return yes_no[any(c.color == m[1] and c.name == m[2] for _, c in shapes)]
    if m := re.fullmatch(r"what color is the (\w+)", text):
        return cells[spot(m[1])].color
    if m := re.fullmatch(r"what shape is (\w+)", text):
        (name,) = [c.name for _, c in shapes if c.color == m[1]]
        return name
    if m := re.fullmatch(r"what is in row (\d) column (\d)", text):
        return name_of(cells[4 * (int(m[1]) - 1) + int(m[2]) - 1])
    if m := re.fullmatch(r"how many (.+) are there", text):
        return str(number(m[1]))
    if m := re.fullmatch(r"are there (\d+) (.+)", text):
        return yes_no[number(m[2]) == int(m[1])]
    if m := re.fullmatch(r"where is the (\w+)", text):
        row, col = divmod(spot(m[1]), 4)
        return f"row {row + 1} column {col + 1}"
    if m := re.fullmatch(r"is the (\w+) (above|below|left of|right of) the (\w+)", text):
        (r1, c1), (r2, c2) = divmod(spot(m[1]), 4), divmod(spot(m[3]), 4)
        return yes_no[{"above": r1 < r2, "below": r1 > r2, "left of": c1 < c2, "right of": c1 > c2}[m[2]]]
    if m := re.fullmatch(r"are there more (\w+) than (\w+)", text):
        return yes_no[number(m[1]) > number(m[2])]
    if m := re.fullmatch(r"is the sum of the digits (\d+)", text):
        return yes_no[total == int(m[1])]
    if text == "what is the sum of the digits":
        return str(total)
    if m := re.fullmatch(r"what is the (\w+) digit", text):
        return next(c.name for c in cells if c and c.kind == "digit" and c.color == m[1])
    if m := re.fullmatch(r"is the (\w+) digit (\d)", text):
        return yes_no[next(c.name for c in cells if c and c.kind == "digit" and c.color == m[1]) == m[2]]
    if m := re.fullmatch(r"is the (\w+) (\w+)", text):
        return yes_no[cells[spot(m[1])].color == m[2]]
    raise AssertionError(f"no rule for {text!r}")


def test_every_answer_is_right_and_every_word_known():
    words, seen = set(all_words()), set()
    for index in range(150):
        scene = draw_scene("validation", index)
        for q in ask_many(scene, np.random.default_rng(index), 24):
            assert q.answer == solve(scene, q.text), (index, q)
            assert set(re.findall(r"\w+|[^\w\s]", f"{q.text} {q.answer}".lower())) <= words
            seen.add(q.type)
    assert seen == set(TYPES)


def test_counts_stay_within_the_vocabulary():
    views = [View(draw_scene("train", i)) for i in range(300)]
    assert max(len(v.shapes) for v in views) <= MAX_COUNT


def test_depth_is_decided_by_the_picture_under_one_wording():
    hops = [draw_scene("test", i).hops for i in range(300)]
    assert {1, 2, 3} == set(hops)
    assert min(np.bincount(hops)[1:]) > 60


def test_splits_share_no_digit_image_and_no_scene():
    owned = {s: {int(i) for value in digits_of_split(s) for i in value} for s in SPLITS}
    assert sum(map(len, owned.values())) == 1797 == len(set().union(*owned.values()))
    assert all(len(value) > 8 for s in SPLITS for value in digits_of_split(s))
    first = [*PLAIN.first_scene.values(), *NATURAL.first_scene.values()]
    signatures = {s: {draw_scene(s, f + i).signature() for f in first for i in range(150)} for s in SPLITS}
    for a in SPLITS:
        used = {c.digit_index for i in range(50) for c in draw_scene(a, i).cells if c and c.kind == "digit"}
        assert used <= owned[a]
        for b in SPLITS:
            assert a == b or not signatures[a] & signatures[b]


def test_picture_shows_what_the_scene_holds():
    for index in range(30):
        scene = draw_scene("train", index)
        pixels = render(scene).astype(int)
        ground = np.clip(np.add(BACKGROUNDS[scene.background], scene.background_tint), 0, 255)
        for i, item in enumerate(scene.cells):
            row, col = divmod(i, 4)
            cell = pixels[row * CELL : (row + 1) * CELL, col * CELL : (col + 1) * CELL]
            if item is None:
                assert np.abs(cell - ground).max() == 0
            elif item.kind == "shape":
                ink = np.clip(np.array(COLORS[item.color]) + item.tint, 0, 255)
                assert np.abs(cell - ink).sum(-1).min() <= 3


SIZES = {"train": 24, "calibration": 16, "validation": 8, "test": 16, "gqa": 16, "mme": 2}


def test_files_are_in_the_formats_people_have_and_reproducible(tmp_path):
    first = writers.write_all(tmp_path / "a", SIZES, tell=lambda _: None)
    again = writers.write_all(tmp_path / "b", SIZES, tell=lambda _: None)
    other = writers.write_all(tmp_path / "c", SIZES, seed=1, tell=lambda _: None)
    assert first["sha256"] == again["sha256"] != other["sha256"]
    assert writers.digest(tmp_path / "a") == first["sha256"]

    records = json.loads((tmp_path / "a/instruct/train.json").read_text())
    assert len(records) == SIZES["train"]
    assert records[0]["conversations"][0]["value"].startswith("<image>\n")
    with Image.open(tmp_path / "a/instruct/images" / records[0]["image"]) as image:
        assert image.size == (64, 64)
    images = {
        s: {
            (tmp_path / "a/instruct/images" / r["image"]).read_bytes()
            for r in json.loads((tmp_path / f"a/instruct/{s}.json").read_text())
        }
        for s in SPLITS
    }
    images["gqa"] = {p.read_bytes() for p in (tmp_path / "a/mini_gqa/images").iterdir()}
    images["mme"] = {p.read_bytes() for p in (tmp_path / "a/mini_mme").rglob("*.png")}
    assert sum(map(len, images.values())) == len(set().union(*images.values()))

    gqa = json.loads((tmp_path / "a/mini_gqa/testdev_balanced_questions.json").read_text())
    assert all(q["isBalanced"] and q["types"]["structural"] and q["semantic"] for q in gqa.values())
    for subtask in writers.MME_SUBTASKS:
        texts = sorted((tmp_path / "a/mini_mme" / subtask).rglob("*.txt"))
        assert len(texts) == SIZES["mme"]
        for path in texts:
            lines = [line.split("\t") for line in path.read_text().strip().split("\n")]
            assert sorted(answer for _, answer in lines) == ["No", "Yes"]
            assert all(q.endswith("Please answer yes or no.") for q, _ in lines)
