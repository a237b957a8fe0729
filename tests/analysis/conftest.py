"""The world that all studies look at."""

from __future__ import annotations

import pytest

from tests.helpers.subjects import studied_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny model, its eager twin, a benchmark."""
    return studied_world(tmp_path_factory.mktemp("analysis"))
