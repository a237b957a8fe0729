"""ReasonSeg: polygons and run lengths against OpenCV, COCO's tool and counting by hand; and its scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dyvte.errors import DataError, ScoreError
from dyvte.tasks.answers.masks import filled_polygon, find_mask, mask_text, run_lengths
from dyvte.tasks.base import Predictions, get_benchmark
from dyvte.tasks.reasonseg import true_mask

PAINTED = (
    (((3, 3),), "o11X>"),
    (((3, 3), (20, 11)), "o11c0010O010O010O010O010O010O010O010O0i2"),
    (((2, 5), (22, 5), (9, 5)), "]11c0000000000000000000000000000000000000000g1"),
    (((4.9, 4.9), (20.2, 4.1), (20.7, 15.9), (4.3, 15.2)), "d2<80000000000000000000000000000000P3"),
    (((2, 2), (23, 17), (23, 2), (2, 17)), "Z1`05N101N2N2N101N2N101N10O2O0O2N2O0O2N2N2O0O2U1"),
    (
        ((1, 1), (24, 1), (24, 18), (1, 18), (1, 1), (8, 6), (8, 12), (16, 12), (16, 6), (8, 6)),
        "e0b0200000000000000D31MO31MO31MO31MO31MO31MO31M;0000000000000000c0",
    ),
    (
        (
            (22.43, 14.74),
            (5.63, 5.7),
            (21.84, 0.1),
            (20.53, 15.14),
            (11.7, 5.76),
            (6.96, 4.84),
            (11.13, 9.59),
            (13.84, 18.91),
        ),
        "Y31b02O00N@1?0AO>2CN<2D190G35NJ52MN22710O0100LMF3>0H1J>O^1",
    ),
    (
        ((19.82, 11.82), (24.72, 4.09), (4.01, 11.64), (1.1, 0.68), (12.87, 8.86), (22.93, 11.96)),
        "d02c03L4M1OO1N101O1N2O001N1001N100O101O1N10MEM;2FN925Nb0",
    ),
    (
        ((12.42, 4.7), (0.29, 3.66), (17.3, 3.81), (9.24, 0.07), (20.75, 2.93)),
        "31c00000000000001O0MOC1=OC1=0B0?OA1?OA1?20O10001O0O10R3",
    ),
    (
        ((6.69, 16.73), (12.74, 16.1), (15.99, 14.09), (2.29, 10.28), (12.69, 16.56), (9.03, 11.37)),
        "b11c010O01O0AO<400OMC1>OB0?2000O2O0Ok5",
    ),
    (
        ((16.04, 10.82), (9.41, 7.81), (5.99, 0.72), (21.91, 8.89), (13.69, 6.12)),
        "T31c02O1N2O0O010O010O01LB1=0DN=1301O010OX2",
    ),
    (
        (
            (3.78, 17.73),
            (0.13, 14.31),
            (20.26, 2.6),
            (10.47, 15.49),
            (0.36, 11.94),
            (19.83, 9.75),
            (18.15, 4.3),
        ),
        ";120>0A2>3O1OO0LD1=ND1=OD0;1D0<0C2;4O01O0LEO=0DO<40100O10JF29NY3",
    ),
)
"""Polygons on 20 x 26 pixels, and COCO's run lengths of what OpenCV 4.8.1 (polylines, fillPoly) paints: a
dot, lines, a spike, fractions, bow ties, a hole cut in by the way there and back, crossings."""


def slow_runs(mask):
    """Column by column, one pixel at a time: the numbers of equal pixels, beginning with zeros."""
    runs, value = [0], False
    for pixel in mask.T.reshape(-1).tolist():
        if bool(pixel) != value:
            runs.append(0)
            value = not value
        runs[-1] += 1
    return runs


@pytest.mark.parametrize(("points", "counts"), PAINTED)
def test_polygons_are_painted_as_opencv_does(points, counts):
    assert run_lengths(filled_polygon(points, (20, 26)))["counts"] == counts


def test_polygons_against_opencv_itself_where_it_is_installed():
    cv2 = pytest.importorskip("cv2")
    if not cv2.__version__.startswith("4.8"):
        pytest.skip("LISA requires OpenCV 4.8")
    rng = np.random.default_rng(0)
    for _ in range(1000):
        height, width = (int(side) for side in rng.integers(8, 90, 2))
        points = rng.uniform(0, 1, (int(rng.integers(1, 9)), 2)) * [width - 1, height - 1]
        painted = np.zeros((height, width), np.uint8)
        cv2.polylines(painted, np.array([points], np.int32), True, 1, 1)
        cv2.fillPoly(painted, np.array([points], np.int32), 1)
        assert (painted == filled_polygon(points, (height, width))).all()


def test_the_inside_is_that_of_the_even_odd_rule_and_nothing_lies_far_from_it():
    """Against another rule than OpenCV's: crossings of a ray, counted for one pixel after the other."""
    rng = np.random.default_rng(1)
    for outside in (0.0, 0.4):
        for _ in range(25):
            corners = np.trunc(rng.uniform(-outside, 1 + outside, (int(rng.integers(3, 8)), 2)) * [29, 23])
            mask = filled_polygon(corners, (24, 30))
            edges = list(zip(corners, np.roll(corners, -1, axis=0), strict=True))
            for y, x in np.ndindex(mask.shape):
                away = min(_distance(np.array([x, y]), a, b) for a, b in edges)
                if away > 1.5:  # further from every edge than any way to draw one
                    crossed = sum((a[1] > y) != (b[1] > y) and x < _at(a, b, y) for a, b in edges)
                    assert mask[y, x] == crossed % 2, (corners, x, y)


