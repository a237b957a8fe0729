"""Readings in the dialects ``lmms`` and ``vlmevalkit`` against the tools' own functions, on fuzzed answers.

Skipped where the tools are absent, see :mod:`tests.helpers.tools`; the versions are in docs/benchmarks.md.
"""

from __future__ import annotations

import copy
import os
import random
import re
import statistics
import string
from collections import defaultdict
from functools import partial

import numpy as np
import pytest

from dyvte.tasks import ai2d, gqa, mmbench, mme, mmmu, scienceqa, seed, videomme
from dyvte.tasks.answers.choices import vlmevalkit_letter
from dyvte.tasks.answers.contractions import CONTRACTIONS
from dyvte.tasks.answers.mmmu_open import gold_forms, is_right, read_open
from dyvte.tasks.answers.vqa import NUMBERS, evalai_answer, official_answer
from dyvte.tasks.answers.yes_no import yes_no_words
from dyvte.tasks.base import Predictions, Question, get_benchmark
from dyvte.tasks.vqav2 import HumanAnswers
from tests.helpers.mutations import seeded
from tests.helpers.tools import LMMS, VLMEVAL, Silent, answers, functions

OPTIONS = {"A": "a cat", "B": "dog", "C": "the red one", "D": "40"}
SOME_BLANK = ({"A": "a cat", "C": "dog"}, {"B": "red", "D": "two"})
ANSWERS = answers(seeded(20260401), 4000)


@pytest.fixture(scope="module")
def evalai():
    return functions(LMMS, "tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor", re=re)[
        "EvalAIAnswerProcessor"
    ]


@pytest.fixture(scope="module")
def punctuation():
    return functions(VLMEVAL, "smp/misc.py", "process_punctuation")["process_punctuation"]


def _exact_match(predictions, references):
    metric = functions(LMMS, "api/metrics.py", "exact_match_hf_evaluate", np=np, re=re, string=string)
    compare = metric["exact_match_hf_evaluate"]
    return [
        bool(compare([p], [r], ignore_case=True, ignore_punctuation=True)["exact_match"])
        for p, r in zip(predictions, references, strict=True)
    ]


def test_tables_are_the_official_ones(evalai):
    """In lmms-eval, which copies the official tool, and in VLMEvalKit."""
    assert list(CONTRACTIONS.items()) == list(evalai.CONTRACTIONS.items())
    assert evalai.NUMBER_MAP.items() >= NUMBERS.items()
    vqa_eval = functions(VLMEVAL, "dataset/utils/vqa_eval.py", "_process_digit_article")
    constants = vqa_eval["_process_digit_article"].__code__.co_consts
    assert set(CONTRACTIONS.values()) <= {one for one in constants if isinstance(one, str)} | {
        item for one in constants if isinstance(one, tuple) for item in one
    }
    assert all(
        vqa_eval["_process_digit_article"](key) == CONTRACTIONS[key] for key in CONTRACTIONS if key.islower()
    )


def test_normal_forms_of_lmms_eval(evalai):
    processor = evalai()
    for text in ANSWERS:
        assert evalai_answer(text) == processor(text), ascii(text)
        plain = text.replace("\n", " ").replace("\t", " ").strip()
        expected = processor.process_digit_article(processor.process_punctuation(plain))
        assert official_answer(text, "lmms") == expected, ascii(text)


def test_normal_forms_of_vlmevalkit(punctuation):
    vqa_eval = functions(
        VLMEVAL,
        "dataset/utils/vqa_eval.py",
        "process_answer",
        "_process_digit_article",
        process_punctuation=punctuation,
    )
    for text in ANSWERS:
        assert official_answer(text, "vlmevalkit") == vqa_eval["process_answer"](text), ascii(text)


def _question(number, answer, **details):
    return Question(
        id=str(number), image=None, text="?", answer=answer, image_id=str(number), kind="", details=details
    )


def _soft(name, dialect, humans, texts, make):
    questions = [_question(n, "x", answers=make(ten), question_type="") for n, ten in enumerate(humans)]
    predictions = Predictions({str(n): text for n, text in enumerate(texts)})
    return get_benchmark(name).correct(questions, predictions, dialect)


