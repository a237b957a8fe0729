"""``dyvte ask`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dyvte.cli import main
from tests.helpers.models import random_image
from tests.helpers.world import World

WORLD = World()


@pytest.fixture(scope="module")
def world(world: Path) -> Path:
    """With an image."""
    random_image(1).save(world / "scene.png")
    return world


def test_ask_answers_and_says_where_the_visual_tokens_left(world, capsys):
    options = [
        "ask",
        str(world / "backbone"),
        str(world / "scene.png"),
        "what color ?",
        "--max-new-tokens",
        "4",
    ]
    assert main([*options, "--policy", "freeze:1:3"]) == 0
    shown = capsys.readouterr()
    assert "left after layer 3 of 4 █▒▒· | frozen after layer 1" in shown.err
    assert main([*options, "--policy", "freeze:1:3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["answer"] == shown.out.strip()
    assert (record["report"]["freeze_layer"], record["report"]["exit_layer"]) == (1, 3)


def test_ask_about_text_alone_and_bad_input(world, capsys):
    backbone = str(world / "backbone")
    assert main(["ask", backbone, "none", "what color ?", "--max-new-tokens", "2"]) == 0
    assert "never | no image" in capsys.readouterr().err
    assert main(["ask", backbone, str(world / "missing.png"), "what ?"]) == 2
    assert "missing image" in capsys.readouterr().err
    assert main(["ask", backbone, "none", "what ?", "--policy", "fixed:9"]) == 2
    assert "exit layer 9: expected 0..4" in capsys.readouterr().err
