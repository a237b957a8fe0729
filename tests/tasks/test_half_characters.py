"""Half a character in a question file: the file is refused, or that question alone is named."""

from __future__ import annotations

import json

import pytest

from dyvte.errors import DataError
from dyvte.tasks.base import get_benchmark
from tests.helpers.benchmark_files import CASES, write_benchmark

HALF = r"\ud83d"
FILES = (".json", ".jsonl")


def spoil(root, old: str, new: str) -> bool:
    """Replace a text in all JSON files of a benchmark: some name the same question twice."""
    done = False
    for path in root.rglob("*"):
        if path.suffix in FILES:
            content = path.read_text(encoding="utf-8")
            path.write_text(content.replace(old, new), encoding="utf-8")
            done |= old in content
    return done


def texts_of(question) -> str:
    return repr((question.id, question.text, question.answer, question.image_id, question.details))


@pytest.mark.parametrize(("name", "form"), [case for case in CASES if case[1] not in ("parquet", "tsv")])
def test_the_question_is_named_and_the_others_are_as_they_were(tmp_path, name, form):
    root, benchmark = write_benchmark(tmp_path / "d", name, form), get_benchmark(name)
    plain = benchmark.load(root)
    assert benchmark.load(root, damaged=True) == plain
    words = json.dumps(plain[0].text.split("\n")[0])[1:-1]
    if not spoil(root, words, f"{words}{HALF}"):
        pytest.skip("its questions are in no JSON file, or stand there in another form")
    with pytest.raises(DataError, match="half of a surrogate pair") as caught:
        benchmark.load(root)
    assert str(tmp_path) in str(caught.value)
    found = benchmark.load(root, damaged=True)
    assert [one.id for one in found] == [one.id for one in plain]
    bad = [one for one in found if one.damage]
    assert bad
    assert all("half of a surrogate pair" in one.damage[1] for one in bad)
    assert all(HALF in one.text for one in bad)
    [texts_of(one).encode() for one in found]
    untouched = {one.id: one for one in found if not one.damage}
    assert untouched == {one.id: one for one in plain if one.id in untouched}


@pytest.mark.parametrize(
    ("name", "form", "old", "field"),
    [
        ("seed", "release", '"the dog"', "options"),
        ("seed", "release", '"101"', "id"),
        ("ai2d", "release", '"the dog"', "options"),
        ("mvbench", "release", '"Slept."', "options"),
        ("vstar", "release", '"relative_position/sa_1.jpg"', "image"),
        ("gqa", "release", '"red"', "answer"),
    ],
)
def test_the_field_is_named(tmp_path, name, form, old, field):
    root, benchmark = write_benchmark(tmp_path / "d", name, form), get_benchmark(name)
    assert spoil(root, old, f'{old[:-1]}{HALF}"'), "nothing was spoilt"
    (bad,) = [one for one in benchmark.load(root, images=False, damaged=True) if one.damage]
    assert bad.damage[0] == field
    texts_of(bad).encode()
