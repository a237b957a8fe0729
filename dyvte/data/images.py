"""Image paths that stay inside their folder, and images read the way LLaVA reads them."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path, PureWindowsPath
from typing import Any

from dyvte.data.samples import EmbeddedImage, LeavesFolder, Unusable
from dyvte.errors import DataError


def image_path(folder: Path, name: str) -> Path:
    """The path of an image entry below ``folder``; the file system is not asked.

    Raises
    ------
    LeavesFolder
        For an absolute path, a drive letter or a ``..`` that leads out, with ``/`` or ``\\`` as separator.
    Unusable
        If the entry is no path (a NUL), or is written with backslashes.
    """
    if "\0" in name:
        raise Unusable("image", f"{name!r} is no path")
    # What a system takes for a separator must not decide what is let through.
    neutral = os.path.normpath(name.replace("\\", "/"))
    if (
        os.path.isabs(neutral)
        or PureWindowsPath(name).drive
        or neutral == os.pardir
        or neutral.startswith(os.pardir + os.sep)
    ):
        raise LeavesFolder(
            "image", f"{name!r} leaves the image folder {folder}; give paths relative to that folder"
        )
    if "\\" in name:
        raise Unusable("image", f"{name!r}: write the path with forward slashes")
    return folder / os.path.normpath(name)


def check_image_file(folder: Path, path: Path, *, follow_links: bool) -> None:
    """Raise if the file is not there (Unusable) or a symbolic link leads out of the folder (LeavesFolder)."""
    if not follow_links and path.exists():
        real = os.path.realpath(path)
        root = os.path.realpath(folder)
        if os.path.commonpath([real, root]) != root:
            raise LeavesFolder(
                "image",
                f"{path} is a symbolic link that leaves the image folder {folder}, to {real}; if you made "
                "these links yourself, allow them with follow_links",
            )
    if not path.is_file():
        raise Unusable("image", f"there is no file {path}")


def load_image(source: Path | EmbeddedImage) -> Any:
    """An RGB PIL image, as ``Image.open(path).convert("RGB")`` gives it: LLaVA ignores EXIF rotation and
    drops alpha, so does this.

    Raises
    ------
    DataError
        Missing or unreadable, truncated files included.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(source.data) if isinstance(source, EmbeddedImage) else source) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"missing image {source}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{source} cannot be read as an image: {error}") from error