def test_textvqa(evalai, punctuation):
    draw = random.Random(1)
    humans = [draw.choices(ANSWERS[:40], k=10) for _ in range(400)]
    texts = [draw.choice((*ten, draw.choice(ANSWERS))) for ten in humans]
    lmms = functions(
        LMMS,
        "tasks/textvqa/utils.py",
        "textvqa_process_results",
        EvalAIAnswerProcessor=evalai,
        statistics=statistics,
    )["textvqa_process_results"]
    expected = [
        lmms({"answers": list(ten), "question_id": 0}, [text.strip()])["exact_match"]
        for ten, text in zip(humans, texts, strict=True)
    ]
    assert _soft("textvqa", "lmms", humans, texts, tuple) == pytest.approx(expected)
    vqa_eval = functions(
        VLMEVAL,
        "dataset/utils/vqa_eval.py",
        "process_line",
        "process_answer",
        "_process_digit_article",
        process_punctuation=punctuation,
        istype=lambda value, kind: True,
    )["process_line"]
    expected = [
        np.mean(vqa_eval({"answer": repr(ten), "prediction": text})["match"])
        for ten, text in zip(humans, texts, strict=True)
    ]
    assert _soft("textvqa", "vlmevalkit", humans, texts, tuple) == pytest.approx(expected)


@pytest.mark.parametrize("ids", [True, False])
def test_vqav2(evalai, ids):
    draw = random.Random(2)
    humans = [draw.choices(ANSWERS[:40], k=10) for _ in range(400)]
    texts = [draw.choice((*ten, draw.choice(ANSWERS))) for ten in humans]
    lmms = functions(
        LMMS,
        "tasks/vqav2/utils.py",
        "vqav2_process_results",
        EvalAIAnswerProcessor=evalai,
        statistics=statistics,
    )["vqav2_process_results"]
    expected = [
        lmms(
            {
                "question_id": 0,
                "answers": [
                    {"answer": one, "answer_confidence": n % 2, **({"answer_id": n} if ids else {})}
                    for n, one in enumerate(ten)
                ],
            },
            [text.strip()],
        )["exact_match"]
        for ten, text in zip(humans, texts, strict=True)
    ]
    records = None if ids else (0, 1) * 5
    got = _soft("vqav2", "lmms", humans, texts, lambda ten: HumanAnswers(tuple(ten), records))
    assert got == pytest.approx(expected)


def test_mme():
    tool = functions(
        LMMS,
        "tasks/mme/utils.py",
        *("parse_pred_ans", "mme_process_results", "mme_aggregate_results", "eval_type_dict"),
        eval_logger=Silent(),
        defaultdict=defaultdict,
    )
    for text in ANSWERS:
        assert mme.read_answer(text, "lmms") == tool["parse_pred_ans"](text), ascii(text)
    kinds = ("count", "OCR", "code_reasoning")
    questions = [
        Question(
            id=f"{n}#{i}",
            image=None,
            text="?",
            answer=gold,
            image_id=f"{kinds[n % 3]}/{n}",
            kind=kinds[n % 3],
        )
        for n in range(300)
        for i, gold in enumerate(("Yes", "No"))
    ]
    texts = dict(zip((q.id for q in questions), random.Random(3).choices(ANSWERS, k=600)))
    rows: dict[str, list] = defaultdict(list)
    for q in questions:
        doc = {"answer": q.answer, "category": q.kind, "question_id": q.image_id}
        for key, value in tool["mme_process_results"](doc, [texts[q.id].strip()]).items():
            rows[key].append(value)
    scores = get_benchmark("mme").score(questions, Predictions(texts), "lmms")
    assert scores["perception"] == pytest.approx(tool["mme_aggregate_results"](rows["mme_perception_score"]))
    assert scores["cognition"] == pytest.approx(tool["mme_aggregate_results"](rows["mme_cognition_score"]))


def test_yes_no_words_of_vlmevalkit(punctuation):
    tool = functions(VLMEVAL, "dataset/utils/yorn.py", "YOrN_Extraction", process_punctuation=punctuation)
    for text in ANSWERS:
        expected = tool["YOrN_Extraction"](text).lower().replace("unknown", "other")
        assert yes_no_words(text) == expected, ascii(text)


