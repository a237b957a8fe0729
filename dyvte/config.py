"""Strict configuration: YAML and command-line overrides into frozen dataclasses.

A configuration class is an ordinary ``@dataclass(frozen=True, kw_only=True)``, possibly holding others. A
field with ``metadata={"choices": known}`` takes names of a :class:`~dyvte.registry.Registry` or of a tuple;
one with ``metadata={"registry": registry}`` holds one of its dataclasses, which the key ``name`` chooses.
Unknown keys, wrong types and values that the class itself refuses (``ValueError`` in ``__post_init__``) all
end as one :class:`~dyvte.errors.ConfigError` that names the key by its dotted path.

Groups of settings may be open, see :mod:`dyvte.groups`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from dyvte.errors import ConfigError
from dyvte.files import write_atomically
from dyvte.groups import full_key, grouped, setting_names
from dyvte.registry import Registry, nearest, unknown
from dyvte.shipped import SettingsFile, find_settings

Config = TypeVar("Config")


def load_config(
    cls: type[Config],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    within: type | None = None,
) -> Config:
    """Build ``cls`` from a YAML file and overrides; what neither names keeps the class's default.

    Parameters
    ----------
    cls:
        A frozen keyword-only dataclass.
    path:
        A YAML file holding one mapping, or the name of one that comes with dyvte (:mod:`dyvte.shipped`), or
        None for defaults alone. Relative paths in it are relative to the
        file's own folder: fields of type ``Path``, and texts of fields with ``metadata={"path": True}`` that
        start with ``./`` or ``../`` (others may be hub ids), or that do so behind ``NAME=``.
    overrides:
        ``"a.b=value"`` strings, applied in order after the file. The value is read as YAML, so ``3``,
        ``true``, ``null`` and ``[1, 2]`` mean what they mean in the file.
    within:
        A larger configuration whose files are read too: settings of it that ``cls`` does not have are passed
        over.

    Raises
    ------
    ConfigError
        Naming the file or override, the dotted key, and (for an unknown key) the nearest known one.
    """
    values: dict[str, Any] = {}
    if path is not None:
        file = find_settings(path)
        values = _make_way(cls, _anchor(cls, _read_yaml(file.path), file, str(path)), overrides)
    origin = "defaults" if path is None else str(path)
    for override in overrides:
        _apply_override(cls, values, override)
        origin = f"{path or 'defaults'} with overrides"
    if within is not None:
        passed_over = {*setting_names(within)} - {*setting_names(cls)}
        values = {key: value for key, value in values.items() if key not in passed_over}
    return from_dict(cls, values, origin=origin)


def from_dict(cls: type[Config], values: Mapping[str, Any], *, origin: str = "a mapping") -> Config:
    """Build ``cls`` from nested plain values, strictly (see :func:`load_config`).

    Parameters
    ----------
    cls
        A frozen keyword-only dataclass.
    values
        Settings by name; groups as mappings.
    origin
        Where they come from, for messages.
    """
    return _build(cls, values, prefix="", origin=origin)


def to_dict(cfg: Any) -> dict[str, Any]:
    """Plain nested values of a configuration, ready for YAML or JSON; paths are made absolute."""
    return {field.name: _plain(getattr(cfg, field.name)) for field in dataclasses.fields(cfg)}


def dump_config(cfg: Any, path: str | Path) -> None:
    """Write the resolved configuration as YAML, atomically; :func:`load_config` reads it back equal.

    Parameters
    ----------
    cfg
        The configuration.
    path
        Of the YAML file.
    """
    write_atomically(path, yaml.safe_dump(to_dict(cfg), sort_keys=False, allow_unicode=True))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such configuration file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(values).__name__}")
    return values


def _anchor(cls: Any, values: Any, file: SettingsFile, origin: str) -> Any:
    """The values with relative paths made absolute."""
    if not dataclasses.is_dataclass(cls) or not isinstance(values, dict):
        return values
    values = grouped(cls, values, origin)
    hints = typing.get_type_hints(cls)
    marked = {field.name for field in dataclasses.fields(cls) if field.metadata.get("path")}
    anchored = dict(values)
    for name, value in values.items():
        hint = hints.get(name)
        if dataclasses.is_dataclass(hint):
            anchored[name] = _anchor(hint, value, file, origin)
        elif isinstance(value, str) and (hint is Path or Path in get_args(hint)):
            anchored[name] = file.absolute(value)
        elif name in marked:
            several = isinstance(value, list)
            texts = [_anchored_text(one, file) for one in (value if several else [value])]
            anchored[name] = texts if several else texts[0]
    return anchored


def _anchored_text(text: Any, file: SettingsFile) -> Any:
    """A path that starts with ``./`` or ``../``, alone or behind ``NAME=``, made absolute; else as it is."""
    if not isinstance(text, str):
        return text
    label, equals, path = text.rpartition("=")
    return f"{label}{equals}{file.absolute(path)}" if path.startswith(("./", "../")) else text


def _make_way(cls: Any, values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A file's values without those that belong to a choice which an override replaces.

    What a file says of one objective says nothing of another: naming another one is no contradiction. What
    the overrides themselves say stays to be refused, and so does a key that no choice has.
    """
    named = {key.strip(): text.strip().strip("'\"") for key, _, text in (o.partition("=") for o in overrides)}
    for field in dataclasses.fields(cls):
        registry, given = field.metadata.get("registry"), values.get(field.name)
        name = named.get(f"{field.name}.name")
        if registry is None or not isinstance(given, Mapping) or name not in list(registry):
            continue
        known = {other: {one.name for one in dataclasses.fields(registry.get(other))} for other in registry}
        foreign = set().union(*known.values()) - known[name]
        values = {**values, field.name: {key: one for key, one in given.items() if key not in foreign}}
    return values


