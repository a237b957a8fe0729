"""`dyvte analyze shift`: groups and p-value from the questions' own features, answers by group."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dyvte import VisualExit
from dyvte.analysis import get_study
from dyvte.analysis.shift import found_groups
from dyvte.backbones import fingerprint, weights_digest
from dyvte.errors import ConfigError
from dyvte.evaluation.generation import encode_questions
from dyvte.gates import GateConfig, GateStack, GroupFinder, GroupThresholds
from tests.helpers.fixtures import write_mini_gqa
from tests.helpers.subjects import LAYERS, studied_world, subject_of

HIDDEN = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    world = studied_world(tmp_path_factory.mktemp("shift"))
    write_mini_gqa(world.root / "more", questions=18, images=6)
    world.questions = world.benchmark.load(world.root / "more")
    return world


def grouped(folder, world, reference_IZ) -> str:
    """Random gates with two groups that their last prompt token's first feature tells; one never leaves."""
    model = world.pipeline.model
    mean_F = torch.zeros(2 * HIDDEN)
    projection_FZ = torch.zeros(2 * HIDDEN, 3)
    projection_FZ[HIDDEN : HIDDEN + 3] = torch.eye(3)
    centers_GZ = torch.tensor([[-1.0, 0, 0], [1, 0, 0]])
    config = GateConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, threshold=0.5,
        groups=GroupThresholds(layer=1, names=("left", "right"), thresholds=(0.3, 1.0)),
        backbone={"id": "x", "fingerprint": fingerprint(model), "weights": weights_digest(model)},
        calibration={"unlike": 0.25, "num_samples": 4, "groups": [
            {"name": "left", "num_samples": 2}, {"name": "right", "num_samples": 1},
        ]},
    )  # fmt: skip
    gates = GateStack.init(config, seed=1)
    gates.finder = GroupFinder(mean_F, projection_FZ, centers_GZ, torch.tensor(torch.inf), reference_IZ)
    gates.save_pretrained(folder)
    return str(folder)


def test_groups_p_value_and_answers_are_those_of_the_questions(world, tmp_path):
    far = 50 + torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    path = grouped(tmp_path / "gates", world, far)
    subject = subject_of(world, tmp_path / "out", gates=(path,))
    named = subject.policies(f"gates:{path}")[0]
    found = found_groups(subject, named)
    exits = VisualExit.from_pretrained(path)
    prompts = subject.prompts(world.questions)
    for row, question in enumerate(world.questions):
        inputs = encode_questions(world.pipeline, [question], [prompts[row]]).inputs
        with exits(world.pipeline.model) as run, torch.no_grad():
            world.pipeline.model(**inputs)
        alone = run.records[0].found
        assert found.groups_B[row] == alone.groups_B[0]
        torch.testing.assert_close(found.projected_BZ[row], alone.projected_BZ[0], rtol=1e-4, atol=1e-4)
        assert run.exit_layers[0] == LAYERS or alone.groups_B[0] == 0
    metrics = get_study("shift")(subject).metrics
    (test,) = metrics["tests"]
    assert (test["num_at_hand"], test["num_calibration"]) == (6, 20)
    assert test["auc"] == 1.0
    assert test["p_value"] == pytest.approx(1 / 1000)
    left = float((found.groups_B == 0).double().mean())
    assert test["groups"] == {"left": (0.5, left), "right": (0.25, pytest.approx(1 - left))}
    rules = [row["rule"] for row in metrics["answers"]]
    assert rules == ["full model", f"{path}: one threshold", f"{path}: by group"]
    assert metrics["answers"][2]["visual_compute"] >= 1 - left


def test_gates_without_groups_have_nothing_to_hold_questions_against(world, tmp_path):
    path = grouped(tmp_path / "gates", world, torch.zeros(6, 3))
    plain = GateStack.from_pretrained(path)
    plain.config, plain.finder = replace(plain.config, groups=None), None
    plain.save_pretrained(tmp_path / "plain")
    subject = subject_of(world, tmp_path / "out", gates=(str(tmp_path / "plain"),))
    with pytest.raises(ConfigError, match="dyvte calibrate --groups"):
        get_study("shift")(subject)