def test_yes_no_ratings_of_vlmevalkit(punctuation):
    pd = pytest.importorskip("pandas")
    draw = random.Random(4)
    names = ("YOrN_Extraction", "POPE_rating", "MME_rating")
    given = {
        "np": np,
        "pd": pd,
        "defaultdict": defaultdict,
        "load": lambda table: table,
        "d2df": lambda values: {key: [value] for key, value in values.items()},
        "process_punctuation": punctuation,
    }
    tool = functions(VLMEVAL, "dataset/utils/yorn.py", *names, **given)
    questions = [
        Question(
            id=str(n),
            image=None,
            text="?",
            answer=draw.choice(("yes", "no")),
            image_id=str(n),
            kind="random",
            details={
                "categories": draw.choice((("random",), ("popular", "adversarial"), ("random", "popular")))
            },
        )
        for n in range(500)
    ]
    texts = {q.id: draw.choice(ANSWERS) for q in questions}
    read = {key: tool["YOrN_Extraction"](text) for key, text in texts.items()}
    table = pd.DataFrame(
        {
            "index": [q.id for q in questions],
            "category": [",".join(q.details["categories"]) for q in questions],
            "answer": [q.answer.capitalize() for q in questions],
            "extracted": [read[q.id] for q in questions],
            "score": [read[q.id] == q.answer.capitalize() for q in questions],
        }
    )
    rating = tool["POPE_rating"](table).set_index("split")
    scores = get_benchmark("pope").score(questions, Predictions(texts), "vlmevalkit")
    for split, own in {"Overall": scores["overall"], **scores["per_category"]}.items():
        expected = rating.loc[split]
        found = [own[key] for key in ("f1", "accuracy", "precision", "recall")]
        assert found == pytest.approx([expected[key] for key in ("Overall", "acc", "precision", "recall")])

    pairs = [
        Question(id=f"{n}#{i}", image=None, text="?", answer=gold, image_id=f"color/{n // 2}", kind="color")
        for n in range(200)
        for i, gold in ((n % 2, ("Yes", "No")[n % 2]),)
    ]
    texts = {q.id: draw.choice(ANSWERS) for q in pairs}
    table = pd.DataFrame(
        {
            "category": [q.kind for q in pairs],
            "image_path": [q.image_id for q in pairs],
            "score": [tool["YOrN_Extraction"](texts[q.id]) == q.answer for q in pairs],
        }
    )
    scores = get_benchmark("mme").score(pairs, Predictions(texts), "vlmevalkit")
    assert scores["perception"] == pytest.approx(tool["MME_rating"](table)["perception"][0])


def test_pope_of_lmms_eval():
    ours = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1_score"}
    ours["gold_yes_rate"] = "yes_ratio"
    rules = [f"pope_aggregate_{name}" for name in ours.values()]
    tool = functions(LMMS, "tasks/pope/utils.py", "pope_process_results", *rules)
    draw = random.Random(5)
    questions = [_question(n, draw.choice(("yes", "no")), categories=("random",)) for n in range(500)]
    texts = {q.id: draw.choice(("yes", "no", "Yes ", "No\n", *ANSWERS[:6])) for q in questions}
    read = tool["pope_process_results"]
    rows = [
        read({"answer": q.answer, "question_id": q.id}, [texts[q.id].strip()])["pope_accuracy"]
        for q in questions
    ]
    overall = get_benchmark("pope").score(questions, Predictions(texts), "lmms")["overall"]
    for name, theirs in ours.items():
        assert overall[name] == pytest.approx(100 * tool[f"pope_aggregate_{theirs}"](rows))


def test_gqa(punctuation):
    golds = [random.Random(6).choice(("red", "dog", "yes", "T-shirt", "a cat")) for _ in ANSWERS]
    texts = [gold if n % 3 == 0 else text for n, (gold, text) in enumerate(zip(golds, ANSWERS, strict=True))]
    questions = [_question(n, gold, balanced=True) for n, gold in enumerate(golds)]
    predictions = Predictions({str(n): text for n, text in enumerate(texts)})
    expected = _exact_match([text.strip() for text in texts], golds)
    assert gqa.GQA().correct(questions, predictions, "lmms") == expected
    line = functions(VLMEVAL, "dataset/utils/vqa_eval.py", "process_line", istype=lambda value, kind: False)[
        "process_line"
    ]
    expected = [
        line({"answer": gold, "prediction": text}, method="accuracy")["match"] == [1.0]
        for gold, text in zip(golds, texts, strict=True)
    ]
    assert gqa.GQA().correct(questions, predictions, "vlmevalkit") == expected


def test_letters_of_vlmevalkit():
    """ms-vlmeval 0.0.20 does not look for "answer is" yet: such answers are checked by hand."""
    tool = functions(
        VLMEVAL,
        "utils/matching_util.py",
        *("can_infer_option", "can_infer_text", "can_infer"),
        cp=copy,
        os=os,
        string=string,
        logger=Silent(),
    )["can_infer"]
    plain = [text for text in ANSWERS if not re.search(r"answer\s+is", text, re.IGNORECASE)]
    assert len(plain) > 2000
    for options in (OPTIONS, *SOME_BLANK):
        for text in plain:
            assert vlmevalkit_letter(text, options) == (tool(text, dict(options)) or None), ascii(text)


