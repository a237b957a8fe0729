"""One world and one reference run for all tests of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyvte.training.lora.train import train_lora
from tests.helpers.adapters import LAYERS, config
from tests.helpers.world import World


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone and eight conversations."""
    return World(conversations={"train": range(8)}, layers=LAYERS).write(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="package")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory):
    """The reference run."""
    return train_lora(config(world, tmp_path_factory.mktemp("run") / "run"))
