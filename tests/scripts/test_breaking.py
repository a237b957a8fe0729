"""The experiment on where reductions break, in a tiny form, and its arithmetic."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("deepspeed")

from dyvte.data.scenes import writers
from dyvte.tasks.base import get_benchmark
from tests.conftest import ROOT

SIZES = {"train": 48, "calibration": 32, "validation": 1, "test": 1, "gqa": 1, "mme": 1, "pope": 6}


@pytest.fixture(scope="module")
def breaking():
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        import breaking
    finally:
        sys.path.remove(str(ROOT / "experiments"))
    return breaking


@pytest.mark.parametrize(("compute", "layers", "visual"), [(0.22, 10, 64), (0.7, 30, 64), (0.15, 10, 64)])
def test_controls_spend_what_they_may_as_nearly_as_tokens_allow(breaking, compute, layers, visual):
    controls = breaking.controls_at(compute, layers, visual)
    for text in controls:
        name, *numbers = text.split(":")
        if name == "pool":
            continue
        behind, share = (0, numbers[0]) if len(numbers) == 1 else (int(numbers[0]), numbers[1])
        spent = (behind * visual + (layers - behind) * visual * (1 - float(share))) / (layers * visual)
        assert abs(spent - compute) <= 0.5 / visual + 1e-9
    assert {"fastv:2", "random_visual:2"} <= {text.rsplit(":", 1)[0] for text in controls} or compute < 0.2
    assert controls[0] == "pool:2"
    assert ("pool:3" in controls) == (compute < 0.2)  # 9 of 64 tokens are nearer than 16


def test_the_whole_experiment_and_that_it_goes_on_where_it_was(breaking, tmp_path, capsys, monkeypatch):
    writers.write_all(tmp_path / "scenes", SIZES, tell=lambda _: None)
    data = tmp_path / "scenes/mini_pope"
    words = ["--config", str(ROOT / "configs/embedded_states.yaml"), "--work", str(tmp_path / "work")]
    words += ["--scenes", str(tmp_path / "scenes/instruct"), "--benchmark", f"mini-POPE:pope={data}"]
    words += ["--gates", str(ROOT / "checkpoints/tiny-llava-gates"), "--draws", "50"]
    words += ["--set", "epochs=2", "--set", "batch_size=16", "--batch-size", "18", "--also", "0.5"]
    breaking.main(words)
    found = json.loads((tmp_path / "work/breaking.json").read_text())["benchmarks"]["mini-POPE"]
    assert (found["num_questions"], found["num_images"]) == (36, 6)
    rows, gates = found["rows"], found["rows"]["gates"]
    reductions = {"pool", "random_visual", "divprune", "fastv"}
    plain = {name for name in rows if not any(one in name for one in reductions)}
    given = {"exits-alone", "static", "fixed-mixture"}
    assert plain == {"never", "gates", "blind", *given, *(f"{name}-0.5" for name in given)}
    assert {"never+divprune-0.5", "never+random_visual-0-0.5-0"} <= set(rows)
    assert rows["blind"]["visual_compute"] == 0
    assert rows["never"]["visual_compute"] == rows["never"]["same_answer"] == 1
    for name in given:  # a mixture draws whole questions
        least = 0.1 if name == "exits-alone" else 0  # which leave after the first layer at the earliest
        wanted = max(gates["visual_compute"], least)
        assert rows[name]["visual_compute"] == pytest.approx(wanted, abs=0.03)
        assert rows[f"{name}-0.5"]["visual_compute"] == pytest.approx(0.5, abs=0.03)
    questions = {q.id: q for q in get_benchmark("pope").load(data)}
    right = {name: _right(tmp_path / "work/mini-POPE" / name, questions) for name in rows}
    for name, row in rows.items():
        assert row["score"] == pytest.approx(100 * np.mean(list(right[name].values())))
        ahead = row["gates_minus"]["score"]
        assert ahead["difference"] == pytest.approx(gates["score"] - row["score"])
        assert ahead["low"] <= ahead["difference"] <= ahead["high"]
    hard = [q for q in questions if right["never"][q] and not right["never+pool-2"][q]]
    assert (found["hard"] is None) == (not hard)
    if hard:
        assert found["hard"]["num_questions"] == len(hard)
        solved = found["hard"]["scores"]["gates"]["solved"]
        assert solved == pytest.approx(100 * np.mean([right["gates"][q] for q in hard]))
    shown = capsys.readouterr().out
    assert "36 questions about 6 images" in shown
    assert "| three-state gates" in shown

    kept = {path: path.read_bytes() for path in (tmp_path / "work").rglob("*.jsonl")}
    with monkeypatch.context() as patch:
        patch.setattr("dyvte.evaluation.generation.generate_greedily", None)  # nothing is asked again
        breaking.main(words)
    assert {path: path.read_bytes() for path in kept} == kept
    assert capsys.readouterr().out.endswith(shown[shown.index("## mini-POPE") :])


def test_one_seed_at_a_time(breaking, capsys):
    with pytest.raises(SystemExit):
        breaking.main(["--benchmark", "pope=x", "--seeds", "0", "1"])
    assert "--seeds: expected one, found 2" in capsys.readouterr().err


def _right(folder: Path, questions) -> dict[str, bool]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    said = {row["question_id"]: row["prediction"] for row in map(json.loads, lines)}
    return {q: ("no" in said[q].lower().split()) == (one.answer == "no") for q, one in questions.items()}
