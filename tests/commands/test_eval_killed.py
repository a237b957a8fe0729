"""``dyvte eval`` killed by the system and started again, alone and under torchrun: the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.world import World

ROOT = Path(__file__).resolve().parents[2]
RUNS = ("never", "fixed-2", "never+fastv-1-0.5", "fixed-2+fastv-1-0.5")
FILES = ("predictions.jsonl", "exits.jsonl", "testdev_balanced_predictions.json")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

pytestmark = pytest.mark.full


WORLD = World(gqa=(240, 6))


@pytest.fixture(scope="module")
def world(world):
    """With the files of a run that nobody kills."""
    _start(world, world / "whole").wait(300)
    return world


def _start(world, output, launcher=()):
    options = [
        *("--model", world / "backbone", "--benchmark", "gqa", "--data", world / "gqa", "--output", output),
        *("--question-suffix", "", "--timing-batches", "0", "--max-new-tokens", "8", "--batch-size", "4"),
        *("--policy", "never", "--policy", "fixed:2", "--reduction", "none", "--reduction", "fastv:1:0.5"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, "-m", "dyvte", "eval", *map(str, options)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def _num_lines(output) -> int:
    return sum(path.read_bytes().count(b"\n") for path in output.glob("*/answers.partial*.jsonl"))


def _kill_after(process, output, lines: int, victim) -> None:
    """SIGKILL to what ``victim`` finds, once so many answers are on disk."""
    deadline = time.monotonic() + 240
    while _num_lines(output) < lines and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, process.stdout.read().decode()[-2000:]
    os.kill(victim(process), signal.SIGKILL)
    process.communicate(timeout=240)


def _same_files(world, output) -> None:
    for name in RUNS:
        for file in FILES:
            assert (output / name / file).read_bytes() == (world / "whole" / name / file).read_bytes(), file
        assert not list((output / name).glob("answers.partial*"))


@pytest.mark.parametrize("lines", [5, 300])
def test_one_process(world, tmp_path, lines):
    _kill_after(_start(world, tmp_path), tmp_path, lines, lambda process: process.pid)
    kept = _num_lines(tmp_path)
    assert 0 < kept < 960
    again = _start(world, tmp_path)
    assert again.wait(300) == 0
    _same_files(world, tmp_path)


def _last_child(process) -> int:
    """A rank: a child of the launcher."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[-1])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
@pytest.mark.parametrize("resumed_by", [TORCHRUN, ()], ids=["two", "one"])
def test_one_of_two_processes(world, tmp_path, resumed_by):
    process = _start(world, tmp_path, TORCHRUN)
    _kill_after(process, tmp_path, 200, _last_child)
    assert process.returncode != 0
    assert 0 < _num_lines(tmp_path) < 960
    again = _start(world, tmp_path, resumed_by)
    output = again.communicate(timeout=300)[0].decode()
    assert again.returncode == 0, output[-2000:]
    _same_files(world, tmp_path)


def test_an_error_ends_all_processes(world, tmp_path):
    """No rank waits for one that refused."""
    (tmp_path / "never").mkdir()
    (tmp_path / "never" / "run.json").write_text('{"benchmark": "other"}')
    (tmp_path / "never" / "answers.partial.jsonl").touch()
    process = _start(world, tmp_path, TORCHRUN)
    output = process.communicate(timeout=200)[0].decode()
    assert process.returncode != 0
    assert "holds a run with another" in output
