"""Adapters on the backbone: told apart from it, refused where they do not fit, measured against it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

import dyvte
from dyvte.backbones import describe_config, fingerprint, load_backbone, resolve_adapter, weights_digest
from dyvte.data import select_samples
from dyvte.errors import (
    ConfigError,
    GateMismatchError,
    UnsupportedBackboneError,
)
from dyvte.gates import GateConfig, GateStack
from dyvte.teacher import Teacher, TeacherConfig
from dyvte.teacher.exits import positions_before
from dyvte.training.lora.labels import Labelled
from tests.helpers.adapters import LAYERS, config, weights
from tests.helpers.batches import VISUAL_ID
from tests.helpers.models import random_image, tiny_llava
from tests.helpers.reference import exit_by_masks
from tests.helpers.world import QUESTIONS

# peft asks for it
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


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
