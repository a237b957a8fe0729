"""GQA's loader and scorer against hand-computed figures of the published rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dyvte.errors import ConfigError, DataError, ScoreError
from dyvte.tasks.base import Predictions, get_benchmark


def _entry(answer, *, image="7", structural="query", group="color", balanced=True, semantic=(), **types):
    return {
        "question": "What color is it?",
        "imageId": image,
        "answer": answer,
        "isBalanced": balanced,
        "groups": {"global": group, "local": None},
        "types": {"structural": structural, "semantic": "attr", "detailed": "queryC", **types},
        "semantic": [{"operation": op, "argument": arg} for op, arg in semantic],
    }


def _write(root: Path, entries: dict, images=("7", "8"), extension=".png") -> Path:
    (root / "images").mkdir(parents=True, exist_ok=True)
    for name in images:
        Image.new("RGB", (4, 4)).save(root / "images" / f"{name}{extension}")
    (root / "testdev_balanced_questions.json").write_text(json.dumps(entries))
    return root


@pytest.fixture
def gqa():
    return get_benchmark("gqa")


@pytest.fixture
def four(tmp_path, gqa):
    """The four answers of the published comparison: 75 / 75 / 50."""
    golds = {"001": "red", "002": "dog", "003": "left", "004": "yes"}
    entries = {i: _entry(g, structural="verify" if g == "yes" else "query") for i, g in golds.items()}
    questions = gqa.load(_write(tmp_path, entries))
    answers = Predictions({"001": "Red.", "002": "the dog", "003": "left", "004": "Yes"})
    return questions, answers


def test_the_three_dialects_disagree_as_published(gqa, four):
    questions, answers = four
    accuracy = {d: gqa.score(questions, answers, d)["accuracy"] for d in ("original", "lmms", "vlmevalkit")}
    assert accuracy == {"original": 75.0, "lmms": 75.0, "vlmevalkit": 50.0}


@pytest.mark.parametrize(
    ("answer", "original", "lmms", "vlmevalkit"),
    [
        ("red!", False, True, False),
        (" RED ", True, True, True),
        ("red...", True, True, False),
        ("red. ", True, True, False),
        ("", False, False, False),
        ("red\u2028", True, True, True),
        ("the red", False, False, False),
    ],
)
def test_noisy_answers(gqa, tmp_path, answer, original, lmms, vlmevalkit):
    questions = gqa.load(_write(tmp_path, {"1": _entry("red")}))
    predictions = Predictions({"1": answer})
    got = [gqa.correct(questions, predictions, d)[0] for d in ("original", "lmms", "vlmevalkit")]
    assert got == [original, lmms, vlmevalkit]


def test_gold_is_left_alone_by_the_original_rule_only(gqa, tmp_path):
    questions = gqa.load(_write(tmp_path, {"1": _entry("T-Shirt")}))
    answer = Predictions({"1": "T-shirt"})
    assert [gqa.correct(questions, answer, d)[0] for d in ("original", "lmms", "vlmevalkit")] == [
        False,
        True,
        True,
    ]


def test_binary_open_types_and_distribution(gqa, four):
    questions, answers = four
    scores = gqa.score(questions, answers)
    assert scores["binary"] == 100.0
    assert scores["open"] == pytest.approx(200 / 3)
    assert scores["per_structural"]["query"] == {"accuracy": pytest.approx(200 / 3), "num_questions": 3}
    assert scores["per_words"]["4"]["num_questions"] == 4
    # golds red, dog, left, yes once each in one group; "dog" is never predicted: chi2 = 1, / 100
    assert scores["distribution"] == pytest.approx(0.01)


def test_steps_leave_out_existence_and_naming(gqa, tmp_path):
    program = [("select", "car (12)"), ("filter color", "red"), ("exist", "?"), ("query", "name")]
    questions = gqa.load(_write(tmp_path, {"1": _entry("yes", semantic=program)}))
    assert questions[0].details["steps"] == 2


def test_unbalanced_questions_do_not_count(gqa, tmp_path):
    questions = gqa.load(_write(tmp_path, {"1": _entry("red"), "2": _entry("blue", balanced=False)}))
    scores = gqa.score(questions, Predictions({"1": "red"}))
    assert (scores["accuracy"], scores["num_questions"], scores["num_not_balanced"]) == (100.0, 1, 1)


def test_a_missing_prediction_is_named(gqa, four):
    questions, answers = four
    texts = {k: v for k, v in answers.texts.items() if k != "003"}
    with pytest.raises(ScoreError, match=r"1 of 4 questions have no prediction: 003"):
        gqa.score(questions, Predictions(texts))


def test_an_unknown_prediction_is_counted(gqa, four):
    questions, answers = four
    scores = gqa.score(questions, Predictions({**answers.texts, "1": "red"}))
    assert (scores["accuracy"], scores["num_unknown_predictions"]) == (75.0, 1)


def test_submission_reads_back_to_the_same_scores(gqa, four, tmp_path):
    questions, answers = four
    path = gqa.write_submission(tmp_path, questions, answers)
    assert json.loads(path.read_text())[0] == {"questionId": "001", "prediction": "red"}
    assert gqa.score(questions, gqa.read_predictions(path, questions)) == gqa.score(questions, answers)


def test_a_submission_is_compared_as_it_stands(gqa, tmp_path):
    questions = gqa.load(_write(tmp_path, {"1": _entry("red")}))
    path = tmp_path / "p.json"
    path.write_text('[{"questionId": "1", "prediction": "Red"}]')
    assert gqa.score(questions, gqa.read_predictions(path, questions))["accuracy"] == 0.0


def test_raw_answers_keep_unicode_line_separators(gqa, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(
        '{"question_id": "1", "text": "a\u2028b"}\n{"question_id": 2, "text": ""}\n', encoding="utf-8"
    )
    assert gqa.read_predictions(path, []).texts == {"1": "a\u2028b", "2": ""}


def test_duplicate_predictions_are_refused(gqa, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": "1", "text": "a"}\n{"question_id": "1", "text": "b"}\n')
    with pytest.raises(ScoreError, match="second prediction for question '1'"):
        gqa.read_predictions(path, [])


def test_prompt_appends_the_suffix(gqa, four):
    question = four[0][0]
    assert gqa.prompt(question) == "What color is it?\nAnswer the question using a single word or phrase."
    assert gqa.prompt(question, "") == "What color is it?"


def test_wrong_folder_shows_the_expected_tree(gqa, tmp_path):
    with pytest.raises(
        DataError, match=r"(?s)no question file.*Expected:.*testdev_balanced_questions.json.*images/"
    ):
        gqa.load(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        gqa.load(tmp_path / "nowhere")


def test_duplicate_question_ids_are_refused(gqa, tmp_path):
    _write(tmp_path, {})
    one = json.dumps(_entry("red"))
    (tmp_path / "testdev_balanced_questions.json").write_text(f'{{"5": {one}, "5": {one}}}')
    with pytest.raises(DataError, match="1 duplicate question ids: 5"):
        gqa.load(tmp_path)


@pytest.mark.parametrize("image", ["nope", "../secret"])
def test_an_image_outside_or_absent_is_refused(gqa, tmp_path, image):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    with pytest.raises(DataError, match="lacks 1 images"):
        gqa.load(_write(tmp_path, {"1": _entry("red", image=image)}))


def test_absent_gold_is_refused(gqa, tmp_path):
    entry = _entry("red")
    del entry["answer"]
    with pytest.raises(DataError, match="1 questions have no gold answer: 1"):
        gqa.load(_write(tmp_path, {"1": entry}))


def test_unknown_names(gqa, four):
    with pytest.raises(ConfigError, match="unknown benchmark 'gpa'"):
        get_benchmark("gpa")
    with pytest.raises(ConfigError, match="unknown scoring dialect 'own'"):
        gqa.score(*four, "own")