def _apply_override(cls: Any, values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: expected key=value, for example training.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    node = values
    *parents, last = full_key(cls, key.strip(), value).split(".")
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a group of settings")
        node = child
    node[last] = value


def _build(cls: type[Config], values: Any, *, prefix: str, origin: str) -> Config:
    if not isinstance(values, Mapping):
        found = type(values).__name__
        raise ConfigError(
            f"{origin}: {prefix or 'the top level'}: expected a group of settings, found {found}"
        )
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = grouped(cls, values, origin)
    for key in values:
        if key not in fields:
            near = _nearest(str(key), setting_names(cls), prefix)
            raise ConfigError(f"{origin}: unknown key {_dotted(prefix, key)!r}{near}")
    arguments = {
        name: _convert_field(field, hints[name], values[name], key=_dotted(prefix, name), origin=origin)
        for name, field in fields.items()
        if name in values
    }
    missing = [
        _dotted(prefix, name)
        for name, field in fields.items()
        if name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{origin}: no value for {', '.join(missing)}, which has no default")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{origin}: {prefix + ': ' if prefix else ''}{error}") from error


def _dotted(prefix: str, key: Any) -> str:
    return f"{prefix}.{key}" if prefix else str(key)


def _nearest(key: str, fields: Sequence[str], prefix: str) -> str:
    near = nearest(key, fields)
    if near:
        return f"; did you mean {_dotted(prefix, near)!r}?"
    return f"; known keys here: {', '.join(fields)}"


def _convert_field(field: dataclasses.Field, hint: Any, value: Any, *, key: str, origin: str) -> Any:
    """The value as the field's type, looked up in the field's registry if it has one."""
    registry = field.metadata.get("registry")
    if registry is not None:
        return _build_choice(registry, field.default_factory().name, value, prefix=key, origin=origin)
    converted = _convert(hint, value, key=key, origin=origin)
    if "choices" in field.metadata:
        for name in converted if isinstance(converted, tuple) else (converted,):
            _check_choice(field.metadata["choices"], name, key=key, origin=origin)
    return converted


def _check_choice(choices: Registry[Any] | Sequence[str], name: Any, *, key: str, origin: str) -> None:
    if isinstance(choices, Registry):
        _named(choices, name, key=key, origin=origin)
    elif name not in choices:
        raise ConfigError(f"{origin}: {key}: {unknown('value', name, choices)}")


def _named(registry: Registry[Any], name: Any, *, key: str, origin: str) -> Any:
    try:
        return registry.get(name)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {key}: {error}") from error


def _build_choice(registry: Registry[Any], default: str, values: Any, *, prefix: str, origin: str) -> Any:
    """One of the registry's dataclasses, from values that name it.

    Files of earlier versions hold the settings of every choice: those of others are passed over where they
    are at their defaults.
    """
    if not isinstance(values, Mapping):
        return _build(registry.get(default), {} if values is None else values, prefix=prefix, origin=origin)
    name = values.get("name", default)
    cls = _named(registry, name, key=_dotted(prefix, "name"), origin=origin)
    defaults = {
        other: {field.name: field.default for field in dataclasses.fields(registry.get(other))}
        for other in registry
    }
    own = {}
    for key, value in values.items():
        owners = [other for other, known in defaults.items() if key in known]
        if name in owners or not owners:
            own[key] = value
        elif all(value != defaults[other][key] for other in owners):
            raise ConfigError(
                f"{origin}: {_dotted(prefix, key)} belongs to the {registry.kind} {' and '.join(owners)}, "
                f"not to {name}"
            )
    return _build(cls, own, prefix=prefix, origin=origin)


def _convert(hint: Any, value: Any, *, key: str, origin: str) -> Any:
    """The value as the field's type, or a ConfigError; bool is never taken for a number."""
    origin_type, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin_type in (Union, types.UnionType):
        return _convert_union(arguments, value, key=key, origin=origin)
    if origin_type is Literal:
        if value in arguments and type(value) in {type(argument) for argument in arguments}:
            return value
        raise _mismatch(origin, key, "one of " + ", ".join(map(repr, arguments)), value)
    if dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, prefix=key, origin=origin)
    if origin_type is tuple or hint is tuple:
        if not isinstance(value, (list, tuple)):
            raise _mismatch(origin, key, "a list", value)
        items = (
            [arguments[0]] * len(value)
            if len(arguments) == 2 and arguments[1] is Ellipsis
            else list(arguments)
        )
        items = items or [Any] * len(value)
        if len(items) != len(value):
            raise _mismatch(origin, key, f"a list of {len(items)} values", value)
        return tuple(
            _convert(item, one, key=f"{key}[{index}]", origin=origin)
            for index, (item, one) in enumerate(zip(items, value, strict=True))
        )
    if origin_type is dict or hint is dict:
        if not isinstance(value, dict):
            raise _mismatch(origin, key, "a mapping", value)
        return dict(value)
    return _convert_scalar(hint, value, key=key, origin=origin)


def _convert_union(arguments: tuple[Any, ...], value: Any, *, key: str, origin: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [argument for argument in arguments if argument is not type(None)]
    errors = []
    for choice in choices:
        try:
            return _convert(choice, value, key=key, origin=origin)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _convert_scalar(hint: Any, value: Any, *, key: str, origin: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 4e-5 as a string; people write learning rates that way.
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    raise _mismatch(
        origin, key, {str: "text", Path: "a path"}.get(hint, getattr(hint, "__name__", str(hint))), value
    )


def _mismatch(origin: str, key: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{origin}: {key}: expected {expected}, found {value!r} ({type(value).__name__})")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return os.path.abspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
