"""Open groups of settings: written inside their group or flat beside it, the same either way.

A field that is a group of settings may be *open* (:func:`open_group`): then a plain value stands for one of
its settings, and the others may stand beside the group instead of inside.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from dyvte.errors import ConfigError

_ALONE = "alone"


def open_group(alone: str) -> dict[str, str]:
    """Metadata of a field that is a group of settings and may also be given flat.

    With ``model: Backbone = field(metadata=open_group("path"))`` these say the same, in a file, a mapping and
    overrides::

        model: {path: folder, dtype: float32}

        model: folder
        dtype: float32

    Parameters
    ----------
    alone
        The group's setting that a plain value stands for. Its other settings may stand beside the group,
        unless the class has a field of the same name.
    """
    return {_ALONE: alone}


def setting_names(cls: Any) -> list[str]:
    """Names that may stand at the top of a file: fields of ``cls`` and the settings of its open groups."""
    names = [field.name for field in dataclasses.fields(cls)]
    return [*names, *(key for _, _, inside in open_groups(cls) for key in inside)]


def open_groups(cls: Any) -> list[tuple[str, str, list[str]]]:
    """Name of each open group, what a plain value stands for, and the settings that may stand beside it."""
    hints, fields = typing.get_type_hints(cls), dataclasses.fields(cls)
    own = {field.name for field in fields}
    groups = []
    for field in fields:
        if _ALONE in field.metadata:
            inside = [one.name for one in dataclasses.fields(hints[field.name]) if one.name not in own]
            groups.append((field.name, field.metadata[_ALONE], inside))
    return groups


def grouped(cls: Any, values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The values with each open group's settings inside the group.

    Parameters
    ----------
    cls
        The configuration class that they are for.
    values
        As a file or a mapping gives them.
    origin
        Where they come from, for messages.

    Raises
    ------
    ConfigError
        If a setting is given inside its group and beside it.
    """
    found = dict(values)
    for name, alone, inside in open_groups(cls):
        beside = {key: found.pop(key) for key in inside if key in found}
        if not beside and name not in found:
            continue
        group = found.get(name)
        if not isinstance(group, Mapping):
            group = {} if group is None else {alone: group}
        if twice := sorted(beside.keys() & group.keys()):
            raise ConfigError(f"{origin}: {twice[0]!r} is given twice, once as '{name}.{twice[0]}'")
        found[name] = {**group, **beside}
    return found


def full_key(cls: Any, key: str, value: Any) -> str:
    """The dotted key that an override means, where it stands for a setting of an open group.

    Parameters
    ----------
    cls
        The configuration class.
    key
        As the override gives it.
    value
        Its value: a group, or what stands for one of its settings.
    """
    for name, alone, inside in open_groups(cls):
        if key == name and not isinstance(value, Mapping):
            return f"{name}.{alone}"
        if key in inside:
            return f"{name}.{key}"
    return key
