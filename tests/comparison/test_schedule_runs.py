"""Schedules in `dyvte compare`, end to end: tables, budgets, sets of frozen layers, answers."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from dyvte.backbones import BackboneConfig, load_backbone
from dyvte.backbones.sizes import decoder_shape
from dyvte.comparison.compare import compare
from dyvte.costs.schedules import kv_share
from dyvte.data import DataConfig, open_conversations, select
from dyvte.errors import DataError
from dyvte.gates import GateConfig, GateStack, uniform_freeze_offsets, uniform_offsets
from dyvte.reductions.frozen import as_ranges
from dyvte.reporting.comparison import write_comparison
from dyvte.reporting.frozen_sets import write_frozen_sets
from dyvte.teacher import Teacher, TeacherConfig, TraceStore, write_traces
from dyvte.tracing import TracingConfig
from dyvte.tracing.frozen_search import search_frozen
from tests.comparison.test_compare import _config, _write_split
from tests.helpers.ranks import on_two_ranks
from tests.helpers.world import World

ROUTER_STEPS = 150
WORLD = World(gqa=(24, 6))


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):
    """Traced splits with freeze layers, two-head gates of two seeds, exits alone as a baseline."""
    root = world
    settings = TeacherConfig(template="chat", max_new_tokens=4, freeze_layers=(0, 1, 2))
    teacher = Teacher(*load_backbone(root / "backbone"), settings)
    for split, count in (("train", 36), ("calibration", 30), ("test", 24)):
        _write_split(root, split, count)
        write_traces(root / f"trace-{split}", teacher, select(open_conversations(root / f"{split}.json")))
    shape = {"num_layers": 4, "hidden_size": 32, "offsets": uniform_offsets(4)}
    record = {"training": {"objective": {"lam": 0.1, "span": 10.0, "loss": "same_answer"}, "epochs": 2.0}}
    freezes = {"freeze_head": True, "freeze_offsets": uniform_freeze_offsets(4, (0, 1, 2))}
    for seed in (0, 1):
        config = GateConfig(**shape, **record, **freezes, threshold=0.4, freeze_threshold=0.35)
        GateStack.init(config, seed).save_pretrained(root / f"gates-{seed}")
    GateStack.init(GateConfig(**shape, **record), 2).save_pretrained(root / "exits")
    output = tmp_path_factory.mktemp("compared")
    tracing = TracingConfig(
        model=BackboneConfig(path=str(root / "backbone")),
        data=DataConfig(path=root / "calibration.json", limit=10),
        teacher=dataclasses.replace(settings, freeze_layers=()),
    )
    sets = search_frozen(tracing, root / "sets", held_out=DataConfig(path=root / "test.json"))
    write_frozen_sets(sets, root / "sets", [0.99])
    config = _config(
        root,
        output,
        frozen_sets=root / "sets",
        budgets="0.2,0.5",
        baselines=(f"exits={root / 'exits'}",),
        benchmarks=(f"mini-GQA:gqa={root / 'gqa'}",),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dyvte.comparison.tuned_router.ROUTER_MIN_STEPS", 5)
        found = compare(config)
    write_comparison(found, output)
    return found, output


def test_all_rules_spend_what_the_gates_spend(compared):
    found, _ = compared
    runs = found.benchmarks["mini-GQA"].runs
    for seed in found.gates:
        spent = runs[f"gates-{seed}"].cost.visual_compute
        for rule in ("vtw-mixture", "static", "router"):
            # Whole questions are drawn: half a question of slack, of the largest step between two settings.
            assert runs[f"{rule}-{seed}"].cost.visual_compute == pytest.approx(spent, abs=1 / 24)
        own = runs[f"gates-{seed}"].cost
        assert own.mean_updated_layers < own.mean_exit_layer


def test_the_table_shows_both_layers(compared):
    found, output = compared
    rows = {row.policy: row for row in found.rows}
    assert list(rows)[-3:] == [
        "static schedule at the gates' budget (mixture of two)",
        "question-only router",
        "three-state gates",
    ]
    assert rows["full model"].prefill_flops == 1.0
    assert rows["three-state gates"].mean_freeze_layer < rows["three-state gates"].mean_exit_layer
    text = (output / "comparison.md").read_text()
    for said in ("layers updated", "layers read", "prefill FLOPs", "schedule oracle", "schedules.png"):
        assert said in text
    for file in ("comparison.png", "budgets.png", "schedules.png"):
        assert (output / file).stat().st_size > 1000
    stored = json.loads((output / "comparison.json").read_text())
    curves = stored["traces"]["curves"]
    assert {"static", "schedule_oracle"} <= set(curves)
    kinds = stored["benchmarks"]["mini-GQA"]["kinds"]
    assert sum(one["questions"] for one in kinds.values()) == 24
    assert all(0 <= one["updated"] <= one["read"] <= 4 for one in kinds.values())


def test_budgets_hold_exits_static_schedules_and_the_router(compared):
    found, _ = compared
    assert found.budgets.baselines == ("fixed K", "static schedule", "question-only router", "exits")
    assert set(found.budgets.curves) > {"oracle", "schedule oracle"}
    needed = found.budgets.compute_at_same_answer
    assert needed.schedule_hindsight <= needed.hindsight
    assert needed.bound == needed.schedule_oracle <= needed.oracle
    for row in found.budgets.rows:
        assert row.risk["schedule oracle"].mean <= row.risk["oracle"].mean + 1e-6


def test_sets_of_frozen_layers_are_shown_at_their_cost(world, compared, tmp_path):
    found, output = compared
    model, processor = load_backbone(world / "backbone")
    share = kv_share(decoder_shape(model.config))
    assert len(found.sets) == 2 * 4  # by ShortV's rule and by the effect on the answer, of every size
    for one in found.sets:
        assert one.visual_compute == pytest.approx((4 - len(one.layers) * (1 - share)) / 4)
        difference = one.gates["risk"].mean - one.metrics["risk"]
        assert one.gates_minus["risk"].difference == pytest.approx(difference, abs=1e-9)
    one = next(one for one in found.sets if len(one.layers) == 2)
    settings = TeacherConfig(
        template="chat", max_new_tokens=4, reductions=f"frozen:{as_ranges(one.layers)}", exit_every=10
    )
    selection = select(open_conversations(world / "test.json"))
    write_traces(tmp_path, Teacher(model, processor, settings), selection)
    trace = TraceStore.open(tmp_path).trace()
    assert one.metrics["risk"] == pytest.approx(float(trace.risk[:, -1].double().mean()), abs=1e-4)
    same = float(trace.same_answer[:, -1].double().mean())
    assert one.metrics["same_answer"] == pytest.approx(same)
    assert "Static sets of frozen layers" in (output / "comparison.md").read_text()
    # Judged on other samples than the test traces: refused.
    held_out = json.loads((world / "sets" / "effects-held-out.json").read_text())
    held_out["of"]["data"] = "other"
    for name in ("effects-held-out.json", "frozen-sets.json"):
        (tmp_path / name).write_text((world / "sets" / name).read_text())
    (tmp_path / "effects-held-out.json").write_text(json.dumps(held_out))
    with pytest.raises(DataError, match="other samples or another backbone"):
        compare(_config(world, tmp_path / "out", gates=(str(world / "gates-0"),), frozen_sets=tmp_path))
    with pytest.raises(DataError, match="dyvte search-frozen --held-out-path"):
        compare(_config(world, tmp_path / "out", gates=(str(world / "gates-0"),), frozen_sets=world))


def test_answers_depend_on_the_schedule_alone(compared):
    found, _ = compared
    curves = found.benchmarks["mini-GQA"].curves
    assert set(curves.lookup_agreement.values()) == {1.0}
    for seed in found.gates:
        same = curves.rules.gates[seed].metrics["same_answer"]
        assert same[-1] == 1.0
        assert not any(np.isnan(same))


TWO = """
import os, sys
from dyvte.cli import main
from dyvte.comparison import tuned_router

tuned_router.ROUTER_MIN_STEPS = 5
assert main(["compare", "--config", "{config}", "--output", "{output}"]) == 0
print("rank", os.environ["RANK"], "exact", file=sys.stderr)
"""


@pytest.mark.full
def test_two_processes_find_what_one_finds(compared, tmp_path):
    _, output = compared
    on_two_ranks(tmp_path, TWO.format(config=output / "config.yaml", output=tmp_path / "out"))
    one, two = (json.loads((folder / "comparison.json").read_text()) for folder in (output, tmp_path / "out"))
    for found in (one, two):
        found["settings"].pop("machine")  # another number of threads
    assert two == one
    assert sorted(path.name for path in (tmp_path / "out" / "runs").rglob("*.jsonl")) == sorted(
        path.name for path in (output / "runs").rglob("*.jsonl")
    )
