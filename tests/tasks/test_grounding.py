"""Boxes: conventions and bad boxes by hand, formats, and the tools' own functions on fuzz."""

from __future__ import annotations

import logging
import math
import random
import re
from typing import Optional

import numpy as np
import pytest

from dyvte.errors import DataError, ScoreError
from dyvte.tasks.answers.boxes import (
    find_box,
    lmms_box,
    of_padded_square,
    original_box,
    overlap,
    vlmevalkit_box,
)
from dyvte.tasks.base import Predictions, Question, get_benchmark
from tests.helpers.benchmark_files import put, put_parquet, write_benchmark
from tests.helpers.minis.boxes import THINGS
from tests.helpers.mutations import seeded
from tests.helpers.tools import LMMS, VLMEVAL, answers, functions

WIDE, TALL = (200, 100), (100, 201)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (2, 2, 3, 3), 0.0),
        ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),  # both corners swapped
        ((2, 0, 0, 2), (0, 0, 2, 2), 0.0),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0.0),
        ((-5, -5, 5, 5), (0, 0, 5, 5), 0.25),  # outside the image counts as area
    ],
)
def test_overlap_by_hand(one, other, expected):
    assert overlap(one, other) == pytest.approx(expected)


def test_overlap_against_counting_cells():
    draw = np.random.default_rng(0)
    for _ in range(200):
        cells = []
        for _ in range(2):
            (left, right), (top, bottom) = np.sort(draw.integers(0, 12, size=(2, 2)), axis=1)
            grid = np.zeros((12, 12), dtype=bool)
            grid[top:bottom, left:right] = True
            cells.append(((left, top, right, bottom), grid))
        (one, first), (other, second) = cells
        union = (first | second).sum()
        assert overlap(one, other) == pytest.approx((first & second).sum() / union if union else 0.0)


@pytest.mark.parametrize(
    ("text", "size", "pixels"),
    [
        ("[0.00, 0.25, 1.00, 0.75]", WIDE, (0, 0, 200, 100)),  # the image's own area of the padded square
        ("It is [0.25, 0.5, 0.5, 0.75].", WIDE, (50, 50, 100, 100)),
        ("[0.0, 0.0, 1.0, 1.0]", TALL, (-50, 0, 151, 201)),  # half a pixel down, as LLaVA pads
        ("[10, 20, 30.5, 40]", WIDE, (10, 20, 30.5, 40)),  # pixels
        ("(100,200),(300,400)", WIDE, (20, 20, 60, 40)),  # Qwen-VL's grid
        ("<ref>x</ref><box>(100, 200), (300,400)</box>", WIDE, (20, 20, 60, 40)),
        ("[10,20,30,40] or [0.1,0.1,0.2,0.2]", WIDE, (10, 20, 30, 40)),  # the first of two boxes
        ("[30, 40, 10, 20]", WIDE, (30, 40, 10, 20)),  # swapped corners stay, and overlap nothing
        ("[-.5, +.5, 1., 1e-1]", (2, 2), (-1, 1, 2, 0.2)),
        ("[10, 20, 30]", WIDE, None),
        ("10, 20, 30, 40", WIDE, None),
        ("I cannot see any box.", WIDE, None),
        ("[nan, 0, 1, 1]", WIDE, None),
        ("[1e999, 0, 1, 1]", WIDE, None),
        ("", WIDE, None),
    ],
)
def test_what_the_numbers_of_an_answer_are(text, size, pixels):
    found = original_box(text, size)
    assert found == (None if pixels is None else pytest.approx(pixels))


def test_the_padded_square_is_the_one_that_images_are_padded_to():
    """Against the picture itself: a lone pixel, padded as LLaVA does, and where it comes to lie."""
    from PIL import Image

    for width, height in ((7, 4), (4, 7), (8, 3), (3, 8), (5, 5)):
        image = Image.new("RGB", (width, height))
        image.putpixel((width - 1, height - 1), (255, 0, 0))
        side = max(width, height)
        square = Image.new("RGB", (side, side), (0, 0, 255))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        x, y = next(p for p in np.ndindex(side, side) if square.getpixel(p) == (255, 0, 0))
        shares = (x / side, y / side, (x + 1) / side, (y + 1) / side)
        expected = (width - 1, height - 1, width, height)
        assert of_padded_square(shares, (width, height)) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["refcoco", "refcocoplus", "refcocog"])
