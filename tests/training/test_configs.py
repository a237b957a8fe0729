"""Every shipped training configuration: loads, dry-runs, trains two steps on a tiny model of its family."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dyvte
from dyvte.backbones import load_backbone
from dyvte.backbones.convert import convert_eagle_x5, convert_vila15, llava_for_features
from dyvte.backbones.given_features import save_for_features
from dyvte.config import load_config
from dyvte.errors import UnsupportedBackboneError
from dyvte.training import TrainConfig
from dyvte.training.candidates import Choice
from dyvte.training.dryrun import dry_run
from dyvte.training.target import OWN
from dyvte.training.train import train
from dyvte.training.zero import engine_config
from tests.helpers.families import FAMILIES
from tests.helpers.models import random_image
from tests.helpers.zoo.common import EOS, IMAGE, TEXT
from tests.helpers.zoo.processors import PROCESSORS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# configuration -> family of its backbone
FAMILY = {
    "llava_v1_5_7b": "llava",
    "llava_v1_5_13b": "llava",
    "llava_next_vicuna_7b": "llava_next",
    "qwen2_vl_7b": "qwen2_vl",
    "qwen2_5_vl_7b": "qwen2_5_vl",
    "internvl3_8b": "internvl",
    "vila_1_5_3b": "vila",
    "eagle_x5_7b": "eagle",
}
# Visual tokens of an image 24 wide and 16 high, patches 4 x 4, worked out by hand. LLaVA-NeXT: the image as a
# whole, and 4 lines of 6 patches (two tiles less their margin) with newlines. Qwen: 2 x 2 patches make one.
VISUAL = {"llava": 16, "llava_next": 16 + 4 * (6 + 1), "qwen2_vl": 6, "qwen2_5_vl": 6, "internvl": 3 * 4,
          "vila": 16, "eagle": 16}  # fmt: skip
IN_DEFAULT_TIER = {"llava_v1_5_7b", "qwen2_vl_7b", "internvl3_8b", "vila_1_5_3b"}
ALL = [pytest.param(name, marks=() if name in IN_DEFAULT_TIER else pytest.mark.full) for name in FAMILY]
QUESTIONS = ("what color is the circle ?", "how many objects are there in the picture ?")


@pytest.fixture
def world(tmp_path: Path, request, monkeypatch) -> list[str]:
    """A tiny backbone of the configuration's family, 8 samples; the overrides that point there."""
    family, overrides = FAMILY[request.getfixturevalue("name")], []
    if family in ("vila", "eagle"):
        save_language_side(family, tmp_path / "backbone")
        (tmp_path / "my_towers.py").write_text(TOWERS.format(width={"vila": 32, "eagle": 16}[family]))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "my_towers", raising=False)
        overrides = ["model.image_features=my_towers:features"]
    else:
        model, _, _ = FAMILIES[family]("sdpa")
        model.generation_config.eos_token_id = EOS
        model.save_pretrained(tmp_path / "backbone")
        processor = PROCESSORS[family]()
        if (
            getattr(processor, "video_processor", processor) is None
        ):  # no torchvision: its folder does not load
            save_parts(processor, tmp_path / "backbone")
            monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *_, **__: processor)
        else:
            processor.save_pretrained(tmp_path / "backbone")
    (tmp_path / "images").mkdir()
    entries = []
    for index in range(8):
        random_image(index, 24).crop((0, 0, 24, 16)).save(tmp_path / "images" / f"{index}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{QUESTIONS[index % 2]}"},
            {"from": "gpt", "value": "red"},
        ]
        entries.append({"id": f"s{index}", "image": f"{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return [
        f"model.path={tmp_path / 'backbone'}", "model.dtype=float32", f"data.path={tmp_path / 'data.json'}",
        f"data.image_folder={tmp_path / 'images'}", "data.fraction=1", "data.validation_fraction=0",
        "teacher.batch_size=4", "teacher.max_new_tokens=3", "epochs=1", "batch_size=4",
        "tracking.report_to=[]", f"output_dir={tmp_path / 'run'}", "target.alpha=null", *overrides,
    ]  # fmt: skip


# Stands in for the original towers: 4 x 4 cells of 16 x 16 pixels, each a feature of its mean colours.
TOWERS = """
import numpy as np, torch

def features(images):
    mix = torch.randn(3, {width}, generator=torch.Generator().manual_seed(0))
    cells = [np.asarray(image.resize((4, 4)), dtype="float32").reshape(16, 3) / 255 for image in images]
    return torch.from_numpy(np.stack(cells)) @ mix
"""


def save_language_side(family: str, folder: Path) -> None:
    """A tiny model of the original layout, converted: VILA without its projector, Eagle with it."""
    model, _, _ = FAMILIES["llava"]("sdpa")
    original = {
        key.replace("model.language_model.", "model.")
        .replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
        .replace("model.multi_modal_projector.linear_2", "model.mm_projector.2"): tensor
        for key, tensor in model.state_dict().items()
        if "vision_tower" not in key and (family == "eagle" or "projector" not in key)
    }
    converted = convert_eagle_x5(original) if family == "eagle" else convert_vila15(original)
    made = llava_for_features(converted, {"model_type": "llama", **TEXT}, IMAGE)
    made.generation_config.eos_token_id = EOS
    save_for_features(made, PROCESSORS["llava"]().tokenizer, folder, num_tokens=16)


def save_parts(processor, folder: Path) -> None:
    """What the folder of a processor with a video half holds beside that half."""
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": type(processor).__name__}))


def config(name: str, overrides: list[str] = ()) -> TrainConfig:
    return load_config(TrainConfig, CONFIGS / f"{name}.yaml", overrides)


def test_every_training_configuration_is_here() -> None:
    others = {f"{kind}{name}" for kind in ("", "compare_", "eval_") for name in ("embedded", "smol")}
    others |= {"embedded_states", "embedded_lora", "smol_lora"}
    found = {path.stem for path in CONFIGS.glob("*.yaml") if "output_dir" in path.read_text(encoding="utf-8")}
    assert found - others == set(FAMILY)


@pytest.mark.parametrize("name", [*FAMILY, "embedded", "embedded_states"])
def test_it_loads_and_its_paths_are_relative_to_it(name: str) -> None:
    cfg, embedded = config(name), name.startswith("embedded")
    assert cfg.output_dir.parent == CONFIGS.parent / "runs"
    assert engine_config(cfg, 2)["zero_optimization"]["stage"] == (0 if embedded else 2)
    assert cfg.teacher.template == ("chat" if FAMILY.get(name) in ("qwen2_vl", "qwen2_5_vl", "internvl") else
                                    "auto" if embedded else "v1")  # fmt: skip


@pytest.mark.parametrize("name", [*FAMILY, "smol", "embedded_states"])
@pytest.mark.parametrize("objective", ["reference_label", "safe_label"])
def test_another_objective_can_be_named(name: str, objective: str) -> None:
    found = config(name, [f"objective.name={objective}", "gates.freeze_head=false"]).objective
    assert found.name == objective


@pytest.mark.parametrize("name", ALL)
def test_it_dry_runs_and_trains_two_steps(name: str, world: list[str], tmp_path: Path) -> None:
    cfg = config(name, world)
    planned = dry_run(cfg)
    model, processor = load_backbone(tmp_path / "backbone", image_features=cfg.model.image_features)
    assert planned.backbone_parameters == sum(p.numel() for p in model.parameters())
    assert planned.backbone_bytes == 4 * planned.backbone_parameters
    assert planned.tokens.visual == VISUAL[FAMILY[name]]
    assert (planned.samples["chosen"], planned.steps) == (8, 2)
    assert "by 8 samples of the data" in str(planned)
    assert not (tmp_path / "run").exists()

    result = train(cfg)
    assert result.summary.record.steps == 2
    assert result.summary.record.num_samples == 8
    assert result.summary.dropped == ()
    trained = load_file(result.gates / "gates.safetensors")
    # Gates moved, all but the one after the last layer, which is never asked; and they are this backbone's.
    start = dyvte.GateStack.init(dyvte.GateStack.from_pretrained(result.gates).config, seed=cfg.seed)
    moved = {
        int(key.split(".")[1])
        for key, old in start.state_dict().items()
        if key.startswith("gates.") and not torch.equal(old, trained[key])
    }
    assert moved == set(range(model.config.get_text_config().num_hidden_layers - 1))
    exits = dyvte.VisualExit.from_pretrained(result.gates, threshold=1e-6)
    with exits(model) as run:
        model.generate(**_prompt(processor, cfg), max_new_tokens=2)
    assert run.exit_layers.tolist() == [1]


@pytest.mark.parametrize("name", ["llava_v1_5_7b", pytest.param("qwen2_vl_7b", marks=pytest.mark.full)])
def test_its_target_tries_several_trainings(name: str, world: list[str]) -> None:
    asked = config(name).target
    assert asked.is_set
    result = train(config(name, [*world, f"target.alpha={asked.alpha}"]))
    choice = Choice.read(result.gates.parent)
    assert {OWN, *asked.candidates} <= set(choice.values)
    assert len(asked.candidates) == 3
    assert choice.target["alpha"] == asked.alpha


def _prompt(processor, cfg: TrainConfig) -> dict[str, torch.Tensor]:
    from dyvte.backbones import encode, get_template

    rendered = get_template(cfg.teacher.template, processor).render(QUESTIONS[0])
    return encode(processor, [rendered], [[random_image(3, 24)]], padding_side="left")[0]


# --- where there is nothing to read ---


def test_a_hub_id_that_is_not_cached_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "data.json").write_text("[]")
    cfg = config("qwen2_vl_7b", [f"data.path={tmp_path / 'data.json'}", "model.path=nobody/nothing"])
    with pytest.raises(UnsupportedBackboneError, match=r"hf download nobody/nothing --local-dir FOLDER"):
        dry_run(cfg)


@pytest.mark.parametrize("name", ["qwen2_vl_7b"])
def test_a_processor_that_needs_torchvision_says_so(
    name: str, world: list[str], tmp_path: Path, monkeypatch
) -> None:
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    monkeypatch.undo()
    with pytest.raises(UnsupportedBackboneError, match=r"pip install torchvision"):
        load_backbone(tmp_path / "backbone")


@pytest.mark.parametrize("name", ["eagle_x5_7b"])
def test_a_folder_without_a_vision_tower_needs_its_features(
    name: str, world: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "backbone"
    for given, message in [
        (None, "holds no vision tower: name the function"),
        ("my_towers", "expected module:function"),
        ("my_towers:nothing", "cannot be imported"),
        ("no_such_module:features", "cannot be imported"),
    ]:
        with pytest.raises(UnsupportedBackboneError, match=message):
            load_backbone(folder, image_features=given)
    (tmp_path / "short.py").write_text("import torch\ndef features(images): return torch.zeros(1, 9, 16)")
    _, processor = load_backbone(folder, image_features="short:features")
    with pytest.raises(UnsupportedBackboneError, match=r"shape \(1, 9, 16\), expected \(1, 16, width\)"):
        processor(text=["<image>"], images=[random_image(0)])
