"""Files of the natural style: formats that the benchmarks read, boxes and objects as in the images."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")

from dyvte.data.scenes import writers
from dyvte.data.scenes.grounding import OBJECTS
from dyvte.data.scenes.natural import TAUGHT_TYPES
from dyvte.data.scenes.styles import NATURAL, PLAIN, narrowed
from dyvte.data.scenes.wordings import QUERIES, SHORT_SUFFIX, VERIFICATIONS
from dyvte.data.scenes.world import draw_scene
from dyvte.errors import ConfigError
from dyvte.tasks import base as tasks
from tests.data.test_scenes import solve

SPLITS = ("train", "calibration", "validation", "test", "unseen")
SIZES = {**dict.fromkeys(SPLITS, 96), "gqa": 80, "mme": 2, "pope": 9, "refcoco": 40, "captions": 12}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("natural")
    writers.write_all(folder, SIZES, tell=lambda _: None, style=NATURAL)
    return folder


def _records(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_same_seed_same_files_and_no_image_twice(root, tmp_path):
    again = writers.write_all(tmp_path, SIZES, tell=lambda _: None, style=NATURAL)
    assert again["sha256"] == writers.digest(root)
    assert writers.write_all(root, SIZES, tell=lambda _: None, style=NATURAL)["style"] == "natural"
    images = [p.read_bytes() for p in root.rglob("*.png")]
    assert len(images) == len(set(images)) > 100
    # a folder of the other style is not taken for this one
    assert "style" not in writers.write_all(
        tmp_path / "plain",
        {k: v for k, v in SIZES.items() if k not in ("unseen", "refcoco", "captions")},
        tell=lambda _: None,
        style=PLAIN,
    )


def test_instruction_data_asks_all_types_in_their_wordings(root):
    records = [r for p in (root / "instruct").glob("*.json") for r in _records(p)]
    assert {r["type"] for r in records} == set(TAUGHT_TYPES)
    assert (
        max(Counter(r["image"] for r in _records(root / "instruct/train.json")).values()) == NATURAL.per_scene
    )
    answers = [r["conversations"][1]["value"] for r in records]
    assert any(re.fullmatch(r"\[(0\.\d\d, ){3}(0\.\d\d|1\.00)\]", a) for a in answers)
    assert any(a.startswith("The background is ") and len(a.split()) >= 30 for a in answers)
    texts = [r["conversations"][0]["value"] for r in records]
    assert any(t.endswith(SHORT_SUFFIX) for t in texts)


def test_some_types_alone_two_questions_a_scene(root, tmp_path):
    style = narrowed(["color", "where"], 2)
    path = writers.write_instruct(tmp_path, "test", 12, style=style)
    asked = _records(path)
    assert {r["type"] for r in asked} == {"color", "where"}
    assert set(Counter(r["image"] for r in asked).values()) == {2}
    first = asked[0]["image"]  # scenes are the same, whatever is asked about them
    own, others = (folder / "instruct/images" / first for folder in (tmp_path, root))
    assert own.read_bytes() == others.read_bytes()
    for types, per_scene in ((["arrow"], 2), ([], 0)):
        with pytest.raises(ConfigError, match="expected"):
            narrowed(types, per_scene)


def test_unseen_wordings_are_asked_about_the_test_images(root):
    seen, unseen = (_records(root / f"instruct/{n}.json") for n in ("test", "test_unseen"))
    assert {r["image"] for r in seen} == {r["image"] for r in unseen}
    assert not {r["id"] for r in seen} & {r["id"] for r in unseen}
    kept = {w for table in (*QUERIES.values(), *VERIFICATIONS.values()) for w in table.unseen}
    patterns = [re.sub(r"\\\{\w+\\\}", ".+", re.escape(w)) for w in kept]
    for record in unseen:
        text = record["conversations"][0]["value"].removeprefix("<image>\n")
        text = text.removesuffix(SHORT_SUFFIX).removesuffix(" Please answer yes or no.")
        if not record["type"].startswith("skip_"):
            assert any(re.fullmatch(p, text) for p in patterns), text


def test_gqa_and_mme_are_read_by_their_tasks(root):
    gqa = tasks.get_benchmark("gqa").load(root / "mini_gqa")
    assert len(gqa) == SIZES["gqa"]
    assert all(not q.text.endswith(SHORT_SUFFIX) and len(q.answer.split()) <= 4 for q in gqa)
    assert len({q.text for q in gqa}) > 60
    mme = tasks.get_benchmark("mme").load(root / "mini_mme")
    assert len(mme) == len(writers.MME_SUBTASKS) * SIZES["mme"] * 2
    assert Counter(q.answer.lower() for q in mme) == {"yes": len(mme) // 2, "no": len(mme) // 2}


def test_pope_asks_each_image_for_what_is_there_and_what_is_not(root):
    asked = tasks.get_benchmark("pope").load(root / "mini_pope")
    assert len(asked) == 6 * SIZES["pope"]
    cells = Counter((q.image_id, q.kind, q.answer) for q in asked)
    assert set(cells.values()) == {1}
    assert len(cells) == len(asked)
    shown = {}
    for q in asked:
        number = int(q.image_id.removesuffix(".png")[-12:]) - 1
        shown[q.image_id] = scene = draw_scene("test", NATURAL.first_scene["pope"] + number, 0)
        assert solve(scene, q.text) == q.answer
    things = {i: {(c.color, c.name) for c in s.cells if c and c.kind == "shape"} for i, s in shown.items()}
    known = Counter(thing for own in things.values() for thing in own)
    for q in asked:
        color, name = q.text.removesuffix("?").split()[-2:]
        there = things[q.image_id]
        if q.answer == "no" and q.kind == "popular":
            assert known[color, name] == max(n for thing, n in known.items() if thing not in there)
        if q.answer == "no" and q.kind == "adversarial":
            near = {(c, n) for c, _ in there for _, n in there} - there
            assert (color, name) in near or not near


def test_boxes_hold_what_differs_from_the_ground(root):
    folder = root / "mini_refcoco"
    lines = [json.loads(line) for line in (folder / "refcoco_testA.jsonl").read_text().splitlines()]
    assert len(lines) == SIZES["refcoco"]
    for line in lines:
        assert re.fullmatch(r"the (\w+ )?(circle|square|triangle|cross|star)", line["sent"])
        with Image.open(folder / line["image"]) as image:
            assert image.size == (line["width"], line["height"])
            pixels = np.asarray(image.convert("RGB")).astype(int)
        x1, y1, *_ = line["bbox"]
        # the cell around the box; its edge is the ground
        top, left = y1 // 16 * 16, x1 // 16 * 16
        cell = pixels[top : top + 16, left : left + 16]
        change = np.abs(cell - np.median(cell.reshape(-1, 3)[[0, 15, 240, 255]], axis=0)).sum(-1)
        rows, cols = np.nonzero(change >= 0.5 * change.max())
        truth = np.array([left + cols.min(), top + rows.min(), left + cols.max() + 1, top + rows.max() + 1])
        assert np.abs(truth - line["bbox"]).max() <= 1


def test_captions_name_exactly_the_objects_that_are_there(root):
    folder = root / "mini_captions"
    captions = _records(folder / "annotations/captions_val2014.json")
    found = _records(folder / "annotations/instances_val2014.json")
    names = {c["id"]: c["name"] for c in found["categories"]}
    assert (folder / "synonyms.txt").read_text().splitlines() == list(names.values()) == list(OBJECTS)
    assert len(captions["annotations"]) == SIZES["captions"]
    for image in captions["images"]:
        assert (folder / "val2014" / image["file_name"]).is_file()
        (text,) = [a["caption"] for a in captions["annotations"] if a["image_id"] == image["id"]]
        there = Counter(names[a["category_id"]] for a in found["annotations"] if a["image_id"] == image["id"])
        assert Counter({name: n for name in OBJECTS if (n := text.count(name))}) == there


def test_sizes_of_the_other_style_are_refused(tmp_path):
    command = [sys.executable, "-m", "dyvte.data.scenes", "--captions", "3", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--captions: only with --natural" in done.stderr
