"""Answers of earlier runs: a folder that is not there is told, not passed over."""

from __future__ import annotations

import pytest

from dyvte.cli import main

SPLITS = ("train", "calibration", "test")


@pytest.mark.parametrize("command", ["eval", "compare"])
def test_an_earlier_run_that_is_not_there_ends_a_command_before_anything_is_read(command, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    none = tmp_path / "none"
    given = ["--benchmark", "gqa", "--data", none]
    if command == "compare":
        splits = [
            f"--{kind}_{split}" for kind in ("data", "traces") for split in ("train", "calibration", "test")
        ]
        given = [part for name in (*splits, "--gates", "--image_folder") for part in (name, none)]
    for wrong in ("nowhere", "file"):
        options = [*given, "--model", none, "--output", tmp_path / "out"]
        code = main([command, *map(str, options), "--earlier", str(tmp_path), str(tmp_path / wrong)])
        assert code == 2
        assert f"earlier: there is no folder {tmp_path / wrong}" in capsys.readouterr().err