@pytest.mark.parametrize("form", ["jsonl", "release", "parquet", "tsv"])
def test_every_format_holds_the_same_boxes(tmp_path, name, form):
    benchmark = get_benchmark(name)
    questions = benchmark.load(write_benchmark(tmp_path, name, form))
    found = sorted((q.text.split(": ")[1], q.details["box"], q.kind) for q in questions)
    assert found == sorted((text, pytest.approx(box), split) for text, box, split in THINGS)
    units = {text: q.image_id for q in questions for text in (q.text.split(": ")[1],)}
    assert units["a dog"] != units["red cup"]
    if form != "tsv":  # which holds the image twice
        assert units["the dog on the left"] == units["a dog"]
    wrong = {q.id: "[0.9, 0.9, 1.0, 1.0]" for q in questions}
    right = {q.id: str([v / 16 for v in q.details["box"]]) for q in questions}
    for dialect in benchmark.dialects:
        assert benchmark.score(questions, Predictions(right), dialect)["accuracy"] == 100
        scores = benchmark.score(questions, Predictions(wrong), dialect)
        assert scores["accuracy"] == 0
    first = next(q.id for q in questions if q.kind == "val")
    scores = benchmark.score(questions, Predictions({**wrong, first: right[first]}))
    assert scores["accuracy"] == 25  # the mean of one half and nothing
    assert {split: one["accuracy"] for split, one in scores["per_split"].items()} == {"val": 50, "testA": 0}


def test_the_convention_of_a_model_shows(tmp_path):
    benchmark = get_benchmark("refcoco")
    questions = benchmark.load(write_benchmark(tmp_path, "refcoco", "jsonl"))
    texts = {
        q.id: "[{}, {}, {}, {}]".format(*(round(v / 16 * 1000) for v in q.details["box"])) for q in questions
    }
    scores = benchmark.score(questions, Predictions(texts))
    assert scores["accuracy_by_convention"] == {
        "padded_square": 0.0,
        "image": 0.0,
        "thousandths": 100.0,
        "pixels": 0.0,
    }
    assert (scores["accuracy"], scores["num_without_box"]) == (0, 0)
    assert benchmark.score(questions, Predictions(texts), "vlmevalkit")["accuracy"] == 100


