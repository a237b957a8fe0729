"""Whole or not there: files and folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyvte.files import publish_folder, write_atomically


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_atomically(path, "old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "newer")
    assert [one.name for one in path.parent.iterdir()] == ["file.txt"]
    assert path.read_bytes() == b"new"


def test_a_folder_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "of the one before").write_text("x")
    writing = tmp_path / ".writing"
    (writing / "deep").mkdir(parents=True)
    (writing / "deep" / "file").write_text("y")
    publish_folder(writing, final)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [
        "final/deep/file"
    ]
    assert not writing.exists()
