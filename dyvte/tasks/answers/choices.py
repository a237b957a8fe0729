"""Multiple choice: how options are shown, and how each tool finds the chosen letter in an answer.

Options are given by letter; a blank option keeps its letter and is not there.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import TypeAlias

LETTERS = string.ascii_uppercase

Options: TypeAlias = Mapping[str, str]
"""Texts of the options by letter."""


def cut_options(text: str, mark: str, letters: str = LETTERS) -> tuple[str, dict[str, str]]:
    """Take apart a question that states its options itself.

    Parameters
    ----------
    text
        Question and options.
    mark
        Regular expression of what stands before an option; ``{}`` is its letter.
    letters
        As they are written there.

    Returns
    -------
    tuple
        What stands before the first option, and the options by capital letter; the last one runs to the end.
        Without two options one after the other: the text as it is, and none.
    """
    places: list[re.Match[str]] = []
    for letter in letters:
        found = re.compile(mark.format(letter)).search(text, places[-1].end() if places else 0)
        if found is None:
            break
        places.append(found)
    if len(places) < 2:
        return text, {}
    ends = [place.start() for place in places[1:]] + [len(text)]
    options = [text[place.end() : end].strip() for place, end in zip(places, ends, strict=True)]
    return text[: places[0].start()].strip(), lettered(options)


def with_options(question: str, options: Options) -> str:
    """``question``, then one line ``A. option`` each, as LLaVA asks.

    Parameters
    ----------
    question
        Its text.
    options
        By letter.
    """
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Options by letter, none of them blank."""
    return dict(zip(LETTERS, options, strict=False))


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_API_FAILURE = "Failed to obtain answer via API"
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


_VERBOSE_ANSWER = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)


def vlmevalkit_letter(text: str, options: Options) -> str | None:
    """What VLMEvalKit's ``exact_matching`` takes an answer for; None where its language model would be asked.

    ``can_infer`` of ``vlmeval/utils/matching_util.py`` at commit d21c5e9: the only option letter that stands
    as a word, if at most four words follow it ("Z", none of them, for a refusal); else the letter A to D
    behind the first "answer is", in any case and with asterisks before it; else the only option whose text
    occurs in an answer of at most twice the length of all options. The second step is not in
    ms-vlmeval 0.0.20. The tool's check for "A" as an article runs only in verbose mode and is omitted.
    """
    return _vlmevalkit_word(text, options) or _only_option_in(text, options, limited=True)


def _vlmevalkit_word(text: str, options: Options) -> str | None:
    if _API_FAILURE in text:
        return None
    if any(refusal in text for refusal in _REFUSALS):
        return "Z"
    words = text.translate(_MARKS).split()
    found = [letter for letter in options if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    if not found and "Z" in words:
        return "Z"
    verbose = _VERBOSE_ANSWER.search(text)
    return verbose[1].upper() if verbose and verbose[1].upper() in options else None


def _only_option_in(text: str, options: Options, limited: bool) -> str | None:
    lowered = text.lower()
    if limited and len(lowered) > 2 * sum(len(option) for option in options.values()):
        return None
    found = [letter for letter, option in options.items() if option.lower() in lowered]
    return found[0] if len(found) == 1 else None


def hrbench_letter(text: str, options: Options) -> str | None:
    """The first step of HR-Bench's evaluation, an early copy of VLMEvalKit's; None where it would ask a
    language model.

    As in ``hrbench_evals.py`` of lmms-eval: the only option letter that stands as a word, wherever ("Z" for a
    refusal), else the only option whose text occurs in the answer, however long that is.

    Parameters
    ----------
    text
        The answer.
    options
        By letter.
    """
    if _API_FAILURE not in text:
        if any(refusal in text for refusal in _REFUSALS):
            return "Z"
        words = text.translate(_MARKS).split()
        found = [letter for letter in options if letter in words]
        if len(found) == 1:
            return found[0]
        if not found and "Z" in words:
            return "Z"
    return _only_option_in(text, options, limited=False)


_AFFIXES = (
    *(("", after) for after in (".", ",", ":", ")", ").")),
    *(("(", after) for after in (")", ").")),
    *((":", after) for after in ("", ",", ".", ")", ").")),
)


def mmbench_letter(text: str, options: Options) -> str | None:
    """The first step of MMBench's own evaluation; None where it would ask a language model.

    As in ``mmbench_evals.py`` of lmms-eval, which carries the evaluation of the MMBench paper: the only one
    of the words A to E (not where "A" may be an article: more than three words), then with each kind of
    punctuation around it, else the only option whose text occurs in the answer.

    Parameters
    ----------
    text
        The answer.
    options
        By letter.
    """
    if _API_FAILURE in text:
        return _only_option_in(text, options, limited=False)
    words = text.split()
    found = [letter for letter in "ABCDE" if letter in words]
    if len(found) == 1 and not ("A" in words and len(words) > 3):
        return found[0]
    for before, after in _AFFIXES:
        found = [letter for letter in "ABCDE" if before + letter + after in words]
        if len(found) == 1:
            return found[0]
    return _only_option_in(text, options, limited=False)


_PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is"),
    *("best option is", "the choice is", "choice is", "the correct choice is", "correct choice is"),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def lmms_letter(text: str, letters: Sequence[str]) -> str:
    """The letter that lmms-eval's ``extract_mcq_answer`` finds; "" for none.

    ``lmms_eval/tasks/_task_utils/mcq_extract.py``: of all places where a letter stands, the best kind of
    place wins (start of the answer, its end, after a phrase such as "the answer is", in brackets, before a
    full stop, a colon, a bracket, a space; any place at all only if there is no other), then the last place.

    Parameters
    ----------
    text
        The answer.
    letters
        Of the options.
    """
    body = text.strip()
    for mark in ",.!?;:'\"":
        body = body.strip(mark)
    padded = f" {body} "
    if not text.strip():
        return ""
    found: list[tuple[int, int, str]] = []  # (rank of the kind, position, letter)
    for rank, shape in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} ")):
        for letter in letters:
            at = padded.rfind(shape.format(letter))
            if at >= 0:
                found.append((rank, at, letter))
    lowered = padded.lower()
    for phrase in _PHRASES:
        at = lowered.find(phrase)
        for letter in letters if at >= 0 else ():
            place = padded.find(letter, at + len(phrase))
            if place >= 0:
                found.append((7, place, letter))
    inner = padded.strip()
    for letter in letters:
        if inner.startswith(letter) and not inner[1:2].isalpha():
            found.append((10, 0, letter))
        if inner.endswith(letter) and not inner[-2:-1].isalpha():
            found.append((9, len(padded) - 1, letter))
    if not found:
        found = [(0, padded.rfind(letter), letter) for letter in letters if letter in padded]
    # the first of equals wins, as in a stable sort
    return max(found, key=lambda item: item[:2])[2] if found else ""


_LETTER_FULL_STOP = re.compile(r"\s*([A-Z])\.")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def lmms_exact(text: str) -> str:
    """lmms-eval on AI2D: a leading "A." is its letter, else the whole answer; lower case, no punctuation."""
    match = _LETTER_FULL_STOP.match(text)
    return (match.group(1) if match else text).strip().lower().translate(_NO_PUNCTUATION)
