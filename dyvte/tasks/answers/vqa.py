"""VQA accuracy: how answers are normalised before ten human answers are counted, and the count.

The normaliser is that of the official VQA evaluation (``vqaEval.py`` of GT-Vision-Lab/VQA), which VLMEvalKit
repeats (``process_answer`` in ``vqa_eval.py``) but for full stops. The EvalAI processor of TextVQA
(``m4c_evaluator.py`` of LLaVA, from Pythia) takes commas, question marks and the possessive apart first. The
tools also differ in what they apply to the human answers: see :mod:`dyvte.tasks.textvqa` and
:mod:`dyvte.tasks.vqav2`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from dyvte.tasks.answers.contractions import CONTRACTIONS

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

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = {"lmms": re.compile(r"\d,+\d")}
_FULL_STOP = {"vlmevalkit": re.compile(r"(?<!\d)\.(?!\d)")}
_OFFICIAL_COMMA = re.compile(r"\d,\d")
_OFFICIAL_STOP = re.compile(r"\.(?!\d)")


def without_punctuation(text: str, dialect: str = "original") -> str:
    """``processPunctuation``: a mark beside a blank, or in a text with a comma between digits, goes; any
    other becomes a blank. At most 32 full stops go (a flag is passed where a count belongs), those before no
    digit.

    Parameters
    ----------
    dialect
        ``lmms``: several commas between digits count too. ``vlmevalkit``: full stops behind a digit stay
        ("1984.").
    """
    cleaned = text
    digits_comma = _NUMBER_COMMA.get(dialect, _OFFICIAL_COMMA).search(text) is not None
    for mark in _PUNCTUATION:
        if mark in cleaned:
            beside_space = f"{mark} " in text or f" {mark}" in text
            cleaned = cleaned.replace(mark, "" if beside_space or digits_comma else " ")
    return _FULL_STOP.get(dialect, _OFFICIAL_STOP).sub("", cleaned, count=32)


def digits_and_articles(text: str) -> str:
    """``processDigitArticle``: lower case, number words to digits, articles out, apostrophes restored."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(text: str) -> str:
    """Line feeds and tabs to blanks, outer blanks off."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def official_answer(text: str, dialect: str = "original") -> str:
    """A prediction as the official VQA evaluation compares it; with the punctuation rule of ``dialect``.

    Parameters
    ----------
    text
        The answer.
    dialect
        Whose rule.
    """
    return digits_and_articles(without_punctuation(one_line(text), dialect))


def evalai_answer(text: str) -> str:
    """An answer as EvalAI's processor leaves it: commas, question marks out, 's split off, then as above."""
    tokens = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return official_answer(tokens)


def remembering(normalise: Callable[[str], str]) -> Callable[[str], str]:
    """The same function, which normalises a text once: human answers repeat themselves."""
    known: dict[str, str] = {}

    def normalised(text: str) -> str:
        if text not in known:
            known[text] = normalise(text)
        return known[text]

    return normalised


def soft_accuracy(prediction: str, answers: Sequence[str], records: Sequence[int] | None = None) -> float:
    """VQA accuracy: min(matches / 3, 1), averaged over omitting each human answer in turn.

    Parameters
    ----------
    prediction
        Normalised.
    answers
        The normalised human answers, at least one.
    records
        What stands beside each answer, as a number that is the same where it is the same: an answer is left
        out together with those that equal it in this too. None: no two answers are the same record.
    """
    if records is None:
        matching, others = answers.count(prediction), len(answers)
        # those who agree with the prediction see one fellow less
        total = matching * _share(matching - 1) + (others - matching) * _share(matching)
        return total / len(answers)
    pairs = list(zip(answers, records, strict=True))
    shares = (
        _share(sum(answer == prediction for answer, record in pairs if (answer, record) != left_out))
        for left_out in pairs
    )
    return sum(shares) / len(pairs)


def _share(matches: int) -> float:
    return min(1.0, max(0, matches) / 3)
