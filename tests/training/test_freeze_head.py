"""Training gates of two heads from traces with a freeze grid, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dyvte.backbones import describe_config
from dyvte.calibration import gate_logits
from dyvte.cli import main
from dyvte.errors import ConfigError
from dyvte.gates import (
    CLOSED,
    GateConfig,
    GateStack,
    HeadLogits,
    schedules,
    uniform_freeze_offsets,
    uniform_offsets,
)
from dyvte.objectives import expected_risk
from dyvte.teacher.freeze_grid import LABELS
from dyvte.teacher.trace import Trace
from dyvte.training.gate_training import GateTraining
from dyvte.training.metrics import budget_rows, validation_metrics
from dyvte.training.train import make_gates
from tests.helpers.models import tiny_llava
from tests.helpers.traces import make_trace
from tests.training.test_training import HIDDEN, LAYERS, make_config, processes  # noqa: F401

FREEZES = (0, 2)


def telling_trace(rows: int = 96, seed: int = 0) -> Trace:
    """Answers that are safe from a freeze layer and an exit layer on, which the features tell."""
    trace = make_trace(rows, LAYERS, seed=seed, features=2 * HIDDEN, freezes=FREEZES)
    generator = torch.Generator().manual_seed(seed)
    needs_freeze = torch.randint(0, 3, (rows,), generator=generator)
    needs_exit = torch.randint(1, LAYERS + 1, (rows,), generator=generator)
    layer = torch.arange(LAYERS + 1)
    plain = (layer < torch.maximum(needs_exit, needs_freeze)[:, None]).float()
    frozen = [
        torch.where((needs_freeze > f)[:, None], 1.0, (layer < needs_exit[:, None]).float()) for f in FREEZES
    ]
    wrong = torch.stack(frozen, 1)
    for i, f in enumerate(FREEZES):
        wrong[:, i, :f], wrong[:, i, f] = torch.nan, plain[:, f]
    labels = {name: 1 - wrong if name in ("agreement", "same_answer") else wrong for name in LABELS}
    told = torch.zeros(rows, 2 * HIDDEN)
    told[torch.arange(rows), needs_freeze] = 2.0
    told[torch.arange(rows), 3 + needs_exit % (2 * HIDDEN - 3)] += 2.0

    def features(like: torch.Tensor) -> torch.Tensor:
        return 0.1 * like + (told if like.dim() == 2 else told[:, None])

    grid = replace(
        trace.grid,
        **labels,
        embeddings=features(trace.grid.embeddings),
        features=features(trace.grid.features),
    )
    exits = {name: 1 - plain if name in ("agreement", "same_answer") else plain for name in LABELS}
    return replace(trace, **exits, features=features(trace.features), grid=grid)


def configured(tmp_path, architecture: str = "scaled", **settings):
    return make_config(
        tmp_path, gates={"freeze_head": True, "architecture": architecture}, epochs=20,
        objective={"name": "expected_risk", "lam": 0.2, "span": 10.0, "loss": "same_answer"}, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("architecture", ["scaled", "shared"])
def test_both_heads_learn_what_the_features_tell(tmp_path, processes, architecture) -> None:  # noqa: F811
    cfg, trace = configured(tmp_path, architecture), telling_trace()
    gates = make_gates(cfg, LAYERS, HIDDEN, {}, trace.exits, trace.freezes)
    gates.fit_inputs(**trace.gate_inputs())
    assert [offset == CLOSED for offset in gates.config.freeze_offsets] == [
        j not in FREEZES for j in range(LAYERS)
    ]
    before = {name: tensor.clone() for name, tensor in gates.state_dict().items()}
    start = float(expected_risk(gate_logits(gates, trace), trace, lam=0.2, loss="same_answer"))
    held_out = telling_trace(40, seed=1)
    training = GateTraining(cfg, gates, trace, held_out, processes)
    reported = []
    try:
        training.run(training.resume(), lambda step, metrics: reported.append(metrics), lambda _: None)
        weights = training.weights()
    finally:
        training.close()
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    assert {"freezes.0.w2.weight", "freezes.2.w2.weight", "gates.0.w2.weight", "trunk.w1.weight"} <= moved
    # what is never asked never moves, nor do constants
    assert not any(name.startswith(("freezes.1.", "freezes.3.", f"gates.{LAYERS - 1}.")) for name in moved)
    assert not moved & {"trunk.mean", "trunk.scale"}
    trained = GateStack(gates.config)
    trained.load_state_dict(weights)
    logits = gate_logits(trained, held_out)
    assert isinstance(logits, HeadLogits)
    assert float(expected_risk(logits, held_out, lam=0.2, loss="same_answer")) < 0.6 * start
    assert schedules(logits, 0.5).freeze_layers_B.double().mean() < LAYERS - 0.5
    metrics = validation_metrics(logits, held_out, 0.5)
    assert metrics["validation/mean_freeze_layer"] < metrics["validation/mean_exit_layer"]
    rows = budget_rows(gate_logits(trained, trace), trace, logits, held_out)
    assert [row.budget for row in rows][-1] == 0.5
    assert all(row.visual_compute < row.budget + 0.1 for row in rows)
    assert any("validation/mean_freeze_layer" in one for one in reported)


def test_a_freeze_head_needs_freeze_layers_and_an_objective_that_trains_it(tmp_path) -> None:
    cfg = configured(tmp_path)
    with pytest.raises(ConfigError, match=r"teacher\.freeze_every"):
        make_gates(cfg, LAYERS, HIDDEN, {}, freezes=())
    labelled = replace(cfg, objective=make_config(tmp_path, objective={"name": "safe_label"}).objective)
    with pytest.raises(ConfigError, match="safe_label trains no freeze head"):
        make_gates(labelled, LAYERS, HIDDEN, {}, freezes=FREEZES)


def test_gates_to_start_from_keep_their_head_and_close_what_is_not_traced(tmp_path) -> None:
    config = GateConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, freeze_head=True, offsets=uniform_offsets(LAYERS)
    )
    GateStack.init(config).save_pretrained(tmp_path / "gates")
    cfg = configured(tmp_path)
    cfg = replace(cfg, gates=replace(cfg.gates, init_from=tmp_path / "gates"))
    assert make_gates(cfg, LAYERS, HIDDEN, {}, freezes=FREEZES).config.open_freezes == FREEZES
    with pytest.raises(ConfigError, match=r"teacher\.freeze_every"):
        make_gates(cfg, LAYERS, HIDDEN, {}, freezes=())


def test_gates_that_init_set_up_are_trained_like_new_ones(tmp_path) -> None:
    """Offsets of the layers that are traced, and features standardised by the training samples."""
    model = tmp_path / "backbone"
    tiny_llava(LAYERS)[0].config.save_pretrained(model)
    words = ["--model", str(model), "--architecture", "scaled", "--freeze-head"]
    assert main(["init", *words, "--output", str(tmp_path / "init")]) == 0
    cfg = make_config(
        tmp_path,
        gates={"init_from": str(tmp_path / "init")},
        objective={"name": "expected_risk", "loss": "same_answer"},
    )
    hidden = GateStack.from_pretrained(tmp_path / "init").config.hidden_size
    backbone = {"fingerprint": describe_config(str(model)).fingerprint}
    gates = make_gates(cfg, LAYERS, hidden, backbone, freezes=FREEZES)
    assert gates.config.is_new
    assert gates.config.freeze_offsets == uniform_freeze_offsets(LAYERS, FREEZES)
    new = make_gates(configured(tmp_path), LAYERS, hidden, backbone, freezes=FREEZES)
    assert gates.config.freeze_offsets == new.config.freeze_offsets
    trained = replace(gates.config, training={"objective": {}}, freeze_offsets=(0.5,) * LAYERS)
    GateStack.init(trained).save_pretrained(tmp_path / "trained")
    again = replace(cfg, gates=replace(cfg.gates, init_from=tmp_path / "trained"))
    kept = make_gates(again, LAYERS, hidden, backbone, freezes=FREEZES).config
    assert [kept.freeze_offsets[j] for j in FREEZES] == [0.5, 0.5]
    assert not kept.is_new


def test_init_refuses_a_head_that_the_objective_does_not_train(tmp_path, capsys) -> None:
    tiny_llava(LAYERS)[0].config.save_pretrained(tmp_path / "backbone")
    words = ["init", "--model", str(tmp_path / "backbone"), "--output", str(tmp_path / "gates")]
    assert main([*words, "--freeze-head", "--objective", "safe_label"]) == 2
    assert "trains no freeze head" in capsys.readouterr().err
