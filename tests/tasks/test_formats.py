"""Every format of every benchmark: the same questions, golds and images, whatever they are stored in."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from dyvte.data import load_image
from dyvte.errors import ConfigError, DataError, ScoreError
from dyvte.evaluation.generation import question_images
from dyvte.readers.tables import PackedImage
from dyvte.tasks.base import TASKS, Predictions, get_benchmark
from tests.helpers.benchmark_files import CASES, CHOICES, WRITERS, picture, put, rendered, write_benchmark

LETTERED = ("scienceqa", "ai2d", "mmmu", "seed", "mmstar", "vstar")


def _load(tmp_path, name, form, **options):
    return get_benchmark(name).load(write_benchmark(tmp_path / form, name, form), **options)


def _pixels(image):
    return image.convert("RGB").tobytes()


def test_the_minis_cover_every_benchmark():
    assert sorted(WRITERS) == sorted(TASKS)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_formats_hold_the_same_questions(tmp_path, name, form):
    first = next(iter(WRITERS[name]))
    expected, got = _load(tmp_path / "a", name, first), _load(tmp_path / "b", name, form)
    if name == "pope" and form == "tsv":  # a question of several categories is stored once
        expected = [q for q in expected if q.kind == "random"]
    ask = get_benchmark(name).prompt
    hint, ocr = "Context: Look.\n", "\nReference OCR"  # not in every format
    keys = [
        sorted((ask(q, "").removeprefix(hint).split(ocr)[0], q.answer) for q in questions)
        for questions in (expected, got)
    ]
    if (name, form) in (("vqav2", "llava"), ("mmvet", "llava")):
        assert all(q.answer is None for q in got)
        keys = [[text for text, _ in key] for key in keys]
    assert keys[0] == keys[1]
    assert len({q.id for q in got}) == len(got)
    shown = [question_images(q, 4) for q in got]
    assert all(image.size == (16, 16) for row in shown for image in row)
    assert all(row for row in shown)


@pytest.mark.parametrize(("name", "form"), [c for c in CASES if c[0] in LETTERED])
def test_choices_are_asked_as_llava_does_about_the_right_image(tmp_path, name, form):
    benchmark = get_benchmark(name)
    questions = {q.answer: q for q in _load(tmp_path, name, form) if q.details["options"]}
    for n, (text, options, gold) in enumerate(CHOICES):
        question = questions[gold]
        asked = benchmark.prompt(question)
        assert asked.endswith(
            rendered(text, options).split("\n", 1)[1]
            + "\nAnswer with the option's letter from the given choices directly."
        )
        assert text in asked
        expected = _pixels(Image.open(io.BytesIO(picture(n))))
        assert _pixels(question_images(question, 1)[0]) == expected


@pytest.mark.parametrize(("name", "form"), CASES)
def test_submissions_read_back_to_the_same_scores(tmp_path, name, form):
    benchmark = get_benchmark(name)
    questions = _load(tmp_path, name, form)
    golds = [q.answer or "x" for q in questions]
    noisy = [gold if n % 3 else f" {gold}\n" for n, gold in enumerate(golds)]
    noisy[-1] = "maybe"
    predictions = Predictions({q.id: text for q, text in zip(questions, noisy, strict=True)})
    path = benchmark.write_submission(tmp_path, questions, predictions)
    assert path.exists()
    if name == "mmbench":
        return  # a workbook for the server, tested in test_multiple_choice
    if name == "seed":  # LLaVA's line format, with "prediction"
        assert path.suffix == ".jsonl"
    again = benchmark.read_predictions(path, questions)
    scores = [benchmark.score(questions, p) for p in (predictions, again)]
    for one in scores:
        one.pop("num_answers_with_line_breaks", None)
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", TASKS.names())
def test_another_layout_shows_the_expected_tree(tmp_path, name):
    benchmark = get_benchmark(name)
    (tmp_path / "readme.txt").write_text("nothing here")
    for root, problem in ((tmp_path, "no "), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(DataError) as error:
            benchmark.load(root)
        assert benchmark.expected_tree in str(error.value)
        assert problem in str(error.value)


@pytest.mark.parametrize("name", TASKS.names())
def test_a_missing_prediction_is_named(tmp_path, name):
    benchmark = get_benchmark(name)
    questions = _load(tmp_path, name, next(iter(WRITERS[name])))
    texts = {q.id: "A" for q in questions[1:]}
    message = f"1 of {len(questions)} questions have no prediction: {questions[0].id}"
    with pytest.raises(ScoreError) as error:
        benchmark.score(questions, Predictions(texts))
    assert message in str(error.value)
    with pytest.raises(ScoreError):
        benchmark.correct(questions, Predictions(texts))


IMAGES = {
    "gqa": "images/n1.png",
    "mme": "color/1.png",
    "pope": "val2014/COCO_val2014_1.jpg",
    "scienceqa": "images/test/11/image.png",
    "ai2d": "images/1.png",
    "seed": "SEED-Bench-image/1_1",
    "textvqa": "train_images/i1.jpg",
    "vqav2": "val2014/COCO_val2014_000000000043.jpg",
    "mmvet": "images/v1_1.png",
    "docvqa": "spdocvqa_images/page_1.png",
    "infovqa": "infographicsvqa_images/37171.jpeg",
    "chartqa": "test/png/1.png",
    "ocrbench": "OCRBench_Images/SROIE/1.jpg",
    "realworldqa": "images/1.webp",
    "mmvp": "MMVP Images/2.jpg",
    "vstar": "relative_position/sa_1.jpg",
    "chair": "val2014/COCO_val2014_000000000001.jpg",
    "refcoco": "train2014/COCO_train2014_000000000001.jpg",
    "hallusionbench": "hallusion_bench/VD/illusion/0_1.png",
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_missing_image_is_named(tmp_path, name):
    root = write_benchmark(tmp_path, name, next(iter(WRITERS[name])))
    (root / IMAGES[name]).unlink()
    with pytest.raises(DataError, match="lacks 1 images"):
        get_benchmark(name).load(root)


VIDEOS = {
    "videomme": "frames/yt_1",
    "tgifqa": "frames/tumblr_1",
    "mvbench": "video/star/Charades_v1_480/clip1",
}


@pytest.mark.parametrize("name", VIDEOS)
def test_a_missing_video_is_named(tmp_path, name):
    import shutil

    root = write_benchmark(tmp_path, name, next(iter(WRITERS[name])))
    shutil.rmtree(root / VIDEOS[name])
    with pytest.raises(DataError, match=r"lacks [12] videos or folders of frames: (yt_1|tumblr_1|clip1)"):
        get_benchmark(name).load(root)


@pytest.mark.parametrize("name", [name for name in IMAGES if name != "mme"] + [*VIDEOS])
def test_scoring_needs_no_images(tmp_path, name):
    import shutil

    benchmark = get_benchmark(name)
    root = write_benchmark(tmp_path, name, next(iter(WRITERS[name])))
    questions = benchmark.load(root)
    for path in (path for path in root.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg", ".webp", "")):
        path.unlink() if path.is_file() else None
    for folder in ("frames", "mp4", "video"):
        shutil.rmtree(root / folder, ignore_errors=True)
    with pytest.raises(DataError, match="lacks"):
        benchmark.load(root)
    predictions = Predictions({q.id: "yes" for q in questions})
    bare = benchmark.load(root, images=False)
    assert benchmark.score(bare, predictions) == benchmark.score(questions, predictions)


def test_a_limit_checks_only_the_images_of_the_questions_kept(tmp_path):
    root = write_benchmark(tmp_path, "gqa", "release")
    (root / "images" / "n2.png").unlink()
    assert [q.id for q in get_benchmark("gqa").load(root, limit=2)] == ["000", "001"]


def _repeat_first(path, key=None):
    content = json.loads(path.read_text())
    rows = content if key is None else content[key]
    rows.append(rows[0])
    put(path, content)


@pytest.mark.parametrize(
    ("name", "form", "file", "key"),
    [
        ("seed", "release", "SEED-Bench.json", "questions"),
        ("textvqa", "release", "TextVQA_0.5.1_val.json", "data"),
        ("vqav2", "release", "v2_OpenEnded_mscoco_val2014_questions.json", "questions"),
        ("tgifqa", "zero_shot", "test_q.json", None),
        ("scienceqa", "release", "pid_splits.json", "test"),
    ],
)
def test_duplicate_ids_are_refused(tmp_path, name, form, file, key):
    root = write_benchmark(tmp_path, name, form)
    _repeat_first(root / file, key)
    with pytest.raises(DataError, match="1 duplicate question ids"):
        get_benchmark(name).load(root)


@pytest.mark.parametrize(
    ("name", "file"), [("pope", "coco/coco_pope_random.json"), ("gqa", "testdev_balanced_questions.json")]
)
def test_absent_gold_answers_are_refused(tmp_path, name, file):
    root = write_benchmark(tmp_path, name, "release")
    text = (root / file).read_text()
    (root / file).write_text(text.replace('"label": "yes"', '"x": 1', 1).replace('"answer": "two", ', "", 1))
    with pytest.raises(DataError, match="no gold answer"):
        get_benchmark(name).load(root)


def test_golds_absent_for_some_questions_are_refused_and_for_all_cannot_be_scored(tmp_path):
    root = write_benchmark(tmp_path / "a", "vqav2", "release")
    path = root / "v2_mscoco_val2014_annotations.json"
    content = json.loads(path.read_text())
    put(path, {"annotations": content["annotations"][1:]})
    benchmark = get_benchmark("vqav2")
    with pytest.raises(DataError, match="1 questions have no gold answer: 42000"):
        benchmark.load(root)
    path.unlink()
    questions = benchmark.load(root)
    predictions = Predictions({q.id: "stop" for q in questions})
    scores = benchmark.score(questions, predictions)
    assert scores["graded"] is False
    assert benchmark.headline(scores) == "not graded"
    with pytest.raises(ScoreError, match="3 of 3 questions have no gold answer"):
        benchmark.correct(questions, predictions)


def test_llava_questions_without_gold_are_refused(tmp_path):
    for name, file, row in (
        ("gqa", "llava_gqa_testdev_balanced.jsonl", {"question_id": "777", "text": "?"}),
        ("mme", "llava_mme.jsonl", {"question_id": "color/0.png", "text": "Is it a cow?"}),
        ("pope", "llava_pope_test.jsonl", None),
    ):
        root = write_benchmark(tmp_path / name, name, "llava")
        row = row or {
            "question_id": 77,
            "text": "Is there a cow?",
            "image": "COCO_val2014_0.jpg",
            "category": "random",
        }
        with (root / file).open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        with pytest.raises(DataError, match="no gold answer"):
            get_benchmark(name).load(root)


@pytest.mark.parametrize("name", ["mme", "textvqa"])
def test_llava_answers_whose_ids_are_images_are_joined_by_question(tmp_path, name):
    benchmark = get_benchmark(name)
    root = write_benchmark(tmp_path, name, "llava")
    questions = benchmark.load(root)
    source = root / ("llava_mme.jsonl" if name == "mme" else "llava_textvqa_val_v051_ocr.jsonl")
    asked = [json.loads(line) for line in source.read_text().splitlines()]
    rows = [
        {"question_id": r["question_id"], "prompt": r["text"], "text": f"answer {n}"}
        for n, r in enumerate(asked)
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    texts = benchmark.read_predictions(answers, questions).texts
    assert [texts[q.id] for q in questions] == [f"answer {n}" for n in range(len(rows))]
    answers.write_text(json.dumps({**rows[0], "prompt": "something else"}) + "\n")
    with pytest.raises(ScoreError, match=r"answers.jsonl, line 1: no such question"):
        benchmark.read_predictions(answers, questions)


def test_llava_mme_keeps_its_own_order_and_choice(tmp_path):
    root = write_benchmark(tmp_path, "mme", "llava")
    rows = (root / "llava_mme.jsonl").read_text().splitlines(keepends=True)
    (root / "llava_mme.jsonl").write_text("".join([*rows[6:8], *rows[:2]]))
    questions = get_benchmark("mme").load(root)
    assert [q.image_id for q in questions] == ["code_reasoning/1.png"] * 2 + ["color/0.png"] * 2


def test_odd_pairs_of_a_table_are_refused(tmp_path):
    root = write_benchmark(tmp_path, "mme", "tsv")
    path = root / "MME.tsv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"1 images have not exactly two questions: artwork/1.png"):
        get_benchmark("mme").load(root)


def test_names_are_not_followed_out_of_the_image_folder(tmp_path):
    root = write_benchmark(tmp_path, "mmvet", "release")
    content = json.loads((root / "mm-vet.json").read_text())
    content["v1_0"]["imagename"] = "../../secret.png"
    put(root / "mm-vet.json", content)
    put(root.parent / "secret.png", picture(0))
    with pytest.raises(DataError, match="leaves the image folder"):
        get_benchmark("mmvet").load(root)


def test_unknown_benchmarks_and_dialects_name_what_there_is(tmp_path):
    for given, near in (("popee", "pope"), ("MM-Vet", "mmvet"), ("text_vqa", "textvqa")):
        with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
            get_benchmark(given)
    benchmark = get_benchmark("vqav2")
    questions = _load(tmp_path, "vqav2", "release")
    with pytest.raises(ConfigError, match="VQAv2 has no 'vlmevalkit' dialect"):
        benchmark.score(questions, Predictions({q.id: "" for q in questions}), "vlmevalkit")


def test_packed_images_are_read_when_asked_for(tmp_path):
    questions = _load(tmp_path, "ai2d", "parquet")
    assert all(isinstance(q.image, PackedImage) for q in questions)
    for n, question in enumerate(questions):  # row groups of two rows
        assert _pixels(load_image(question.image.read())) == _pixels(Image.open(io.BytesIO(picture(n))))