def _distance(point, a, b):
    along = b - a
    share = np.clip((point - a) @ along / max(along @ along, 1e-9), 0, 1)
    return np.linalg.norm(point - a - share * along)


def _at(a, b, y):
    return a[0] + (y - a[1]) * (b[0] - a[0]) / (b[1] - a[1])


def test_a_polygon_outside_the_image_paints_nothing_and_one_across_its_border_is_cut():
    assert not filled_polygon([(50, 50), (60, 50), (55, 60)], (20, 20)).any()
    square = filled_polygon([(-5, -5), (9, -5), (9, 9), (-5, 9)], (20, 20))
    assert square[:10, :10].all()
    assert square.sum() == 100
    assert filled_polygon([(-100, -100), (200, -100), (200, 200), (-100, 200)], (20, 20)).all()


def test_run_lengths_there_and_back():
    rng = np.random.default_rng(2)
    masks = [rng.random(rng.integers(1, 40, 2)) < rng.random() for _ in range(200)]
    masks += [
        np.zeros((3, 4), bool),
        np.ones((4, 3), bool),
        np.eye(70, dtype=bool),
        np.ones((300, 400), bool),
    ]
    for mask in masks:
        assert (find_mask(f"Sure, [SEG]. {mask_text(mask)}") == mask).all()
        plain = json.dumps({"size": list(mask.shape), "counts": slow_runs(mask)})
        assert (find_mask(plain) == mask).all()


def test_run_lengths_are_those_of_cocos_tool_where_it_is_installed():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(3)
    for _ in range(300):
        mask = rng.random(rng.integers(1, 60, 2)) < rng.random()
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert run_lengths(mask)["counts"] == theirs["counts"].decode()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"size": [2, 2], "counts": [1, 2]}', "do not fill 2 x 2"),
        ('{"size": [2, 2], "counts": [5, -1]}', "do not fill"),
        ('{"size": [2], "counts": [4]}', "expected .height, width."),
        ('{"size": [2, 2], "counts": "o"}', "break off"),
        ('{"size": [2, 2], "counts": "\u00e9"}', "hold"),
        ('{"size": [2, 2], "counts": "4", }', "property name|Illegal trailing comma"),
    ],
)
def test_a_broken_mask_is_named_with_its_question(tmp_path, text, problem):
    with pytest.raises(ValueError, match=problem):
        find_mask(text)
    questions = scenes(tmp_path, 2)
    answers = Predictions({questions[0].id: "", questions[1].id: text})
    with pytest.raises(ScoreError, match=f"question {questions[1].id}: "):
        get_benchmark("reasonseg").score(questions, answers)


