"""What evaluations in tests run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyvte.backbones import get_template
from dyvte.evaluation.generation import Pipeline
from dyvte.gates import GateConfig, GateStack, uniform_offsets
from tests.helpers.evaluations import LAYERS
from tests.helpers.fixtures import write_mini_gqa, write_mini_mme
from tests.helpers.models import tiny_llava


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """A tiny model, its processor and its template."""
    model, processor = tiny_llava(LAYERS)
    return Pipeline(model, processor, get_template("chat", processor), max_new_tokens=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mini benchmarks: gqa and mme."""
    root = tmp_path_factory.mktemp("data")
    write_mini_gqa(root / "gqa")
    write_mini_mme(root / "mme")
    return root


@pytest.fixture(scope="module")
def gates_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random gates, some of which fire."""
    folder = tmp_path_factory.mktemp("gates")
    config = GateConfig(num_layers=LAYERS, hidden_size=32, offsets=uniform_offsets(LAYERS), threshold=0.4)
    GateStack.init(config, seed=1).save_pretrained(folder)
    return folder
