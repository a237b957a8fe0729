"""Adapters on the backbone: told apart from it, distilled for early exits, saved as PEFT saves them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dyvte
from dyvte.backbones import describe_config, fingerprint, load_backbone, resolve_adapter, weights_digest
from dyvte.config import from_dict
from dyvte.data import select_samples
from dyvte.distributed import Processes, join_processes
from dyvte.errors import (
    CheckpointError,
    ConfigError,
    GateMismatchError,
    TrainingError,
    UnsupportedBackboneError,
)
from dyvte.gates import GateConfig, GateStack
from dyvte.teacher import Teacher, TeacherConfig
from dyvte.teacher.exits import positions_before
from dyvte.training.config import TrainConfig
from dyvte.training.lora.distillation import LoraTraining, distillation_loss
from dyvte.training.lora.labels import Labelled, label
from dyvte.training.lora.model import add_adapter, trainable
from dyvte.training.lora.train import train_lora
from dyvte.training.schedule import drawn_exits
from tests.helpers.batches import VISUAL_ID
from tests.helpers.models import random_image, tiny_llava
from tests.helpers.reference import exit_by_masks
from tests.helpers.world import QUESTIONS, World

# peft asks for it
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LAYERS = 4
WORLD = World(conversations={"train": range(8)}, layers=LAYERS)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with join_processes(engine=True) as found:
        yield found


def config(world: Path, output: Path, **changed) -> TrainConfig:
    lora = {"enabled": True, "rank": 4, "first_exit": 1, "last_exit": 2, **changed.pop("lora", {})}
    values = {
        "model": {"path": str(world / "backbone")},
        "data": {"path": str(world / "train.json"), "validation_fraction": 0.25},
        "teacher": {"template": "chat", "max_new_tokens": 3, "batch_size": 8},
        "optimizer": {"learning_rate": 0.01}, "checkpoint": {"every_steps": 2, "keep": 2},
        "tracking": {"log_every": 1}, "epochs": 2, "batch_size": 6, "output_dir": str(output),
        "lora": lora, **changed,
    }  # fmt: skip
    return from_dict(TrainConfig, values)


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory):
    """The reference run of this module."""
    return train_lora(config(world, tmp_path_factory.mktemp("run") / "run"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- an adapter as part of the backbone ---


def test_an_adapter_is_loaded_by_its_folder_or_beside_the_model(world: Path, trained) -> None:
    from peft import PeftModel

    folder = trained.adapter
    assert resolve_adapter(folder) == (str(world / "backbone"), str(folder))
    by_folder, _ = load_backbone(folder)
    beside, _ = load_backbone(world / "backbone", adapter=folder)
    base, processor = load_backbone(world / "backbone")
    plain = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).merge_and_unload()
    inputs = tokens(processor)
    with torch.no_grad():
        expected = plain(**inputs).logits
        assert not torch.allclose(base(**inputs).logits, expected, atol=1e-3)
        for model in (by_folder, beside):
            torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
            assert not any(parameter.requires_grad for parameter in model.parameters())
    assert describe_config(folder) == describe_config(world / "backbone")


def test_adapted_and_plain_weights_have_different_digests(world: Path, trained) -> None:
    base, _ = load_backbone(world / "backbone")
    adapted, _ = load_backbone(trained.adapter)
    half, _ = load_backbone(trained.adapter, dtype=torch.bfloat16)
    plain = weights_digest(base)
    assert weights_digest(adapted).startswith(f"{plain}+")
    assert weights_digest(half) == weights_digest(adapted)
    with adapted.disable_adapter():
        assert weights_digest(adapted) == plain
    before = weights_digest(adapted)
    name, factor = next((n, p) for n, p in adapted.named_parameters() if "lora_B" in n)
    factor.data.mul_(1.5)
    assert weights_digest(adapted) not in (before, plain), name
    assert fingerprint(adapted) == fingerprint(base)


def test_gates_of_one_are_refused_on_the_other(world: Path, trained) -> None:
    base, processor = load_backbone(world / "backbone")
    adapted, _ = load_backbone(trained.adapter)
    for made_for, used_on in ((base, adapted), (adapted, base)):
        identity = {"fingerprint": fingerprint(made_for), "weights": weights_digest(made_for)}
        gates = GateStack.init(GateConfig(num_layers=LAYERS, hidden_size=32, backbone=identity))
        with dyvte.VisualExit(gates)(made_for):
            made_for(**tokens(processor))
        with pytest.raises(GateMismatchError, match=r"weights"), dyvte.VisualExit(gates)(used_on):
            pass
        with dyvte.VisualExit(gates, allow_transfer=True)(used_on) as run:
            used_on(**tokens(processor))
        assert run.transferred


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda f: edit(f, base_model_name_or_path=None), "names no base_model_name_or_path"),
        (lambda f: edit(f, base_model_name_or_path="/nowhere/base"), "/nowhere/base, which is not there"),
        (lambda f: edit(f, r=8), "does not fit the backbone"),
        (lambda f: drop_a_tensor(f), "missing adapter keys"),
        (
            lambda f: add_a_layer(f),
            r"modules that are not there \(.*layers\.9\..* more\)\. Give the backbone",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "config.json").write_text("{}"), "holds a model and an adapter"),
    ],
    ids=["no weights", "no base", "base gone", "other rank", "half of it", "layers more", "torn", "both"],
)
def test_an_adapter_that_cannot_be_used_is_named(trained, tmp_path: Path, spoil, message: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(trained.adapter, folder)
    spoil(folder)
    with pytest.raises(UnsupportedBackboneError, match=message):
        load_backbone(folder)


def edit(folder: Path, **changed) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import save_file

    found = weights(folder)
    found.pop(next(iter(found)))
    save_file(found, folder / "adapter_model.safetensors")


def add_a_layer(folder: Path) -> None:
    """As an adapter of a deeper backbone of the same width holds them."""
    from safetensors.torch import save_file

    found = weights(folder)
    last = f"layers.{LAYERS - 1}."
    more = {key.replace(last, "layers.9."): value.clone() for key, value in found.items() if last in key}
    assert len(more) > 3
    save_file({**found, **more}, folder / "adapter_model.safetensors")


def test_an_adapter_of_a_deeper_backbone_is_refused(world: Path, trained, tmp_path: Path) -> None:
    """Every second backbone of a family: the same width, fewer layers."""
    shallow, processor = tiny_llava(layers=LAYERS - 1)
    shallow.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedBackboneError, match=r"modules that are not there \(.*layers\.3\."):
        load_backbone(tmp_path, adapter=trained.adapter)


def tokens(processor):
    from dyvte.backbones import encode, get_template

    template = get_template("chat", processor)
    rendered = [template.render(question) for question in QUESTIONS]
    return encode(processor, rendered, [[random_image(row)] for row in range(3)], padding_side="left")[0]


# --- the reference stays the un-adapted model ---


def test_traces_against_the_base_compare_with_the_unadapted_model(world: Path, trained) -> None:
    """Column k is KL(base full || adapted behind exit k), each from a masked pass of its own."""
    base, processor = load_backbone(world / "backbone")
    adapted, _ = load_backbone(trained.adapter)
    samples = select_samples(config(world, Path("unused")).data).samples[:4]
    settings = {"template": "chat", "max_new_tokens": 3}
    shard, _ = Teacher(adapted, processor, TeacherConfig(**settings, reference="base")).trace(samples)
    plain = Teacher(base, processor, TeacherConfig(**settings))
    inputs, answer_BN = labelled(plain, samples).inputs(range(4))[:2]
    predict_BN = positions_before(answer_BN, ["a"] * 4)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        full = base(**inputs, position_ids=positions).logits.log_softmax(-1)
        for k in range(LAYERS + 1):
            with exit_by_masks(adapted.get_base_model(), [k] * 4, [VISUAL_ID]):
                out = adapted(**inputs, position_ids=positions, use_cache=False).logits.log_softmax(-1)
            kl_BN = (full.exp() * (full - out)).sum(-1)
            expected = (kl_BN * predict_BN).sum(1) / predict_BN.sum(1)
            torch.testing.assert_close(shard.trace.risk[:, k], expected, atol=1e-4, rtol=1e-3)
    assert shard.trace.risk[:, -1].max() > 1e-3  # the adapter changes the full model, and that is counted
    own, _ = Teacher(adapted, processor, TeacherConfig(**settings)).trace(samples)
    assert torch.equal(own.trace.risk[:, -1], torch.zeros(4))
    with pytest.raises(ConfigError, match=r"model\.adapter"):
        Teacher(base, processor, TeacherConfig(**settings, reference="base"))


def labelled(teacher: Teacher, samples) -> Labelled:
    from dyvte.teacher import greedy_answers

    answers = {}
    for sample in samples:
        inputs, answer_BN = greedy_answers(teacher.model, teacher.prepare([sample]).inputs, 3)
        answers[sample.id] = inputs["input_ids"][0][answer_BN[0]].tolist()
    return Labelled(teacher, tuple(samples), answers)


# --- training ---


def fresh(world: Path, output: Path, processes: Processes, **changed):
    """A training before its first step, its model, and the answers it learns from."""
    cfg = config(world, output, **changed)
    model, processor = load_backbone(cfg.model.path)
    model = add_adapter(model, cfg.lora, cfg.seed)
    teacher = Teacher(model, processor, TeacherConfig(template="chat", max_new_tokens=3, reference="base"))
    quiet = {"file": "", "max_bad_samples": 0, "progress": lambda _: None}
    data = label(output / "answers", teacher, select_samples(cfg.data), processes, **quiet)
    return LoraTraining(cfg, model, data, None, processes), model, data


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
