"""Functions of the benchmarks' tools, taken from their published sources without importing the packages.

lmms-eval and VLMEvalKit are no dependencies. Where they are installed, or unpacked below the folders of
``DYVTE_TOOLS`` (separated as in PATH: ``pip download --no-deps lmms-eval==0.7.3 ms-vlmeval==0.0.20`` and
unzip), the named functions are compiled out of their files; their imports are not run.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import random
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LMMS, VLMEVAL = "lmms_eval", "vlmeval"


def source(package: str, path: str) -> Path:
    """A file of a tool; the test is skipped where the tool is absent."""
    roots = [
        Path(folder) / package for folder in os.environ.get("DYVTE_TOOLS", "").split(os.pathsep) if folder
    ]
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        roots += [Path(folder) for folder in spec.submodule_search_locations]
    for root in roots:
        if (root / path).is_file():
            return root / path
    pytest.skip(f"{package} is neither installed nor below $DYVTE_TOOLS")


def functions(package: str, path: str, *names: str, **given: Any) -> dict[str, Any]:
    """The named functions, classes and constants of a file, in a namespace of what they use.

    Parameters
    ----------
    names : what is compiled.
    given : modules and stand-ins that the file would import.
    """
    file = source(package, path)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    wanted = [node for node in tree.body if _name(node) in names]
    missing = set(names) - {_name(node) for node in wanted}
    assert not missing, f"{file} has no {missing}"
    for node in wanted:
        getattr(node, "decorator_list", []).clear()
    space: dict[str, Any] = dict(given)
    exec(compile(ast.Module(wanted, []), str(file), "exec"), space)
    return space


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return getattr(node, "name", None)


class Silent:
    """Takes any call, as a logger."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


_PIECES = (
    *("A", "B", "C", "D", "E", "Z", "a", "b", "(A)", "(B)", "A.", "B.", "C)", "D:", ":B", "**B**", "*C*"),
    *("the answer is", "The answer is", "answer is", "correct answer is", "I choose", "Answer:", "[D]", "="),
    *("a cat", "dog", "the red one", "40", "Dog", "red", "not", "no", "No", "yes", "Yes", "y", "n", "NO"),
    *("none", "two", "1,000", "3.5", "1984.", ".5", "1,,2", "dont", "couldnt've", "man's", "t-shirt", "the"),
    *("so", "is", "12", "-7", "1e3", "?", "!", ";", "/", "'s", "an", "The best answer", "\u2028", "é", "YES"),
    "Cannot determine the answer",
)
_JOINTS = (" ", " ", " ", " ", "", ", ", ". ", "\n", "\t", "-", ".", ",")


def answers(draw: random.Random, count: int) -> list[str]:
    """Answers such as models give, well and badly formed."""
    made = []
    for _ in range(count):
        text = ""
        for _ in range(draw.choice((1, 1, 2, 2, 3, 4, 6, 9))):
            text += draw.choice(_PIECES) + draw.choice(_JOINTS)
        made.append(text if draw.random() < 0.3 else text.strip())
    return made


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
    """lmms-eval's metric of that name, one pair at a time."""
    metric = functions(LMMS, "api/metrics.py", "exact_match_hf_evaluate", np=np, re=re, string=string)
    compare = metric["exact_match_hf_evaluate"]
    return [
        bool(compare([p], [r], ignore_case=True, ignore_punctuation=True)["exact_match"])
        for p, r in zip(predictions, references, strict=True)
    ]
