"""Options that are blank or absent, in every format and every benchmark with choices."""

from __future__ import annotations

import pytest

from dyvte.errors import DataError
from dyvte.tasks.base import Predictions, get_benchmark
from tests.helpers.benchmark_files import (
    CHOICES,
    LETTER,
    picture,
    put,
    put_parquet,
    put_tsv,
    text64,
)

GAP = ("a cat", None, "a dog", "")
"""Options of which B and D are blank; the right one is C."""


def _choice_files(root, name, form, options, gold):
    """One question with these options, as the release, parquet or TSV of a benchmark stores them."""
    blank = ["" if option is None else option for option in options]
    letters = dict(zip("ABCD", options, strict=True))
    index = "ABCD".index(gold)
    base = {"question": "what is it ?", "image": picture(0)}
    if form == "tsv":
        names = {"scienceqa": "ScienceQA_TEST", "ai2d": "AI2D_TEST", "seed": "SEEDBench_IMG"}
        names |= {"mmbench": "MMBench_DEV_EN", "mmmu": "MMMU_DEV_VAL"}
        row = {"index": 7, **base, **dict(zip("ABCD", blank, strict=True)), "answer": gold}
        return put_tsv(root / f"{names[name]}.tsv", [row])
    if name == "scienceqa" and form == "release":
        problem = {"question": "what is it ?", "choices": list(options), "answer": index, "hint": None}
        put(root / "problems.json", {"7": {**problem, "image": "image.png", "subject": None}})
        put(root / "pid_splits.json", {"test": ["7"]})
        return put(root / "test" / "7" / "image.png", picture(0))
    if name == "ai2d" and form == "release":
        entry = {"answerTexts": list(options), "correctAnswer": index, "questionId": "7", "abcLabel": False}
        put(root / "questions" / "7.png.json", {"imageName": "7.png", "questions": {"what is it ?": entry}})
        put(root / "ai2d_test_ids.csv", "7")
        return put(root / "images" / "7.png", picture(0))
    choices = {f"choice_{letter.lower()}": option for letter, option in letters.items()}
    if name == "seed" and form == "release":
        entry = {"question_id": "7", "question": "what is it ?", "answer": gold, "data_id": "7", **choices}
        put(root / "SEED-Bench.json", {"questions": [{**entry, "data_type": "image"}], "question_type": {}})
        return put(root / "SEED-Bench-image" / "7", picture(0))
    rows = {
        "scienceqa": {**base, "id": "7", "choices": list(options), "answer": index},
        "ai2d": {**base, "id": "7", "options": blank, "answer": str(index)},
        "seed": {**base, "question_id": "7", **choices, "answer": gold},
        "mmbench": {**base, "index": 7, **letters, "answer": gold, "hint": None},
        "mmmu": {"id": "validation_Math_7", "question": "what is it ? <image 1>", "image_1": picture(0)}
        | {"options": str(blank), "answer": gold, "question_type": "multiple-choice"},
    }
    folder = "dev" if name == "mmbench" else "validation" if name == "mmmu" else "test"
    return put_parquet(root / "data" / f"{folder}-0.parquet", [rows[name]])


CHOICE_CASES = [
    *((name, form) for name in ("scienceqa", "ai2d", "seed") for form in ("release", "parquet", "tsv")),
    *((name, form) for name in ("mmbench", "mmmu") for form in ("parquet", "tsv")),
]


@pytest.mark.parametrize(("name", "form"), CHOICE_CASES)
def test_a_blank_option_keeps_its_letter_and_is_not_shown(tmp_path, name, form):
    benchmark = get_benchmark(name)
    _choice_files(tmp_path, name, form, GAP, "C")
    (question,) = benchmark.load(tmp_path)
    assert question.answer == "C"
    asked = benchmark.prompt(question)
    assert asked[asked.index("\nA.") :] == "\nA. a cat\nC. a dog" + LETTER
    assert "None" not in asked
    assert "nan" not in asked
    for dialect in benchmark.dialects:
        assert benchmark.correct([question], Predictions({question.id: "C"}), dialect) == [True]
        assert benchmark.correct([question], Predictions({question.id: "B"}), dialect) == [False]
    # the text of an option is found under its own letter
    if name != "mmmu":
        assert benchmark.correct([question], Predictions({question.id: "a dog"}), "vlmevalkit") == [True]


@pytest.mark.parametrize(("name", "form"), CHOICE_CASES)
@pytest.mark.parametrize("options", [GAP, (None, "a cat", "a dog", "a cow")])
def test_a_gold_answer_on_a_blank_option_names_the_question(tmp_path, name, form, options):
    gold = "ABCD"[options.index(None)]
    _choice_files(tmp_path, name, form, options, gold)
    with pytest.raises(DataError) as error:
        get_benchmark(name).load(tmp_path)
    assert f"gold answer '{gold}' is none of" in str(error.value)
    assert "7" in str(error.value).split(":")[0]


@pytest.mark.parametrize(("name", "form"), CHOICE_CASES)
def test_a_choice_without_options_is_no_open_question(tmp_path, name, form):
    if (name, form) == ("mmmu", "tsv"):
        pytest.skip("the TSV marks its open questions by having no options")
    _choice_files(tmp_path, name, form, (None, "", None, ""), "A")
    with pytest.raises(DataError, match=r"without options|no column"):
        get_benchmark(name).load(tmp_path)


@pytest.mark.parametrize(("name", "form"), CHOICE_CASES)
def test_the_word_none_is_an_option_where_the_tools_show_it(tmp_path, name, form):
    """JSON and parquet store it as text; pandas, and so VLMEvalKit, takes it for an empty cell of a TSV."""
    _choice_files(tmp_path, name, form, ("two", "None", "one", "five"), "C")
    (question,) = get_benchmark(name).load(tmp_path)
    assert ("\nB. None\n" in question.text) == (form != "tsv")


def test_blank_options_of_a_video(tmp_path):
    rows = [
        {
            "videoID": "v",
            "question_id": "7",
            "question": "what ?",
            "options": ["A. a cat", "B. ", None, "D. cow"],
        }
        | {"answer": "D", "duration": "short"}
    ]
    put_parquet(tmp_path / "test-0.parquet", rows)
    (question,) = get_benchmark("videomme").load(tmp_path, images=False)
    assert question.text.endswith("what ?\nA. a cat\nD. cow")
    put_parquet(tmp_path / "test-0.parquet", [{**rows[0], "answer": "B"}])
    with pytest.raises(DataError, match=r"question 7\): gold answer 'B' is none of 2 options"):
        get_benchmark("videomme").load(tmp_path, images=False)


def test_nothing_absent_is_shown_as_a_word(tmp_path):
    """Hints, contexts and categories that are absent in every way a table knows."""
    rows = [
        {"index": n, "question": "what ?", "hint": hint, "A": "a", "B": "b", "answer": "A", "category": ""}
        for n, hint in enumerate(("", "nan", "None", "NA", " "))
    ]
    put_tsv(tmp_path / "MMBench_DEV_EN.tsv", [{**row, "image": text64(picture(0))} for row in rows])
    put_tsv(tmp_path / "ScienceQA_TEST.tsv", [{**row, "image": text64(picture(0))} for row in rows])
    for name in ("mmbench", "scienceqa"):
        texts = {q.text for q in get_benchmark(name).load(tmp_path)}
        assert texts == {"what ?\nA. a\nB. b"}


def test_questions_of_each_choice_stay_what_they_are():
    assert all(gold in "ABCD"[: len(options)] for _, options, gold in CHOICES)
