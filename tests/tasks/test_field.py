"""What people have: LLaVA's own files, tables without images, blank options, damaged and empty files."""

from __future__ import annotations

import json
import shutil

import pytest

from dyvte.errors import DataError, DyvteError, ScoreError
from dyvte.readers.tables import read_tsv
from dyvte.tasks.base import Predictions, get_benchmark
from tests.helpers.benchmark_files import (
    ASK,
    CASES,
    MME_PAIRS,
    MME_SPLIT,
    SHORT,
    lines,
    picture,
    put,
    put_tsv,
    text64,
    write_benchmark,
)

# --- MME and TextVQA with LLaVA's answers ---------------------------------------------------------------


def _mme_answers(folder, ending=""):
    """LLaVA's answers to the mini, in another order; "Yes" to every first question only."""
    rows = [
        {"question_id": f"{subtask}/{'images/' if subtask in MME_SPLIT else ''}{n}.png", "text": answer}
        | {"prompt": text + ending + SHORT}
        for subtask, *texts in reversed(MME_PAIRS)
        for n in range(2)
        for text, answer in zip(texts, ("Yes", "Yes"), strict=True)
    ]
    put(folder / "answers.jsonl", lines(rows))
    return folder / "answers.jsonl"


@pytest.mark.parametrize("form", ["release", "llava", "parquet", "tsv"])
def test_mme_takes_llavas_answers_and_converted_results_in_every_format(tmp_path, form):
    mme = get_benchmark("mme")
    questions = mme.load(write_benchmark(tmp_path / form, "mme", form))
    assert {q.kind for q in questions} == {"color", "code_reasoning", "artwork"}
    scores = [
        mme.score(questions, mme.read_predictions(_mme_answers(tmp_path, e), questions)) for e in ("", ASK)
    ]
    assert [score["perception"] for score in scores] == [100, 100]
    # convert_answer_to_mme.py: the stem with .txt, the prompt with the request after one blank or two
    for subtask, first, second in MME_PAIRS:
        rows = [
            f"{n}.txt\t{text}\t{gold}\t{answer}\n"
            for n in range(2)
            for text, gold, answer in ((first + ASK, "Yes", "yes"), (f"{second} {ASK}", "No", "no, it is"))
        ]
        put(tmp_path / "converted" / f"{subtask}.txt", "".join(rows))
    found = mme.score(questions, mme.read_predictions(tmp_path / "converted", questions))
    assert (found["perception"], found["cognition"]) == (400, 200)


def test_mme_names_answers_that_fit_nothing_and_questions_that_stand_twice(tmp_path):
    mme = get_benchmark("mme")
    questions = mme.load(write_benchmark(tmp_path / "d", "mme", "release"))
    put(
        tmp_path / "a.jsonl",
        lines([{"question_id": "artwork/images/7.png", "prompt": "Is it?", "text": "Yes"}]),
    )
    with pytest.raises(ScoreError, match=r"a.jsonl, line 1: no such question: artwork/7, 'Is it\?'"):
        mme.read_predictions(tmp_path / "a.jsonl", questions)
    put(tmp_path / "d" / "color" / "0.txt", "Is it red?\tYes\nIs it red? Please answer yes or no.\tNo")
    questions = mme.load(tmp_path / "d")
    put(tmp_path / "a.jsonl", lines([{"question_id": "color/0.png", "prompt": "Is it red?", "text": "Yes"}]))
    with pytest.raises(
        ScoreError, match="color/0 has this question 2 times: give predictions by question id"
    ):
        mme.read_predictions(tmp_path / "a.jsonl", questions)


@pytest.mark.parametrize("form", ["release", "llava", "parquet"])
@pytest.mark.parametrize(
    "shape",
    [
        "{question}" + SHORT,
        "{question}\nReference OCR token: STOP, 7" + SHORT,
        "Reference OCR token: STOP, 7\n{question}" + SHORT,
        "<image>\n{question}\nReference OCR token: " + SHORT,
    ],
)
def test_textvqa_joins_answers_with_and_without_ocr_tokens(tmp_path, form, shape):
    textvqa = get_benchmark("textvqa")
    questions = textvqa.load(write_benchmark(tmp_path / form, "textvqa", form))
    asked = ("What does the sign say ?", "what BRAND is it ?", "what number ?")
    rows = [
        {"question_id": f"i{n % 2}", "prompt": shape.format(question=text), "text": answer}
        for n, (text, answer) in enumerate(zip(asked, ("stop", "coke", "2"), strict=True))
    ]
    put(tmp_path / "a.jsonl", lines(rows[::-1]))
    found = textvqa.read_predictions(tmp_path / "a.jsonl", questions)
    assert textvqa.score(questions, found)["accuracy"] == pytest.approx(100)


# --- tables ---------------------------------------------------------------------------------------------

