"""Finding question files and images below a root, whatever the format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dyvte.data.defects import Unusable
from dyvte.data.images import image_path
from dyvte.readers.rows import Row, shown
from dyvte.readers.tables import PackedImage

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


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


def tables_below(root: Path) -> list[Path]:
    """The TSV files of a folder, sorted by name; ``root`` may be one itself."""
    if root.is_file():
        return [root] if root.suffix.lower() == ".tsv" else []
    return sorted(path for path in root.glob("*.tsv") if path.is_file())


def shards_below(root: Path, patterns: Sequence[str]) -> list[Path]:
    """The parquet files of the first pattern that any fits, sorted by name; ``root`` may be one itself.

    Parameters
    ----------
    root
        Folder, or a parquet file.
    patterns
        Relative to it, in the order they are tried.
    """
    if root.is_file():
        return [root] if root.suffix == ".parquet" else []
    found = (sorted(path for path in root.glob(pattern) if path.is_file()) for pattern in patterns)
    return next((files for files in found if files), [])


def fit(name: str, patterns: Sequence[str]) -> int:
    """How well a file name fits: letters of the longest pattern that it matches in any case; 0 for none.

    Parameters
    ----------
    name
        Of a file.
    patterns
        As `fnmatch` takes them.
    """
    matching = (pattern for pattern in patterns if fnmatch(name.lower(), pattern.lower()))
    return max((len(pattern.replace("*", "")) for pattern in matching), default=0)


def is_file(path: Path) -> bool:
    """Whether there is such a file; False also for names that no file can have: too long, or half
    a character in them."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


class ImageFolder:
    """Images by the names that data gives. A name that leads out of the folder is refused; whether a file is
    there is checked for the questions that are kept, by :meth:`dyvte.tasks.base.Benchmark.load`.

    Parameters
    ----------
    folder
        Where the images lie.
    extensions
        What names lack; the first for which a file exists is taken.
    """

    def __init__(self, folder: Path, extensions: Sequence[str] = ("",)) -> None:
        self.folder = Path(folder)
        self.extensions = extensions
        self._known: dict[str, Path] = {}

    def of(self, row: Row, name: str) -> Path:
        """The file of that name.

        Raises
        ------
        DataError
            The name, which ``row`` gives, leads out of the folder.
        """
        if name not in self._known:
            try:
                path = image_path(self.folder, name)
            except Unusable as problem:
                raise row.error(str(problem)) from problem
            candidates = [path.with_name(path.name + extension) for extension in self.extensions]
            there = candidates if len(candidates) == 1 else filter(is_file, candidates)
            self._known[name] = next(iter(there), candidates[0])
        return self._known[name]


def table_images(row: Row, base: Path) -> list[PackedImage | Path]:
    """The images of a table's row: packed into ``image``, or files that ``image_path`` names; none where the
    table has neither (scoring needs none).

    Parameters
    ----------
    base
        Folder of the table; paths are relative to it or to its ``images/``.
    """
    cell = row.value("image")
    if isinstance(cell, PackedImage):
        return [cell]
    if isinstance(cell, list) and cell and all(isinstance(item, PackedImage) for item in cell):
        return cell
    if cell is not None and not isinstance(cell, str):
        raise row.error(f"'image' is {shown(cell)}, expected an image, or its path")
    paths = row.value("image_path", "image")
    if paths is None:
        return []
    names = row.texts("image_path", "image") if _is_list(paths) else [row.text("image_path", "image")]
    return [_path_image(row, name, base) for name in names if name is not None]


def table_image(row: Row, base: Path, unnamed: str) -> tuple[PackedImage | Path | None, str]:
    """The image of a table's row, the first where there are several, and its name.

    Parameters
    ----------
    row
        Of the table.
    base
        As for `table_images`.
    unnamed
        The name where there is no image.
    """
    images = table_images(row, base)
    return (images[0], images[0].name) if images else (None, unnamed)


def _path_image(row: Row, name: str, base: Path) -> Path:
    candidates = [ImageFolder(folder).of(row, name) for folder in (base, base / "images")]
    return next((path for path in candidates if is_file(path)), candidates[0])


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and re.fullmatch(r"\[.*\]", value) is not None)
