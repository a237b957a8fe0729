"""A reader that goes away (``dyvte ... | head``) ends any command quietly, however much is printed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dyvte.cli import COMMANDS, EXIT_READER_GONE, main


def run_without_reader(code: str) -> subprocess.CompletedProcess[bytes]:
    """A Python program whose standard output is a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False
        )
    finally:
        os.close(writing)


@pytest.mark.parametrize("arguments", [["--help"], ["score", "--help"], []])
def test_help_into_a_closed_pipe_is_no_traceback(arguments: list[str]) -> None:
    done = run_without_reader(f"import sys; from dyvte.cli import main; sys.exit(main({arguments!r}))")
    assert done.returncode in (0, 2, EXIT_READER_GONE)  # argparse itself may pass over what it cannot write
    assert done.stderr == b""


@pytest.mark.parametrize("lines", [1, 100_000], ids=["within the buffer", "beyond it"])
def test_what_a_command_prints_into_a_closed_pipe_is_no_traceback(lines: int) -> None:
    """One stand-in for all commands: each prints from its ``run``, which `main` calls."""
    done = run_without_reader(
        "import sys; from dyvte.cli import main; import dyvte.commands.score as score\n"
        f"score.run = lambda args: [print('a line of scores') for _ in range({lines})] and 0\n"
        "sys.exit(main(['score', 'gqa', '--data', 'x', '--predictions', 'y']))"
    )
    assert done.returncode == EXIT_READER_GONE
    assert done.stderr == b""


def test_another_broken_pipe_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: object) -> int:
        raise BrokenPipeError("of a helper process")

    import dyvte.commands.score

    monkeypatch.setattr(dyvte.commands.score, "run", run)
    monkeypatch.setattr(dyvte.cli, "_reader_is_gone", lambda: False)
    assert "score" in COMMANDS
    with pytest.raises(BrokenPipeError, match="helper"):
        main(["score", "gqa", "--data", "x", "--predictions", "y"])