def test_scienceqa_of_lmms_eval():
    tool = functions(LMMS, "tasks/scienceqa/utils.py", "sqa_process_results", "sqa_doc_to_target")
    for text in ANSWERS:
        for index, letter in enumerate(OPTIONS):
            doc = {"choices": list(OPTIONS.values()), "answer": index}
            right = tool["sqa_process_results"](doc, [text.strip()])["exact_match"] == 1
            assert (scienceqa.read_answer(text, OPTIONS, "lmms") == letter) == right, ascii(text)


def test_ai2d_of_lmms_eval():
    tool = functions(LMMS, "tasks/ai2d/utils.py", "MultiChoiceRegexFilter", ExtendedRegexFilter=object, re=re)
    apply = partial(tool["MultiChoiceRegexFilter"].apply, None)
    filtered = apply([[text] for text in ANSWERS], [None] * len(ANSWERS))
    for letter in OPTIONS:
        expected = _exact_match([text.strip() for text in filtered], [letter] * len(filtered))
        got = [ai2d.read_answer(text, OPTIONS, "lmms") == letter for text in ANSWERS]
        assert got == expected


def test_seed_of_lmms_eval():
    tool = functions(LMMS, "tasks/seedbench/utils.py", "seed_process_result", "seed_aggregation_result")
    for text in ANSWERS:
        for letter in OPTIONS:
            doc = {"answer": letter, "data_type": "image", "question_id": 0}
            row = tool["seed_process_result"](doc, [text.strip()])["seed_all"]
            expected = tool["seed_aggregation_result"]([row]) == 1
            assert (seed.read_answer(text, OPTIONS, "lmms") == letter) == expected, ascii(text)


@pytest.fixture(scope="module")
def evaluator():
    pd = pytest.importorskip("pandas")
    given = {"pd": pd, "os": os, "string": string, "eval_logger": Silent()}
    tool = functions(LMMS, "tasks/mmbench/mmbench_evals.py", "MMBench_Evaluator", **given)
    return tool["MMBench_Evaluator"]()


def test_mmbench_of_lmms_eval(evaluator):
    extract = functions(
        LMMS,
        "tasks/_task_utils/mcq_extract.py",
        *("extract_mcq_answer", "_DEFAULT_CHOICES", "_ANSWER_PHRASES", "_FORMAT_PRIORITY"),
        Optional=__import__("typing").Optional,
        List=list,
    )["extract_mcq_answer"]
    for options in (OPTIONS, *SOME_BLANK, {**OPTIONS, "C": "nan", "D": "nan"}):
        for text in map(str.strip, ANSWERS):
            first = evaluator.can_infer(text, dict(options)) or None
            assert mmbench.read_answer(text, options, "original") == first, ascii(text)
            static = first or extract(text, choices=sorted(options)) or None
            assert mmbench.read_answer(text, options, "lmms") == static, ascii(text)


def test_mmmu_of_lmms_eval():
    names = ("parse_mmmu_multi_choice_response", "get_multi_choice_info")
    parse = functions(LMMS, "tasks/_task_utils/mmmu_mcq_utils.py", *names, np=np, random=_NoChance())
    for text in map(str.strip, ANSWERS):
        got = parse["parse_mmmu_multi_choice_response"](text, list(OPTIONS), OPTIONS)
        assert mmmu.read_letter(text, OPTIONS) == got, ascii(text)
    names = ("parse_open_response", "extract_numbers", "normalize_str", "check_is_number", "eval_open")
    tool = functions(LMMS, "tasks/mmmu/utils.py", *names, re=re)
    for text in map(str.strip, ANSWERS):
        stated = tool["parse_open_response"](text)
        for golds in (["3.50"], ["Dog", "a cat"], ["1000"], ["b"]):
            expected = tool["eval_open"](golds, stated)
            assert is_right(read_open(text), gold_forms(golds)) == expected, ascii(text)


class _NoChance:
    def choice(self, letters):
        return None


def test_videomme():
    lmms = functions(
        LMMS,
        "tasks/_task_utils/mcq_extract.py",
        *("extract_mcq_answer", "_DEFAULT_CHOICES", "_ANSWER_PHRASES", "_FORMAT_PRIORITY"),
        Optional=__import__("typing").Optional,
        List=list,
    )["extract_mcq_answer"]
    vlmevalkit = functions(VLMEVAL, "dataset/utils/videomme.py", "extract_characters_regex", re=re)[
        "extract_characters_regex"
    ]
    for text in ANSWERS:
        assert videomme.read_answer(text, "lmms") == lmms(text.strip(), choices=list("ABCD")), ascii(text)
        assert videomme.read_answer(text, "vlmevalkit") == vlmevalkit(text), ascii(text)
