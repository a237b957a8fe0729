"""Multiple choice and yes/no on which reductions break: rules by hand, and against the tools on fuzz."""

from __future__ import annotations

import copy
import os
import random
import re
import string
import sys
from collections import defaultdict
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from dyvte.errors import DataError
from dyvte.tasks import hallusionbench, mmstar, mmvp, vstar
from dyvte.tasks.answers.choices import cut_options, hrbench_letter
from dyvte.tasks.base import Predictions, Question, get_benchmark
from tests.helpers.benchmark_files import picture, put, put_parquet, put_tsv, text64, write_benchmark
from tests.helpers.minis.yes_no import hallusion_rows
from tests.helpers.mutations import seeded
from tests.helpers.tools import LMMS, VLMEVAL, Silent, answers, functions

ANSWERS = answers(seeded(20261102), 1500)
OPTIONS = {"A": "a cat", "B": "dog", "C": "the red one", "D": "40"}
OPTION_SETS = (OPTIONS, {"A": "a cat", "C": "dog"}, {"A": "Yes", "B": "No"})


def _question(number, answer, kind="", **details):
    own = {"id": str(number), "answer": answer, "image_id": str(number), "kind": kind, "details": details}
    return Question(image=None, text="?", **own)


# --- by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mark", "stem", "options"),
    [
        (
            "which ?\nOptions: A: one, B: two, three, C: 4.",
            mmstar._MARK,
            "which ?",
            ("one", "two, three", "4."),
        ),
        ("which ?\n(A) one\n(B) two", r"\({}\)\s*", "which ?", ("one", "two")),
        ("which of (A) and (C) ?", r"\({}\)\s*", "which of (A) and (C) ?", ()),
        ("A: only one", mmstar._MARK, "A: only one", ()),
        ("", mmstar._MARK, "", ()),
    ],
)
def test_options_in_a_question(text, mark, stem, options):
    found = cut_options(text, mark)
    assert found == (stem, dict(zip("ABC", options, strict=False)))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("B", "B"), ("b. dog", "B"), ("(B) dog", "B"), ("Option b", "B"), ("The answer is B", "B")),
        *(("Answer: B", "A"), ("dog", "D"), ("", None), (" \n", None), ("(", "("), ("I cannot tell.", "I")),
    ],
)
def test_mmstar_reads_the_start(text, letter):
    assert mmstar.read_answer(text, OPTIONS, "original") == letter


@pytest.mark.parametrize(
    ("text", "letter"), [("(a)", "A"), ("A.", "A"), (" b ", "B"), ("(B).", "B"), ("(a) Open", "A) OPEN")]
)
def test_mmvp_takes_the_letter_alone(text, letter):
    assert mmvp.read_answer(text, {"A": "Open", "B": "Closed"}, "original") == letter


def test_short_answers_of_realworldqa(tmp_path):
    benchmark = get_benchmark("realworldqa")
    questions = benchmark.load(write_benchmark(tmp_path, "realworldqa", "release"))
    short = [q for q in questions if q.kind == "short"]
    assert [benchmark.prompt(q) for q in short] == [
        "how many cars are there?\nPlease answer directly with a single word or number.",
        "is the road uphill?\nPlease answer directly with a single word or number.",
    ]
    for text, right in (("downhill.", True), (" Downhill ", True), ("Downhill!", False), ("down", False)):
        for dialect in ("original", "lmms"):
            assert benchmark.correct(short[1:], Predictions({"4": text}), dialect) == [right]
        assert benchmark.correct(short[1:], Predictions({"4": text}), "vlmevalkit") == [False]
    choice = benchmark.prompt(questions[0])
    assert choice.endswith(
        "\nPlease answer directly with only the letter of the correct option and nothing else."
    )
    assert benchmark.prompt(questions[0], "!").endswith("\nD. white!")