TABLES = [(name, form) for name, form in CASES if form == "tsv" and name not in ("videomme", "mvbench")]


def _without_column(path, *names):
    rows = [dict(row) for row in read_tsv(path, keep_words=True)]
    put_tsv(path, [{key: value for key, value in row.items() if key not in names} for row in rows])


@pytest.mark.parametrize("name", [name for name, _ in TABLES])
def test_tables_without_images_are_scored_but_not_asked(tmp_path, name):
    benchmark = get_benchmark(name)
    root = write_benchmark(tmp_path, name, "tsv")
    full = benchmark.load(root)
    (path,) = root.glob("*.tsv")
    _without_column(path, "image")
    bare = benchmark.load(root, images=False)
    assert [(q.id, q.text, q.answer, q.kind) for q in bare] == [
        (q.id, q.text, q.answer, q.kind) for q in full
    ]
    answers = Predictions({q.id: q.answer or "x" for q in full})
    assert benchmark.score(bare, answers) == benchmark.score(full, answers)
    with pytest.raises(DataError, match=f"{len(full)} questions have no image|lacks"):
        benchmark.load(root)


@pytest.mark.parametrize("name", ["ai2d", "seed", "mmbench", "gqa", "pope", "scienceqa"])
@pytest.mark.parametrize("folder", [".", "images"])
def test_images_may_lie_beside_the_table(tmp_path, name, folder):
    benchmark = get_benchmark(name)
    root = write_benchmark(tmp_path, name, "tsv")
    (path,) = root.glob("*.tsv")
    rows = [dict(row) for row in read_tsv(path, keep_words=True)]
    for n, row in enumerate(rows):
        row.pop("image")
        row["image_path"] = f"part/{n}.png"
        put(root / folder / "part" / f"{n}.png", picture(n))
    put_tsv(path, rows)
    questions = benchmark.load(root)
    assert all(q.image.read_bytes() == picture(n) for n, q in enumerate(questions))
    (root / folder / "part" / "0.png").unlink()
    with pytest.raises(DataError, match=r"lacks 1 images: .*part/0.png"):
        benchmark.load(root)


@pytest.mark.parametrize(
    "name", ["seed", "scienceqa", "mmmu", "mmbench", "ai2d", "textvqa", "gqa", "pope", "mme", "mmvet"]
)
def test_another_benchmarks_table_is_refused_by_name(tmp_path, name):
    benchmark = get_benchmark(name)
    for other, _ in TABLES:
        if other == name:
            continue
        root = write_benchmark(tmp_path / other, other, "tsv")
        (path,) = root.glob("*.tsv")
        for given in (root, path):
            with pytest.raises(DataError) as error:
                benchmark.load(given, images=False)
            assert f"is not {benchmark.title} data" in str(error.value)
            whose = str(error.value).split(f"{path.name} is the table of ")[1].split("\n")[0].split(")")[0]
            assert get_benchmark(other).title in (f"{whose})" if "(" in whose else whose).split(" and of ")
    for unknown in ("MyBench.tsv", "my answers.tsv"):
        put_tsv(tmp_path / "u" / unknown, [{"index": 0, "question": "?", "answer": "A", "A": "a", "B": "b"}])
    with pytest.raises(
        DataError, match=r"MyBench.tsv is not named after any benchmark, my answers.tsv is not"
    ):
        benchmark.load(tmp_path / "u", images=False)


ALIKE = {"refcoco", "refcocoplus", "refcocog"}
"""Their parquet files tell them apart by nothing but the expressions."""


@pytest.mark.parametrize("name", [name for name, form in CASES if form == "parquet" and name != "gqa"])
def test_another_benchmarks_parquet_is_refused(tmp_path, name):
    benchmark = get_benchmark(name)
    for other, form in CASES:
        if form != "parquet" or other in (name, "gqa") or {name, other} <= ALIKE:
            continue
        for path in write_benchmark(tmp_path / other, other, form).rglob("*.parquet"):
            with pytest.raises(DataError) as error:
                benchmark.load(path, images=False)
            assert str(path) in str(error.value)


def test_a_file_of_ones_own_is_read_by_the_name_in_it(tmp_path):
    seed = get_benchmark("seed")
    write_benchmark(tmp_path, "seed", "tsv")
    own = tmp_path / "half of SEED.tsv"
    shutil.move(tmp_path / "SEEDBench_IMG.tsv", own)
    assert len(seed.load(own)) == len(seed.load(tmp_path)) == 3
    write_benchmark(tmp_path, "mme", "tsv")
    write_benchmark(tmp_path, "videomme", "tsv")
    assert {q.kind for q in get_benchmark("mme").load(tmp_path)} == {"color", "code_reasoning", "artwork"}


# --- files that hold nothing, or nothing right ----------------------------------------------------------


HOLLOW = ("{}", "[]", "null", "", "\n", "7", '{"question_id": 1}', "[null]", '[{"x": null}]')


