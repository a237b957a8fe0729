"""The hard subset, against counting by hand and against a bootstrap written out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dyvte.comparison.hard import hard_subset, is_pooled
from dyvte.reporting.hard import hard_note, hard_rows, hard_subsets
from dyvte.tasks.base import Question


def _questions(images):
    own = {"image": None, "text": "?", "answer": "x", "kind": ""}
    return [Question(id=str(n), image_id=image, **own) for n, image in enumerate(images)]


QUESTIONS = _questions("aabbccdd")
HITS = {
    "never": [1, 1, 1, 0, 1, 1, 0.6, 0],
    "never+pool-2": [1, 0, 0, 0, 1, 0.3, 0.4, 1],
    "gates": [1, 1, 0, 0, 0, 0.9, 0.2, 0],
}


def test_the_subset_is_what_the_full_model_solves_and_the_pooled_one_does_not():
    found = hard_subset(QUESTIONS, HITS, "never", "never+pool-2", "pool:2")
    assert (found.num_questions, found.num_units, found.num_all) == (4, 4, 8)  # 1, 2, 5, 6
    solved = {name: one.solved for name, one in found.scores.items()}
    assert solved == pytest.approx({"never": 100, "never+pool-2": 0, "gates": 50})
    assert found.scores["never"].low == found.scores["never"].high == 100
    assert hard_rows(found)[1] == ["never+pool-2", "0.0 [0.0, 0.0]"]
    assert hard_note(found, "image").startswith("Hard subset: 4 of 8 questions")
    assert hard_subset(QUESTIONS, HITS, "never+pool-2", "never+pool-2", "pool:2") is None


def test_the_interval_is_a_bootstrap_over_units():
    questions = _questions([str(n // 3) for n in range(60)])
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, 60).astype(float)
    hits = {"never": [1.0] * 60, "pool": [0.0] * 60, "own": right.tolist()}
    one = hard_subset(questions, hits, "never", "pool", "pool:2", num_draws=4000, seed=1).scores["own"]
    by_unit = right.reshape(20, 3).mean(1)
    draws = np.random.default_rng(5).integers(0, 20, size=(20_000, 20))
    expected = 100 * np.quantile(by_unit[draws].mean(1), [0.025, 0.975])
    assert [one.low, one.high] == pytest.approx(expected, abs=1.5)
    assert one.solved == pytest.approx(100 * right.mean())


def _section(hits, full=True):
    def run(name, reduction):
        about = SimpleNamespace(policy="never", reduction=reduction)
        return SimpleNamespace(name=name, hits=hits.get(name), scores=SimpleNamespace(run=about))

    runs = [run("never", "none"), run("never+pool-2", "pool:2"), run("gates", "none")]
    return SimpleNamespace(questions=QUESTIONS, runs=runs, full=runs[0] if full else None)


def test_a_report_shows_it_for_each_pooled_run_beside_the_full_model():
    (found,) = hard_subsets(_section(HITS), num_draws=50, seed=0)
    assert found.pooled == "pool:2"
    assert list(found.scores) == ["never", "never+pool-2", "gates"]
    assert not list(hard_subsets(_section(HITS, full=False), num_draws=50, seed=0))
    assert not list(hard_subsets(_section({}), num_draws=50, seed=0))  # nothing can be graded here
    (found,) = hard_subsets(_section({**HITS, "gates": None}), num_draws=50, seed=0)
    assert list(found.scores) == ["never", "never+pool-2"]


@pytest.mark.parametrize(
    ("policy", "reduction", "chooses"),
    [
        ("never", "pool:2", True),
        ("fixed:4", "pool:2", False),
        ("never", "pool:2+fastv:2:0.5", False),
        ("never", "none", False),
        ("never", "heads:8 of a profile", False),
    ],
)
def test_which_run_chooses(policy, reduction, chooses):
    assert is_pooled(policy, reduction) is chooses
