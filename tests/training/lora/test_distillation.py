"""Adapters distilled for early exits, and saved as PEFT saves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dyvte.backbones import load_backbone, weights_digest
from dyvte.data import select_samples
from dyvte.distributed import Processes, join_processes
from dyvte.errors import (
    CheckpointError,
    ConfigError,
    TrainingError,
)
from dyvte.teacher import Teacher, TeacherConfig
from dyvte.teacher.exits import positions_before
from dyvte.training.lora.distillation import LoraTraining, distillation_loss
from dyvte.training.lora.labels import label
from dyvte.training.lora.metrics import exit_columns, exit_rows, exit_table
from dyvte.training.lora.model import add_adapter, trainable
from dyvte.training.lora.train import train_lora
from dyvte.training.schedule import drawn_exits
from tests.helpers.adapters import LAYERS, config, weights
from tests.helpers.batches import VISUAL_ID
from tests.helpers.reference import exit_by_masks

# peft asks for it
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with join_processes(engine=True) as found:
        yield found


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def fresh(world: Path, output: Path, processes: Processes, **changed):
    """A training before its first step, its model, and the answers it learns from."""
    cfg = config(world, output, **changed)
    model, processor = load_backbone(cfg.model.path)
    model = add_adapter(model, cfg.lora, cfg.seed)
    teacher = Teacher(model, processor, TeacherConfig(template="chat", max_new_tokens=3, reference="base"))
    quiet = {"file": "", "max_bad_samples": 0, "progress": lambda _: None}
    data = label(output / "answers", teacher, select_samples(cfg.data), processes, **quiet)
    return LoraTraining(cfg, model, data, None, processes), model, data


def test_exits_that_are_left_out_are_not_judged(world: Path, tmp_path: Path, processes: Processes) -> None:
    training, model, data = fresh(world, tmp_path, processes)
    training.close()
    teacher = TeacherConfig(template="chat", max_new_tokens=3)
    every, some = (exit_columns(model, data, replace(teacher, exit_layers=k)) for k in ((), (1,)))
    for name, values in some.items():
        assert torch.equal(values[:, [1, LAYERS]], every[name][:, [1, LAYERS]])
        assert bool(values[:, [k for k in range(LAYERS) if k != 1]].isnan().all())
    rows = exit_rows(some, every)
    assert [row.exit_layer for row in rows] == [1, LAYERS]
    assert exit_table(rows).splitlines()[-1].endswith(f"{LAYERS} before, {LAYERS} after")


def test_gradients_equal_brute_force(world: Path, tmp_path: Path, processes: Processes) -> None:
    """The same loss through full-length passes with 4D masks that hide visual keys layer by layer."""
    training, model, data = fresh(world, tmp_path, processes, lora={"first_layer": 1, "full_share": 0.3})
    generator = torch.Generator().manual_seed(5)
    for parameter in trainable(model):
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    exits = training.drawn_exits(0, 0)
    assert len(set(exits.tolist())) == 3  # 1, 2 and never
    with training.micro_step(0, 0) as (loss, ids):
        training.engine.backward(loss)
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    training.close()

    inputs, answer_BN, again = data.inputs(training.drawn(0, 0).tolist())
    assert again == ids
    predict_BN = positions_before(answer_BN, ids)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    base, _ = load_backbone(world / "backbone")
    full = base(**inputs, position_ids=positions).logits.log_softmax(-1).detach()
    model.zero_grad()
    with exit_by_masks(model.get_base_model(), exits, [VISUAL_ID]):
        out = model(**inputs, position_ids=positions, use_cache=False).logits.log_softmax(-1)
    kl_BN = (full.exp() * (full - out)).sum(-1) * predict_BN
    expected = (kl_BN.sum(1) / predict_BN.sum(1)).mean()
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=1e-5, rtol=1e-4)
    assert len(got) == len(trainable(model)) == 2 * 7 * LAYERS
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)
    assert max(gradient.abs().max() for gradient in got.values()) > 1e-2


@pytest.mark.full
def test_checkpointed_layers_have_the_same_gradients(
    world: Path, tmp_path: Path, processes: Processes
) -> None:
    found = []
    for checkpointing in (False, True):
        lora = {"gradient_checkpointing": checkpointing, "first_layer": 1}
        training, model, _ = fresh(world, tmp_path / str(checkpointing), processes, lora=lora)
        with training.micro_step(0, 0) as (loss, _):
            training.engine.backward(loss)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert not any(module.training for module in model.modules())
        training.close()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_only_the_adapter_changes_and_only_in_its_layers(
    world: Path, tmp_path: Path, processes: Processes
) -> None:
    training, model, _ = fresh(world, tmp_path, processes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training.run(0, lambda *_: None, lambda _: None)
    training.close()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert moved == adapters
    assert {name.split(".layers.")[1][0] for name in adapters} == {
        "1",
        "2",
        "3",
    }  # layers 2..L: exits from 1 on
    assert not any("vision" in name for name in adapters)
    base, _ = load_backbone(world / "backbone")
    for name, tensor in base.state_dict().items():
        kept = [value for other, value in before.items() if other.replace(".base_layer", "").endswith(name)]
        assert any(torch.equal(tensor, value) for value in kept), name


def test_training_lowers_its_loss(world: Path, tmp_path: Path, processes: Processes) -> None:
    """Risk of one fixed exit on the samples trained on; a random model has nothing that carries to others."""
    changed = {"batch_size": 12, "epochs": 15, "optimizer": {"learning_rate": 0.002, "warmup_ratio": 0.0}}
    training, _, _ = fresh(world, tmp_path, processes, lora={"last_exit": 1, "full_share": 0.0}, **changed)
    losses = []
    training.run(0, lambda _, figures: losses.append(figures["loss"]), lambda _: None)
    training.close()
    assert sum(losses[-4:]) < 0.4 * sum(losses[:4]), losses


def test_the_summary_tells_before_from_after(trained) -> None:
    rows = {row.exit_layer: row for row in trained.summary.exits}
    assert list(rows) == list(range(LAYERS + 1))
    assert trained.summary.judged_on == "held-out samples"
    assert trained.summary.num_judged == 6
    assert rows[LAYERS].risk_before == pytest.approx(0, abs=1e-6)
    assert rows[LAYERS].same_answer_before == 1
    assert all(rows[k].risk_after != rows[k].risk_before for k in range(LAYERS + 1))
    lines = trained.table().splitlines()
    assert lines[-1] == f"first exit with at least 99% same answer: {LAYERS} before, none after"


def test_the_result_is_an_ordinary_peft_checkpoint(world: Path, trained) -> None:
    from peft import PeftModel

    base, _ = load_backbone(world / "backbone")
    model = PeftModel.from_pretrained(base, str(trained.adapter))
    stored = json.loads((trained.adapter / "adapter_config.json").read_text())
    assert stored["peft_type"] == "LORA"
    assert stored["base_model_name_or_path"] == str(world / "backbone")
    found = weights(trained.adapter)
    assert len(found) == 2 * 7 * (LAYERS - 1)
    loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(loaded) == len(found)
    for name, tensor in found.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor)
    record = json.loads((trained.adapter / "dyvte_lora.json").read_text())
    assert record["base"]["weights"] == weights_digest(load_backbone(world / "backbone")[0])
    assert record["exits_trained"] == [1, 2]
    assert not list(trained.adapter.parent.glob(".adapter*"))


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.full), 0.2])
def test_an_interrupted_run_ends_bit_identical(
    world: Path, tmp_path: Path, monkeypatch, dropout: float
) -> None:
    changed = {"lora": {"dropout": dropout}, "accumulation": 2, "batch_size": 3}
    whole = train_lora(config(world, tmp_path / "whole", **changed))
    interrupted = config(world, tmp_path / "cut", **changed)
    step = LoraTraining._step
    with monkeypatch.context() as patch:

        def killed(self, number):
            if number == 3:  # after the checkpoint of step 2
                raise KeyboardInterrupt
            return step(self, number)

        patch.setattr(LoraTraining, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train_lora(interrupted)
    assert [path.name for path in sorted((tmp_path / "cut" / "checkpoints").iterdir())] == ["step-00000002"]
    assert not (tmp_path / "cut" / "adapter").exists()
    resumed = train_lora(interrupted)
    assert same(weights(resumed.adapter), weights(whole.adapter))
    log = [json.loads(line) for line in (tmp_path / "cut" / "train_log.jsonl").read_text().splitlines()]
    other = [json.loads(line) for line in (tmp_path / "whole" / "train_log.jsonl").read_text().splitlines()]
    keep = ("step", "loss", "validation/risk")
    assert [{name: row.get(name) for name in keep} for row in log] == [
        {name: row.get(name) for name in keep} for row in other
    ]


def test_checkpoints_hold_the_adapter_alone(trained) -> None:
    folder = trained.adapter.parent / "checkpoints"
    size = sum(path.stat().st_size for path in max(folder.iterdir()).rglob("*") if path.is_file())
    assert size < 8 * 4 * trained.summary.parameters + 100_000


def test_a_nan_stops_the_run_and_names_the_samples(world: Path, tmp_path: Path, processes: Processes) -> None:
    training, model, _ = fresh(world, tmp_path, processes)
    trainable(model)[1].data.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan; samples train-\d-\d"):
        training.run(0, lambda *_: None, lambda _: None)
    training.close()


def test_answers_are_made_once_and_those_of_another_run_refused(
    world: Path, trained, tmp_path: Path, processes: Processes
) -> None:
    folder = trained.adapter.parent / "answers"
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    shutil.copytree(folder, tmp_path / "answers")
    longer = {"template": "chat", "max_new_tokens": 4, "batch_size": 8}
    other = config(world, tmp_path / "c", trace_dir=str(tmp_path / "answers"), teacher=longer)
    with pytest.raises(CheckpointError, match="labels: stored 'greedy 3', this run 'greedy 4'"):
        train_lora(other)
    (tmp_path / "answers" / "answers-00000.json").write_text("{")  # torn: made again, to the same bytes
    training, _, data = fresh(world, tmp_path, processes, seed=1)
    training.close()
    assert len(data) == 24
    for path in folder.iterdir():
        assert path.stat().st_mtime_ns == stamps[path]
        assert (tmp_path / "answers" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora": {"first_exit": 3, "last_exit": 2}}, r"0 <= first <= last <= 4"),
        ({"lora": {"full_share": 1.0}}, r"nothing to learn"),
        ({"lora": {"first_layer": 5}}, r"lora\.first_layer 5: expected 1\.\.4"),
        ({"lora": {"target_modules": ["q_proj", "w1"]}}, r"\['w1'\]: the decoder layers have .*'gate_proj'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(world: Path, tmp_path: Path, changed, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_lora(config(world, tmp_path, **changed))  # the configuration itself refuses some


def test_an_adapted_backbone_and_zero_3_are_refused(world: Path, trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="starts from a backbone without an adapter"):
        train_lora(config(world, tmp_path, model={"path": str(trained.adapter)}))
    (tmp_path / "z3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ConfigError, match="stages 0 to 2"):
        train_lora(config(world, tmp_path, deepspeed=str(tmp_path / "z3.json")))


# --- pieces ---


def test_exits_are_drawn_from_the_range_and_from_seed_and_step_alone() -> None:
    options = {"first": 3, "last": 7, "full": 10, "full_share": 0.25}
    exits = drawn_exits(0, 5, 20_000, **options)
    assert torch.equal(exits, drawn_exits(0, 5, 20_000, **options))
    assert not torch.equal(exits, drawn_exits(0, 6, 20_000, **options))
    share = torch.bincount(exits, minlength=11) / len(exits)
    expected = torch.zeros(11)
    expected[3:8], expected[10] = 0.75 / 5, 0.25
    torch.testing.assert_close(share, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("kind", ["kl", "cross_entropy"])
def test_loss_by_hand(kind: str) -> None:
    exit_BAV = torch.tensor([[[0.0, 1.0], [2.0, 0.0]], [[1.0, 1.0], [9.0, 9.0]]])
    full_BAV = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 3.0], [5.0, 1.0]]])
    labels_BA, valid_BA = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[True, True], [True, False]])
    q, p = exit_BAV.double().softmax(-1), full_BAV.double().softmax(-1)
    rows = []
    for row, slots in ((0, (0, 1)), (1, (0,))):
        if kind == "kl":
            values = [sum(p[row, a, v] * (p[row, a, v] / q[row, a, v]).log() for v in (0, 1)) for a in slots]
        else:
            values = [-q[row, a, labels_BA[row, a]].log() for a in slots]
        rows.append(sum(values) / len(values))
    found = distillation_loss(exit_BAV, full_BAV, labels_BA, valid_BA, kind)
    assert float(found) == pytest.approx(float(sum(rows) / 2), abs=1e-6)
