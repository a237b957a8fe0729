"""The parser of all commands: ``-`` and ``_`` mean the same, and help shows types, choices and defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dyvte.registry import nearest

_TYPES = {int: "INT", float: "FLOAT", Path: "PATH"}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions and examples as they are written; the type in place of a value, and the default."""

    def __init__(self, prog: str, width: int | None = None) -> None:
        super().__init__(prog, max_help_position=30, width=width)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _TYPES.get(action.type, "TEXT")  # type: ignore[arg-type]

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text is None or text is argparse.SUPPRESS or not action.option_strings:
            return text
        if action.default in (None, argparse.SUPPRESS, []) or action.nargs == 0 or "default" in text:
            return text
        return f"{text} (default: %(default)s)"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """``--one, --other TYPE``: the type once."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` without abbreviations.

    An option that is unknown is answered with the nearest one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse; exit with code 2 and the nearest known option where one is not known."""
        parsed, extra = self.parse_known_args(args, namespace)
        if extra:
            getattr(parsed, "parser", self).refuse(extra)
        return parsed

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does, once each option is spelled as it was declared."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(self._spelled(words)), namespace)

    def refuse(self, extra: Sequence[str]) -> NoReturn:
        """Exit: there are words that are no option."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        words = []
        for option in [word.partition("=")[0] for word in extra if word.startswith("--")]:
            near = nearest(option, known)
            words.append(f"{option} (did you mean {near}?)" if near else option)
        self.error(f"unknown {'option' if words else 'word'} {', '.join(words or extra)}; see --help")

    def _spelled(self, words: Sequence[str]) -> Iterator[str]:
        """Options as they were declared; one that takes several is repeated before each number after it."""
        declared = {_plain(option): option for option in self._option_string_actions}
        repeated, waits = "", False
        for position, word in enumerate(words):
            if word == "--":
                yield from words[position:]
                return
            option, equals, value = word.partition("=")
            if word.startswith("--"):
                option = declared.get(_plain(option), option)
                several = isinstance(self._option_string_actions.get(option), Several)
                repeated, waits = (option, not equals) if several else ("", False)
            elif repeated and not waits and _is_number(word):
                yield repeated
            elif repeated and not waits:
                repeated = ""
            else:
                waits = False
            yield f"{option}{equals}{value}"


class Several(argparse.Action):
    """Values of one option, given several times or one after the other, as one list."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        """Add what ``type`` made of one word: a list."""
        given = values if self.nargs == "+" else [values]
        found = [*getattr(namespace, self.dest, ()), *(item for items in given for item in items)]
        setattr(namespace, self.dest, found)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _plain(option: str) -> str:
    return "--" + option[2:].replace("_", "-")
