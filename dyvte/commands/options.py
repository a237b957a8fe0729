"""Options that are the settings of a configuration class; and from options to a configuration."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from dyvte.commands.parser import Several
from dyvte.config import load_config
from dyvte.fields import Setting, section_texts, settings_of

Config = TypeVar("Config")
Names = Mapping[str, tuple[str, ...]]
"""Key of a setting to the options that set it, the first of which is shown first."""

_YES, _NO, _NULL = ("true", "1", "yes"), ("false", "0", "no"), "null"


def add_settings(
    parser: argparse.ArgumentParser,
    cls: type,
    names: Names | None = None,
    *,
    omit: Collection[str] = (),
) -> None:
    """``--config``, ``--set``, and an option for every setting of a configuration class.

    The option of a setting at the top, or of one that may stand beside its group, is its own name; others
    are ``--group.name``. Every setting also has its dotted key as an option, and those of ``names``.

    Parameters
    ----------
    parser
        Positional arguments must have been added: with them, a list takes one value per option.
    cls
        The configuration class.
    names
        Further options, or shorter ones, by the setting's key.
    omit
        Settings, or whole groups of them, that the command sets itself.
    """
    parser.add_argument(
        "--config",
        type=Path,
        help="YAML file with any of the settings below, or the name of one that comes with dyvte (such as "
        "embedded); paths in it are relative to it",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting by its key"
    )
    texts = section_texts(cls)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for one in settings_of(cls):
        if one.key in omit or one.section in omit:
            continue
        if one.section not in groups:
            title = one.section or "settings"
            text = texts.get(one.section)
            groups[one.section] = parser.add_argument_group(title, _unmarked(text) if text else None)
        _add(parser, groups[one.section], one, (names or {}).get(one.key, ()))


def config_from(
    cls: type[Config],
    args: argparse.Namespace,
    *,
    before: Iterable[str] = (),
    after: Iterable[str] = (),
    within: type | None = None,
) -> Config:
    """A configuration from ``--config``, then ``before``, options that were given, ``after``, ``--set``.

    The file may be that of the larger configuration ``within`` (see :func:`dyvte.config.load_config`).

    Parameters
    ----------
    cls
        The configuration's class.
    args
        Parsed options.
    before
        Overrides that options take precedence over.
    after
        Overrides that take precedence over options.
    within
        A larger configuration whose files are read too.
    """
    given = [
        f"{one.key}={json.dumps(vars(args)[one.key], ensure_ascii=False)}"
        for one in settings_of(cls)
        if vars(args).get(one.key, MISSING) is not MISSING
    ]
    return load_config(cls, args.config, [*before, *given, *after, *args.set], within=within)


def _add(
    parser: argparse.ArgumentParser,
    group: argparse._ArgumentGroup,
    one: Setting,
    names: tuple[str, ...],
) -> None:
    if (
        f"--{one.key}" in parser._option_string_actions
    ):  # two choices of a registry have a setting of that name
        action = parser._option_string_actions[f"--{one.key}"]
        action.help = f"{action.help} -- {_help(one)}"
        return
    shown = _options(one, names)
    group.add_argument(
        *shown, dest=one.key, default=argparse.SUPPRESS, help=_help(one), **_arguments(parser, one)
    )
    dotted = f"--{one.key.replace('_', '-')}"
    if dotted not in shown:
        parser.add_argument(
            dotted,
            dest=one.key,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
            **_arguments(parser, one),
        )


def _options(one: Setting, names: tuple[str, ...]) -> list[str]:
    own = one.alone or (one.name if one.is_open or not one.section else "")
    given = [*names, *([own] if own else [])] or [one.key]
    return list(dict.fromkeys(f"--{name.replace('_', '-')}" for name in given))


def _arguments(parser: argparse.ArgumentParser, one: Setting) -> dict[str, Any]:
    """How argparse takes the values of a setting."""
    has_positionals = any(not action.option_strings for action in parser._actions)
    if one.kind is bool and not one.is_list:
        if has_positionals:
            return {"action": "store_const", "const": True}
        return {"nargs": "?", "const": True, "type": _converter(one), "metavar": "{true,false}"}
    taken: dict[str, Any] = {"type": _converter(one), "metavar": _metavar(one)}
    if one.is_list:
        taken |= {"action": Several, "nargs": None if has_positionals else "+"}
        taken["type"] = _several(one)
        if not has_positionals and one.choices:
            taken["metavar"] = (_metavar(one), "NAME")
    return taken


def _several(one: Setting) -> Callable[[str], list[Any]]:
    """Words and numbers may be joined by commas; of words that can be listed, ``all`` and ``none`` serve."""
    convert = _converter(one)

    def split(text: str) -> list[Any]:
        if one.choices and text in ("all", "none") and text not in one.choices:
            return list(one.choices) if text == "all" else []
        if one.choices or one.kind in (int, float):
            return [convert(part) for part in text.split(",") if part]
        return [convert(text)]

    return split


def _metavar(one: Setting) -> str:
    if one.choices:
        return "{" + ",".join(one.choices) + "}"
    return {int: "INT", float: "FLOAT", Path: "PATH"}.get(one.kind, "TEXT")


def _converter(one: Setting) -> Callable[[str], Any]:
    """Text to a value of the setting's type; what is none is left for the configuration to refuse."""

    def convert(text: str) -> Any:
        if text == _NULL and one.is_optional and not one.is_list:
            return None
        if one.kind in (int, float):
            with contextlib.suppress(ValueError):
                return one.kind(text)
        if one.kind is bool and text.lower() in (*_YES, *_NO):
            return text.lower() in _YES
        return text

    return convert


def _help(one: Setting) -> str:
    """The field's text, its forms, its default, and its key where that is not the option."""
    parts = [_unmarked(one.text)]
    if one.forms is not None:
        parts.append(f"Forms: {' | '.join(one.forms.usages())}.")
    if one.default is MISSING:
        parts.append("(required)")
    elif one.default not in (None, (), "") and not (one.kind is bool and one.default is False):
        parts.append(f"(default: {_shown(one.default)})")
    if one.section:
        parts.append(f"[{one.key}]")
    return " ".join(part for part in parts if part).replace("%", "%%")


def _unmarked(text: str) -> str:
    """The text without the markup of docstrings."""
    text = re.sub(r":\w+:`~(?:\w+\.)*(\w+)`", r"\1", text)
    return re.sub(r":\w+:`([^`]*)`", r"\1", text).replace("``", "").replace("`", "")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