# --- the benchmark --------------------------------------------------------------------------------------


def write(root, name, shapes, *, size=(30, 24), text=("the cup",), sentence=False, encoding="utf-8"):
    root.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(root / f"{name}.jpg")
    record = {"text": list(text), "is_sentence": sentence, "shapes": shapes}
    (root / f"{name}.json").write_bytes(json.dumps(record, ensure_ascii=False).encode(encoding))


def square(left, top, side, label="target"):
    points = [[left, top], [left + side, top], [left + side, top + side], [left, top + side]]
    return {"label": label, "points": points}


def scenes(root, count, seed=0):
    rng = np.random.default_rng(seed)
    for n in range(count):
        shapes = [
            {"label": label, "points": (rng.uniform(0, 1, (5, 2)) * [29, 23]).tolist()}
            for label in ("target", "ignore", "target")[: 1 + n % 3]
        ]
        write(root / "val", f"i{n}", shapes, sentence=bool(n % 2))
    return get_benchmark("reasonseg").load(root)


def test_larger_polygons_are_painted_first_and_the_ignored_ones_over_them(tmp_path):
    shapes = [
        square(10, 10, 3, "ignore"),
        square(2, 2, 15),
        square(20, 15, 2, "FLAG"),
        square(3, 3, 6, "Ignored"),
        square(4, 4, 2),
    ]
    write(tmp_path, "a", shapes)
    (question,) = get_benchmark("reasonseg").load(tmp_path)
    expected = np.zeros((24, 30), int)
    expected[2:18, 2:18] = 1
    expected[3:10, 3:10] = 255
    expected[10:14, 10:14] = 255
    expected[4:7, 4:7] = 1
    assert (true_mask(question) == expected).all()


def test_scores_are_lisas(tmp_path):
    """Its way of counting: histograms of classes over all pixels but those of 255."""
    benchmark = get_benchmark("reasonseg")
    questions = scenes(tmp_path, 9)
    write(tmp_path / "val", "nothing", [])
    write(tmp_path / "val", "missed", [square(1, 1, 5)])
    questions = benchmark.load(tmp_path)
    rng = np.random.default_rng(5)
    masks = {q.id: rng.random((24, 30)) < 0.4 for q in questions}
    masks["nothing"] = np.zeros((24, 30), bool)
    texts = {name: f"Sure, [SEG]. {mask_text(mask)}" for name, mask in masks.items()}
    texts["missed"] = "I see no cup."
    masks["missed"] = np.zeros((24, 30), bool)
    shared, union, overlaps = np.zeros(2), np.zeros(2), []
    for question in questions:
        target, output = true_mask(question).ravel().astype(int), masks[question.id].ravel().astype(int)
        output[target == 255] = 255
        count = [
            np.array([(part == c).sum() for c in (0, 1)])
            for part in (output[output == target], output, target)
        ]
        own = count[1] + count[2] - count[0]
        overlap = count[0] / (own + 1e-5)
        overlap[own == 0] += 1.0
        shared, union = shared + count[0], union + own
        overlaps.append(overlap[1])
    scores = benchmark.score(questions, Predictions(texts))
    assert scores["giou"] == pytest.approx(100 * np.mean(overlaps))
    assert scores["ciou"] == pytest.approx(100 * shared[1] / (union[1] + 1e-10))
    assert scores["num_without_mask"] == 1
    assert scores["per_kind"]["short"]["num_questions"] + scores["per_kind"]["long"]["num_questions"] == 11
    assert overlaps[[q.id for q in questions].index("nothing")] == 1.0
    assert benchmark.headline(scores) == f"{scores['giou']:.1f} / {scores['ciou']:.1f}"


