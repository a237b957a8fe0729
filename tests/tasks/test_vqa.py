"""TextVQA and VQAv2: normalisation and soft accuracy, by values worked out from the published rules."""

from __future__ import annotations

import json
import random

import pytest

from dyvte.errors import ScoreError
from dyvte.tasks.answers.vqa import evalai_answer, official_answer, without_punctuation
from dyvte.tasks.base import Predictions, Question, get_benchmark
from dyvte.tasks.vqav2 import HumanAnswers
from tests.helpers.benchmark_files import put, write_benchmark

DIALECTS = ("original", "lmms", "vlmevalkit")


@pytest.mark.parametrize(
    ("answer", "official", "evalai"),
    [
        ("The Dog.", "dog", "dog"),
        ("two", "2", "2"),
        ("none", "0", "0"),
        ("dont", "don't", "don't"),
        ("t-shirt", "t shirt", "t shirt"),
        ("left -hand", "left hand", "left hand"),
        ("3.5", "3.5", "3.5"),
        ("1,000", "1000", "1000"),
        ("red, white", "red white", "red white"),
        ("red,white", "red white", "redwhite"),
        ("man's", "man's", "man 's"),
        ("why?not", "why not", "whynot"),
        ("a\nb\tc", "b c", "b c"),
        ("red\u2028hat", "red hat", "red hat"),
        ("couldntve", "couldntve", "couldntve"),
        ("couldnt've", "couldn't've", "couldn't've"),
        ("Id've", "id've", "id've"),
        ("an", "", ""),
        ("", "", ""),
        (" . ", "", ""),
    ],
)
def test_normal_forms(answer, official, evalai):
    assert (official_answer(answer), evalai_answer(answer)) == (official, evalai)


def _text_question(humans):
    return Question(
        id="1",
        image=None,
        text="?",
        answer=humans[0],
        image_id="i",
        kind="",
        details={"answers": tuple(humans)},
    )


def _textvqa(humans, answer, dialect="original"):
    return get_benchmark("textvqa").correct([_text_question(humans)], Predictions({"1": answer}), dialect)[0]


def test_leave_one_out_over_ten_answers():
    for same in range(11):
        humans = ["stop"] * same + [f"other {n}" for n in range(10 - same)]
        # those who said it see one fellow less
        share = (same * min(1, max(0, same - 1) / 3) + (10 - same) * min(1, same / 3)) / 10
        assert _textvqa(humans, "STOP.") == pytest.approx(share)


def test_textvqa_dialects_differ_in_commas_and_possessives():
    humans = ["redwhite"] * 10
    assert [_textvqa(humans, "red,white", d) for d in DIALECTS] == [1, 1, 0]
    humans = ["joe 's"] * 10
    assert [_textvqa(humans, "Joe's", d) for d in DIALECTS] == [1, 1, 0]


def test_textvqa_wants_ten_answers_in_the_original_only():
    with pytest.raises(ScoreError, match="1 questions have not ten human answers: 1"):
        _textvqa(["a b"] * 5, "a b")
    assert _textvqa(["a b"] * 5, "a b", "lmms") == 1


def _vqa(humans, answer, dialect="original", ids=True):
    records = None if ids else (0,) * len(humans)
    question = Question(
        id="1",
        image=None,
        text="?",
        answer=humans[0],
        image_id="i",
        kind="",
        details={"answers": HumanAnswers(tuple(humans), records), "question_type": ""},
    )
    return get_benchmark("vqav2").correct([question], Predictions({"1": answer}), dialect)[0]


def test_vqav2_normalises_human_answers_in_part_or_fully():
    # ten equal answers stay as they are: "Two" is not "2", the normalised prediction
    assert [_vqa(["Two"] * 10, "two", d) for d in DIALECTS[:2]] == [0, 1]
    # differing ones lose their punctuation only
    assert [_vqa(["2."] * 9 + ["x"], "two", d) for d in DIALECTS[:2]] == [1, 1]
    assert [_vqa(["two"] * 9 + ["x"], "two", d) for d in DIALECTS[:2]] == [0, 1]


def test_vqav2_leaves_out_equal_records_together():
    humans = ["yes"] * 6 + ["no"] * 4
    assert _vqa(humans, "yes") == 1
    # without ids each "yes" is the same record: none is left when one is omitted
    assert _vqa(humans, "yes", ids=False) == pytest.approx(0.4)


def _published_rule(prediction, records):
    """VQA accuracy as vqaEval.py states it, on whole records."""
    records = [dict(record) for record in records]
    if len({record["answer"] for record in records}) > 1:
        for record in records:
            record["answer"] = without_punctuation(record["answer"])
    shares = []
    for one in records:
        others = [other for other in records if other != one]
        shares.append(min(1, len([other for other in others if other["answer"] == prediction]) / 3))
    return sum(shares) / len(shares)


def test_vqav2_at_random_against_the_published_rule(tmp_path):
    """Also records without ids, with ids that repeat, and with fewer or more than ten of them."""
    draw = random.Random(7)
    words = ["yes", "no", "Yes.", "two", "2", "red, white", "t-shirt", "a dog", "dog", ""]
    benchmark, annotations, questions = get_benchmark("vqav2"), [], []
    for n in range(300):
        keep = draw.choice(((), ("answer_id",), ("answer_confidence",), ("answer_id", "answer_confidence")))
        records = [
            {"answer": draw.choice(words)} | {key: draw.choice((1, 2, "yes", 3 + i)) for key in keep}
            for i in range(draw.choice((1, 3, 10, 10, 10, 12)))
        ]
        annotations.append({"question_id": n, "answers": records})
        questions.append({"question_id": n, "image_id": n, "question": "?"})
    put(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    put(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    loaded = benchmark.load(tmp_path, images=False)
    texts = {q.id: draw.choice(words) for q in loaded}
    expected = [
        _published_rule(official_answer(texts[str(one["question_id"])]), one["answers"])
        for one in annotations
    ]
    assert benchmark.correct(loaded, Predictions(texts)) == pytest.approx(expected)
    assert 0.1 < sum(expected) / 300 < 0.9


def test_scores_by_type_and_the_server_file(tmp_path):
    benchmark = get_benchmark("vqav2")
    questions = benchmark.load(write_benchmark(tmp_path / "d", "vqav2", "release"))
    predictions = Predictions({q.id: text for q, text in zip(questions, ["Stop.", "the coke", "two"])})
    scores = benchmark.score(questions, predictions)
    # 8 of 10 say stop: 1; 5 of 10 say coke: 1; ten say 2: 1
    assert scores["accuracy"] == pytest.approx(100)
    assert scores["per_answer_type"]["other"]["num_questions"] == 3
    rows = json.loads(benchmark.write_submission(tmp_path, questions, predictions).read_text())
    assert rows == [
        {"question_id": 42000, "answer": "stop"},
        {"question_id": 42001, "answer": "coke"},
        {"question_id": 42002, "answer": "2"},
    ]


def test_llava_texts_carry_the_ocr_tokens(tmp_path):
    benchmark = get_benchmark("textvqa")
    questions = benchmark.load(write_benchmark(tmp_path, "textvqa", "llava"))
    assert benchmark.prompt(questions[0]) == (
        "what does the sign say ?\nReference OCR token: A, B\n"
        "Answer the question using a single word or phrase."
    )
    assert questions[0].id == "34602"
