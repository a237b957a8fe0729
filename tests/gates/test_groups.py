"""Thresholds by group: the rule against each group decided alone, the finder by hand, the files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from dyvte.errors import CheckpointError, ConfigError
from dyvte.gates import (
    NOT_ASKED,
    UNLIKE,
    FoundGroups,
    GateConfig,
    GateStack,
    GroupFinder,
    GroupRule,
    GroupThresholds,
    exit_layers,
    load_checkpoint,
    save_config,
    write_groups,
)

LAYERS, ROWS = 6, 40


def finder(limit: float = 4.0, size: int = 2) -> GroupFinder:
    """Two groups at (0, 0) and (10, 0) of features that are projected to their first two."""
    projection = torch.zeros(4, size)
    projection[:size] = torch.eye(size)
    centers = torch.zeros(2, size)
    centers[1, 0] = 10
    return GroupFinder(torch.ones(4), projection, centers, torch.tensor(limit), torch.zeros(3, size))


def test_rows_are_of_the_nearest_group_or_of_none() -> None:
    features = torch.ones(5, 4) + torch.tensor(
        [[0.0, 0, 9, 9], [9, 1, 0, 0], [4, 0, 0, 0], [10, 1.9, 0, 0], [torch.nan, 0, 0, 0]]
    )
    found = finder().find(features)
    assert found.groups_B.tolist() == [0, 1, UNLIKE, 1, UNLIKE]
    assert found.distances_B[:4].tolist() == pytest.approx([0, 2, 16, 3.61])
    again = FoundGroups.unpacked(found.packed())
    assert again.groups_B.tolist() == found.groups_B.tolist()
    assert torch.equal(again.projected_BZ[:4], found.projected_BZ[:4])
    assert finder(float("inf")).find(features).groups_B[:4].tolist() == [0, 1, 0, 1]


def packed(groups: list[int]) -> torch.Tensor:
    return torch.stack((torch.tensor(groups).float(), torch.zeros(len(groups))))


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_each_row_is_decided_as_its_group_alone(layer: int) -> None:
    generator = torch.Generator().manual_seed(layer)
    logits_BL = torch.randn(ROWS, LAYERS, generator=generator)
    logits_BL[5, 3] = torch.nan
    groups = torch.randint(-1, 3, (ROWS,), generator=generator).tolist()
    given = GroupThresholds(layer=layer, names=("a", "b", "c"), thresholds=(0.5, 0.8, 1.0))
    rule = GroupRule(ROWS, LAYERS, given, 0, fallback=4)
    for k in range(LAYERS):
        assert rule.wants(k) == (k == layer or (k > layer and bool(rule.asking_B.any())))
        if not rule.wants(k):
            continue
        column = logits_BL[:, k - 1] if k else torch.zeros(ROWS)
        extra = torch.cat((torch.stack((column, column)), packed(groups)))
        rule.step(k, extra if k == layer else column)
    for row, group in enumerate(groups):
        if group in (-1, 2):  # like none, or without certificate: not even a broken gate lets it leave
            assert rule.exit_layers_B[row] == LAYERS
            continue
        alone = exit_layers(logits_BL[row : row + 1], given.thresholds[group], max(1, layer), fallback=4)
        assert rule.exit_layers_B[row] == int(alone)
    assert torch.equal(rule.freeze_layers_B, rule.exit_layers_B)
    assert rule.found.groups_B.tolist() == groups


def test_a_row_that_nobody_asks_has_no_group() -> None:
    given = GroupThresholds(layer=1, names=("a",), thresholds=(0.5,))
    rule = GroupRule(3, LAYERS, given, 0)
    rule.asking_B[1] = False
    rule.step(1, torch.cat((torch.full((2, 3), 5.0), packed([0, 0, -1]))))
    assert rule.found.groups_B.tolist() == [0, NOT_ASKED, UNLIKE]
    assert rule.exit_layers_B.tolist() == [1, LAYERS, LAYERS]


def test_both_heads_take_the_groups_thresholds() -> None:
    given = GroupThresholds(
        layer=0, names=("early", "late"), thresholds=(0.5, 0.9), freeze_thresholds=(0.5, 0.9)
    )
    rule = GroupRule(2, LAYERS, given, 0)
    level = torch.full((2,), 1.0)  # above the level of 0.5, below that of 0.9
    rule.step(0, torch.cat((torch.stack((level - 9, level)), packed([0, 1]))))
    assert rule.freeze_layers_B.tolist() == [0, LAYERS]
    rule.step(1, torch.stack((level, level)))
    assert rule.exit_layers_B.tolist() == [1, LAYERS]
    assert rule.freeze_layers_B.tolist() == [0, LAYERS]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": -1}, "layer -1"),
        ({"names": ("a", "a")}, "none twice"),
        ({"thresholds": (0.5,)}, "thresholds of 2 groups"),
        ({"thresholds": (0.5, 1.5)}, "thresholds of 2 groups"),
        ({"freeze_thresholds": (0.5,)}, "freeze_thresholds of 2 groups"),
    ],
)
def test_groups_that_make_no_sense_are_refused(fields: dict, message: str) -> None:
    good = {"layer": 1, "names": ("a", "b"), "thresholds": (0.5, 0.6)}
    with pytest.raises(ConfigError, match=message):
        GroupThresholds(**{**good, **fields})


def config(**fields) -> GateConfig:
    return GateConfig(num_layers=LAYERS, hidden_size=2, **fields)


def test_a_config_without_groups_is_the_text_that_it_was() -> None:
    assert "groups" not in json.loads(config().to_json())
    given = GroupThresholds(layer=2, names=("a", "b"), thresholds=(0.5, 1.0))
    again = GateConfig.from_json(config(groups=given).to_json())
    assert again.groups == given
    with pytest.raises(ConfigError, match="after layer 6"):
        config(groups=replace(given, layer=LAYERS))
    with pytest.raises(ConfigError, match="freeze_head"):
        config(groups=replace(given, freeze_thresholds=(0.5, 0.5)))
    broken = json.loads(config(groups=given).to_json())
    broken["groups"]["colour"] = 1
    with pytest.raises(CheckpointError, match="colour"):
        GateConfig.from_json(json.dumps(broken))


def test_groups_lie_beside_the_weights_and_must_be_there(tmp_path) -> None:
    given = GroupThresholds(layer=1, names=("a", "b"), thresholds=(0.5, 0.6))
    gates = GateStack.init(config(groups=given))
    gates.finder = finder()
    gates.save_pretrained(tmp_path)
    _, again = load_checkpoint(tmp_path)
    features = torch.randn(7, 4)
    assert torch.equal(again.finder.find(features).groups_B, gates.finder.find(features).groups_B)
    told_by = replace(given, finder=gates.finder.digest())
    save_config(config(groups=told_by), tmp_path)
    assert load_checkpoint(tmp_path)[0].groups == told_by
    write_groups(tmp_path, finder(limit=5.0))
    with pytest.raises(CheckpointError, match="another calibration, or one was stopped half-way"):
        load_checkpoint(tmp_path)
    save_config(config(groups=replace(given, names=("a", "b", "c"), thresholds=(0.5,) * 3)), tmp_path)
    with pytest.raises(CheckpointError, match=r"centers_GZ has shape \(2, 2\), expected \(3, 2\)"):
        load_checkpoint(tmp_path)
    (tmp_path / "groups.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no groups\.safetensors"):
        load_checkpoint(tmp_path)
    save_config(config(), tmp_path)
    assert load_checkpoint(tmp_path)[1].finder is None
