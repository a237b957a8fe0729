"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

TEMPORARY = ".tmp"
"""Ending of files that are being written; their names start with a dot."""


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut; its folder is made.

    Parameters
    ----------
    path
        Of the file.
    content
        Text is written as UTF-8.

    Raises
    ------
    OSError
        If it cannot be written; the file that was there before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def publish_folder(writing: Path, final: Path) -> None:
    """Give a folder that was written under another name, beside it, its own: whole, also after a power cut.

    A folder that has the name already is removed.

    Parameters
    ----------
    writing
        The folder as it was written.
    final
        Its name to be.

    Raises
    ------
    OSError
        If it cannot be done.
    """
    for path in writing.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(writing, final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    """Let the renaming survive a power cut, where the system can do that for folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
