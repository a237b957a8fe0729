"""What a configuration class says of its settings: type, default, choices, and the text under each field.

The text is the string literal that follows a field in the class's source; no other place repeats it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from dataclasses import MISSING, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from dyvte.groups import open_groups
from dyvte.registry import Registry


@dataclass(frozen=True)
class Setting:
    """One setting of a configuration class.

    Attributes
    ----------
    key
        Its dotted name, as in a file: ``teacher.batch_size``.
    kind
        ``int``, ``float``, ``bool``, ``str`` or ``Path``: of a value, or of each of several.
    text
        What the field says of itself.
    default
        `dataclasses.MISSING` where a value is required.
    is_optional
        May it be null?
    is_list
        Does it take several values?
    choices
        All values, where they can be listed.
    forms
        The registry whose command line forms (``fixed:K``) it takes.
    section
        The group of settings that it lies in; empty at the top.
    is_open
        May it stand beside its group (:func:`dyvte.groups.open_group`)?
    alone
        The group's own name, where a plain value of the group is this setting.
    """

    key: str
    kind: type
    text: str
    default: Any
    is_optional: bool = False
    is_list: bool = False
    choices: tuple[str, ...] = ()
    forms: Registry[Any] | None = None
    section: str = ""
    is_open: bool = False
    alone: str | None = None

    @property
    def name(self) -> str:
        """The last part of its key."""
        return self.key.rpartition(".")[2]


def settings_of(cls: type) -> list[Setting]:
    """All settings of a configuration class, those of its groups included, in the order of the fields.

    A group that is chosen by ``name`` from a registry has the settings of all its choices.
    """
    found: list[Setting] = []
    inside = {name: (alone, names) for name, alone, names in open_groups(cls)}
    hints, texts = typing.get_type_hints(cls), field_texts(cls)
    for field in dataclasses.fields(cls):
        registry = field.metadata.get("registry")
        if registry is not None:
            found.extend(_choices(field, registry))
        elif dataclasses.is_dataclass(hints[field.name]):
            alone, names = inside.get(field.name, (None, ()))
            for one in settings_of(hints[field.name]):
                found.append(
                    dataclasses.replace(
                        one,
                        key=f"{field.name}.{one.key}",
                        section=one.section or field.name,
                        is_open=one.key in names,
                        alone=field.name if one.key == alone else None,
                    )
                )
        else:
            found.append(_setting(field, hints[field.name], texts.get(field.name, "")))
    return found


def section_texts(cls: type) -> dict[str, str]:
    """Name of each group of settings to what it is: the field's text, or the first line of its class's."""
    hints, texts = typing.get_type_hints(cls), field_texts(cls)
    return {
        field.name: texts.get(field.name) or (inspect.getdoc(hints[field.name]) or "").split("\n")[0]
        for field in dataclasses.fields(cls)
        if "registry" in field.metadata or dataclasses.is_dataclass(hints[field.name])
    }


@lru_cache
def field_texts(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass, inherited fields included; one line each."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = tree.body  # type: ignore[attr-defined]
        for field, below in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[field.target.id] = " ".join(below.value.value.split())
    return found


def _choices(field: dataclasses.Field[Any], registry: Registry[Any]) -> list[Setting]:
    """``name``, and the settings of every choice: "expected_risk: ..."."""
    default = field.default_factory().name  # type: ignore[misc]
    text = f"{registry.kind[0].upper()}{registry.kind[1:]}."
    made = [Setting(f"{field.name}.name", str, text, default, choices=registry.names(), section=field.name)]
    for choice in registry:
        for one in settings_of(registry.get(choice)):
            if one.key == "name":
                continue
            key = f"{field.name}.{one.key}"
            made.append(dataclasses.replace(one, key=key, text=f"{choice}: {one.text}", section=field.name))
    return made


def _setting(field: dataclasses.Field[Any], hint: Any, text: str) -> Setting:
    default = field.default
    if default is MISSING and field.default_factory is not MISSING:
        default = field.default_factory()
    hint, is_optional = _without_none(hint)
    is_list = get_origin(hint) is tuple
    kind = get_args(hint)[0] if is_list else hint
    listed = field.metadata.get("choices")
    choices = tuple(listed) if listed is not None else ()
    if get_origin(kind) is Literal:
        choices = tuple(map(str, get_args(kind)))
        kind = type(get_args(kind)[0])
    if kind not in (int, float, bool, str, Path):
        kind = str
    return Setting(
        key=field.name,
        kind=kind,
        text=text,
        default=default,
        is_optional=is_optional,
        is_list=is_list,
        choices=choices,
        forms=field.metadata.get("forms"),
    )


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The hint without ``| None``, and whether it was there."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    others = [one for one in get_args(hint) if one is not type(None)]
    return (others[0] if len(others) == 1 else str), len(others) < len(get_args(hint))
