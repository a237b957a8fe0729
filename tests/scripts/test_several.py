"""Several commands in one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "several.py"


@pytest.fixture
def several(monkeypatch):
    spec = importlib.util.spec_from_file_location("several", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = []

    def main(words):
        calls.append(words)
        return 3 if words[0] == "search-k" else 0

    monkeypatch.setattr(module, "main", main)
    return module, calls


def test_commands_run_in_order_until_one_fails(several):
    module, calls = several
    assert module.run(["dyvte", "trace", "--a", "1", "--then", "dyvte", "calibrate"]) == 0
    assert calls == [["trace", "--a", "1"], ["calibrate"]]
    calls.clear()
    assert module.run(["dyvte", "search-k", "--then", "dyvte", "trace"]) == 3
    assert calls == [["search-k"]]


@pytest.mark.parametrize("words", [[], ["--then", "dyvte", "trace"], ["dyvte", "trace", "--then"], ["trace"]])
def test_a_command_that_is_missing_is_named(several, words, capsys):
    module, _ = several
    assert module.run(words) == 2
    assert "expected a dyvte command before and behind each --then" in capsys.readouterr().err
