"""What multiple-choice benchmarks share: options by letter, gold letters, reading the chosen one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from dyvte.readers.rows import Row, is_blank
from dyvte.tasks.answers.choices import LETTERS, Options
from dyvte.tasks.base import Benchmark, Predictions, Question
from dyvte.tasks.prompts import LETTER_SUFFIX


class ChoiceBenchmark(Benchmark):
    """A benchmark whose answers are letters; a subclass says how a tool reads one (:meth:`read`)."""

    suffix: ClassVar[str] = LETTER_SUFFIX

    def read(self, text: str, question: Question, dialect: str) -> str | None:
        """The letter that the tool of ``dialect`` finds in an answer; what is no letter equals none.

        Parameters
        ----------
        text
            The answer.
        question
            That it is to.
        dialect
            Whose rule.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no `read`")

    def hits(self, questions: Sequence[Question], predictions: Predictions, dialect: str) -> list[bool]:
        """Read letter equals gold."""
        return [self.read(predictions.texts[q.id], q, dialect) == q.answer for q in questions]


def lettered_options(row: Row, *keys: str) -> dict[str, str]:
    """The options of a row.

    Parameters
    ----------
    row
        Has a list under one of ``keys``, or the columns A, B, ...
    keys
        Where the list may stand.

    Raises
    ------
    DataError
        No options, more than there are letters, or all of them blank.
    """
    listed = row.value(*keys)
    if listed is not None:
        options = listed_options(row, row.texts(*keys))
    else:
        options = {letter: row.text(letter) for letter in LETTERS if not is_blank(row.get(letter))}
    if not options:
        raise row.error("a multiple-choice question without options")
    return options


def listed_options(row: Row, texts: Sequence[str | None]) -> dict[str, str]:
    """Options by letter from a list in which the blank ones are None.

    Parameters
    ----------
    row
        For the message.
    texts
        In the order of the letters.
    """
    if len(texts) > len(LETTERS):
        raise row.error(f"{len(texts)} options, but only {len(LETTERS)} letters")
    return {letter: text for letter, text in zip(LETTERS, texts, strict=False) if text is not None}


def gold_letter(row: Row, options: Options, key: str = "answer") -> str | None:
    """The gold answer, a letter; None where the row has none.

    Parameters
    ----------
    row
        Of a question.
    options
        Those that are there.
    key
        Where the letter stands.

    Raises
    ------
    DataError
        It is no letter of an option that is there.
    """
    answer = row.text(key, default=None)
    return None if answer is None else checked_letter(row, answer.strip(), options)


def gold_index(row: Row, options: Options, key: str = "answer") -> str:
    """The letter of a gold answer that is the index of an option, from 0.

    Parameters
    ----------
    row
        Of the table.
    options
        By letter.
    key
        Column of the index.
    """
    index = row.integer(key)
    return checked_letter(row, LETTERS[index] if 0 <= index < len(LETTERS) else str(index), options)


def checked_letter(row: Row, letter: str, options: Options) -> str:
    """The letter, if there is such an option.

    Parameters
    ----------
    row
        For the message.
    letter
        As the row gives it.
    options
        By letter.
    """
    if letter not in options:
        raise row.error(f"gold answer {letter!r} is none of {len(options)} options ({', '.join(options)})")
    return letter
