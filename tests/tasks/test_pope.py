"""POPE's readings and rates against values worked out by hand from the published rules."""

from __future__ import annotations

import pytest

from dyvte.tasks.base import Predictions, Question, get_benchmark
from dyvte.tasks.pope import read_answer
from tests.helpers.benchmark_files import write_benchmark


@pytest.mark.parametrize(
    ("answer", "original", "lmms", "vlmevalkit"),
    [
        ("yes", "yes", "yes", "yes"),
        ("No", "no", "no", "no"),
        ("no.", "no", "other", "no"),
        ("NO", "yes", "no", "no"),
        ("(No)", "yes", "other", "no"),
        ("No, there is not", "no", "other", "no"),
        ("Yes, but not a dog", "no", "other", "yes"),
        ("There is. No dog", "yes", "other", "no"),
        ("Not sure", "yes", "other", "other"),
        ("nothing", "yes", "other", "other"),
        ("no\u2028", "no", "no", "no"),
        ("No\n", "no", "no", "no"),
        ("No\nway", "yes", "other", "no"),
        ("Yes and no", "no", "other", "other"),
        ("", "yes", "other", "other"),
        (" No ", "no", "no", "no"),
    ],
)
def test_readings(answer, original, lmms, vlmevalkit):
    assert [read_answer(answer, d) for d in ("original", "lmms", "vlmevalkit")] == [
        original,
        lmms,
        vlmevalkit,
    ]


def test_a_submitted_answer_is_read_as_it_stands(tmp_path):
    assert read_answer("No\n", "original", converted=True) == "yes"
    pope = get_benchmark("pope")
    questions = pope.load(write_benchmark(tmp_path / "a", "pope", "release"))
    raw = Predictions({q.id: f"{q.answer.capitalize()}\n" for q in questions})
    assert pope.score(questions, raw)["accuracy"] == 100
    again = pope.read_predictions(pope.write_submission(tmp_path, questions, raw), questions)
    assert pope.score(questions, again)["accuracy"] == 100


def _questions(golds, categories=("random",)):
    return [
        Question(
            id=str(n),
            image=None,
            text="?",
            answer=gold,
            image_id=str(n),
            kind=categories[0],
            details={"categories": categories},
        )
        for n, gold in enumerate(golds)
    ]


def _score(golds, answers, dialect):
    questions = _questions(golds)
    predictions = Predictions({str(n): a for n, a in enumerate(answers)})
    return get_benchmark("pope").score(questions, predictions, dialect)


GOLDS = ["yes", "yes", "yes", "no", "no", "no", "no", "no"]
ANSWERS = ["yes", "yes", "no", "yes", "no", "no", "no", "maybe"]


@pytest.mark.parametrize(
    ("dialect", "true_yes", "false_yes", "missed", "right", "yes"),
    [("original", 2, 2, 1, 5, 4), ("lmms", 2, 1, 1, 5, 3), ("vlmevalkit", 2, 1, 1, 5, 3)],
)
def test_rates(dialect, true_yes, false_yes, missed, right, yes):
    scores = _score(GOLDS, ANSWERS, dialect)
    precision, recall = true_yes / (true_yes + false_yes), true_yes / (true_yes + missed)
    expected = {
        "accuracy": 100 * right / 8,
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * 2 * precision * recall / (precision + recall),
        "yes_rate": 100 * yes / 8,
    }
    assert {key: scores[key] for key in expected} == pytest.approx(expected)
    assert scores["overall"]["gold_yes_rate"] == 37.5
    assert scores["missing_categories"] == ["popular", "adversarial"]


def test_unreadable_answers_leave_recall_in_lmms_eval_only():
    recalls = {d: _score(["yes", "yes"], ["yes", "maybe"], d)["recall"] for d in ("lmms", "vlmevalkit")}
    assert recalls == {"lmms": 100.0, "vlmevalkit": 50.0}


def test_all_no_gives_zero_where_the_official_tool_divides_by_zero():
    scores = _score(["yes", "no"], ["no", "no"], "original")
    assert (scores["precision"], scores["recall"], scores["f1"], scores["accuracy"]) == (0, 0, 0, 50)


def test_figures_are_means_over_categories_and_the_tsv_counts_a_question_in_each(tmp_path):
    pope = get_benchmark("pope")
    release = pope.load(write_benchmark(tmp_path / "a", "pope", "release"))
    answers = ["yes", "no", "yes", "no", "yes", "yes", "yes", "yes"]
    scores = pope.score(release, Predictions({q.id: a for q, a in zip(release, answers, strict=True)}))
    assert scores["per_category"]["random"]["accuracy"] == 100
    assert scores["per_category"]["adversarial"]["accuracy"] == 50
    assert scores["accuracy"] == 75
    assert scores["f1"] == pytest.approx((100 + 200 / 3) / 2)
    tsv = pope.load(write_benchmark(tmp_path / "b", "pope", "tsv"))
    scores = pope.score(tsv, Predictions({q.id: "yes" for q in tsv}))
    assert scores["overall"]["num_questions"] == 8
    assert scores["num_questions"] == 4


def test_official_answer_files_hold_the_text(tmp_path):
    pope = get_benchmark("pope")
    questions = pope.load(write_benchmark(tmp_path / "a", "pope", "llava"))
    folder = pope.write_submission(tmp_path, questions, Predictions({q.id: "No, it is" for q in questions}))
    assert sorted(path.name for path in folder.iterdir()) == ["adversarial.json", "random.json"]
    first = (folder / "adversarial.json").read_text().split("\n")[0]
    assert first == '{"question_id": 4, "question": "Is there a dog in the image?", "answer": "No, it is"}'
