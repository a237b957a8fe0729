"""Records of question files whose getters say which file, record and field is not as it should be."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeAlias

from dyvte.data.defects import Unusable, check_text
from dyvte.errors import DataError
from dyvte.formatting import name_some

Pairs: TypeAlias = Callable[[list[tuple[str, Any]]], Any]

_REQUIRED: Any = object()
_IDS = ("question_id", "questionId", "index", "id")
_TAKES_HALVES = ContextVar("_TAKES_HALVES", default=False)


@contextmanager
def halves_taken() -> Iterator[None]:
    """Inside, records give out texts with half a character too (a lone surrogate, as text cut at a fixed
    length leaves it): for callers that name the record's question themselves, and let the others be."""
    before = _TAKES_HALVES.set(True)
    try:
        yield
    finally:
        _TAKES_HALVES.reset(before)


class Row(dict[str, Any]):
    """One record. A NaN, as tables store what is absent, is absent.

    Parameters
    ----------
    values
        Its fields.
    where
        Its file, and its place there unless ``number`` says that.
    number
        Of the row of ``where`` that it is; 0: ``where`` says all.
    """

    __slots__ = ("_number", "_where")

    def __init__(self, values: Mapping[str, Any], where: str | Path, number: int = 0) -> None:
        super().__init__(values)
        self._where, self._number = where, number

    @property
    def where(self) -> str:
        """File and place, for messages."""
        return f"{self._where}, row {self._number}" if self._number else str(self._where)

    def error(self, problem: str) -> DataError:
        """The error that names this record, by its id too where it states one."""
        known_as = self.value(*_IDS)
        named = f" (question {known_as})" if isinstance(known_as, str | int | float) else ""
        return DataError(f"{self.where}{named}: {problem}")

    def value(self, *keys: str) -> Any:
        """What stands under the first of the keys that has a value; None where none has."""
        for key in keys:
            value = self.get(key)
            if not is_absent(value):
                return value
        return None

    def need(self, *keys: str) -> Any:
        """As :meth:`value`; raises DataError where none of the keys has a value."""
        value = self.value(*keys)
        if value is None:
            raise self.error(f"no {' or '.join(map(repr, keys))}")
        return value

    def text(self, *keys: str, default: Any = _REQUIRED) -> Any:
        """A text; numbers are texts too where a table or a careless writer stored them so.

        Raises
        ------
        DataError
            Absent without a ``default``, neither text nor number, or (outside `halves_taken`) a text with
            half a character (a lone surrogate, which no file and no tokenizer takes).
        """
        value = self.need(*keys) if default is _REQUIRED else self.value(*keys)
        return default if value is None else self._as_text(value, keys)

    def identity(self, *keys: str, default: Any = _REQUIRED) -> str:
        """An id as text: 7, 7.0 and "7" are "7", and "007" stays."""
        value = self.value(*keys)
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        return str(self.text(*keys, default=default))

    def integer(self, *keys: str) -> int:
        """A whole number, also where it is stored as text."""
        value = self.need(*keys)
        try:
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                raise ValueError
            return int(value)
        except (TypeError, ValueError, OverflowError):
            raise self.error(f"{_named(keys)} is {shown(value)}, expected a whole number") from None

    def texts(self, *keys: str) -> list[str | None]:
        """A list of texts, or the Python text of one (MMMU and VLMEvalKit store lists as text); blank items
        are None."""
        value = self.need(*keys)
        if isinstance(value, str):
            try:
                value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                raise self.error(f"{_named(keys)} is {shown(value)}, expected a list") from None
        if not isinstance(value, list | tuple):
            raise self.error(f"{_named(keys)} is {shown(value)}, expected a list")
        return [None if is_blank(item) else self._as_text(item, keys) for item in value]

    def several(self, *keys: str) -> list[str | None]:
        """As :meth:`texts`, but a text that is no list is taken for the only one."""
        value = self.need(*keys)
        return [self._as_text(value, keys)] if _is_one(value) else self.texts(*keys)

    def rows(self, key: str) -> list[Row]:
        """A list of records within this one."""
        return rows_of(self.need(key), f"{self.where}, {key!r}")

    def child(self, key: str) -> Row:
        """A record within this one, empty where it is absent."""
        value = self.value(key)
        if value is None:
            return Row({}, f"{self.where}, {key!r}")
        if not isinstance(value, dict):
            raise self.error(f"{key!r} is {shown(value)}, expected an object")
        return Row(value, f"{self.where}, {key!r}")

    def _as_text(self, value: Any, keys: Sequence[str]) -> str:
        if isinstance(value, str):
            if _TAKES_HALVES.get():
                return value
            try:
                check_text(value, _named(keys))
            except Unusable as problem:
                raise self.error(f"{problem.field}: {problem}") from problem
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise self.error(f"{_named(keys)} is {shown(value)}, expected text")


