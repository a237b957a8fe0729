"""kill -9 at chosen moments, on either rank: the same command then ends as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.trainings import LIMIT_SECONDS, ROOT, environment, options, same, weights
from tests.helpers.world import World

WORLD = World(conversations={"train": range(12), "calibration": range(12, 20)}, stops=True)
SABOTEUR = str(Path(__file__).parents[1] / "helpers" / "saboteur.py")
CASES = [
    # moment, rank that dies, processes
    ("saving", 0, 1),
    ("shard", 0, 1),
    ("step", 0, 1),
    ("publishing", 0, 1),
    ("finishing", 0, 1),
    ("shard", 1, 2),
    ("step", 1, 2),
    ("step", 0, 2),
    ("saving", 1, 2),
    ("publishing", 0, 2),
]
# The default tier has a kill at a random moment: test_training_cli.py.
pytestmark = pytest.mark.full


def command(world: Path, output: Path, processes: int, *program: str) -> list[str]:
    zero = {"--deepspeed": str(ROOT / "configs" / "deepspeed" / "zero2.json")} if processes > 1 else {}
    flags = {
        "--save_steps": "5", "--logging_steps": "1", "--per_device_train_batch_size": str(8 // processes),
        "--set": "teacher.shard_batches=1", **zero,
    }  # fmt: skip
    words = ["train", *options(world, output, **flags)]
    if processes == 1:
        return [sys.executable, *program, *words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*launcher, *program, *words]


def start(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=cwd, env=environment(), timeout=2 * LIMIT_SECONDS, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory):
    """An uninterrupted run with so many processes."""

    @cache
    def run(processes: int) -> Path:
        output = tmp_path_factory.mktemp("undisturbed") / "run"
        done = start(command(world, output, processes, "-m", "dyvte"), output.parent)
        assert done.returncode == 0, done.stderr
        return output

    return run


def log(output: Path) -> list[dict]:
    """The log without its clock."""
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]


@pytest.mark.parametrize(("moment", "rank", "processes"), CASES)
def test_the_same_command_ends_as_if_nothing_had_happened(
    world: Path,
    undisturbed,
    tmp_path: Path,
    moment: str,
    rank: int,
    processes: int,
) -> None:
    output, whole = tmp_path / "run", undisturbed(processes)
    died = start(command(world, output, processes, SABOTEUR, moment, str(rank)), tmp_path)
    assert died.returncode != 0
    assert not (output / "summary.json").exists()
    checkpoints = sorted(path.name for path in (output / "checkpoints").glob("step-*"))
    expected = {"shard": 0, "step": 2, "saving": 1, "publishing": 1, "finishing": 2}[moment]
    assert len(checkpoints) == expected

    again = start(command(world, output, processes, "-m", "dyvte"), tmp_path)
    assert again.returncode == 0, again.stderr
    assert ("going on from step" in again.stderr) == (expected > 0)
    assert same(weights(output), weights(whole))
    assert log(output) == log(whole)
    for path in (whole / "trace").iterdir():
        assert (output / "trace" / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in (output / "trace").iterdir()} == {
        p.name for p in (whole / "trace").iterdir()
    }
    left = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert left == sorted(path.name for path in (whole / "checkpoints").iterdir())
