"""Certificates by group: each bound by simulation, whatever the mix; what is written and read."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from dyvte.calibration import (
    Grouping,
    ThresholdPath,
    calibrate_groups,
    calibrate_risk,
    certified_threshold,
    gate_logits,
    threshold_at,
    write_calibration,
)
from dyvte.calibration.apply import bounded_loss
from dyvte.calibration.finder import Parts, conformal_limit, features_after, fit_finder
from dyvte.calibration.groups import closed_before, group_schedules
from dyvte.calibration.pvalues import P_VALUES
from dyvte.calibration.risk import image_means
from dyvte.cli import main
from dyvte.errors import CalibrationError
from dyvte.gates import GateConfig, GateStack, close_freezes, load_checkpoint, uniform_freeze_offsets
from dyvte.teacher import Manifest, Shard, TraceStore
from dyvte.teacher.manifest import grid_fingerprint
from tests.helpers.traces import make_trace

# --- a finite population of three groups whose risks are known exactly ---

QUESTIONS, IMAGES, DEPTH = 4, 2400, 8
LEVELS = tuple(10 - 0.5 * step for step in range(41))
ALPHA, DELTA = 0.06, 0.1
MIX = torch.tensor([0.7, 0.2, 0.1])
"""In calibration; the last group is the hard one, of which gates are too sure."""


@cache
def population() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    kind = torch.multinomial(MIX, IMAGES * QUESTIONS, replacement=True, generator=generator)
    images = [str(i) for i in range(IMAGES) for _ in range(QUESTIONS)]
    shared = normal(IMAGES, 1).expand(-1, QUESTIONS).flatten()
    needs = torch.tensor([2.5, 3.5, 6.0])[kind] + 0.8 * shared + 0.4 * normal(IMAGES * QUESTIONS)
    claims = torch.tensor([2.5, 3.5, 4.0])[kind] + 0.8 * shared
    layer = torch.arange(DEPTH + 1.0)
    mood = torch.rand(IMAGES, 1, generator=generator).expand(-1, QUESTIONS).flatten()
    loss = (mood[:, None] < torch.sigmoid(-3 * (layer - needs[:, None]))).float()
    loss[:, -1] = 0
    logits = 1.5 * (layer[1:] - 1 - claims[:, None]) + 0.8 * normal(IMAGES * QUESTIONS, DEPTH)
    features = torch.nn.functional.one_hot(kind, 3) * 3.0 + 0.7 * normal(IMAGES * QUESTIONS, 3)
    path = ThresholdPath(logits, torch.ones(len(logits)))
    parts = Parts.of(images, 0.25, 0)
    names, finder = fit_finder(features, parts, [f"kind {k}" for k in kind.tolist()], images, 0.02)
    found = finder.find(features).groups_B
    # Of every group as found: losses of its images, at every level.
    tested = torch.zeros(len(images), dtype=torch.bool)
    tested[parts.test] = True
    groups = []
    for group in range(len(names)):
        rows = ((found == group) & tested).nonzero().flatten()
        own = path.rows(rows)
        losses = torch.stack(
            [loss[rows].gather(1, own.at(level).exit_layers_B[:, None])[:, 0] for level in LEVELS], 1
        )
        by_image = image_means(losses, [images[row] for row in rows.tolist()])
        groups.append(SimpleNamespace(by_image=by_image, risk=by_image.mean(0)))
    return SimpleNamespace(
        kind=kind, images=images, loss=loss, path=path, features=features, parts=parts, names=names,
        finder=finder, found=found, groups=groups,
    )  # fmt: skip


def chosen_levels(group: int, draws: int, images: int, method: str) -> torch.Tensor:
    """Index of the certified level of a group for every draw of its images, -1 for none."""
    known = population().groups[group].by_image
    generator = torch.Generator().manual_seed(group)
    picks = torch.randint(len(known), (draws, images), generator=generator)
    return torch.cat(
        [
            (P_VALUES[method](known[part], ALPHA, DELTA) <= DELTA).long().cumprod(1).sum(1) - 1
            for part in picks.split(200)
        ]
    )


def test_one_threshold_for_all_breaks_where_the_mix_changes() -> None:
    known = population()
    pooled = certified_threshold(known.path, known.loss[:, None], known.images, ALPHA, DELTA, levels=LEVELS)
    level = next(n for n, one in enumerate(LEVELS) if threshold_at(one) == pooled.threshold)
    risks = torch.tensor([group.risk[level] for group in known.groups])
    assert float(risks @ MIX.double()) < ALPHA
    assert risks[2] > 2 * ALPHA  # the hard group, and so every mix that holds much of it


@pytest.mark.parametrize("method", list(P_VALUES))
@pytest.mark.parametrize("group", [0, 1, 2])
def test_violations_in_every_group_stay_below_delta_over_2000_draws(group: int, method: str) -> None:
    risk = population().groups[group].risk
    chosen = chosen_levels(group, 2000, 120, method)
    violated = (chosen >= 0) & (risk[chosen.clamp(min=0)] > ALPHA)
    assert violated.double().mean() <= DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / 2000)
    naive = (population().groups[group].by_image[:120].mean(0) <= ALPHA).long().cumprod(0).sum() - 1
    assert naive >= 0  # there is something to choose


def test_any_mix_of_certified_groups_is_bounded_and_the_easy_one_still_leaves_early() -> None:
    risks = []
    for group in range(3):
        chosen = chosen_levels(group, 300, 400, "betting")
        risks.append(torch.where(chosen >= 0, population().groups[group].risk[chosen.clamp(min=0)], 0.0))
    worst = torch.stack(risks).amax(0)  # no mix has a larger risk
    assert (worst > ALPHA).double().mean() <= 3 * DELTA + 3 * math.sqrt(0.3 * 0.7 / 300)
    easy = chosen_levels(0, 20, 400, "betting")
    hard = chosen_levels(2, 20, 400, "betting")
    assert easy.double().mean() > hard.double().mean() + 2


def test_the_finder_finds_what_can_be_found_and_the_guard_keeps_its_share() -> None:
    known = population()
    tested = known.parts.test
    found, kind = known.found[tested], known.kind[tested]
    like = found >= 0
    assert (found == kind)[like].double().mean() > 0.95
    assert (~like).double().mean() == pytest.approx(0.02, abs=0.012)
    assert known.finder.find(torch.full((1, 3), 40.0)).groups_B.tolist() == [-1]
    assert len(known.finder.reference_IZ) == len({known.images[row] for row in tested.tolist()})


def test_the_guards_limit_is_exceeded_by_its_share_of_further_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    above = [
        float(
            (torch.rand(400, generator=generator) > conformal_limit(torch.rand(60, generator=generator), 0.1))
            .double()
            .mean()
        )
        for _ in range(300)
    ]
    assert sum(above) / len(above) == pytest.approx(0.1 * 60 / 61, abs=0.01)
    assert conformal_limit(torch.rand(5), 0.1) == torch.inf
    assert conformal_limit(torch.rand(500), 0.0) == torch.inf


def test_clusters_need_no_names() -> None:
    known = population()
    names, finder = fit_finder(known.features, known.parts, 3, known.images, 0.0)
    assert names == ("cluster 0", "cluster 1", "cluster 2")
    found = finder.find(known.features).groups_B
    table = torch.stack([torch.bincount(known.kind[found == g], minlength=3) for g in range(3)])
    assert float(table.amax(1).sum() / table.sum()) > 0.9


def test_parts_share_no_image() -> None:
    images = [str(i // 3) for i in range(300)]
    parts = Parts.of(images, 0.3, seed=4)
    own = [{images[row] for row in part.tolist()} for part in (parts.fit, parts.limit, parts.test)]
    assert [len(one) for one in own] == [20, 10, 70]
    assert not own[0] & own[1]
    assert not (own[0] | own[1]) & own[2]
    with pytest.raises(CalibrationError, match="2 images"):
        Parts.of(["a", "b"], 0.3, 0)


# --- checkpoints ---

LAYERS, FREEZES = 6, (0, 2, 3)


def gates_and_store(folder, freezes=FREEZES) -> tuple[GateStack, TraceStore]:
    heads = {}
    if freezes:
        offsets = close_freezes(uniform_freeze_offsets(LAYERS), freezes)
        heads = {"freeze_head": True, "freeze_offsets": offsets, "freeze_threshold": 0.6}
    gates = GateStack.init(GateConfig(num_layers=LAYERS, hidden_size=2, threshold=0.4, **heads), seed=1)
    gates.save_pretrained(folder / "gates")
    trace = make_trace(800, LAYERS, freezes=freezes)
    # Rows alternate between two kinds, told by the features before and after the first layer.
    signs = torch.tensor([1.0, -1.0]).repeat(400)[:, None] * 4
    trace.features[:, 0] += signs
    if trace.grid is not None:
        trace.grid.embeddings[:] += signs
    grid = grid_fingerprint(trace.freezes, trace.grid.kv_share) if trace.grid is not None else {}
    made = Manifest(
        fingerprint={"features": "mean_prompt+last_prompt", **grid},
        num_samples=len(trace), shard_size=len(trace), num_layers=LAYERS, feature_size=4,
    )  # fmt: skip
    store = TraceStore.create(folder / "trace", made)
    store.write(0, Shard(trace=trace, image_ids=tuple(str(i // 4) for i in range(len(trace)))))
    return gates, store


GRID = tuple(10.0 - step for step in range(21))
NAMES = {str(i): ("odd" if i % 2 else "even") for i in range(800)}


@pytest.mark.parametrize("freezes", [FREEZES, ()])
@pytest.mark.parametrize("layer", [None, 2])
def test_every_group_gets_the_threshold_that_it_would_get_alone(tmp_path, freezes, layer) -> None:
    gates, store = gates_and_store(tmp_path, freezes)
    found = calibrate_groups(
        gates, store, Grouping(names=NAMES, layer=layer), 0.5, 0.1, loss="risk:1", levels=GRID
    )
    used = layer if layer is not None else int(not freezes)
    assert found.groups.layer == used
    assert found.groups.names == ("even", "odd")
    trace, images = store.trace(gates.config.features), store.image_ids()
    parts = Parts.of(images, 0.25, 0)
    path = closed_before(ThresholdPath.of(gate_logits(gates, trace), trace, gates.config), used)
    told = found.finder.find(features_after(trace, used)).groups_B
    for group, name in enumerate(found.groups.names):
        rows = [row for row in parts.test.tolist() if told[row] == group]
        alone = certified_threshold(
            path.rows(torch.tensor(rows)), bounded_loss(trace, "risk:1", path)[rows],
            [images[row] for row in rows], 0.5, 0.1, levels=GRID,
        )  # fmt: skip
        assert found.groups.of(name) == (alone.threshold, alone.freeze_threshold)
        record = found.record["groups"][group]
        assert (record["name"], record["num_samples"]) == (name, len(rows))
    if layer is None:
        shares = [one["num_samples"] for one in found.record["groups"]]
        assert sum(shares) > 0.95 * len(parts.test)
        assert found.record["unlike"] < 0.05
    chosen = group_schedules(path, found.finder.find(features_after(trace, used)), found.groups)
    rows = parts.test
    assert found.record["mean_exit_layer"] == pytest.approx(float(chosen.exit_layers_B[rows].double().mean()))
    assert found.record["one_threshold"]["threshold"] == found.threshold


def test_what_is_written_is_what_decides_and_goes_when_calibrated_otherwise(tmp_path) -> None:
    gates, store = gates_and_store(tmp_path)
    folder = tmp_path / "gates"
    weights = (folder / "gates.safetensors").read_bytes()
    found = calibrate_groups(gates, store, Grouping(clusters=2), 0.5, 0.1, loss="risk:1", levels=GRID)
    config = write_calibration(folder, found)
    again, stack = load_checkpoint(folder)
    assert again.groups == config.groups == found.groups
    assert (again.threshold, again.freeze_threshold) == (found.threshold, found.freeze_threshold)
    assert torch.equal(stack.finder.reference_IZ, found.finder.reference_IZ)
    assert again.groups.finder == stack.finder.digest()
    assert (folder / "gates.safetensors").read_bytes() == weights
    assert json.loads((folder / "gate_config.json").read_text())["calibration"]["kind"] == "risk by group"
    write_calibration(folder, calibrate_risk(gates, store, 0.9, 0.1))
    assert not (folder / "groups.safetensors").exists()
    assert load_checkpoint(folder)[0].groups is None


def test_a_group_without_certificate_never_leaves_and_all_bounds_may_hold_at_once(tmp_path) -> None:
    gates, store = gates_and_store(tmp_path)
    none = calibrate_groups(gates, store, Grouping(names=NAMES), 0.001, 0.1, levels=GRID)
    assert none.groups.thresholds == none.groups.freeze_thresholds == (1.0, 1.0)
    assert none.record["visual_compute"] == none.record["same_answer"] == 1.0
    assert "0 of 2 groups certified" in none.text
    each = calibrate_groups(gates, store, Grouping(names=NAMES), 0.5, 0.2, loss="risk:1", levels=GRID)
    joint = calibrate_groups(
        gates, store, Grouping(names=NAMES, joint=True), 0.5, 0.2, loss="risk:1", levels=GRID
    )
    half = calibrate_groups(gates, store, Grouping(names=NAMES), 0.5, 0.1, loss="risk:1", levels=GRID)
    assert joint.groups == half.groups
    assert all(a >= b for a, b in zip(joint.groups.thresholds, each.groups.thresholds, strict=True))


def test_samples_without_a_group_and_layers_without_features_are_named(tmp_path) -> None:
    gates, store = gates_and_store(tmp_path, ())
    few = {name: group for name, group in NAMES.items() if name != "7"}
    with pytest.raises(CalibrationError, match=r"1 of 800 calibration samples have no group \(first: 7\)"):
        calibrate_groups(gates, store, Grouping(names=few), 0.5, 0.1)
    with pytest.raises(CalibrationError, match="no features of the embeddings"):
        calibrate_groups(gates, store, Grouping(names=NAMES, layer=0), 0.5, 0.1)
    with pytest.raises(CalibrationError, match=r"names .* or a number of clusters"):
        Grouping()
    with pytest.raises(CalibrationError, match="guard"):
        replace(Grouping(clusters=2), guard=1.0)


def test_the_command_reads_groups_from_the_records(tmp_path, capsys) -> None:
    gates_and_store(tmp_path)
    records = [{"id": name, "kind": group, "image": "x.png"} for name, group in NAMES.items()]
    (tmp_path / "records.json").write_text(json.dumps(records))
    common = ["calibrate", "--gates", str(tmp_path / "gates"), "--trace", str(tmp_path / "trace")]
    asked = ["--groups", f"{tmp_path / 'records.json'}:kind"]
    assert main([*common, *asked, "--budget", "0.5"]) == 2
    assert "--groups bounds a risk" in capsys.readouterr().err
    assert main([*common, *asked, "--alpha", "0.5", "--loss", "risk:1", "--joint", "--guard", "0.05"]) == 0
    assert "2 of 2 groups certified at alpha 0.5" in capsys.readouterr().out
    record = load_checkpoint(tmp_path / "gates")[0].calibration
    assert (record["joint"], record["guard"], record["groups_of"]) == (True, 0.05, "named")
    assert [one["name"] for one in record["groups"]] == ["even", "odd"]
