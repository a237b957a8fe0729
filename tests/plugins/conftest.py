"""Scenes and gates for the embedded backbone, as the tools are asked about them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dyvte.gates import GateConfig, GateStack
from tests.helpers.tool_runs import BACKBONE, run

LAYERS = 10


@pytest.fixture(scope="package")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``mini_gqa``, ``mini_mme`` and random ``gates``."""
    root = tmp_path_factory.mktemp("scenes")
    sizes = [f"--{split}=8" for split in ("train", "calibration", "validation", "test")]
    run([sys.executable, "-m", "dyvte.data.scenes", "--output", root, *sizes, "--gqa=60", "--mme=4"])
    gates = GateStack.init(GateConfig(num_layers=LAYERS, hidden_size=_hidden_size(), threshold=0.5), seed=3)
    gates.save_pretrained(root / "gates")
    return root


def _hidden_size() -> int:
    config = json.loads((BACKBONE / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == LAYERS
    return config["text_config"]["hidden_size"]
