"""The questions of an evaluation: read, put into words, and told apart from others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from dyvte.tasks.base import Benchmark, Question


def load_questions(
    benchmark: Benchmark, root: Path, limit: int | None, max_bad_samples: int
) -> list[Question]:
    """A benchmark's questions, to be asked. An image that is not there, or half a character in a text, ends
    the run at once; where any are tolerated, it counts as the other things do that keep a question from being
    asked.

    Parameters
    ----------
    benchmark
        Reads them.
    root
        Its data, in any known format.
    limit
        About this many; None: all.
    max_bad_samples
        How many that cannot be asked are tolerated.
    """
    strict = max_bad_samples == 0
    return benchmark.load(root, limit, images=strict, damaged=not strict)


def prompts_of(benchmark: Benchmark, questions: Sequence[Question], suffix: str | None) -> list[str]:
    """Prompt text of every question.

    Parameters
    ----------
    benchmark
        Whose way of asking it is.
    questions
        All.
    suffix
        Appended; None: what the benchmark appends.
    """
    extra = {} if suffix is None else {"suffix": suffix}
    return [benchmark.prompt(question, **extra) for question in questions]


def questions_digest(questions: Sequence[Question], prompts: Sequence[str]) -> str:
    """sha256 over ids, prompts and image names: what a resumed run must share.

    Parameters
    ----------
    questions, prompts
        All, in one order.
    """
    digest = hashlib.sha256()
    for question, prompt in zip(questions, prompts, strict=True):
        shown = question.images if question.video is None else (question.video,)
        digest.update(
            "\0".join((question.id, prompt, *(one.name for one in shown), "\n")).encode(
                "utf-8", "surrogatepass"
            )
        )
    return digest.hexdigest()
