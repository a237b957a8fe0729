"""What a bootstrap resamples, against scoring data sets in which units really are repeated."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dyvte.tasks.answers.masks import mask_text
from dyvte.tasks.base import TASKS, Predictions, get_benchmark
from dyvte.tasks.reasonseg import true_mask
from tests.helpers.benchmark_files import WRITERS, write_benchmark

SCORES = {
    "mmvp": lambda scores: scores["pair_accuracy"],
    "hallusionbench": lambda scores: scores["mean"],
    "chair": lambda scores: 100 - scores["chair_s"],
    "docvqa": lambda scores: scores["anls"],
    "infovqa": lambda scores: scores["anls"],
    "reasonseg": lambda scores: scores["giou"],
    "mme": lambda scores: scores["perception"] + scores["cognition"],
    "tgifqa": lambda scores: scores["exact_match"],
    "videomme": lambda scores: scores["accuracy_of_all"],
}
"""The figure that the statistic is, where it is not ``accuracy``."""

ANSWERS = {"reasonseg": lambda question: mask_text(true_mask(question) == 1)}
"""The right answer, where it is not ``Question.answer``."""

GRADED = [name for name in TASKS if name != "mmvet"]


def _copy(question, number):
    """The question about a copy of its unit; ids of MMBench's rotations lead back to their question."""
    group = question.details.get("group")
    details = dict(question.details)
    if group is not None:
        details["group"] = f"{group}@{number}"
    return dataclasses.replace(
        question,
        id=f"{question.id}@{number}",
        image_id=f"{question.image_id}@{number}",
        details=details,
    )


@pytest.mark.parametrize("name", GRADED)
def test_the_statistic_equals_scoring_repeated_units(tmp_path, name):
    benchmark = get_benchmark(name)
    questions = benchmark.load(write_benchmark(tmp_path, name, next(iter(WRITERS[name]))))
    right = ANSWERS.get(name, lambda question: question.answer)
    texts = {q.id: right(q) if n % 3 else "Z" for n, q in enumerate(questions)}
    hits = benchmark.correct(questions, Predictions(texts))
    statistic = benchmark.statistic(questions, hits)
    units = list(dict.fromkeys(q.image_id for q in questions))
    weights = np.random.default_rng(0).integers(1, 4, size=(5, len(units))).astype(float)
    weights[0] = 1
    expected = []
    for row in weights:
        pairs = [(q, n) for q in questions for n in range(int(row[units.index(q.image_id)]))]
        copies = [_copy(q, n) for q, n in pairs]
        answers = Predictions({copy.id: texts[q.id] for copy, (q, _) in zip(copies, pairs)})
        expected.append(SCORES.get(name, lambda scores: scores["accuracy"])(benchmark.score(copies, answers)))
    assert statistic(weights) == pytest.approx(expected)
    assert expected[0] > 0


def test_strata_keep_every_subtask(tmp_path):
    benchmark = get_benchmark("mme")
    questions = benchmark.load(write_benchmark(tmp_path, "mme", "release"))
    kinds = dict.fromkeys(q.kind for q in questions)
    by_unit = {q.image_id: list(kinds).index(q.kind) for q in questions}
    assert benchmark.strata(questions).tolist() == list(by_unit.values())
    assert set(benchmark.strata(questions)) == {0, 1, 2}
    other = get_benchmark("gqa")
    assert set(other.strata(other.load(write_benchmark(tmp_path / "g", "gqa", "release")))) == {0}


def test_unbalanced_questions_of_gqa_weigh_nothing(tmp_path):
    benchmark = get_benchmark("gqa")
    questions = benchmark.load(write_benchmark(tmp_path, "gqa", "release"))
    odd = dataclasses.replace(questions[0], details={**questions[0].details, "balanced": False})
    statistic = benchmark.statistic([odd, *questions[1:]], [False, True, True])
    assert statistic(np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0]])).tolist() == [100.0, 100.0]


def test_units_are_named():
    units = {name: get_benchmark(name).unit for name in TASKS}
    assert {units[name] for name in ("gqa", "mme", "pope")} == {"image"}
    assert units["mmbench"] == "question"
    assert units["videomme"] == units["tgifqa"] == "video"
