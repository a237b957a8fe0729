"""Families whose processors want torchvision, and real videos, in an environment that has both.

``scripts/test_plugins.sh torchvision`` makes it: .venv, and beside it PyPI's torchvision with its two
operators declared, PyAV and scikit-image.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.helpers.tool_runs import ROOT, tool_python

TESTS = (
    "tests/readers/test_decoding.py",
    "tests/evaluation/test_video_families.py",
    "tests/backbones/test_own_processors.py",
)
CLOSE = {"llava": 2.5, "llava_onevision": 2.5, "internvl": 2.5, "qwen2_vl": 10.0}
"""Largest difference that is allowed between both processors of a family, in levels of 255."""


@pytest.fixture(scope="module")
def python() -> str:
    return tool_python("torchvision")


def run(python: str, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([python, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize("path", TESTS)
def test_what_wants_torchvision_or_a_decoder_passes_there(python: str, path: str) -> None:
    said = run(python, "-m", "pytest", path, "-rs")
    assert "passed" in said
    assert "skipped" not in said


@pytest.mark.full
def test_both_processors_of_a_family_agree_on_photographs(python: str) -> None:
    found = json.loads(run(python, "experiments/image_processors.py", "--json", *CLOSE))
    assert list(found) == list(CLOSE)
    for family, one in found.items():
        assert one["same_shapes"]
        assert one["largest"] < CLOSE[family]
        assert one["mean"] < 0.1
        assert one["share_over_one"] < 0.001