def test_pairs_of_mmvp(tmp_path):
    benchmark = get_benchmark("mmvp")
    root = write_benchmark(tmp_path, "mmvp", "release")
    questions = benchmark.load(root)
    assert [q.answer for q in questions] == ["A", "B", "B", "A", "A", "B"]
    texts = dict(zip((q.id for q in questions), "ABBBAB", strict=True))
    scores = benchmark.score(questions, Predictions(texts))
    assert (scores["pair_accuracy"], scores["accuracy"]) == pytest.approx((200 / 3, 500 / 6))
    assert [len(benchmark.load(root, limit)) for limit in (1, 2, 3)] == [2, 2, 4]
    lines = (root / "Questions.csv").read_text().split("\n")
    put(root / "Questions.csv", "\n".join([*lines[:2], *lines[3:]]))
    with pytest.raises(DataError, match="3 pairs are not two rows with the same question: pair 1"):
        benchmark.load(root)
    put(root / "Questions.csv", "Index,Question,Options,Correct Answer\n1,what,a or b,(a)")
    with pytest.raises(DataError, match=r"record 2: options 'a or b' are not of the form"):
        benchmark.load(root)
    put(root / "Questions.csv", "Index,Question\n1,what,a or b")
    with pytest.raises(DataError, match="record 2: 3 columns, expected 2"):
        benchmark.load(root)


def test_figures_and_pairs_of_hallusionbench(tmp_path):
    benchmark = get_benchmark("hallusionbench")
    questions = benchmark.load(write_benchmark(tmp_path, "hallusionbench", "release"))
    assert [(q.image_id, q.answer) for q in questions] == [
        *(("VD_illusion_0", gold) for gold in ("no", "yes", "no", "yes")),
        ("VS_chart_0", "no"),
    ]
    texts = dict(zip((q.id for q in questions), ("No.", "yes", "Yes", "yes", "unsure"), strict=True))
    scores = benchmark.score(questions, Predictions(texts))
    # figure 0 is whole, figure 1 and the chart are not; question 1 is right about both, 0 is not
    assert (scores["aAcc"], scores["fAcc"], scores["qAcc"]) == pytest.approx((60, 100 / 3, 100 / 3))
    assert scores["num_neither_yes_nor_no"] == 1
    assert benchmark.headline(scores) == "60.0 / 33.3 / 33.3"
    assert benchmark.score(questions, Predictions(texts), "lmms")["aAcc"] == 80  # "unsure" is no there


def test_cycles_of_hrbench(tmp_path):
    benchmark = get_benchmark("hrbench4k")
    questions = benchmark.load(write_benchmark(tmp_path, "hrbench4k", "parquet"))
    assert len({q.image_id for q in questions}) == 3
    texts = {q.id: q.answer for q in questions} | {"1": "none of them", "5": "Z"}
    scores = benchmark.score(questions, Predictions(texts))
    assert scores["accuracy"] == pytest.approx(100 * (3 + 1 + 3 + 3) / 12)
    assert (scores["accuracy_single"], scores["accuracy_cross"]) == (87.5, 75)
    assert (scores["accuracy_all_cycles"], scores["num_unread"]) == (pytest.approx(100 / 3), 1)
    assert len(benchmark.load(tmp_path, limit=5)) == 8
    assert questions[0].image.read().data == picture(0)


def test_an_image_as_text_that_is_none_is_named(tmp_path):
    row = {"index": 0, "question": "?", "answer": "A", "A": "a", "B": "b", "category": "single"}
    rows = [{**row, "cycle_category": "0", "image": "!" * 70 + "="}]
    put_parquet(tmp_path / "hr_bench_4k.parquet", rows)
    (question,) = get_benchmark("hrbench4k").load(tmp_path)
    with pytest.raises(DataError, match=r"hr_bench_4k.parquet: (cannot read|no image bytes in)"):
        question.image.read()


