"""Natural questions: true by an independent solver, wordings kept apart, boxes and descriptions exact."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("sklearn")

from dyvte.data.scenes.natural import (
    EXTRA_TYPES,
    NATURAL_TYPES,
    ask_natural,
    ask_plain,
    description,
    reword,
)
from dyvte.data.scenes.questions import TYPES, View
from dyvte.data.scenes.render import render
from dyvte.data.scenes.wordings import QUERIES, SKIPS, VERIFICATIONS
from dyvte.data.scenes.world import COLORS, SHAPES, draw_scene

STEP = {"above": -4, "below": 4, "left of": -1, "right of": 1}


def name_of(item) -> str:
    if item is None:
        return "nothing"
    return f"arrow {item.name}" if item.kind in ("start", "arrow") else f"{item.color} {item.name}"


def solve(scene, question) -> str:
    """Answers of the added types from the first wording and the cells alone."""
    cells, text = scene.cells, question.text
    if m := re.fullmatch(r"Describe row (\d)\.", text):
        return ", ".join(name_of(cells[4 * (int(m[1]) - 1) + i]) for i in range(4))
    if m := re.fullmatch(r"Describe column (\d)\.", text):
        return ", ".join(name_of(cells[int(m[1]) - 1 + 4 * i]) for i in range(4))
    if m := re.fullmatch(r"What is directly (.+) the (\w+)\?", text):
        (at,) = [i for i, c in enumerate(cells) if c and c.kind == "shape" and c.name == m[2]]
        return name_of(cells[at + STEP[m[1]]])
    if m := re.fullmatch(r"Which digit is larger, the (\w+) one or the (\w+) one\?", text):
        value = {c.color: int(c.name) for c in cells if c and c.kind == "digit"}
        return m[1] if value[m[1]] > value[m[2]] else m[2]
    raise AssertionError(text)


def test_added_types_are_answered_truly():
    seen = set()
    for index in range(120):
        scene = draw_scene("validation", index)
        view, rng = View(scene), np.random.default_rng(index)
        for kind in ("row", "column", "beside", "larger"):
            question = ask_plain(view, kind, rng, 0.3)
            if question is not None:
                assert question.answer == solve(scene, question)
                seen.add(kind)
    assert seen == {"row", "column", "beside", "larger"}


def test_boxes_hold_the_shape_and_little_else():
    boxes = 0
    for index in range(60):
        scene = draw_scene("train", index)
        question = ask_plain(View(scene), "box", np.random.default_rng(index), 0.0)
        if question is None:
            continue
        boxes += 1
        words = question.program[0][1].split(" ")
        (at,) = [
            i
            for i, c in enumerate(scene.cells)
            if c and c.kind == "shape" and c.name == words[-1] and words[0] in (c.color, c.name)
        ]
        # what the picture shows: where it changes when the shape is taken away
        bare = replace(scene, cells=tuple(None if i == at else c for i, c in enumerate(scene.cells)))
        change = np.abs(render(scene).astype(int) - render(bare)).sum(-1)
        rows, cols = np.nonzero(change >= 0.5 * change.max())
        truth = np.array([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]) / 64
        found = [float(v) for v in re.fullmatch(r"\[(.*)\]", question.answer)[1].split(", ")]
        assert np.abs(np.array(found) - truth).max() <= 1 / 64 + 0.005
    assert boxes > 50


def test_descriptions_name_everything_in_30_to_80_words():
    for index in range(300):
        scene = draw_scene("test", index)
        text = description(scene)
        assert 30 <= len(text.split()) <= 80
        assert text.startswith(f"The background is {scene.background}.")
        rows = text.split("Row ")[1:]
        for row, sentence in enumerate(rows):
            cells = [c for c in scene.cells[4 * row : 4 * row + 4] if c]
            found = re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)}|digit \d)", sentence)
            there = [(c.color, c.name if c.kind == "shape" else f"digit {c.name}") for c in cells if c.color]
            assert found == there
            assert re.findall(r"pointing (\w+)", sentence) == [c.name for c in cells if not c.color]


def test_wordings_change_the_words_and_never_the_truth():
    answers, templates = {}, defaultdict(set)
    for index in range(80):
        scene = draw_scene("validation", index)
        view = View(scene)
        for kind in NATURAL_TYPES:
            plain = ask_plain(view, kind, np.random.default_rng([index, 1]), 0.5)
            if plain is None:
                continue
            for turn in range(6):
                rng = np.random.default_rng([index, turn])
                for unseen in (False, True):
                    worded = reword(plain, rng, unseen=unseen)
                    assert plain.answer in worded.answer
                    assert "{" not in worded.text + worded.answer
                    templates[kind, unseen].add(worded.text)
                    answers[worded.text] = worded.answer
    for kind in NATURAL_TYPES:
        assert templates[kind, True]
        assert not templates[kind, True] & templates[kind, False]
    assert set(EXTRA_TYPES) | set(TYPES) == set(QUERIES) | {t for t in TYPES if t.startswith("skip_")}


def test_unseen_wordings_are_no_training_wordings():
    for table in (*QUERIES.values(), *VERIFICATIONS.values(), SKIPS):
        assert not set(table.unseen) & {*table.phrase, *(t for t, _ in table.sentence)}


def test_same_arguments_same_questions():
    scene = draw_scene("train", 7)
    first, again = (ask_natural(scene, np.random.default_rng(3), 24) for _ in range(2))
    assert first == again
    assert len({(q.type, q.program, q.text) for q in first}) == 24
    assert sum(q.type == "describe" for q in first) <= 1
