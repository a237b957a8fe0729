"""``dyvte eval``, ``score`` and ``compare`` from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dyvte.cli import main
from tests.helpers.world import World

ROOT = Path(__file__).resolve().parents[2]


WORLD = World(gqa=(9, 3), mme=2)


def _options(world, benchmark, output, *more):
    return [
        *("eval", "--model", str(world / "backbone"), "--benchmark", benchmark),
        *("--data", str(world / benchmark), "--output", str(output)),
        *("--question-suffix", "", "--timing-batches", "0", "--max-new-tokens", "3", *more),
    ]


def test_eval_then_score_in_a_fresh_process(world, tmp_path):
    """Through the script, from another folder, offline."""
    script = ROOT / "scripts" / "eval" / "gqa.sh"
    options = _options(world, "gqa", tmp_path / "out", "--policy", "never", "--policy", "fixed:2")
    done = subprocess.run(
        ["bash", script, *options[1:]],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "| fixed-2 |" in done.stdout
    scores = json.loads((tmp_path / "out" / "fixed-2" / "scores.json").read_text())
    assert scores["mean_exit_layer"] == 2.0
    predictions = tmp_path / "out" / "fixed-2" / "predictions.jsonl"
    command = [sys.executable, "-m", "dyvte", "score", "gqa", "--dialect", "all"]
    done = subprocess.run(
        [*command, "--data", world / "gqa", "--predictions", predictions],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["original"] == scores["scores"]


def test_score_of_mme_submission_equals_evals(world, tmp_path, capsys):
    assert main(_options(world, "mme", tmp_path)) == 0
    capsys.readouterr()
    folder = tmp_path / "never"
    for predictions in ("predictions.jsonl", "mme_results"):
        out = tmp_path / f"{predictions}.json"
        arguments = ["score", "mme", "--data", str(world / "mme"), "--output", str(out)]
        assert main([*arguments, "--predictions", str(folder / predictions)]) == 0
        wanted = json.loads((folder / "scores.json").read_text())["scores"]
        assert json.loads(out.read_text())["per_subtask"] == wanted["per_subtask"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--benchmark", "gpa"], "unknown benchmark 'gpa' (did you mean 'gqa'?); known: ai2d, "),
        (["--data", "/nowhere"], "is not GQA data: the folder does not exist"),
        (["--model", "/nowhere/model"], "no model folder at /nowhere/model"),
        (["--policy", "fixed:9"], "the backbone has 4 decoder layers"),
        (["--policy", "sometimes"], "unknown policy 'sometimes'; known: blind, fixed:K"),
        (["--policy", "gates:/nowhere"], "no gates checkpoint folder at /nowhere"),
        (["--dialect", "own"], "dialect: unknown value 'own'; known: original, lmms"),
        (["--set", "bach_size=3"], "did you mean 'batch_size'"),
        (["--output", "/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["--policy", "never", "--policy", "never"], "given twice"),
        (["--reduction", "fastw:2:0.5"], "unknown reduction 'fastw:2:0.5' (did you mean 'fastv'?)"),
        (["--reduction", "fastv:4:0.5"], "fastv after layer 4: expected 1..3"),
        (["--reduction", "none", "--reduction", ""], "reduction 'none' is given twice"),
    ],
)
def test_bad_input_is_said_and_ends_with_2(world, tmp_path, capsys, change, message):
    assert main(_options(world, "gqa", tmp_path, *change)) == 2
    assert message in capsys.readouterr().err


def test_gates_of_another_shape_are_refused(world, tmp_path, capsys):
    from dyvte.gates import GateConfig, GateStack

    GateStack.init(GateConfig(num_layers=6, hidden_size=32)).save_pretrained(tmp_path / "gates")
    options = _options(world, "gqa", tmp_path / "out", "--policy", f"gates:{tmp_path / 'gates'}")
    assert main(options) == 2
    error = capsys.readouterr().err
    assert "6 layers" in error
    assert "4 layers" in error


def test_missing_and_foreign_predictions(world, tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question_id": "00000", "text": "red"}\n')
    arguments = ["score", "gqa", "--data", str(world / "gqa"), "--predictions", str(path)]
    assert main(arguments) == 2
    assert "8 of 9 questions have no prediction: 00001" in capsys.readouterr().err
    path.write_text("not json\n")
    assert main(arguments) == 2
    assert "line 1: not JSON" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "none.jsonl")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_compare_names_what_is_missing(tmp_path, capsys):
    assert main(["compare", "--model", "x", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("gates", "data_train", "traces_test"))


def test_help_lists_every_command(capsys):
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(
        name in text for name in ("init", "trace", "train", "calibrate", "search-k", "eval", "compare")
    )