def test_the_bootstrap_draws_images(tmp_path):
    benchmark = get_benchmark("reasonseg")
    questions = scenes(tmp_path, 6)
    rng = np.random.default_rng(6)
    answers = Predictions({q.id: mask_text(rng.random((24, 30)) < 0.5) for q in questions})
    once = benchmark.score(questions, answers)
    hits = benchmark.correct(questions, answers)
    weights = np.array([[1, 1, 1, 1, 1, 1], [0, 2, 1, 0, 3, 0]])
    drawn = [q for q, times in zip(questions, weights[1], strict=True) for _ in range(times)]
    again = benchmark.metrics(drawn, benchmark.hits(drawn, answers, "original"), answers, "original")
    mean = benchmark.statistic(questions, hits)(weights)
    whole = benchmark.cumulative_statistic(questions, answers)(weights)
    assert mean == pytest.approx([once["giou"], again["giou"]])
    assert whole == pytest.approx([once["ciou"], again["ciou"]])


def test_prompts_are_those_of_lisas_validation(tmp_path):
    benchmark = get_benchmark("reasonseg")
    write(tmp_path, "a", [square(1, 1, 4)], text=("the cup", "not asked"))
    write(tmp_path, "b", [square(1, 1, 4)], text=["Where would one drink from? "], sentence=True)
    short, long = benchmark.load(tmp_path)
    assert benchmark.prompt(short) == "What is the cup in this image? Please output segmentation mask."
    assert benchmark.prompt(long) == "Where would one drink from? Please output segmentation mask."
    assert benchmark.prompt(short, "") == "the cup"


def test_files_in_windows_1252_are_read(tmp_path):
    write(tmp_path, "a", [square(1, 1, 4)], text=("the caf\u00e9\u2019s cup",), encoding="cp1252")
    (question,) = get_benchmark("reasonseg").load(tmp_path)
    assert question.text == "the caf\u00e9\u2019s cup"


def test_two_splits_are_not_mixed(tmp_path):
    write(tmp_path / "val", "a", [square(1, 1, 4)])
    write(tmp_path / "test", "a", [square(1, 1, 4)])
    with pytest.raises(DataError, match="name the folder of one"):
        get_benchmark("reasonseg").load(tmp_path)
    assert len(get_benchmark("reasonseg").load(tmp_path / "test")) == 1


@pytest.mark.parametrize("points", [[], [[1]], [[1, 2, 3]], [["a", 2]], [[1, float("nan")]], [[1e9, 2]], 3])
def test_points_that_are_none_are_named(tmp_path, points):
    write(tmp_path, "a", [square(1, 1, 4), {"label": "target", "points": points}])
    with pytest.raises(DataError, match=r"a\.json.*row 2.*points"):
        get_benchmark("reasonseg").load(tmp_path)


def test_polygons_without_area_are_lines_and_dots(tmp_path):
    shapes = [
        {"label": "target", "points": p} for p in ([[3, 3]], [[5, 5], [9, 5]], [[5, 8], [9, 8], [7, 8]])
    ]
    write(tmp_path, "a", shapes)
    (question,) = get_benchmark("reasonseg").load(tmp_path)
    assert true_mask(question).sum() == 1 + 5 + 5


def test_a_mask_of_another_size_or_an_image_that_is_gone_is_named(tmp_path):
    benchmark = get_benchmark("reasonseg")
    write(tmp_path, "a", [square(1, 1, 4)])
    questions = benchmark.load(tmp_path)
    with pytest.raises(ScoreError, match=r"question a: a mask of 30 x 24 .* has 24 x 30"):
        benchmark.score(questions, Predictions({"a": mask_text(np.ones((30, 24)))}))
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ScoreError, match="question a: masks have the size of their image"):
        benchmark.score(benchmark.load(tmp_path, images=False), Predictions({"a": ""}))
    with pytest.raises(DataError, match=r"lacks 1 images: a\.jpg"):
        benchmark.load(tmp_path)
