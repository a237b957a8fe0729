"""Finding question files and images below a root, whatever the format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dyvte.data.images import image_path
from dyvte.data.samples import Unusable
from dyvte.errors import DataError
from dyvte.tasks.readers.tables import Row, read_table


def find_file(root: Path, *patterns: str) -> Path | None:
    """The first file below ``root`` that a pattern matches; ``root`` may be that file itself."""
    if root.is_file():
        return root if any(fnmatch(root.name, pattern.rsplit("/", 1)[-1]) for pattern in patterns) else None
    for pattern in patterns:
        found = sorted(path for path in root.glob(pattern) if path.is_file())
        if found:
            return found[0]
    return None


def find_folder(root: Path, *names: str) -> Path:
    """The first of the named folders that exists, else ``root``; beside ``root`` where that is a file."""
    base = root.parent if root.is_file() else root
    return next((base / name for name in names if (base / name).is_dir()), base)


def table_rows(root: Path, tsv: Sequence[str], parquet: Sequence[str]) -> list[Row] | None:
    """Rows of VLMEvalKit's TSV or of a Hugging Face parquet split.

    Parameters
    ----------
    tsv, parquet
        Patterns of file names below ``root``; all shards that the first fitting parquet pattern matches are
        read, in order of their names.
    """
    path = find_file(root, *tsv)
    if path is not None and path.suffix == ".tsv":
        return read_table([path])
    if root.is_file():
        return read_table([root]) if root.suffix == ".parquet" else None
    for pattern in parquet:
        shards = sorted(root.glob(pattern))
        if shards:
            return read_table(shards)
    return None


def need(row: Mapping[str, Any], keys: Iterable[str], where: Path, number: int) -> None:
    """Raise DataError unless a row states all the keys."""
    lacking = [key for key in keys if key not in row or row[key] is None]
    if lacking:
        raise DataError(f"{where}, question {number}: no {' and no '.join(map(repr, lacking))}")


class ImageFolder:
    """Images by the names that data gives. A name that leads out of the folder is refused; whether a file is
    there is checked for the questions that are kept, by :meth:`.common.StandardBenchmark.load`."""

    def __init__(self, folder: Path, extensions: Sequence[str] = ("",)) -> None:
        self.folder = Path(folder)
        self.extensions = extensions
        self._known: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        """The file of that name with the first of the extensions that exists."""
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def _find(self, name: str) -> Path:
        try:
            path = image_path(self.folder, name)
        except Unusable as problem:
            raise DataError(str(problem)) from problem
        candidates = [path.with_name(path.name + extension) for extension in self.extensions]
        if len(candidates) == 1:
            return candidates[0]
        return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
