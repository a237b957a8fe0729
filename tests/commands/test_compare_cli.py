"""``dyvte compare`` and ``dyvte search-plan`` together: plans chosen on one search and judged on another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dyvte.cli import main
from dyvte.gates import GateConfig, GateStack, uniform_offsets
from tests.helpers.world import World

LAYERS = 4
SPLITS = {"train": range(9), "calibration": range(9, 15), "test": range(15, 21)}
WORLD = World(gqa=(6, 3), conversations=SPLITS, questions=2)


@pytest.fixture(scope="module")
def world(world: Path) -> Path:
    """With gates for the backbone."""
    config = GateConfig(
        num_layers=LAYERS,
        hidden_size=32,
        offsets=uniform_offsets(LAYERS),
        training={"objective": {"lam": 0.1, "span": 1.0}},
    )
    GateStack.init(config, seed=0).save_pretrained(world / "gates")
    return world


def traced(world: Path, split: str, command: str, output: Path, *further: str) -> None:
    given = {
        "--model": world / "backbone", "--data_path": world / f"{split}.json", "--output": output,
        "--image_folder": world / "images", "--max_new_tokens": 3, "--teacher_batch_size": 6,
    }  # fmt: skip
    assert main([command, *(str(word) for pair in given.items() for word in pair), *further]) == 0


def test_a_whole_comparison(world: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("dyvte.comparison.tuned_router.ROUTER_MIN_STEPS", 20)
    for split in SPLITS:
        traced(world, split, "trace", tmp_path / f"trace-{split}")
    for split in ("calibration", "test"):
        further = ["--reduction", "fastv:2:0.5", "--budget", "0.5", "--gates", str(world / "gates")]
        traced(world, split, "search-plan", tmp_path / "plans" / split, *further)
    shutil.copytree(world / "gqa", tmp_path / "gqa")
    torn = tmp_path / "gqa" / "images" / "1.png"  # of two of the six questions
    torn.write_bytes(torn.read_bytes()[:-300])
    settings = {
        "--model": world / "backbone", "--gates": world / "gates", "--image-folder": world / "images",
        "--output": tmp_path / "out", "--benchmark": f"mini-GQA:gqa={tmp_path / 'gqa'}",
        "--budgets": "0.6,0.3",
        "--plans": tmp_path / "plans", "--template": "chat", "--timing-batches": 1, "--timing-repeats": 1,
        "--search-samples": 4, "--num-draws": 100, "--sweep-questions": 0, "--max-new-tokens": 3,
        "--max-bad-samples": 2,
        **{f"--data-{split}": world / f"{split}.json" for split in SPLITS},
        **{f"--traces-{split}": tmp_path / f"trace-{split}" for split in SPLITS},
    }  # fmt: skip
    command = ["compare", *(str(word) for pair in settings.items() for word in pair)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for title in ("| policy ", "| mini-GQA ", "## At given budgets", "## Plans", "| DyVTE gates "):
        assert title in shown
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    answered = found["benchmarks"]["mini-GQA"]
    assert (answered["num_questions"], len(answered["unaskable"])) == (4, 2)
    assert all("truncated" in problem for problem in answered["unaskable"].values())
    assert "mini-GQA: 2 questions that cannot be asked" in (tmp_path / "out" / "comparison.md").read_text()
    plans = found["plans"]
    assert (plans["num_calibration"], plans["num_test"], plans["num_images"], plans["num_seeds"]) == (
        12,
        12,
        6,
        1,
    )
    assert {one["budget"] for one in plans["methods"]} == {0.3, 0.6}
    assert any("fastv" in plan for one in plans["methods"] for plan in one["plans"])
    assert (tmp_path / "out" / "plans.png").is_file()
    # a search that lacks a combination is named, before anything is loaded
    monkeypatch.setattr("dyvte.comparison.compare.load_pipeline", lambda config: pytest.fail("loaded"))
    (tmp_path / "plans" / "test" / "plans.json").write_text('{"plans": [{"reduction": "none"}]}')
    assert main(command) == 2
    assert "lacks traces of fastv:2:0.5" in capsys.readouterr().err
    (tmp_path / "plans" / "test" / "plans.json").unlink()
    assert main(command) == 2
    assert "dyvte search-plan --output" in capsys.readouterr().err
