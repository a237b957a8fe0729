"""Letters and options read as the tools read them: their own functions on the same answers."""

from __future__ import annotations

import copy
import os
import re
import string
from functools import partial

import numpy as np
import pytest

from dyvte.tasks import ai2d, mmbench, mmmu, scienceqa, seed, videomme
from dyvte.tasks.answers.choices import vlmevalkit_letter
from dyvte.tasks.answers.mmmu_open import gold_forms, is_right, read_open
from tests.helpers.mutations import seeded
from tests.helpers.tools import LMMS, VLMEVAL, Silent, answers, exact_match, functions

ANSWERS = answers(seeded(20260401), 4000)
OPTIONS = {"A": "a cat", "B": "dog", "C": "the red one", "D": "40"}
SOME_BLANK = ({"A": "a cat", "C": "dog"}, {"B": "red", "D": "two"})


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
        expected = exact_match([text.strip() for text in filtered], [letter] * len(filtered))
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
