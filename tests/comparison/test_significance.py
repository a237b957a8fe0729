"""Scores as statistics of image weights, against scoring data sets in which images really are repeated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dyvte.comparison.significance import score_difference
from dyvte.tasks.base import Predictions, Question, get_benchmark

SUBTASKS = ("count", "color", "code_reasoning")


def _mme(images_per_subtask: int = 5) -> list[Question]:
    return [
        Question(
            id=f"{subtask}/{n}#{i}",
            image=Path(f"{n}.png"),
            text="?",
            answer="Yes",
            image_id=f"{subtask}/{n}",
            kind=subtask,
        )
        for subtask in SUBTASKS
        for n in range(images_per_subtask)
        for i in (1, 2)
    ]


def _repeated(questions: list[Question], hits: np.ndarray, weights: np.ndarray) -> float:
    """MME's own score of a data set in which image g occurs weights[g] times."""
    import dataclasses

    copies, answers = [], {}
    order = list(dict.fromkeys(q.image_id for q in questions))
    for question, hit in zip(questions, hits):
        for copy in range(int(weights[order.index(question.image_id)])):
            one = dataclasses.replace(
                question, id=f"{question.id}@{copy}", image_id=f"{question.image_id}@{copy}"
            )
            copies.append(one)
            answers[one.id] = "yes" if hit else "no"
    scores = get_benchmark("mme").score(copies, Predictions(answers))
    return scores["perception"] + scores["cognition"]


def test_mme_statistic_equals_scoring_repeated_images():
    rng = np.random.default_rng(0)
    questions = _mme()
    hits = rng.random(len(questions)) < 0.6
    weights = rng.integers(1, 4, size=(6, 15)).astype(float)
    expected = [_repeated(questions, hits, row) for row in weights]
    assert get_benchmark("mme").statistic(questions, list(hits))(weights) == pytest.approx(expected)
    assert get_benchmark("mme").strata(questions).tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_accuracy_statistic_weighs_questions():
    questions = _mme(1)
    hits = [True, False, True, True, False, False]
    weights = np.array([[1.0, 1.0, 1.0], [2.0, 1.0, 0.0]])
    assert get_benchmark("gqa").statistic(questions, hits)(weights) == pytest.approx([50.0, 100 * 4 / 6])


def test_difference_is_of_means_over_seeds():
    rng = np.random.default_rng(1)
    questions = _mme()
    a, b = rng.random((3, 30)) < 0.8, rng.random((2, 30)) < 0.4
    for name in ("mme", "gqa"):
        benchmark = get_benchmark(name)
        ones = np.ones((1, 15))
        mean_a, mean_b = (
            np.mean([benchmark.statistic(questions, list(h))(ones)[0] for h in hits]) for hits in (a, b)
        )
        found = score_difference(benchmark, questions, list(a), list(b), num_draws=200)
        assert found.difference == pytest.approx(mean_a - mean_b)
        assert found.low < found.difference < found.high
