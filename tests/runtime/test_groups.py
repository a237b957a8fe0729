"""Thresholds by group at run time: a row is decided as its group says, told by what its states are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dyvte import VisualExit
from dyvte.calibration import ThresholdPath
from dyvte.calibration.groups import closed_before, group_schedules
from dyvte.errors import ConfigError
from dyvte.gates import NOT_ASKED, GateStack, GroupFinder, GroupThresholds
from dyvte.policies import LearnedPolicy, NeverPolicy, parse_policy
from dyvte.policies.per_row import PerRowPolicy
from tests.helpers.batches import batch, llava
from tests.runtime.test_two_heads import IMAGES, features_by_hand, logits_by_hand, make_gates


@pytest.fixture(scope="module")
def case():
    model, processor = llava()
    inputs = batch(processor)
    features_BGSF = features_by_hand(model, inputs)
    return model, inputs, features_BGSF, make_gates(features_BGSF, "shared")


def grouped(gates: GateStack, features_BGSF: torch.Tensor, layer: int, heads: int) -> GateStack:
    """The gates with three groups, told by one direction of the features; one has no certificate."""
    features_RF = features_BGSF[IMAGES, -1, layer]
    mean_F = features_RF.mean(0)
    axis_F1 = torch.linalg.svd(features_RF - mean_F, full_matrices=False)[2][:1].T
    places_R = ((features_RF - mean_F) @ axis_F1)[:, 0]
    centers_G1 = places_R.quantile(torch.tensor([0.1, 0.5, 0.9]))[:, None]
    own = {"freeze_thresholds": (0.8, 0.55, 1.0)} if heads == 2 else {}
    given = GroupThresholds(layer=layer, names=("sure", "quick", "open"), thresholds=(0.75, 0.5, 1.0), **own)
    alone = {} if heads == 2 else {"freeze_head": False, "freeze_offsets": (), "freeze_threshold": 0.5}
    config = replace(gates.config, groups=given, **alone)
    made = GateStack(config)
    made.load_state_dict({n: t for n, t in gates.state_dict().items() if heads == 2 or "freezes" not in n})
    distances_R = (places_R[:, None] - centers_G1.T).square().amin(1)
    limit = distances_R.sort().values[-2] * 1.001 + 1e-4  # the row that is furthest away is like none
    made.finder = GroupFinder(mean_F, axis_F1, centers_G1, limit, torch.zeros(1, 1))
    return made.requires_grad_(False)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_rows_are_decided_by_their_groups_thresholds(case, layer, heads):
    model, inputs, features_BGSF, plain = case
    gates = grouped(plain, features_BGSF, layer, heads)
    with VisualExit(gates)(model) as run:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    found = run.records[0].found
    expected = gates.finder.find(features_BGSF[:, -1, layer])
    assert found.groups_B[IMAGES].tolist() == expected.groups_B[IMAGES].tolist()
    assert -1 in found.groups_B
    others = [row for row in range(len(found.groups_B)) if row not in IMAGES]
    assert set(found.groups_B[others].tolist()) <= {NOT_ASKED}
    torch.testing.assert_close(
        found.projected_BZ[IMAGES], expected.projected_BZ[IMAGES], rtol=1e-3, atol=1e-3
    )
    logits = logits_by_hand(plain, features_BGSF)
    path = ThresholdPath(
        logits if heads == 2 else logits.exit_BGL[:, -1], torch.ones(len(logits)), gap=0.0, kv_share=0.2
    )
    chosen = group_schedules(closed_before(path, layer), expected, gates.config.groups)
    assert run.exit_layers[IMAGES].tolist() == chosen.exit_layers_B[IMAGES].tolist()
    frozen = torch.minimum(chosen.freeze_layers_B, chosen.exit_layers_B)
    assert run.freeze_layers[IMAGES].tolist() == frozen[IMAGES].tolist()
    assert len(set(chosen.exit_layers_B[IMAGES].tolist())) > 1


def test_rows_of_other_policies_and_thresholds_stand_beside(case):
    model, inputs, features_BGSF, plain = case
    gates = grouped(plain, features_BGSF, 1, 2)
    by_group, one = LearnedPolicy(gates, by_group=True), LearnedPolicy(gates, 0.5, freeze_threshold=0.6)
    alone = []
    for policy in (by_group, one):
        with VisualExit.from_policy(policy)(model) as run:
            model(**inputs)
        alone.append((run.exit_layers, run.freeze_layers))
    count = len(inputs["input_ids"])
    mixed = PerRowPolicy([(by_group, one, NeverPolicy())[row % 3] for row in range(count)])
    with VisualExit.from_policy(mixed)(model) as run:
        model(**inputs)
    for row in IMAGES:
        exits, freezes = run.exit_layers[row].item(), run.freeze_layers[row].item()
        if row % 3 == 2:
            assert exits == freezes == gates.config.num_layers
        else:
            assert (exits, freezes) == tuple(values[row].item() for values in alone[row % 3])
        assert (run.records[0].found.groups_B[row] == NOT_ASKED) == (row % 3 != 0)


def test_a_stated_threshold_or_group_is_one_for_all_rows(case, tmp_path):
    _, _, features_BGSF, plain = case
    gates = grouped(plain, features_BGSF, 1, 2)
    gates.save_pretrained(tmp_path)
    assert VisualExit(gates).policy.by_group
    assert not VisualExit(gates, threshold=0.5).policy.by_group
    assert not VisualExit(gates, by_group=False).policy.by_group
    assert VisualExit.from_pretrained(tmp_path).policy.by_group
    assert parse_policy(f"gates:{tmp_path}").by_group
    named = parse_policy(f"gates:{tmp_path}@quick")
    assert (named.threshold, named.freeze_threshold, named.by_group) == (0.5, 0.55, False)
    assert not parse_policy(f"gates:{tmp_path}@0.5").by_group
    with pytest.raises(ConfigError, match="no calibrated group 'slow'; there are: sure, quick, open"):
        parse_policy(f"gates:{tmp_path}@slow")
    with pytest.raises(ConfigError, match="dyvte calibrate --groups"):
        LearnedPolicy(plain, by_group=True)
