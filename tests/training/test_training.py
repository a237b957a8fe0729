"""The DeepSpeed engine on synthetic traces: equal to plain PyTorch, resumable to the bit, honest about
failure."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dyvte.config import from_dict
from dyvte.distributed import Processes, join_processes
from dyvte.errors import CheckpointError, ConfigError, TrainingError
from dyvte.gates import GateConfig, GateStack, exit_layers, uniform_offsets
from dyvte.objectives import expected_risk, reference_label
from dyvte.teacher.trace import Trace
from dyvte.training.checkpoints import Checkpoints, RunState
from dyvte.training.config import TrainConfig
from dyvte.training.gate_training import GateTraining
from dyvte.training.metrics import budget_rows, fixed_at, validation_metrics
from dyvte.training.schedule import SampleOrder, drawn_layer, lr_factor

LAYERS, HIDDEN = 4, 6


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with join_processes(engine=True) as found:
        yield found


def make_trace(rows: int = 40, seed: int = 0) -> Trace:
    """Risk vanishes at a depth that the features tell."""
    generator = torch.Generator().manual_seed(seed)
    depth = torch.randint(1, LAYERS + 1, (rows,), generator=generator)
    layer = torch.arange(LAYERS + 1)
    risk = (layer < depth[:, None]).float() * 0.5
    features = 0.1 * torch.randn(rows, LAYERS, 2 * HIDDEN, generator=generator)
    features[torch.arange(rows), :, depth - 1] += 2.0
    same = (risk == 0).float()
    return Trace(
        risk=risk, reverse_risk=risk, agreement=same, same_answer=same, loss=1 + risk, features=features,
        sample_ids=tuple(f"s{row}" for row in range(rows)), num_visual=torch.full((rows,), 16),
    )  # fmt: skip


def make_config(tmp_path: Path, **settings) -> TrainConfig:
    values = {
        "model": {"path": "m"}, "data": {"path": "d.json"}, "output_dir": str(tmp_path), "epochs": 4,
        "batch_size": 8, "optimizer": {"learning_rate": 0.02, "weight_decay": 0.1}, **settings,
    }  # fmt: skip
    values["checkpoint"] = {"every_steps": 5, "keep": 3}
    return from_dict(TrainConfig, values)


def make_gates() -> GateStack:
    config = GateConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, architecture="compact", offsets=uniform_offsets(LAYERS)
    )
    return GateStack.init(config, seed=0)


def run(cfg: TrainConfig, processes: Processes, trace: Trace, stop_at: int | None = None, validation=None):
    """Train (again); returns weights and the reported metrics. ``stop_at`` fails right after that step."""
    metrics = []
    training = GateTraining(cfg, make_gates(), trace, validation, processes)

    def advance(_: int) -> None:
        if stop_at is not None and metrics and metrics[-1][0] >= stop_at:
            raise KeyboardInterrupt

    try:
        start = training.resume()
        training.run(start, lambda step, found: metrics.append((step, dict(found))), advance)
    except KeyboardInterrupt:
        return None, metrics
    finally:
        training.close()
    return training.weights(), metrics


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_engine_equals_a_plain_loop(tmp_path: Path, processes: Processes, accumulation: int) -> None:
    cfg = make_config(tmp_path, accumulation=accumulation, batch_size=8 // accumulation)
    trace = make_trace()
    weights, metrics = run(cfg, processes, trace)

    gates = make_gates()
    parameters = [p for gate in gates.gates[:-1] for p in gate.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)
    order, factor = SampleOrder(len(trace), cfg.seed), lr_factor("cosine", 20, 0.03)
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * factor(step)
        batch = trace.rows(order.at(8 * step, 8))
        optimizer.zero_grad()
        loss = expected_risk(gates(batch.features), batch, lam=0.1, span=100.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert len(metrics) == 2
    assert metrics[-1][1]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for name, tensor in gates.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-4)


def test_gate_L_is_never_moved(tmp_path: Path, processes: Processes) -> None:
    weights, _ = run(make_config(tmp_path), processes, make_trace())
    before = make_gates().state_dict()
    moved = {int(name.split(".")[1]) for name in weights if not torch.equal(weights[name], before[name])}
    assert moved == set(range(LAYERS - 1))


@pytest.mark.parametrize("stop_at", [10, 13])
def test_an_interrupted_run_ends_bit_identical(tmp_path: Path, processes: Processes, stop_at: int) -> None:
    settings = {"tracking": {"log_every": 1}}
    trace = make_trace()
    whole, all_metrics = run(make_config(tmp_path / "a", **settings), processes, trace)
    cfg = make_config(tmp_path / "b", **settings)
    _, first = run(cfg, processes, trace, stop_at=stop_at)
    assert first[-1][0] == stop_at
    resumed, second = run(cfg, processes, trace)
    assert second[0][0] == 11  # from the checkpoint of step 10
    assert equal(resumed, whole)
    losses = {step: found["loss"] for step, found in all_metrics}
    assert all(found["loss"] == losses[step] for step, found in second)


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, processes: Processes) -> None:
    trace = make_trace()
    whole, _ = run(make_config(tmp_path / "a"), processes, trace)
    cfg = make_config(tmp_path / "b", tracking={"log_every": 1})
    run(cfg, processes, trace, stop_at=18)
    folder = cfg.output_dir / "checkpoints"
    newest = sorted(folder.glob("step-*"))[-1]
    assert newest.name == "step-00000015"
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    (folder / ".writing-step-00000020").mkdir()  # a writer that was killed
    resumed, metrics = run(cfg, processes, trace)
    assert metrics[0][0] == 11
    assert equal(resumed, whole)
    assert [path.name for path in sorted(folder.iterdir())] == [
        "step-00000010", "step-00000015", "step-00000020"
    ]  # fmt: skip


def test_resume_refuses_another_batch(tmp_path: Path, processes: Processes) -> None:
    run(make_config(tmp_path), processes, make_trace())
    with pytest.raises(ConfigError, match=r"8 samples per step.*this start has 16"):
        run(make_config(tmp_path, batch_size=16), processes, make_trace())
    # The same product in other pieces is the same run.
    weights, _ = run(make_config(tmp_path, batch_size=4, accumulation=2), processes, make_trace())
    assert weights is not None


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(tmp_path: Path, processes: Processes) -> None:
    trace = make_trace()
    cfg = make_config(tmp_path, tracking={"log_every": 1})
    run(cfg, processes, trace, stop_at=7)
    trace.features[23] = float("nan")
    with pytest.raises(TrainingError, match=r"step \d+: the loss is nan; samples .*s23.*step-00000005"):
        run(cfg, processes, trace)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    state = Checkpoints(tmp_path / "checkpoints", 3, processes).latest()
    assert state is not None
    assert state[1].step == 5


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, processes: Processes) -> None:
    """Gradients can overflow where the loss did not: the step before a checkpoint spoils the weights."""
    cfg = make_config(tmp_path, tracking={"log_every": 1})
    training = GateTraining(cfg, make_gates(), make_trace(), None, processes)

    def spoil(_: int) -> None:
        if training.engine.global_steps == 9:
            training._step = lambda step: spoiled(step)

    def spoiled(_: int) -> float:
        next(training.gates.parameters()).data[0] = float("inf")
        return 0.1

    with pytest.raises(TrainingError, match=r"step 10: the gates hold weights.*step-00000005"):
        training.run(0, lambda *_: None, spoil)
    training.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_trains_the_same_gates(tmp_path: Path, processes: Processes, stage: int) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    plain, _ = run(make_config(tmp_path / "plain", accumulation=2, batch_size=4), processes, make_trace())
    cfg = make_config(
        tmp_path / "zero", accumulation=2, batch_size=4, deepspeed=str(tmp_path / "zero.json"),
        tracking={"log_every": 1},
    )  # fmt: skip
    run(cfg, processes, make_trace(), stop_at=12)
    weights, metrics = run(cfg, processes, make_trace())
    assert metrics[0][0] == 11  # resumed
    for name, tensor in plain.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=1e-5)


def test_zero3_holds_the_backbone_in_shards_and_leaves_nothing_behind(
    tmp_path: Path, processes: Processes
) -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    from dyvte.backbones import weights_digest
    from dyvte.tracing.sharded import opened_backbone
    from tests.helpers.models import tiny_llava

    model, processor = tiny_llava()
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0,
                                      "offload_param": {"device": "cpu"}}}  # fmt: skip
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    cfg = make_config(tmp_path, model={"path": str(tmp_path / "m")}, deepspeed=str(tmp_path / "zero.json"))
    linear = torch.nn.functional.linear
    with opened_backbone(cfg, processes) as (sharded, _):
        assert is_deepspeed_zero3_enabled()
        assert all(parameter.numel() == 0 for parameter in sharded.parameters())
        assert not any(parameter.requires_grad for parameter in sharded.parameters())
        held = sum(parameter.ds_tensor.numel() for parameter in sharded.parameters())
        assert held >= sum(parameter.numel() for parameter in model.parameters())
        assert weights_digest(sharded) == weights_digest(model)
        assert all(parameter.numel() == 0 for parameter in sharded.parameters())
    assert not is_deepspeed_zero3_enabled()
    assert torch.nn.functional.linear is linear


def test_a_full_disk_keeps_earlier_checkpoints(tmp_path: Path, processes: Processes, monkeypatch) -> None:
    cfg = make_config(tmp_path, tracking={"log_every": 1})
    run(cfg, processes, make_trace(), stop_at=6)

    def full(path: Path) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dyvte.training.checkpoints._sha256", full)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3, processes)
    training = GateTraining(cfg, make_gates(), make_trace(), None, processes)
    state = RunState(step=10, global_batch=8, world_size=1, zero_stage=0)
    with pytest.raises(CheckpointError, match=r"step 10 cannot be written.*No space left"):
        checkpoints.save(training.engine, state)
    training.close()
    monkeypatch.undo()
    found = checkpoints.latest()
    assert found is not None
    assert found[1].step == 5


def test_one_layer_per_step_leaves_other_gates_and_their_moments_alone(
    tmp_path: Path, processes: Processes
) -> None:
    objective = {"name": "reference_label", "one_layer_per_step": True}
    cfg = make_config(tmp_path, objective=objective)
    trace = make_trace()
    weights, _ = run(cfg, processes, trace)

    gates = make_gates()
    optimizer = torch.optim.AdamW(gates.parameters(), lr=0.02, weight_decay=0.1)
    order, factor = SampleOrder(len(trace), cfg.seed), lr_factor("cosine", 20, 0.03)
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * factor(step)
        batch = trace.rows(order.at(8 * step, 8))
        layer = drawn_layer(cfg.seed, step, LAYERS)
        optimizer.zero_grad(set_to_none=True)
        reference_label(gates.gate(layer, batch.features[:, layer - 1]), batch, layer=layer).backward()
        torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
    for name, tensor in gates.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["expected_risk", "safe_label", "reference_label"])
def test_gates_learn_what_the_features_tell(tmp_path: Path, processes: Processes, name: str) -> None:
    cfg = make_config(tmp_path, epochs=8, objective={"name": name})
    train, test = make_trace(200, seed=1), make_trace(100, seed=2)
    weights, metrics = run(cfg, processes, train, validation=test)
    gates = make_gates()
    gates.load_state_dict(weights)
    with torch.no_grad():
        exits = exit_layers(gates(test.features), 0.5)
    ideal = (test.risk == 0).float().argmax(1).clamp(max=LAYERS)
    assert (exits == ideal).float().mean() > 0.95
    last = [found for _, found in metrics if "validation/risk" in found][-1]
    assert last["validation/risk"] < 0.02
    assert sum(last["validation/exit_rate"]) == pytest.approx(1)


# --- metrics ---


def test_budget_rows_compare_at_equal_compute() -> None:
    trace = make_trace(400)
    ideal = (trace.risk == 0).float().argmax(1)
    logits = (torch.arange(1, LAYERS + 1) >= ideal[:, None]).float() * 4 - 2
    logits += 0.01 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    rows = budget_rows(logits, trace, logits, trace)
    assert rows
    for row in rows:
        assert row.visual_compute <= row.budget
        assert row.risk <= row.fixed_risk + 1e-6


def test_fixed_at_is_the_lower_hull() -> None:
    values = torch.tensor([[1.0, 0.9, 0.2, 0.1, 0.0]])
    assert fixed_at(values, values, 0.25) == pytest.approx(0.6)  # half 0, half 2: below the value at 1
    assert fixed_at(values, values, 0.5) == pytest.approx(0.2)
    assert fixed_at(values, values, 1.0) == 0.0


def test_validation_metrics_at_a_threshold() -> None:
    trace = make_trace(10)
    metrics = validation_metrics(torch.full((10, LAYERS), -9.0), trace, 0.5)
    assert metrics["validation/mean_exit_layer"] == LAYERS
    assert metrics["validation/same_answer"] == 1.0
    assert metrics["validation/exit_rate"] == [0.0] * LAYERS + [1.0]
