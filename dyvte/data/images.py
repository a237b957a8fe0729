"""Image paths that stay inside their folder, and images read the way LLaVA reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PureWindowsPath
from typing import Any

from dyvte.data.defects import LeavesFolder, Unusable, is_of_sample, problem_text
from dyvte.data.samples import EmbeddedImage
from dyvte.errors import DataError

# Formats whose samples of more than 8 bits PIL scales to 16 bits, but keeps in 32.
_SIXTEEN_BITS_AS_I = ("PPM",)


def image_path(folder: Path, name: str) -> Path:
    """The path of an image entry below ``folder``; the file system is not asked.

    Parameters
    ----------
    folder
        That images lie in.
    name
        As the record gives it.

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
    """Raise if the file is not there (Unusable) or a symbolic link leads out of the folder (LeavesFolder).

    Parameters
    ----------
    folder
        That images lie in.
    path
        Of the file.
    follow_links
        Let symbolic links lead out of the folder.
    """
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
    """An RGB PIL image, as `as_rgb` gives it: EXIF rotation is ignored and alpha dropped, as LLaVA does.

    Parameters
    ----------
    source
        A file, or bytes that came with the data.

    Raises
    ------
    DataError
        Missing or unreadable, truncated files included, or of a range of values that cannot be told.
    """
    with _opened(source) as image:
        return as_rgb(image)


def check_image(source: Path | EmbeddedImage) -> None:
    """Raise what `load_image` would. A JPEG is decoded at an eighth of its size, which is several times
    faster and reads its whole stream all the same."""
    with _opened(source) as image:
        image.draft("RGB", (1, 1))
        as_rgb(image)


@contextmanager
def _opened(source: Path | EmbeddedImage) -> Iterator[Any]:
    """The PIL image, not decoded yet; what goes wrong with it as a DataError that names it."""
    from PIL import Image

    try:
        with Image.open(BytesIO(source.data) if isinstance(source, EmbeddedImage) else source) as image:
            yield image
    except FileNotFoundError as error:
        raise DataError(f"missing image {source}") from error
    except Exception as error:  # what a damaged file makes its decoder raise is beyond listing
        if not is_of_sample(error):
            raise
        raise DataError(f"{source} cannot be read as an image: {problem_text(error)}") from error


def as_rgb(image: Any) -> Any:
    """A PIL image in 8-bit RGB: PIL's own conversion, but for samples of more than 8 bits, which PIL clips to
    white or black.

    Samples of 16 bits are divided by 257, to the nearest. Those of 32 bits and of floating point say nothing
    of their range: 0..1 and 0..255 are taken as such.

    Raises
    ------
    DataError
        If samples of 32 bits or floating point lie outside both ranges.
    """
    import numpy as np
    from PIL import Image

    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in _SIXTEEN_BITS_AS_I)
    if not sixteen_bits and image.mode not in ("I", "F"):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.float64)
    if sixteen_bits:
        values /= 257
    elif not np.isfinite(values).all() or values.min() < 0 or values.max() > 255:
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise DataError(
            f"{kind} samples from {values.min():g} to {values.max():g}: expected 0..1 or 0..255, as the file "
            "does not say which value is white; convert it to 8 or 16 bits"
        )
    elif values.max() <= 1:
        values *= 255
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")
