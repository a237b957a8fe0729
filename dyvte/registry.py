"""Names for what people choose from: policies, reductions, objectives, gate architectures, benchmarks.

Every such room works the same way. It has one :class:`Registry`; each choice is a class in a file of its own
with a ``name``, registered by the decorator above it; nothing else lists it. Command line, configuration,
``--help`` and the tests of the documents read the registry.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from dyvte.errors import ConfigError


class Named(Protocol):
    """What a registry holds: a class with a ``name``, and a ``usage`` where the name takes arguments."""

    name: str
    __name__: str


Item = TypeVar("Item", bound="type[Named]")


class Registry(Generic[Item]):
    """The choices of one room, by name. The room's modules are imported when it is first read.

    Parameters
    ----------
    kind : str
        What one of them is called in messages: "policy".
    package : str
        The package whose modules hold them, such as ``dyvte.policies``.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._items: dict[str, Item] = {}
        self._is_complete = False

    def register(self, item: Item) -> Item:
        """Decorator of a class: register it under its ``name``.

        Raises
        ------
        ValueError
            If the class has no name, or another one has it.
        """
        if not item.__module__.startswith(f"{self.package}."):
            self.names()  # the room's own come first
        taken = self._items.get(item.name)
        if not item.name or (taken is not None and taken.__qualname__ != item.__qualname__):
            raise ValueError(f"{item.__qualname__}: {self.kind} {item.name!r} is no name, or is taken")
        self._items[item.name] = item
        return item

    def names(self) -> tuple[str, ...]:
        """All names, in the order of the alphabet."""
        if not self._is_complete:
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            self._is_complete = True
        return tuple(sorted(self._items))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def get(self, name: str, *, given: str | None = None) -> Item:
        """The class called ``name``.

        Parameters
        ----------
        name : str
        given : str, optional
            What the user wrote, where that is more than the name.

        Raises
        ------
        ConfigError
            Unknown; the nearest name and all of them are listed.
        """
        if name not in self:
            raise ConfigError(unknown(self.kind, name, self.names(), given=given, shown=self.usages()))
        return self._items[name]

    def parse(self, text: str) -> object:
        """An object from its command line form ``NAME:ARGUMENT``: the class's ``parse`` of the argument.

        Raises
        ------
        ConfigError
            Unknown name, or malformed argument.
        """
        name, _, argument = text.partition(":")
        return self.get(name, given=text).parse(argument)  # type: ignore[attr-defined]

    def usages(self) -> tuple[str, ...]:
        """The whole command line form of each, such as ``fixed:K``; the name where there is no more to it."""
        return tuple(getattr(self._items[name], "usage", "") or name for name in self.names())


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name that ``name`` was probably meant to be; case, ``-`` and ``_`` do not count.

    Parameters
    ----------
    name : str
    known : iterable of str
    cutoff : float
        How alike they must be, in [0, 1], as `difflib` counts: higher where other names may be right too.
    """

    def plain(text: str) -> str:
        return text.lower().replace("-", "").replace("_", "")

    by_plain = {plain(one): one for one in known}
    found = difflib.get_close_matches(plain(str(name)), by_plain, n=1, cutoff=cutoff)
    return by_plain[found[0]] if found else None


def unknown(
    kind: str, name: str, known: Iterable[str], *, given: str | None = None, shown: Iterable[str] = ()
) -> str:
    """The message for a name that is none: what was given, the nearest name, and all of them.

    Parameters
    ----------
    kind : str
        What was expected: "policy".
    name : str
    known : iterable of str
    given : str, optional
        What the user wrote, where that is more than the name.
    shown : iterable of str
        What is listed; default: the known names.
    """
    known = tuple(known)
    near = nearest(name, known)
    hint = f" (did you mean {near!r}?)" if near else ""
    return f"unknown {kind} {(given or name)!r}{hint}; known: {', '.join(tuple(shown) or known)}"
