"""Readings in the dialects ``lmms`` and ``vlmevalkit`` against the tools' own functions, on fuzzed answers.

Skipped where the tools are absent, see :mod:`tests.helpers.tools`; the versions are in docs/benchmarks.md.
"""

from __future__ import annotations

import random
import re
import statistics
from collections import defaultdict

import numpy as np
import pytest

from dyvte.tasks import gqa, mme
from dyvte.tasks.answers.contractions import CONTRACTIONS
from dyvte.tasks.answers.vqa import NUMBERS, evalai_answer, official_answer
from dyvte.tasks.answers.yes_no import yes_no_words
from dyvte.tasks.base import Predictions, Question, get_benchmark
from dyvte.tasks.vqav2 import HumanAnswers
from tests.helpers.mutations import seeded
from tests.helpers.tools import LMMS, VLMEVAL, Silent, answers, exact_match, functions

ANSWERS = answers(seeded(20260401), 4000)


@pytest.fixture(scope="module")
def evalai():
    return functions(LMMS, "tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor", re=re)[
        "EvalAIAnswerProcessor"
    ]


@pytest.fixture(scope="module")
def punctuation():
    return functions(VLMEVAL, "smp/misc.py", "process_punctuation")["process_punctuation"]


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
    expected = exact_match([text.strip() for text in texts], golds)
    assert gqa.GQA().correct(questions, predictions, "lmms") == expected
    line = functions(VLMEVAL, "dataset/utils/vqa_eval.py", "process_line", istype=lambda value, kind: False)[
        "process_line"
    ]
    expected = [
        line({"answer": gold, "prediction": text}, method="accuracy")["match"] == [1.0]
        for gold, text in zip(golds, texts, strict=True)
    ]
    assert gqa.GQA().correct(questions, predictions, "vlmevalkit") == expected
