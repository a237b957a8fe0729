"""Trainings that are tried for a target: the measure by brute force, the choice, the run's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dyvte.config import from_dict, load_config
from dyvte.errors import ConfigError
from dyvte.gates import GateStack, exit_layers, load_checkpoint
from dyvte.objectives import expected_risk
from dyvte.training.candidates import SHARES, Choice, candidate_configs, choose, value_of
from dyvte.training.config import TrainConfig
from dyvte.training.dryrun import dry_run
from dyvte.training.target import CANDIDATES, OWN, TargetConfig
from dyvte.training.train import train
from tests.helpers.trainings import same, weights
from tests.helpers.world import World
from tests.training.test_training import LAYERS, make_config, make_gates, make_trace

WORLD = World(conversations={"train": range(12)}, stops=True)


def fitted(steps: int, seed: int = 0) -> GateStack:
    gates, trace = make_gates(), make_trace(200, seed=1)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in gates.parameters() if p.dim()], lr=0.02)
    for _ in range(steps):
        batch = trace.rows(torch.randint(len(trace), (32,)))
        optimizer.zero_grad()
        expected_risk(gates(batch.features), batch, lam=0.1, span=100.0).backward()
        optimizer.step()
    return gates.eval()


def frontier_by_hand(gates: GateStack, trace) -> list[tuple[float, float]]:
    """(compute, loss) at each level of the certificate's grid."""
    with torch.no_grad():
        logits = gates(trace.features)
    points = []
    for step in range(401):
        level = 20.0 - 0.1 * step
        exits = exit_layers(logits, float(torch.sigmoid(torch.tensor(level, dtype=torch.float64))))
        loss = 1 - trace.same_answer[torch.arange(len(trace)), exits]
        points.append((float(exits.float().mean()) / LAYERS, float(loss.mean())))
    return points


def test_the_value_is_the_compute_that_a_bound_costs():
    gates, held_out, alpha = fitted(60), make_trace(120, seed=2), 0.2
    points = frontier_by_hand(gates, held_out)
    for share in SHARES:
        # the grid's own points bracket what a mixture of two of them spends
        enough = [compute for compute, loss in points if loss <= share * alpha]
        assert enough
    value = value_of(gates, held_out, TargetConfig(alpha=alpha))
    upper = np.mean([min(c for c, loss in points if loss <= share * alpha) for share in SHARES])
    assert value <= upper + 1e-6
    assert value >= np.mean([min(c for c, loss in points) for _ in SHARES])
    at_budget = value_of(gates, held_out, TargetConfig(budget=0.6))
    assert at_budget <= min(loss for compute, loss in points if compute <= 0.54) + 1e-6


def test_gates_that_never_get_there_cost_the_full_model():
    gates = make_gates()
    held_out = make_trace(60, seed=3)
    wrong = torch.zeros_like(held_out.same_answer)
    held_out.same_answer.copy_(wrong)
    held_out.same_answer[:, -1] = 1
    # a mixture with what is always wrong may spend that much less
    assert 1 - 0.01 <= value_of(gates, held_out, TargetConfig(alpha=0.01)) <= 1


def test_the_best_is_kept_and_a_mean_only_where_it_is_better():
    held_out, target = make_trace(300, seed=4), TargetConfig(alpha=0.1)
    stacks = {"new": make_gates().eval(), "half": fitted(15), "good": fitted(120), "other": fitted(120, 7)}
    gates, choice = choose(stacks, held_out, target)
    singles = {name: value_of(one, held_out, target) for name, one in stacks.items()}
    assert {name: choice.values[name] for name in stacks} == pytest.approx(singles)
    assert choice.chosen[0] == min(singles, key=singles.get)
    kept = choice.values["+".join(choice.chosen)]
    assert kept <= min(singles.values())
    assert value_of(gates, held_out, target) == pytest.approx(kept)
    tried = [name for name in choice.values if "+" in name]
    assert all(name.startswith(choice.chosen[0]) for name in tried)
    assert "<- kept" in choice.table()


def test_candidates_differ_in_their_recipe_alone(tmp_path: Path):
    cfg = make_config(tmp_path, target={"alpha": 0.02}, gates={"features": ["last_prompt"]})
    found = candidate_configs(cfg)
    assert list(found) == [OWN, *CANDIDATES]
    assert {one.traces for one in found.values()} == {cfg.traces}
    assert {one.data.validation_fraction for one in found.values()} == {0.2}
    assert len({one.output_dir for one in found.values()}) == len(found)
    assert not any(one.target.is_set for one in found.values())
    assert found[OWN].objective == cfg.objective
    assert found["safe"].objective == CANDIDATES["safe"].objective
    assert found["safe"].gates.features == ("last_prompt",)
    two_heads = candidate_configs(make_config(tmp_path, target={"budget": 0.3}, gates={"freeze_head": True}))
    assert "safe" not in two_heads
    assert "answer" in two_heads


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": {"alpha": 0.1, "budget": 0.5}}, "not both"),
        ({"target": {"alpha": 1.5}}, r"target\.alpha must lie in \(0, 1\)"),
        ({"target": {"alpha": 0.1, "loss": "risk"}}, "no bound"),
        ({"target": {"alpha": 0.1, "candidates": ["best"]}}, "best"),
        ({"target": {"alpha": 0.1}, "lora": {"enabled": True}}, "adapter"),
    ],
)
def test_targets_that_cannot_be_meant_are_named(tmp_path: Path, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(tmp_path, **settings)


def run_config(world: Path, output: Path, **target) -> TrainConfig:
    return from_dict(
        TrainConfig,
        {
            "model": {"path": str(world / "backbone")},
            "data": {"path": str(world / "train.json"), "image_folder": str(world / "images")},
            "teacher": {"batch_size": 8, "max_new_tokens": 3},
            "epochs": 2,
            "batch_size": 8,
            "target": target,
            "output_dir": str(output),
        },
    )


def test_a_run_with_a_target_keeps_the_best_and_says_so(world: Path, tmp_path: Path):
    output = tmp_path / "run"
    cfg = run_config(world, output, alpha=0.5, held_out=0.4, candidates=["answer", "safe"])
    assert "3 trainings to choose from" in str(dry_run(cfg, 1))
    result = train(cfg)
    choice = result.choice
    assert set(choice.chosen) <= {OWN, "answer", "safe"}
    assert Choice.read(output) == choice
    config, gates = load_checkpoint(output / "gates")
    assert gates is not None
    assert config.training["choice"]["chosen"] == list(choice.chosen)
    objective = load_config(TrainConfig, output / "candidates" / choice.chosen[0] / "config.yaml").objective
    assert config.training["objective"]["name"] == objective.name
    if len(choice.chosen) == 1:
        assert same(weights(output), weights(output / "candidates" / choice.chosen[0]))
    assert {p.name for p in (output / "candidates").iterdir()} == {OWN, "answer", "safe"}
    assert not (output / "candidates" / OWN / "trace").exists()

    # started again it is done; without its summary it takes up what the candidates left
    assert train(cfg).choice == choice
    before = weights(output)
    (output / "summary.json").unlink()
    shutil.rmtree(output / "gates")
    logged = (output / "candidates/safe/train_log.jsonl").read_text()
    assert train(cfg).choice == choice
    assert same(weights(output), before)
    assert (output / "candidates/safe/train_log.jsonl").read_text() == logged
    values = json.loads((output / "choice.json").read_text())["values"]
    assert all(np.isfinite(list(values.values())))
