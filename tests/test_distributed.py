"""Processes: what they tell each other, how an error reaches all of them, and that nothing stays behind."""

from __future__ import annotations

import os

import pytest
import torch

from dyvte.distributed import Processes, join_processes
from dyvte.errors import ConfigError, TrainingError
from tests.helpers.ranks import on_two_ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_asks_nobody(no_launcher):
    with join_processes() as alone:
        assert (alone.rank, alone.world_size, alone.group) == (0, 1, None)
        assert alone.first
        assert alone.first_alone(lambda: 3) == 3
        assert alone.from_first("words") == "words"
        assert (alone.all_true(True), alone.all_true(False), alone.mean(0.25)) == (True, False, 0.25)
        alone.barrier()
        with pytest.raises(TrainingError, match="disk"):
            alone.first_alone(_fails)
    assert list(Processes(1, 3).share(range(8))) == [1, 4, 7]


def _fails():
    raise TrainingError("disk")


def test_an_engine_alone_leaves_no_variables(no_launcher):
    pytest.importorskip("deepspeed")
    with join_processes(engine=True) as alone:
        assert alone.world_size == 1
        assert torch.distributed.is_initialized()
        assert all(name in os.environ for name in VARIABLES)
    assert not any(name in os.environ for name in VARIABLES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT not set.*torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': expected the number"),
    ],
)
def test_half_a_launcher_is_named(no_launcher, monkeypatch, given, message):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), join_processes():
        pass


SCRIPT = """
import errno, os, sys
import torch
from dyvte.distributed import join_processes
from dyvte.errors import DataError

torch.distributed.init_process_group("gloo")
with join_processes() as processes:
    rank = processes.rank
    assert (rank, processes.world_size) == (int(os.environ["RANK"]), 2)
    assert processes.all_true(True) and not processes.all_true(rank == 0)
    assert processes.mean(float(rank)) == 0.5
    assert processes.from_first(["of", rank]) == ["of", 0]
    items = list(range(5))
    assert processes.together([(i, rank) for i in processes.share(items)]) == [(i, i % 2) for i in items]
    assert processes.first_alone(lambda: "done") == ("done" if rank == 0 else None)

    def raising(error):
        def work():
            raise error
        try:
            processes.first_alone(work)
        except Exception as raised:
            return raised
        raise AssertionError("nothing was raised")

    bad = raising(DataError("row 3 of x.json"))
    assert (type(bad), str(bad)) == (DataError, "row 3 of x.json"), bad
    full = raising(OSError(errno.ENOSPC, "No space left", "there"))
    assert (type(full), full.errno, full.filename) == (OSError, errno.ENOSPC, "there"), full
    odd = raising(KeyError("name"))
    assert type(odd) is (KeyError if rank == 0 else RuntimeError) and "name" in str(odd), odd
    processes.barrier()
assert torch.distributed.is_initialized(), "the caller's own group was taken away"
print(f"rank {rank} exact", file=sys.stderr, flush=True)
"""


LEAVING = """
import os, sys
import torch
from dyvte.distributed import join_processes

launcher = dict(os.environ)
with join_processes() as processes:
    assert processes.all_true(True)
assert not torch.distributed.is_initialized()
assert dict(os.environ) == launcher
print(f"rank {processes.rank} exact", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize("script", [SCRIPT, LEAVING], ids=["talk and fail together", "leave nothing behind"])
def test_two_processes(script, tmp_path):
    on_two_ranks(tmp_path, script)