@pytest.mark.parametrize("name", ["mmstar", "vstar"])
def test_options_written_in_another_way_are_asked_as_they_stand(tmp_path, name):
    row = {
        "index": 0,
        "question": "which?\na) one b) two",
        "answer": "B",
        "category": "x",
        "l2_category": "y",
    }
    title = {"mmstar": "MMStar", "vstar": "VStarBench"}[name]
    put_tsv(tmp_path / f"{title}.tsv", [{**row, "image": text64(picture(0))}])
    benchmark = get_benchmark(name)
    (question,) = benchmark.load(tmp_path)
    assert question.text == "which?\na) one b) two"
    for dialect in benchmark.dialects:
        assert benchmark.correct([question], Predictions({"0": "B"}), dialect) == [True]
        assert benchmark.correct([question], Predictions({"0": "I cannot help"}), dialect) == [False]


# --- against the tools ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extract():
    return functions(
        LMMS,
        "tasks/_task_utils/mcq_extract.py",
        *("extract_mcq_answer", "_DEFAULT_CHOICES", "_ANSWER_PHRASES", "_FORMAT_PRIORITY"),
        Optional=__import__("typing").Optional,
        List=list,
    )["extract_mcq_answer"]


@pytest.fixture(scope="module")
def can_infer():
    given = {"cp": copy, "os": os, "string": string, "logger": Silent()}
    names = ("can_infer_option", "can_infer_text", "can_infer")
    return functions(VLMEVAL, "utils/matching_util.py", *names, **given)["can_infer"]


def _plain(texts):
    """Answers that ms-vlmeval 0.0.20 reads as the later VLMEvalKit does."""
    return [text for text in texts if not re.search(r"answer\s+is", text, re.IGNORECASE)]


@pytest.mark.parametrize("name", ["mmstar", "realworldqa", "mmvp", "vstar", "hrbench4k", "hrbench8k"])
def test_letters_of_vlmevalkit(can_infer, name):
    benchmark = get_benchmark(name)
    for options in OPTION_SETS:
        question = _question(0, "A", options=options)
        for text in _plain(ANSWERS):
            expected = can_infer(text, dict(options)) or None
            assert benchmark.read(text, question, "vlmevalkit") == expected, ascii(text)


def test_mmstar_of_lmms_eval(extract):
    rows = functions(LMMS, "tasks/mmstar/utils.py", "mmstar_aggregate_results", defaultdict=defaultdict)
    rows["eval_logger"] = Silent()
    draw = random.Random(1)
    questions, texts, expected = [], {}, []
    for n, text in enumerate(ANSWERS):
        gold, category = draw.choice("ABCD"), ("x", "y", "z")[n % 3]
        questions.append(_question(n, gold, "k", options=OPTIONS, category=category))
        texts[str(n)] = text
        right = extract(text, choices=list("ABCD")) == gold
        expected.append({"score": float(right), "l2_category": category})
    benchmark = get_benchmark("mmstar")
    assert benchmark.correct(questions, Predictions(texts), "lmms") == [
        bool(row["score"]) for row in expected
    ]
    scores = benchmark.score(questions, Predictions(texts), "lmms")
    assert scores["accuracy_over_categories"] == pytest.approx(
        100 * rows["mmstar_aggregate_results"](expected)
    )


