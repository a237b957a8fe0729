"""lmms-eval tasks over local files: what ``configs/lmms_tasks/*.yaml`` name.

The questions are read by the benchmark's own loader, so any format of ``docs/benchmarks.md`` serves, and are
put as ``dyvte eval`` puts them; answers are scored by lmms-eval's rules.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from dyvte.errors import ConfigError
from dyvte.evaluation.generation import question_images
from dyvte.tasks.base import Question, get_benchmark


def gqa_docs(placeholder: Any) -> Any:
    """Questions of the GQA below $DYVTE_GQA."""
    return _docs("gqa")


def mme_docs(placeholder: Any) -> Any:
    """Questions of the MME below $DYVTE_MME."""
    return _docs("mme")


def visual(doc: Mapping[str, Any]) -> list[Any]:
    """RGB PIL images of a question."""
    return question_images(_question(doc), num_frames=1)


def text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any]) -> str:
    """The prompt; ``post_prompt`` is what ``dyvte eval --question-suffix`` is.

    Parameters
    ----------
    doc
        Row of the data set.
    lmms_eval_specific_kwargs
        Of the task, by lmms-eval.
    """
    return get_benchmark(doc["benchmark"]).prompt(_question(doc), lmms_eval_specific_kwargs["post_prompt"])


def _docs(name: str) -> Any:
    from datasets import Dataset

    rows = [
        {
            "id": question.id,
            "benchmark": name,
            # what lmms-eval's MME pairs the two questions of an image by
            "question_id": question.image_id,
            "question": question.text,
            "answer": question.answer,
            "category": question.kind,
        }
        for question in _loaded(name, _root(name)).values()
    ]
    return Dataset.from_list(rows)


def _question(doc: Mapping[str, Any]) -> Question:
    return _loaded(doc["benchmark"], _root(doc["benchmark"]))[doc["id"]]


def _root(name: str) -> Path:
    variable = f"DYVTE_{name.upper()}"
    root = os.environ.get(variable)
    if not root:
        raise ConfigError(
            f"{variable} is not set: give the folder with {name}'s files, as --data of dyvte eval"
        )
    return Path(root)


@lru_cache(maxsize=4)
def _loaded(name: str, root: Path) -> dict[str, Question]:
    return {question.id: question for question in get_benchmark(name).load(root)}
