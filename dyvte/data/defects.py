"""What is wrong with one sample: named by file, sample and field, counted, and fatal only beyond a limit."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dyvte.errors import DataError, DyvteError

log = logging.getLogger(__name__)

_SHOWN_DEFECTS = 5
_LONGEST_PROBLEM = 400
# What the system says when it is short of something, whatever file was asked for.
_OF_THE_SYSTEM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)


@dataclass(frozen=True, kw_only=True)
class Defect:
    """What is wrong with one sample, and where.

    Attributes
    ----------
    file
        Of the data; for messages.
    sample_id
        As the file gives it.
    field
        Where it is wrong: "image", "conversations", ...
    problem
        What was found, and what was expected.
    """

    file: str
    sample_id: str
    field: str
    problem: str

    def __str__(self) -> str:
        text = f"{self.file}: sample {self.sample_id!r}: {self.field}: {self.problem}"
        return printable(text)


class Unusable(Exception):
    """Raised while a sample is made; who knows file and sample id makes a `Defect` of it."""

    def __init__(self, field_name: str, problem: str) -> None:
        super().__init__(problem)
        self.field, self.problem = field_name, problem

    def defect(self, file: str, sample_id: str) -> Defect:
        """The defect that it is.

        Parameters
        ----------
        file
            Or data set, that the sample is of.
        sample_id
            Its id.
        """
        return Defect(file=file, sample_id=sample_id, field=self.field, problem=self.problem)


class LeavesFolder(Unusable):
    """An image path leads out of the image folder: always fatal, never one of the tolerated defects."""


@contextmanager
def collected(defects: list[Defect], *, file: str, sample_id: str, field: str) -> Iterator[None]:
    """Whatever the body raises over one sample becomes a defect of it, and the run goes on.

    Parameters
    ----------
    defects
        Where it is added.
    file, sample_id, field
        What it is called; an `Unusable` names its field itself.

    Raises
    ------
    DataError
        If an image path leaves its folder.
    Exception
        What is no sample's fault; see `is_of_sample`.
    """
    try:
        yield
    except LeavesFolder as problem:
        raise DataError(str(problem.defect(file, sample_id))) from problem
    except Unusable as problem:
        defects.append(problem.defect(file, sample_id))
    except Exception as error:
        if not is_of_sample(error):
            raise
        defects.append(Defect(file=file, sample_id=sample_id, field=field, problem=problem_text(error)))


@contextmanager
def named(what: str) -> Iterator[None]:
    """Whatever the body raises over one sample becomes a DataError that begins with ``what``: for those who
    cannot go on without a sample.

    Raises
    ------
    DataError
        Naming it.
    Exception
        What is no sample's fault.
    """
    try:
        yield
    except Exception as error:
        if not is_of_sample(error):
            raise
        raise DataError(printable(f"{what}: {problem_text(error)}")) from error


def is_of_sample(error: Exception) -> bool:
    """Whether an error raised over a sample may be the sample's own: not one of settings, nor one of a
    machine short of memory, files or disk."""
    if isinstance(error, DyvteError):
        return isinstance(error, DataError)
    if isinstance(error, OSError):
        return error.errno not in _OF_THE_SYSTEM
    # torch.OutOfMemoryError is a RuntimeError; torch is not imported for it
    return not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError"


def problem_text(error: BaseException) -> str:
    """An error as one line; a foreign one with its type, as its text alone often says little."""
    text = " ".join(str(error).split())
    if not isinstance(error, DyvteError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONGEST_PROBLEM else f"{text[:_LONGEST_PROBLEM]} ..."


def printable(text: str) -> str:
    """The text with each half of a character as its escape: half a character can be printed nowhere."""
    return text.encode("utf-8", "backslashreplace").decode()


def check_text(text: str, where: str) -> None:
    """Raise Unusable if a text holds half a character: JSON may escape one half of an emoji, as text cut at a
    fixed length leaves it, but no tokenizer and no file takes it.

    Parameters
    ----------
    text
        Any.
    where
        The field, for the message.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable(
            where,
            f"character {error.start} is half of a surrogate pair ({text[error.start]!r}): no valid text",
        ) from error


def check_defects(defects: Sequence[Defect | str], max_bad_samples: int) -> None:
    """See that no more samples are unusable than are allowed.

    Parameters
    ----------
    defects
        All that were found so far.
    max_bad_samples
        How many are tolerated: excluded and counted.

    Raises
    ------
    DataError
        There are more; the first of them are named.
    """
    if len(defects) <= max_bad_samples:
        return
    shown = "\n  ".join(str(defect) for defect in defects[:_SHOWN_DEFECTS])
    more = f"\n  ... and {len(defects) - _SHOWN_DEFECTS} more" if len(defects) > _SHOWN_DEFECTS else ""
    raise DataError(
        f"{len(defects)} unusable samples, {max_bad_samples} allowed (max_bad_samples):\n  {shown}{more}\n"
        "Correct the data, or allow that many: they are then excluded and counted."
    )


def log_excluded(defects: Sequence[Defect]) -> None:
    """Name every sample that a run goes on without.

    Parameters
    ----------
    defects
        What is wrong with them.
    """
    for defect in defects:
        log.warning("excluded: %s", defect)
