"""Public names say what they take and what they raise.

Public is what a package names in ``__all__``, and the methods of public classes whose names begin with no
underscore. Every parameter stands in a section of the docstring, a field of a dataclass there or with a text
under it; a method that a base class documents needs no second text.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import dyvte
from dyvte.errors import ConfigError, DyvteError
from dyvte.fields import field_texts, section_texts

ABSENT = {"dyvte.plugins.vllm"}
"""Packages that need vLLM to be imported."""


def sections(text: str | None) -> dict[str, str]:
    """A docstring's sections by name."""
    lines = inspect.cleandoc(text or "").split("\n")
    found: dict[str, str] = {}
    name = ""
    for line, below in zip(lines, [*lines[1:], ""]):
        if line.strip() and re.fullmatch(r"-{3,}", below):
            name = line
        elif name and not re.fullmatch(r"-{3,}", line):
            found[name] = found.get(name, "") + line + "\n"
    return found


def names_in(text: str) -> set[str]:
    """What a section has entries for: ``a``, ``a:``, ``a : int``, ``a, b``."""
    heads = (re.split(r" : |:$", line)[0] for line in text.split("\n") if line and not line[0].isspace())
    return {name.strip().lstrip("*") for head in heads for name in head.split(",")}


def documented(item: Any) -> set[str]:
    found = sections(item.__doc__)
    return set().union(*(names_in(found.get(name, "")) for name in ("Parameters", "Attributes")))


def parameters(function: Callable[..., Any]) -> list[str]:
    names = list(inspect.signature(function).parameters)
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def undocumented(item: Any) -> list[str]:
    """Parameters of a function, or of a class's constructor, without a text."""
    if inspect.isfunction(item):
        return [name for name in parameters(item) if name not in documented(item)]
    known = set().union(*(documented(base) for base in item.__mro__ if base is not object))
    if dataclasses.is_dataclass(item):
        taken = [one.name for one in dataclasses.fields(item) if one.init and not one.name.startswith("_")]
        known |= {name for base in item.__mro__ if dataclasses.is_dataclass(base) for name in texts_of(base)}
    else:
        own = "__init__" in item.__dict__ and not getattr(item, "_is_protocol", False)
        taken = parameters(item.__init__) if own else []
    return [name for name in taken if name not in known]


def texts_of(owner: type) -> list[str]:
    """Fields with a text under them; a group of settings has that of its own class."""
    groups = section_texts(owner) if owner.__name__.endswith("Config") else {}
    return [name for name, text in {**groups, **field_texts(owner)}.items() if text]


def raised(item: Any) -> set[type[DyvteError]]:
    """Errors that a function, or a class's constructor, raises in its own lines."""
    function = item
    if inspect.isclass(item):
        function = item.__dict__.get("__init__") or item.__dict__.get("__post_init__")
    if not inspect.isfunction(function):
        return set()
    function = inspect.unwrap(function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # written by dataclasses
        return set()
    found, waiting = set(), [tree.body[0]]
    while waiting:
        node = waiting.pop()
        if (
            isinstance(node, ast.Raise)
            and isinstance(node.exc, ast.Call)
            and isinstance(node.exc.func, ast.Name)
        ):
            kind = function.__globals__.get(node.exc.func.id)
            if inspect.isclass(kind) and issubclass(kind, DyvteError):
                found.add(kind)
        inner = (ast.FunctionDef, ast.Lambda)
        waiting += [one for one in ast.iter_child_nodes(node) if not isinstance(one, inner)]
    return found


def unnamed_errors(item: Any) -> list[str]:
    """Errors that it raises and does not name, nor one of their bases."""
    text = sections(item.__doc__).get("Raises", "")
    names = names_in(text)
    return [kind.__name__ for kind in raised(item) if not names & {base.__name__ for base in kind.__mro__}]


def public() -> Iterator[tuple[str, Any]]:
    """All that is public, once, by where it is defined."""
    packages = [one.name for one in pkgutil.walk_packages(dyvte.__path__, "dyvte.") if one.ispkg]
    seen = set()
    for package in ["dyvte", *(name for name in packages if name not in ABSENT)]:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            item = getattr(module, name)
            own = inspect.isfunction(item) or inspect.isclass(item)
            if own and item.__module__.startswith("dyvte") and item not in seen:
                seen.add(item)
                yield f"{item.__module__}.{name}", item
                yield from methods(f"{item.__module__}.{name}", item)


def methods(name: str, item: Any) -> Iterator[tuple[str, Any]]:
    if not inspect.isclass(item):
        return
    for key, value in item.__dict__.items():
        inherited = any(key in base.__dict__ for base in item.__mro__[1:])
        function = getattr(value, "__func__", value)
        if not key.startswith("_") and not inherited and inspect.isfunction(function):
            yield f"{name}.{key}", function


PUBLIC = dict(public())


def test_what_is_public_is_found():
    """Not a rule that holds because nothing is looked at."""
    assert len(PUBLIC) > 250
    assert {"dyvte.runtime.visual_exit.VisualExit.fixed", "dyvte.teacher.exits.trace_exits"} <= PUBLIC.keys()


def test_every_parameter_has_a_text():
    missing = {name: names for name, item in PUBLIC.items() if (names := undocumented(item))}
    assert not missing, "\n".join(f"{name}: {', '.join(names)}" for name, names in missing.items())


def test_errors_that_are_raised_are_named():
    missing = {name: kinds for name, item in PUBLIC.items() if (kinds := unnamed_errors(item))}
    assert not missing, "\n".join(f"{name}: {', '.join(kinds)}" for name, kinds in missing.items())


def spoilt(plain, second=None):
    """It has two faults.

    Parameters
    ----------
    second : int
        Of them.

    Raises
    ------
    ConfigError
        There is a second.
    """
    if second:
        raise ConfigError(second)
    raise DyvteError(plain)


def test_what_is_missing_is_seen():
    assert undocumented(spoilt) == ["plain"]
    assert unnamed_errors(spoilt) == ["DyvteError"]