def test_a_pickle_is_refused_with_what_to_do(tmp_path):
    put(tmp_path / "refs(unc).p", b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(DataError, match=r"is a Python pickle, which is not read: .*json\.dump"):
        get_benchmark("refcoco").load(tmp_path)


def test_boxes_that_are_none_are_named(tmp_path):
    row = {"image": "a.png", "sent": "it", "width": 9, "height": 9}
    for box in ([1, 2, 3], [1, 2, 3, "x"], "1234", None, [0, 0, math.inf, 1], {"a": 1}):
        put(
            tmp_path / "refcoco_val.jsonl", f"{row | {'bbox': box}}".replace("'", '"').replace("None", "null")
        )
        with pytest.raises(DataError, match=r"refcoco_val.jsonl"):
            get_benchmark("refcoco").load(tmp_path, images=False)
    put(
        tmp_path / "refcoco_val.jsonl",
        '{"image": "a.png", "sent": "it", "bbox": [0,0,1,1], "width": 0, "height": 3}',
    )
    with pytest.raises(DataError, match="an image of 0 x 3 pixels"):
        get_benchmark("refcoco").load(tmp_path, images=False)


def test_without_a_size_and_an_image_boxes_cannot_be_scored(tmp_path):
    rows = [{"question_id": "7", "answer": ["it"], "bbox": [0.0, 0.0, 2.0, 2.0], "file_name": "a.jpg"}]
    put_parquet(tmp_path / "data" / "val-0.parquet", rows)
    benchmark = get_benchmark("refcoco")
    questions = benchmark.load(tmp_path, images=False)
    with pytest.raises(
        ScoreError, match="question 7_0: boxes are scored in pixels, and its table states neither"
    ):
        benchmark.score(questions, Predictions({"7_0": "[0, 0, 1, 1]"}))


# --- against the tools ----------------------------------------------------------------------------------


def _questions(count):
    draw = random.Random(11)
    questions = []
    for n in range(count):
        size = draw.choice((WIDE, TALL, (640, 480), (1500, 900)))
        left, top = draw.uniform(0, size[0] * 0.7), draw.uniform(0, size[1] * 0.7)
        box = (left, top, draw.uniform(left + 1, size[0]), draw.uniform(top + 1, size[1]))
        own = {"id": str(n), "image_id": str(n), "kind": "val", "answer": "x"}
        questions.append(Question(image=None, text="?", details={"box": box, "size": size}, **own))
    return questions


def _texts(questions) -> list[str]:
    """Answers such as models give; every second one near the gold box, in one of the conventions."""
    draw = seeded(20261103)
    shapes = ("[{}, {}, {}, {}]", "[{},{},{},{}]", "[ {} , {}, {},{} ]", "({},{}),({},{})", "{} {} {} {}")
    shapes += (
        "It is [{}, {}, {}, {}] or [0.5, 0.5, 1, 1].",
        "[{} {} {} {}]",
        "x={}, y={}, w={}, h={}",
        "[{}, {}]",
    )
    made = answers(draw, len(questions) // 4)
    for q in questions[len(made) :]:
        (width, height), box = q.details["size"], q.details["box"]
        scale = draw.choice((1, 1, 1, 1.5, 100, 1000, 1200))
        if draw.random() < 0.6:
            scale = draw.choice((1, 1, 1000))
            box = [
                scale * (v + draw.gauss(0, 9)) / side
                for v, side in zip(box, (width, height) * 2, strict=True)
            ]
            if draw.random() < 0.3:
                box = [v + draw.gauss(0, 9) for v in q.details["box"]]
        else:
            box = [draw.uniform(-0.1, 1.05) * scale for _ in range(4)]
        if draw.random() < 0.1:
            box = [box[2], box[1], box[0], box[3]]
        box = [round(v, draw.choice((0, 2, 3))) if scale > 2 else round(v, 3) for v in box]
        made.append(draw.choice(shapes).format(*box))
    return made


QUESTIONS = _questions(1500)
TEXTS = _texts(QUESTIONS)


def test_refcoco_of_lmms_eval():
    names = ("parse_float_sequence_within", "refcoco_bbox_rec_process_result", "COCO_REC_METRICS")
    more = (
        "compute_iou",
        "compute_accuracy",
        "compute_center_accuracy",
        "refcoco_bbox_rec_aggregation_result",
    )
    tool = functions(
        LMMS,
        "tasks/refcoco/utils_rec.py",
        *names,
        *more,
        re=re,
        eval_logger=logging.getLogger("x"),
        print=print,
    )
    questions = QUESTIONS
    texts = {q.id: text for q, text in zip(questions, TEXTS, strict=True)}
    rows, kept = [], []
    for q in questions:
        (width, height), box = q.details["size"], q.details["box"]
        gold = [box[0] / width, box[1] / height, box[2] / width, box[3] / height]
        doc = {"question_id": q.id, "answer": "it", "bbox": gold}
        row = tool["refcoco_bbox_rec_process_result"](doc, [texts[q.id].strip()])["refcoco_IoU"]
        assert lmms_box(texts[q.id]) == tuple(row["pred"]), ascii(texts[q.id])
        try:
            expected = tool["compute_iou"](gold, row["pred"])
        except ZeroDivisionError:  # one corner swapped, and just as large
            continue
        found = get_benchmark("refcoco").overlaps([q], Predictions(texts), "lmms")[0]
        assert found == pytest.approx(max(expected, 0.0), abs=1e-12)
        rows.append(row)
        kept.append(q)
    assert len(kept) > 1400
    scores = get_benchmark("refcoco").score(kept, Predictions(texts), "lmms")
    total = tool["refcoco_bbox_rec_aggregation_result"]
    assert scores["accuracy"] == pytest.approx(100 * total(rows, "ACC@0.5"))
    assert scores["accuracy"] > 3


def test_refcoco_of_vlmevalkit():
    given = {
        "re": re,
        "np": np,
        "Optional": Optional,
        "ImageBaseDataset": object,
        "pd": pytest.importorskip("pandas"),
    }
    given |= {"Dict": dict, "List": list}
    tool = functions(VLMEVAL, "dataset/refcoco.py", "RefCOCODataset", **given)["RefCOCODataset"]
    questions = QUESTIONS
    texts = {q.id: text for q, text in zip(questions, TEXTS, strict=True)}
    expected = []
    for q in questions:
        parsed = tool._parse_prediction(texts[q.id])
        size = q.details["size"]
        box = None if parsed is None else tool._to_absolute(parsed, *map(float, size))
        assert vlmevalkit_box(texts[q.id], size) == (None if box is None else tuple(box)), ascii(texts[q.id])
        expected.append(0.0 if box is None else float(tool._compute_iou(box, np.array(q.details["box"]))))
    benchmark = get_benchmark("refcoco")
    assert benchmark.overlaps(questions, Predictions(texts), "vlmevalkit") == pytest.approx(expected)
    scores = benchmark.score(questions, Predictions(texts), "vlmevalkit")
    assert scores["accuracy"] == pytest.approx(100 * np.mean([value >= 0.5 for value in expected]))
    assert scores["mean_overlap"] == pytest.approx(100 * np.mean(expected))


def test_every_text_has_a_value_under_the_own_rule():
    for text in TEXTS:
        found = find_box(text)
        assert found is None or all(map(math.isfinite, found[0]))


def test_the_embedded_scenes_are_read(tmp_path):
    from dyvte.data.scenes.grounding import write_captions, write_refcoco

    write_refcoco(tmp_path / "boxes", 9, 100_000_000)
    questions = get_benchmark("refcoco").load(tmp_path / "boxes")
    assert len(questions) == 9
    texts = {
        q.id: str([v / side for v, side in zip(q.details["box"], q.details["size"] * 2)]) for q in questions
    }
    assert get_benchmark("refcoco").score(questions, Predictions(texts))["accuracy"] == 100
    write_captions(tmp_path / "captions", 4, 110_000_000)
    questions = get_benchmark("chair").load(tmp_path / "captions")
    scenes = Predictions({q.id: f"It shows a {q.answer.replace(', ', ' and a ')}." for q in questions})
    scores = get_benchmark("chair").score(questions, scenes)
    assert (scores["chair_s"], scores["recall"]) == (0, 100)
    assert scores["num_objects_named"] > 10
