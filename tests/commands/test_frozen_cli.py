"""search-frozen as people call it: dry run, table, choices, going on, and what it refuses."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from dyvte.calibration.frozen_sets import count_sets
from dyvte.cli import main
from dyvte.reductions import parse_reduction
from tests.helpers.world import World

LAYERS = 4
WORLD = World(conversations={"train": range(4), "other": range(4, 7)}, questions=2, stops=True)


def asked(world: Path, output: Path, *more: str, data: str = "train") -> list[str]:
    given = {
        "--model_name_or_path": str(world / "backbone"), "--data_path": str(world / f"{data}.json"),
        "--image_folder": str(world / "images"), "--max_new_tokens": "3", "--teacher_batch_size": "4",
        "--num-samples": "6", "--output": str(output),
    }  # fmt: skip
    return ["search-frozen", *(word for pair in given.items() for word in pair), *more]


def test_a_dry_run_says_what_would_be_measured(world: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "frozen"
    assert main(asked(world, output, "--held-out-path", str(world / "other.json"), "--dry-run")) == 0
    said = capsys.readouterr().out
    assert f"4 layers: at most {count_sets(LAYERS, LAYERS)} sets on 6 samples" in said
    assert "on 6 held-out samples" in said
    assert "full passes" in said
    assert "TFLOP" in said
    assert not output.exists()


def test_search_frozen_writes_tables_and_goes_on(world: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "frozen"
    more = ["--held-out-path", str(world / "other.json"), "--keep", "1.0", "--keep", "0"]
    assert main(asked(world, output, *more)) == 0
    printed = capsys.readouterr().out
    found = json.loads((output / "frozen-sets.json").read_text())
    assert (found["num_samples"], found["num_held_out"], found["num_layers"]) == (6, 6, LAYERS)
    assert set(found["sets"]) == set(found["held_out"]) == {"answer", "shortv", "last"}
    for rule, rows in found["sets"].items():
        sets = [parse_reduction(row["reduction"]).layers for row in rows]
        assert [len(layers) for layers in sets] == [1, 2, 3, 4]
        assert all(set(small) < set(large) for small, large in pairwise(sets))
        assert [row["reduction"] for row in found["held_out"][rule]] == [row["reduction"] for row in rows]
    assert found["sets"]["answer"][0]["risk"] <= min(rows[0]["risk"] for rows in found["sets"].values())
    assert found["chosen"]["0.0"] == dict.fromkeys(found["sets"], "frozen:0-3")
    assert "`frozen:0-3`" in printed
    assert (output / "frozen-sets.png").read_bytes().startswith(b"\x89PNG")
    table = (output / "frozen-sets.md").read_text()
    assert "layer contribution" in table.lower()
    # a chosen set is what the other commands take
    chosen = found["sets"]["answer"][1]["reduction"]
    trace = [*asked(world, tmp_path / "trace")[1:], "--reduction", chosen]
    samples = trace.index("--num-samples")
    assert main(["trace", *trace[:samples], "--limit", "6", *trace[samples + 2 :]]) == 0
    risks = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("risk"))
    assert float(risks.split()[-1]) == pytest.approx(found["sets"]["answer"][1]["risk"], abs=6e-5)
    # once more, stopped in the middle: the same end
    effects = json.loads((output / "effects.json").read_text())
    effects["effects"] = effects["effects"][:5]
    (output / "effects.json").write_text(json.dumps(effects))
    assert main(asked(world, output, *more)) == 0
    assert json.loads((output / "frozen-sets.json").read_text()) == found


def test_search_frozen_refuses_what_it_cannot_do(world: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    for more, reason in (
        (["--largest", "5"], r"expected 1..4"),
        (["--keep", "99"], "share of answers"),
        (["--set", "teacher.reductions=fastv:2:0.5"], "chooses them itself"),
        (["--set", "teacher.freeze_every=2"], "chooses them itself"),
    ):
        assert main(asked(world, output, *more)) == 2
        assert reason in capsys.readouterr().err
    assert not output.exists()
    # a folder of another search is named, not mixed with
    assert main(asked(world, output, "--largest", "1")) == 0
    assert main(asked(world, output, "--largest", "1", data="other")) == 2
    assert "belongs to another search (data:" in capsys.readouterr().err
    (output / "effects.json").write_text('{"of": 3}')
    assert main(asked(world, output, "--largest", "1")) == 2
    assert "not what dyvte search-frozen writes" in capsys.readouterr().err