def test_realworldqa_of_lmms_eval(extract, monkeypatch):
    """The tool imports its reader of letters when it is called."""
    name = "realworldqa_process_results"
    tool = functions(LMMS, "tasks/realworldqa/utils.py", name)[name]
    module = ModuleType("lmms_eval.tasks._task_utils.mcq_extract")
    module.extract_mcq_answer = extract
    for package in ("lmms_eval", "lmms_eval.tasks", "lmms_eval.tasks._task_utils"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    draw = random.Random(2)
    for text in ANSWERS:
        for gold, options in ((draw.choice("ABCD"), OPTIONS), (draw.choice(("3", "Dog", "a cat", "no")), {})):
            expected = tool({"answer": gold}, [text.strip()])["exact_match"] == 1
            question = _question(0, gold, options=options)
            found = get_benchmark("realworldqa").correct([question], Predictions({"0": text}), "lmms")
            assert found == [expected], ascii(text)


def test_mmvp_of_the_tools(can_infer):
    names = ("_extract_answer_letter", "mmvp_process_results", "mmvp_doc_to_target", "_normalize_answer")
    totals = ("mmvp_aggregate_results", "mmvp_aggregate_pair_results")
    typing = __import__("typing")
    given = {name: getattr(typing, name) for name in ("Any", "Dict", "List", "Optional")}
    tool = functions(LMMS, "tasks/mmvp/utils.py", *names, *totals, re=re, eval_logger=Silent(), **given)
    pd = pytest.importorskip("pandas")
    report = functions(
        VLMEVAL, "dataset/utils/multiple_choice.py", "report_acc_MMVP", np=np, d2df=lambda values: values
    )["report_acc_MMVP"]
    options = {"A": "a cat", "B": "dog"}
    texts = _plain(ANSWERS)[: len(_plain(ANSWERS)) // 2 * 2]
    draw = random.Random(3)
    rows, questions = [], []
    for n, text in enumerate(texts):
        gold = draw.choice("AB")
        question = _question(n, gold, options=options)
        questions.append(replace(question, image_id=f"pair {n // 2}"))
        doc = {"Index": n + 1, "Correct Answer": f"({gold.lower()})"}
        rows.append(tool["mmvp_process_results"](doc, [text.strip()])["mmvp_accuracy"])
        assert (mmvp.read_answer(text, options, "lmms") or "") == rows[-1]["pred_letter"], ascii(text)
    benchmark, predictions = (
        get_benchmark("mmvp"),
        Predictions({str(n): text for n, text in enumerate(texts)}),
    )
    scores = benchmark.score(questions, predictions, "lmms")
    assert scores["accuracy"] == pytest.approx(100 * tool["mmvp_aggregate_results"](rows))
    assert scores["pair_accuracy"] == pytest.approx(100 * tool["mmvp_aggregate_pair_results"](rows))
    hits = [can_infer(text, dict(options)) == q.answer for q, text in zip(questions, texts, strict=True)]
    found = report(pd.DataFrame({"hit": hits, "question": ["?"] * len(hits)}))
    scores = benchmark.score(questions, predictions, "vlmevalkit")
    assert scores["pair_accuracy"] == pytest.approx(100 * found["Overall"])
    assert scores["accuracy"] == pytest.approx(100 * found["Average"])


def test_vstar_of_lmms_eval():
    tool = functions(LMMS, "tasks/vstar_bench/utils.py", "extract_answer_letter", re=re)[
        "extract_answer_letter"
    ]
    for text in (*ANSWERS, "The Choice: b", "option c", "B]", "x (d) y", "nothing here: b"):
        assert vstar.read_answer(text, OPTIONS, "lmms") == tool(text.strip()), ascii(text)


def test_hrbench_of_the_tools(can_infer):
    pd = pytest.importorskip("pandas")
    given = {"os": os, "string": string, "cp": copy, "eval_logger": Silent()}
    tool = functions(LMMS, "tasks/hrbench/hrbench_evals.py", "HRBenchEval", **given)["HRBenchEval"]("key")
    for options in OPTION_SETS:
        for text in map(str.strip, ANSWERS):
            expected = tool.can_infer(text, dict(options)) or None
            assert hrbench_letter(text, options) == expected, ascii(text)
    report = functions(
        VLMEVAL,
        "dataset/utils/hrbench.py",
        *("report_acc_hrbench", "hrbench_score"),
        np=np,
        pd=pd,
        defaultdict=defaultdict,
    )["report_acc_hrbench"]
    total = functions(LMMS, "tasks/hrbench/utils.py", "hrbench_aggregate_results", defaultdict=defaultdict)
    draw = random.Random(4)
    texts = _plain(ANSWERS)
    questions = [
        replace(
            _question(
                n, draw.choice("ABCD"), ("single", "cross")[n % 7 % 2], options=OPTIONS, cycle=str(n % 4)
            ),
            image_id=str(n // 4),
        )
        for n in range(len(texts))
    ]
    predictions = Predictions({str(n): text for n, text in enumerate(texts)})
    hits = [can_infer(text, dict(OPTIONS)) == q.answer for q, text in zip(questions, texts, strict=True)]
    table = {"hit": hits, "category": [q.kind for q in questions]}
    table["cycle_category"] = [q.details["cycle"] for q in questions]
    found = report(pd.DataFrame(table)).set_index(["cycle", "type"])["accuracy"]
    scores = get_benchmark("hrbench4k").score(questions, predictions, "vlmevalkit")
    for own, theirs in (("accuracy", "all"), ("accuracy_single", "single"), ("accuracy_cross", "cross")):
        assert scores[own] == pytest.approx(100 * found["Average", theirs])
    hits = [
        tool.can_infer(t.strip(), dict(OPTIONS)) == q.answer for q, t in zip(questions, texts, strict=True)
    ]
    rows = [
        {"gpt_score": int(hit), "cycle_category": q.details["cycle"]}
        for q, hit in zip(questions, hits, strict=True)
    ]
    scores = get_benchmark("hrbench4k").score(questions, predictions, "lmms")
    assert scores["accuracy"] == pytest.approx(100 * total["hrbench_aggregate_results"](rows, None))


def _hallusion_questions(count):
    draw = random.Random(5)
    questions = []
    for n in range(count):
        row = {
            **hallusion_rows()[0],
            "category": ("VD", "VS")[n % 2],
            "subcategory": ("ocr", "chart")[n % 3 % 2],
        }
        row |= {"set_id": str(n // 16), "figure_id": str(n // 4 % 4), "question_id": str(n % 4)}
        row |= {"gt_answer": draw.choice("01"), "index": f"a_b_c_{n // 16}_{n // 4 % 4}_{n % 4}"}
        question = hallusionbench._question(hallusionbench.Row(row, "row"), None)
        questions.append(replace(question, id=str(n)))
    return questions


def test_hallusionbench_of_lmms_eval():
    tool = functions(LMMS, "tasks/hallusion_bench/evaluate_hb.py", "hb_aggregation_result_intern")[
        "hb_aggregation_result_intern"
    ]
    questions = _hallusion_questions(len(ANSWERS))
    texts = {str(n): text for n, text in enumerate(ANSWERS)}
    rows = [{**q.details["record"], "subcategory": q.details["subcategory"]} for q in questions]
    for row, q in zip(rows, questions, strict=True):
        row |= {"model_prediction": texts[q.id].strip()}
    scores = get_benchmark("hallusionbench").score(questions, Predictions(texts), "lmms")
    for name in ("aAcc", "fAcc", "qAcc"):
        assert scores[name] == pytest.approx(100 * tool([dict(row) for row in rows], name)), name


def test_hallusionbench_of_vlmevalkit():
    pd = pytest.importorskip("pandas")
    clean = functions(VLMEVAL, "smp/misc.py", "process_punctuation")["process_punctuation"]
    given = {
        "np": np,
        "pd": pd,
        "defaultdict": defaultdict,
        "load": lambda t: t,
        "process_punctuation": clean,
    }
    tool = functions(VLMEVAL, "dataset/utils/yorn.py", "Hallusion_rating", "YOrN_Extraction", **given)
    questions = _hallusion_questions(len(ANSWERS))
    texts = {str(n): text for n, text in enumerate(ANSWERS)}
    records = [q.details["record"] for q in questions]
    table = pd.DataFrame(
        {
            "index": [f"a_b_c_{r['set_id']}_{r['figure_id']}_{r['question_id']}" for r in records],
            "category": [q.kind for q in questions],
            "l2-category": [q.details["subcategory"] for q in questions],
            "score": [tool["YOrN_Extraction"](texts[q.id]).lower() == q.answer for q in questions],
        }
    )
    found = tool["Hallusion_rating"](table).set_index("split").loc["Overall"]
    scores = get_benchmark("hallusionbench").score(questions, Predictions(texts), "vlmevalkit")
    for name in ("aAcc", "fAcc", "qAcc"):
        assert scores[name] == pytest.approx(found[name]), name
