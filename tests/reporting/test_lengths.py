"""Answers by length: counted by hand on a few."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dyvte.reporting.lengths import first_difference, length_table

ANSWERS = {
    # full answer, its tokens, another run's answer
    "a": ("yes", 2, "yes"),
    "b": ("no", 2, "yes"),
    "c": ("a red star", 4, "a red star"),
    "d": ("Row 1 has a red star and a blue circle.", 12, "Row 1 has a red star and a green circle."),
    "e": ("one two three", 70, "one two"),
}


def _section(answers, *, with_full=True):
    def run(name, texts, is_full):
        found = [
            SimpleNamespace(prediction=text, num_new_tokens=tokens)
            for text, (_, tokens, _) in zip(texts, answers.values(), strict=True)
        ]
        return SimpleNamespace(name=name, answers=found, is_full=is_full)

    full = run("never", [full for full, _, _ in answers.values()], True)
    other = run("fixed-2", [said for _, _, said in answers.values()], False)
    return SimpleNamespace(full=full if with_full else None, runs=[full, other])


def test_same_answers_are_counted_by_length():
    table = length_table(_section(ANSWERS))
    assert list(table.header) == [
        "policy",
        "1-4 tokens (3)",
        "5-16 tokens (1)",
        "65+ tokens (1)",
        "first differing word",
    ]
    # differing words: 1 of "no", 8 of the row, 3 of the cut answer
    assert table.rows == [["fixed-2", "66.7 %", "0.0 %", "0.0 %", "3"]]


def test_no_table_without_a_full_run_or_with_one_length():
    assert length_table(_section(ANSWERS, with_full=False)) is None
    assert length_table(_section({name: ANSWERS[name] for name in "abc"})) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "place"),
    [
        ("a b", "a  b", None),
        ("a b", "a c", 2),
        ("a b", "a", 2),
        ("a", "a b", 2),
        ("", "x", 1),
        ("", "", None),
    ],
)
def test_first_differing_word(ours, theirs, place):
    assert first_difference(ours, theirs) == place
