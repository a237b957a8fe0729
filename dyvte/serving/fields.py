"""Fields of a JSON object, read one by one; every complaint names the field by its path."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from dyvte.registry import nearest
from dyvte.serving.errors import RequestError

_NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}
_NAMES |= {float: "a number", type(None): "null"}


class Fields:
    """One object of a request. A field that is null counts as omitted.

    Parameters
    ----------
    values
        What was parsed from JSON.
    path
        Where it stands, such as ``messages[0]``; "" for the request itself.

    Raises
    ------
    RequestError
        If it is no object.
    """

    def __init__(self, values: Any, path: str = "") -> None:
        if not isinstance(values, dict):
            raise RequestError(
                f"{path or 'the request'}: expected {_NAMES[dict]}, found {kind(values)}", param=path
            )
        self.values, self.path = values, path

    def at(self, name: str) -> str:
        """The path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def error(self, name: str, text: str, **how: Any) -> RequestError:
        """A complaint about a field."""
        return RequestError(f"{self.at(name)}: {text}", param=self.at(name), **how)

    def check_known(self, known: Collection[str]) -> None:
        """Refuse fields of another name.

        Raises
        ------
        RequestError
            Status 422, with the nearest known name.
        """
        for name in self.values:
            if name not in known:
                near = nearest(name, known)
                hint = f"did you mean {near!r}?" if near else f"known are {', '.join(sorted(known))}"
                shown = name if len(name) <= 60 else f"{name[:60]}..."
                raise self.error(shown, f"unknown field; {hint}", status=422, code="unknown_field")

    def text(self, name: str) -> str | None:
        """A text, of which UTF-8 can be made; None if omitted."""
        value = self._typed(name, str)
        if value is not None:
            check_text(value, self.at(name))
        return value

    def flag(self, name: str) -> bool:
        """True or false; false if omitted."""
        return bool(self._typed(name, bool))

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number in low..high; None if omitted."""
        value = self._typed(name, int)
        if value is not None and not low <= value <= high:
            raise self.error(name, f"{_short(value)}: expected {low}..{high}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number in low..high; None if omitted."""
        value = self.values.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**53 else math.inf
        if value is None:
            return None
        if not isinstance(value, float):
            raise self.error(name, f"expected a number, found {kind(value)}")
        if not low <= value <= high:
            raise self.error(name, f"{value:g}: expected {low:g}..{high:g}")
        return value

    def items(self, name: str) -> list[Any] | None:
        """A list; None if omitted."""
        return self._typed(name, list)

    def _typed(self, name: str, wanted: type) -> Any:
        value = self.values.get(name)
        if value is None or type(value) is wanted:
            return value
        raise self.error(name, f"expected {_NAMES[wanted]}, found {kind(value)}")


def check_text(text: str, path: str) -> None:
    """Raise RequestError where a text holds half a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{path}: character {error.start} is half of a surrogate pair: no valid text", param=path
        ) from error


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    return _NAMES.get(type(value), type(value).__name__)


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**20 else "a number of more than 20 digits"
