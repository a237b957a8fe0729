"""The configuration files that come with dyvte: ``configs/`` of a checkout, and within a wheel.

A command takes them by name: ``--config embedded``. Relative paths in a file that was given as a path are
relative to its folder. One that was given by its name may lie among installed packages, where nobody has
data and nothing may be written: its paths are relative to a ``configs`` folder in the current one, as they
are in a checkout; files that come with it (DeepSpeed's) are found all the same.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dyvte.errors import ConfigError
from dyvte.registry import nearest

FOLDER = (Path(__file__).parent / "configs").resolve()


@dataclass(frozen=True)
class SettingsFile:
    """A configuration file, and what its relative paths are relative to."""

    path: Path
    base: Path

    def absolute(self, value: str) -> str:
        """A path that the file names."""
        inside = self.path.parent / value
        if self.base != self.path.parent and ".." not in Path(value).parts and inside.exists():
            return str(inside)
        return os.path.normpath(self.base / value)


def shipped_configs() -> tuple[str, ...]:
    """Names of the files that come with dyvte."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def find_settings(given: str | Path) -> SettingsFile:
    """The file at a path, or else the one of that name that comes with dyvte.

    Raises
    ------
    ConfigError
        Neither; the nearest name and all of them are listed.
    """
    path, name = Path(given), str(given)
    if path.is_file() or path.name != name or path.suffix:
        return SettingsFile(path.absolute(), path.absolute().parent)
    if name in shipped_configs():
        return SettingsFile(FOLDER / f"{name}.yaml", Path.cwd() / "configs")
    near = nearest(name, shipped_configs())
    hint = f" (did you mean {near!r}?)" if near else ""
    raise ConfigError(
        f"{name}: there is no such configuration file{hint}; those that come with dyvte: "
        f"{', '.join(shipped_configs())}"
    )