@pytest.mark.parametrize(("name", "form"), [case for case in CASES if case[1] in ("release", "llava")])
@pytest.mark.parametrize("content", HOLLOW)
def test_empty_and_null_question_files_are_refused_by_name(tmp_path, name, form, content):
    root = write_benchmark(tmp_path, name, form)
    for path in sorted(root.rglob("*.json*")):
        data = path.read_bytes()
        path.write_text(content)
        message, questions = "", []
        try:
            questions = get_benchmark(name).load(root, images=False)
        except DyvteError as error:
            message = str(error)
        # an optional file may say nothing, or only what is not needed
        assert questions or str(tmp_path) in message, path
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["gqa", "pope", "seed", "mmvet", "mme", "textvqa"])
@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question_id": 1, "text": None}, "line 1"),
        ({"question_id": 1, "text": 7}, "line 1"),
        ({"question_id": 1, "text": "\ud83d"}, "line 1"),
        ({"question_id": None, "text": "a"}, "line 1"),
        ({"question_id": [1], "text": "a"}, "line 1"),
        ({"question_id": 1, "prompt": None, "text": "a"}, None),
        ({"question_id": 1, "prompt": 7, "text": "a"}, None),
        ({"question_id": 1}, "line 1"),
        (None, "line 1: expected an object, found null"),
        ("a", "line 1: expected an object, found 'a'"),
        (["a"], "line 1: expected an object"),
    ],
)
def test_rows_of_answers_that_are_none_are_named(tmp_path, name, row, problem):
    benchmark = get_benchmark(name)
    form = "release" if name != "mmvet" else "parquet"
    questions = benchmark.load(write_benchmark(tmp_path / "d", name, form))
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(row) + "\n")
    if problem is None and name not in ("mme", "textvqa"):
        assert benchmark.read_predictions(path, questions).texts  # prompts are not read there
        return
    with pytest.raises(DyvteError) as error:
        benchmark.read_predictions(path, questions)
    assert f"{path}, {problem or 'line 1'}" in str(error.value)


def test_gold_that_is_no_letter_and_rows_of_the_wrong_kind(tmp_path):
    for gold in ("a cat", "7", "AB", "?"):
        put_tsv(
            tmp_path / "ScienceQA_TEST.tsv",
            [{"index": 3, "question": "?", "A": "a", "B": "b", "answer": gold, "image": text64(picture(0))}],
        )
        with pytest.raises(
            DataError,
            match=rf"record 2 \(question 3\): gold answer '{gold}' is none of 2".replace("?'", r"\?'"),
        ):
            get_benchmark("scienceqa").load(tmp_path)


def test_a_damaged_parquet_body_is_named(tmp_path):
    (path,) = write_benchmark(tmp_path, "ai2d", "parquet").rglob("*.parquet")
    data = bytearray(path.read_bytes())
    for at in range(4, len(data) - 400):
        data[at] ^= 0x5A
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=str(path)):
        get_benchmark("ai2d").load(tmp_path)


# --- workbooks ------------------------------------------------------------------------------------------


def test_mmbenchs_own_workbook_is_read_back(tmp_path):
    mmbench = get_benchmark("mmbench")
    questions = mmbench.load(write_benchmark(tmp_path / "d", "mmbench", "tsv"))
    said = ("{}", " {}. because\tof <that> & \u00e9", "", "None")
    texts = {q.id: said[n % 4].format(q.answer) for n, q in enumerate(questions)}
    path = mmbench.write_submission(tmp_path, questions, Predictions(texts))
    again = mmbench.read_predictions(path, questions)
    assert again.texts == {key: text.strip() for key, text in texts.items()}
    assert mmbench.score(questions, again) == mmbench.score(questions, Predictions(texts))


@pytest.mark.parametrize("name", ["ai2d", "gqa", "pope"])
def test_vlmevalkits_tables_of_answers_are_read(tmp_path, name):
    """In each of the three formats that VLMEvalKit offers."""
    from dyvte.readers.xlsx import write_xlsx

    benchmark = get_benchmark(name)
    questions = benchmark.load(write_benchmark(tmp_path / "d", name, "tsv"))
    rows = [["index", "question", "prediction"], *([int(q.id), q.text, q.answer] for q in questions)]
    write_xlsx(tmp_path / "model_X.xlsx", rows)
    records = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    put_tsv(tmp_path / "model_X.tsv", records)
    put(tmp_path / "model_X.json", records)
    for path in tmp_path.glob("model_X.*"):
        assert benchmark.read_predictions(path, questions).texts == {q.id: q.answer for q in questions}
    put_tsv(tmp_path / "model_X.tsv", [{"index": 0, "answer": "A"}])
    with pytest.raises(ScoreError, match="no column 'prediction', found index, answer"):
        benchmark.read_predictions(tmp_path / "model_X.tsv", questions)
