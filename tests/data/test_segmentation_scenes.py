"""Scenes as ReasonSeg: the polygon is the shape that the question means."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dyvte.data.scenes.questions import place
from dyvte.data.scenes.render import CELL, IMAGE_SIZE, item_box, render
from dyvte.data.scenes.segmentation import KINDS, ask_target, target, write_reasonseg
from dyvte.data.scenes.world import draw_scene
from dyvte.tasks.answers.masks import filled_polygon
from dyvte.tasks.base import get_benchmark
from dyvte.tasks.reasonseg import true_mask


@pytest.mark.parametrize("kind", KINDS)
def test_the_outline_is_that_of_the_shape_meant(kind):
    asked = 0
    for index in range(40):
        scene, rng = draw_scene("test", index), np.random.default_rng(index)
        found = ask_target(scene, kind, rng)
        if found is None:
            continue
        asked += 1
        question, points = found
        cell = target(scene, question)
        item = scene.cells[cell]
        if kind == "where":
            assert question.answer == place(cell)
        else:
            assert question.answer == (item.color if kind == "color" else f"{item.color} {item.name}")
        mask = filled_polygon(points, (IMAGE_SIZE, IMAGE_SIZE))
        box = [round(v * IMAGE_SIZE) for v in item_box(cell, item)]
        rows, cols = np.nonzero(mask)
        assert (
            np.abs(np.array([cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]) - box).max() <= 2
        )  # tips of stars
        # what is drawn there differs from the ground, and the ground around it does not
        row, col = divmod(cell, 4)
        window = slice(row * CELL, (row + 1) * CELL), slice(col * CELL, (col + 1) * CELL)
        assert mask[window].sum() == mask.sum()
        pixels = render(scene)[window].astype(int)
        drawn = np.abs(pixels - pixels[0, 0]).sum(-1) > 60
        overlap = (drawn & mask[window]).sum() / (drawn | mask[window]).sum()
        assert overlap > 0.7
    assert asked > 20


def test_the_files_are_a_function_of_the_seed_and_read_as_reasonseg(tmp_path):
    for name in ("a", "b"):
        write_reasonseg(tmp_path / name, 6, first=50)
    for one in sorted((tmp_path / "a" / "val").iterdir()):
        assert one.read_bytes() == (tmp_path / "b" / "val" / one.name).read_bytes()
    questions = get_benchmark("reasonseg").load(tmp_path / "a")
    assert [q.kind for q in questions] == ["short", "short", "long"] * 2
    for question in questions:
        record = json.loads((tmp_path / "a" / "val" / f"{question.id}.json").read_text())
        expected = filled_polygon(record["shapes"][0]["points"], (IMAGE_SIZE, IMAGE_SIZE))
        assert (true_mask(question) == expected).all()
        assert Image.open(question.image).size == (IMAGE_SIZE, IMAGE_SIZE)
