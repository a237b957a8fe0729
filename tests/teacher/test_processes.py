"""Traces written by real processes: in parallel, killed, resumed; and one teacher pass for a whole sweep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dyvte.errors import CheckpointError
from dyvte.teacher import Teacher, TraceStore, write_traces
from tests.helpers.models import random_image, tiny_llava
from tests.helpers.trace_writer import NUM_SAMPLES, selection_of, teacher_of

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 240


def writer(*words: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.helpers.trace_writer", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> int:
    _, errors = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """The images, and what one undisturbed process writes, as bytes."""
    root = tmp_path_factory.mktemp("traces")
    images = root / "images"
    selection_of(images)
    assert finished(writer(root / "whole", images)) == 0
    found = shards(root / "whole")
    assert len(found) == 1 + -(-NUM_SAMPLES // 2)
    return images, found


def test_two_processes_write_the_same_bytes_side_by_side(whole, tmp_path: Path) -> None:
    images, expected = whole
    both = [writer(tmp_path / "t", images, "--rank", rank, "--world_size", 2) for rank in (0, 1)]
    assert [finished(process) for process in both] == [0, 0]
    assert shards(tmp_path / "t") == expected


@pytest.mark.full
def test_a_killed_writer_is_resumed_without_loss_or_double(whole, tmp_path: Path) -> None:
    """kill -9 from outside while one of two ranks writes; then inside a write, before the shard has its
    name."""
    images, expected = whole
    folder = tmp_path / "t"
    victim = writer(folder, images, "--rank", 0, "--world_size", 2, "--wait", 600)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (folder / "shard-00000.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.kill()
    assert finished(victim) == -signal.SIGKILL
    assert TraceStore.open(folder).missing() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(CheckpointError, match="6 of 7 trace shards are missing"):
        TraceStore.open(folder).trace()

    assert finished(writer(folder, images, "--die_in_write", 3)) == -signal.SIGKILL
    assert list(folder.glob(".shard-00003*.tmp")), "it was to die with the shard half named"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert len(before) == 3

    # Another number of ranks may finish the work.
    store = write_traces(folder, teacher_of(), selection_of(images))
    assert shards(folder) == expected
    assert all((folder / name).stat().st_mtime_ns == written for name, written in before.items())
    assert store.trace().sample_ids == tuple(f"s{i}" for i in range(NUM_SAMPLES))


def test_a_sweep_over_ten_settings_costs_one_teacher_pass(tmp_path: Path, monkeypatch) -> None:
    from dyvte.config import load_config
    from dyvte.training.config import TrainConfig
    from dyvte.training.train import train

    model, processor = tiny_llava(layers=3)
    model.save_pretrained(tmp_path / "backbone")
    processor.save_pretrained(tmp_path / "backbone")
    entries = []
    for index in range(8):
        random_image(index).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nhow many ?"}, {"from": "gpt", "value": "red"}]
        entries.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    traced: list[int] = []
    trace = Teacher.trace

    def counting(self, samples, file=""):
        traced.append(len(samples))
        return trace(self, samples, file)

    monkeypatch.setattr(Teacher, "trace", counting)
    common = [
        f"model.path={tmp_path / 'backbone'}", f"data.path={tmp_path / 'data.json'}",
        f"data.image_folder={tmp_path}", f"trace_dir={tmp_path / 'trace'}", "data.validation_fraction=0",
        "teacher.max_new_tokens=2", "teacher.batch_size=4", "epochs=2", "batch_size=4",
        "optimizer.warmup_ratio=0",
    ]  # fmt: skip
    sweep = [
        *(f"objective.lam={lam}" for lam in (0.01, 0.1, 1.0)), "objective.name=safe_label",
        "objective.name=reference_label", "optimizer.learning_rate=1e-4", "optimizer.weight_decay=0.1",
        "gates.hidden_size=4", "gates.architecture=reference", "seed=3",
    ]  # fmt: skip
    assert len(sweep) == 10
    results = set()
    for number, setting in enumerate(sweep):
        cfg = load_config(TrainConfig, None, [*common, f"output_dir={tmp_path / str(number)}", setting])
        results.add((train(cfg).gates / "gates.safetensors").read_bytes())
    assert sum(traced) == 8
    assert len(results) == 10
