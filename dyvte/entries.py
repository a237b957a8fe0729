"""Typed records out of what a JSON file holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

from dyvte.errors import DataError

Record = TypeVar("Record")


def entries(values: Any, names: Sequence[str], where: str, advice: str) -> dict[str, Any]:
    """The entries of those names; further ones, of a later version, are passed over.

    Parameters
    ----------
    values
        What the file holds there.
    names
        Of the entries that must be there.
    where
        File, and place in it, for the message.
    advice
        What their absence means and what to do, for the message.

    Raises
    ------
    DataError
        If it is no object, or entries are absent; they are named.
    """
    missing = [name for name in names if not isinstance(values, Mapping) or name not in values]
    if missing:
        raise DataError(f"{where}: no {', '.join(map(repr, missing))}: {advice}")
    return {name: values[name] for name in names}


def record_of(cls: type[Record], values: Any, where: str, advice: str) -> Record:
    """A dataclass from the entries of its fields' names. Lists become tuples, of records where the field says
    so. Parameters and errors are those of `entries`."""
    found = entries(values, [field.name for field in dataclasses.fields(cls)], where, advice)  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for name, value in found.items():
        if isinstance(value, list):
            kind = next(iter(get_args(hints[name])), None)
            if dataclasses.is_dataclass(kind):
                value = [record_of(kind, one, f"{where}, {name}", advice) for one in value]
            found[name] = tuple(value)
    return cls(**found)
