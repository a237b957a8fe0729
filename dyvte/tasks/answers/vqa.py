"""VQA accuracy: how answers are normalised before ten human answers are counted, and the count.

The normaliser is that of the official VQA evaluation (``vqaEval.py`` of GT-Vision-Lab/VQA), which VLMEvalKit
repeats (``process_answer`` in ``vqa_eval.py``). The EvalAI processor of TextVQA (``m4c_evaluator.py`` of
LLaVA, from Pythia) takes commas, question marks and the possessive apart first. The tools also differ in what
they apply to the human answers: see :mod:`.textvqa` and :mod:`.vqav2`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
ARTICLES = ("a", "an", "the")

# Words the official table restores an apostrophe in, written with it; the key is the word without any.
_RESTORED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
    how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't
    shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll
    that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't
    would've wouldn't y'all you'd you'll you're you've
"""
# Double contractions: both half-restored spellings lead to the full one.
_DOUBLE = """
    couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've you'd've
"""


def _halves(word: str) -> tuple[str, str]:
    """``couldn't've`` -> ``couldnt've``, ``couldn'tve``: the first or the last apostrophe is lost."""
    first, last = word.index("'"), word.rindex("'")
    return word[:first] + word[first + 1 :], word[:last] + word[last + 1 :]


CONTRACTIONS = {
    **{word.replace("'", ""): word for word in _RESTORED.split()},
    **{half: word for word in _DOUBLE.split() for half in _halves(word)},
    # what the table has beside the pattern, its one inverted entry included
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def without_punctuation(text: str) -> str:
    """``processPunctuation``: a mark beside a blank, or in a text with a comma between digits, goes; any
    other becomes a blank. At most 32 full stops go (a flag is passed where a count belongs)."""
    cleaned = text
    digits_comma = _NUMBER_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or digits_comma else " ")
    return _FULL_STOP.sub("", cleaned, count=32)


def digits_and_articles(text: str) -> str:
    """``processDigitArticle``: lower case, number words to digits, articles out, apostrophes restored."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(text: str) -> str:
    """Line feeds and tabs to blanks, outer blanks off."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def official_answer(text: str) -> str:
    """A prediction as the official VQA evaluation compares it (and any answer, in VLMEvalKit)."""
    return digits_and_articles(without_punctuation(one_line(text)))


def evalai_answer(text: str) -> str:
    """An answer as EvalAI's processor leaves it: commas, question marks out, 's split off, then as above."""
    tokens = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return official_answer(tokens)


def leave_one_out(prediction: str, humans: Sequence[Any], answers: Sequence[str]) -> float:
    """VQA accuracy: min(matches / 3, 1), averaged over leaving out each human answer in turn.

    Parameters
    ----------
    prediction
        Normalised.
    humans
        What makes a human answer the same record as another: left out with it.
    answers
        The normalised answers of those records.
    """
    matches = [answer == prediction for answer in answers]
    total = 0.0
    for left_out in humans:
        count = sum(match for match, human in zip(matches, humans, strict=True) if human != left_out)
        total += min(1.0, count / 3)
    return total / len(humans)