def _is_one(value: Any) -> bool:
    """A text, and not that of a list."""
    if not isinstance(value, str):
        return isinstance(value, int | float)
    try:
        return not isinstance(ast.literal_eval(value.strip()), list)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return True


def is_absent(value: Any) -> bool:
    """None, or the NaN that tables store for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: Any) -> bool:
    """Absent, or a text without anything to see."""
    return is_absent(value) or (isinstance(value, str) and not value.strip())


def shown(value: Any) -> str:
    """A value in a message, not too long."""
    if value is None:
        return "null"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _named(keys: Sequence[str]) -> str:
    return " or ".join(map(repr, keys))


def rows_of(content: Any, where: str | Path) -> list[Row]:
    """The records of a list.

    Parameters
    ----------
    content
        Parsed JSON.
    where
        File, for messages.

    Raises
    ------
    DataError
        No list, or an item that is no object.
    """
    if not isinstance(content, list | tuple):
        raise DataError(f"{where}: expected a list of objects, found {shown(content)}")
    rows = []
    for number, item in enumerate(content, start=1):
        if not isinstance(item, dict):
            raise DataError(f"{where}, row {number}: expected an object, found {shown(item)}")
        rows.append(Row(item, where, number))
    return rows


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte order mark, line ends as they are.

    Raises
    ------
    DataError
        Unreadable, or other bytes.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: Path, unique_keys: bool = False) -> Any:
    """Parse a JSON file.

    Parameters
    ----------
    path
        The file.
    unique_keys
        Refuse an object that states a key twice.

    Raises
    ------
    DataError
        Unreadable, not JSON, or (with ``unique_keys``) an object that states a key twice.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            twice = [key for key, _ in items if key in seen or seen.add(key)]
            raise DataError(f"{path}: {len(twice)} duplicate question ids: {name_some(twice)}")
        return result

    return _parsed(read_text(path), str(path), pairs if unique_keys else None)


def read_rows(path: Path, key: str | None = None, compact: Pairs | None = None) -> list[Row]:
    """The records of a JSON list.

    Parameters
    ----------
    path
        The file.
    key
        What the list stands under; None: it is the whole file.
    compact
        Makes an object of each list of its fields, while the file is read: for files that would be too large
        as they stand.
    """
    content = _parsed(read_text(path), str(path), compact)
    if key is None:
        return rows_of(content, path)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise DataError(f'{path}: expected {{"{key}": [...]}}, found {shown(content)}')
    return rows_of(content[key], path)


def read_entries(path: Path) -> dict[str, Row]:
    """The records of a JSON object, by key; a key must not be stated twice.

    Raises
    ------
    DataError
        No object, an empty one, or values that are no objects.
    """
    content = read_json(path, unique_keys=True)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} is not a dictionary of questions: found {shown(content)}")
    for key, value in content.items():
        if not isinstance(value, dict):
            raise DataError(f"{path}, question {shown(key)}: expected an object, found {shown(value)}")
    return {key: Row(value, f"{path}, question {key}") for key, value in content.items()}


def read_jsonl(path: Path) -> list[Row]:
    """The records of a JSON-lines file; lines end at ``\\n`` only (answers may hold U+2028 and its like).

    Raises
    ------
    DataError
        Unreadable, or a line that is no JSON object.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        content = _parsed(line, where)
        if not isinstance(content, dict):
            raise DataError(f"{where}: expected an object, found {shown(content)}")
        rows.append(Row(content, where))
    return rows


def _parsed(text: str, where: str, pairs: Pairs | None = None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error
