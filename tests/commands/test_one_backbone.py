"""Every command loads the configured backbone: one declaration of it, of which no setting is lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dyvte.backbones import BackboneConfig, describe_config, fingerprint, load_backbone
from dyvte.cli import main
from dyvte.config import from_dict, load_config, to_dict
from dyvte.errors import ConfigError, UnsupportedBackboneError
from dyvte.evaluation.runner import EvalConfig
from dyvte.gates import GateConfig, GateStack
from dyvte.plugins.answering import Answering, plugin_config
from dyvte.training import TrainConfig
from tests.helpers.models import tiny_llava
from tests.helpers.world import World

SETTINGS = {
    "adapter": "/some/adapter",
    "dtype": "bfloat16",
    "attn_implementation": "eager",
    "trust_remote_code": True,
    "image_padding": "none",
    "image_features": "towers:features",
    "quantization": "nf4",
    "device": "cpu",
}
"""Each unlike its default."""


class Loaded(Exception):
    """What would have been loaded."""


WORLD = World(gqa=(4, 2), conversations={"data": range(2)}, questions=1)


@pytest.fixture(scope="module")
def world(world: Path) -> Path:
    """With gates for the backbone."""
    shape = describe_config(world / "backbone")
    config = GateConfig(num_layers=shape.num_layers, hidden_size=shape.hidden_size)
    GateStack.init(config, seed=0).save_pretrained(world / "gates")
    return world


def training_file(world: Path, folder: Path, model: dict) -> str:
    values = {"data": {"path": str(world / "data.json")}, "output_dir": str(folder / "run"), **model}
    path = folder / "training.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def evaluation_file(world: Path, folder: Path, model: dict) -> str:
    values = {"benchmark": "gqa", "data": str(world / "gqa"), "output": str(folder / "out"), **model}
    path = folder / "evaluation.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def comparison_file(world: Path, folder: Path, model: dict) -> str:
    data, traces = str(world / "data.json"), str(folder / "traces")
    values = {"gates": [str(world / "gates")], "output": str(folder / "out"), "image_folder": str(world)}
    for split in ("train", "calibration", "test"):
        values |= {f"data_{split}": data, f"traces_{split}": traces}
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump({**values, **model}))
    return str(path)


# command line without --config -> what makes the file
COMMANDS = {
    "train": (["train"], training_file),
    "train --lora": (["train", "--lora"], training_file),
    "trace": (["trace", "--output", "OUT"], training_file),
    "calibrate": (["calibrate", "--gates", "GATES", "--trace", "OUT", "--budget", "0.5", "--data_path",
                   "DATA"], training_file),
    "profile": (["profile", "--output", "OUT"], training_file),
    "search-k": (["search-k"], training_file),
    "search-plan": (["search-plan", "--budget", "0.5", "--output", "OUT"], training_file),
    "eval": (["eval"], evaluation_file),
    "analyze": (["analyze", "last_token"], evaluation_file),
    "compare": (["compare"], comparison_file),
}  # fmt: skip


@pytest.mark.parametrize("flat", [False, True], ids=["group", "flat"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_reaches_the_loader(command, flat, world, tmp_path, monkeypatch):
    def spy(path, **given):
        raise Loaded(path, given)

    monkeypatch.setattr("dyvte.backbones.load.load_backbone", spy)
    settings = dict(SETTINGS)
    if command == "train --lora":  # it makes the adapter
        del settings["adapter"]
    path = str(world / "backbone")
    model = {"model": path, **settings} if flat else {"model": {"path": path, **settings}}
    words, write = COMMANDS[command]
    named = {"OUT": str(tmp_path / "made"), "GATES": str(world / "gates"), "DATA": str(world / "data.json")}
    with pytest.raises(Loaded) as loaded:
        main([*(named.get(word, word) for word in words), "--config", write(world, tmp_path, model)])
    got, given = loaded.value.args
    assert got == path
    given["device"] = str(given["device"])
    given.pop("before_weights")
    assert given == {**dict.fromkeys(SETTINGS), **settings}


def test_plugins_load_the_same(world, monkeypatch):
    def spy(path, **given):
        raise Loaded(path, given)

    monkeypatch.setattr("dyvte.backbones.load.load_backbone", spy)
    with pytest.raises(Loaded) as loaded:
        Answering(plugin_config("--model_args", str(world / "backbone"), **SETTINGS))
    path, given = loaded.value.args
    given.pop("before_weights")
    assert (path, given) == (str(world / "backbone"), SETTINGS)
    with pytest.raises(ConfigError, match="unknown key 'adaptor'; did you mean 'adapter'"):
        plugin_config("--model_args", "m", adaptor="x")


def test_options_and_files_mean_the_same(tmp_path):
    path = tmp_path / "eval.yaml"
    rest = "benchmark: gqa\ndata: d\noutput: o\n"
    path.write_text(f"model: ../here\nadapter: ./there\ndtype: bfloat16\n{rest}")
    flat = load_config(EvalConfig, path, ["device=cpu", "model.image_padding=none"])
    path.write_text(f"model: {{path: ../here, adapter: ./there, dtype: bfloat16}}\n{rest}")
    nested = load_config(EvalConfig, path, ["model.device=cpu", "image_padding=none"])
    assert flat == nested
    assert nested.model == BackboneConfig(
        path=str(tmp_path.parent / "here"), adapter=str(tmp_path / "there"), dtype="bfloat16", device="cpu",
        image_padding="none",
    )  # fmt: skip
    assert from_dict(EvalConfig, to_dict(flat)) == flat
    other = load_config(EvalConfig, path, ["model=hub/id"])
    assert (other.model.path, other.model.dtype) == ("hub/id", "bfloat16")
    train = from_dict(TrainConfig, {"model": "hub/id", "data": {"path": "x.json"}, "output_dir": "o"})
    assert train.model == BackboneConfig(path="hub/id")
    path.write_text(f"model: {{path: m, dtype: bfloat16}}\ndtype: float32\n{rest}")
    with pytest.raises(ConfigError, match=r"'dtype' is given twice, once as 'model\.dtype'"):
        load_config(EvalConfig, path)


def test_a_folder_without_a_vision_tower_is_evaluated(world, tmp_path, monkeypatch):
    """For real: gates of the shipped VILA and Eagle configurations can be judged on their backbone."""
    from tests.training.test_configs import save_language_side

    save_language_side("vila", tmp_path / "backbone")
    (tmp_path / "short_towers.py").write_text(
        "import torch\ndef features(images): return torch.ones(len(images), 16, 32)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = [
        "eval",
        "--model",
        str(tmp_path / "backbone"),
        "--benchmark",
        "gqa",
        "--data",
        str(world / "gqa"),
    ]
    words += ["--output", str(tmp_path / "out"), "--question-suffix", "", "--max-new-tokens", "2"]
    words += ["--timing-batches", "0", "--policy", "never", "--policy", "fixed:1", "--template", "v1"]
    assert main([*words]) == 2  # its features are named nowhere
    assert main([*words, "--set", "image_features=short_towers:features"]) == 0
    scores = json.loads((tmp_path / "out" / "fixed-1" / "scores.json").read_text())
    assert scores["mean_exit_layer"] == 1
    assert scores["run"]["image_features"] == "short_towers:features"
    sys.modules.pop("short_towers", None)


def test_a_cpu_computes_in_float32_unless_asked(tmp_path):
    model, processor = tiny_llava(2)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for device in (None, "cpu", torch.device("cpu")):
        assert load_backbone(tmp_path, device=device)[0].dtype == torch.float32
    assert load_backbone(tmp_path, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load_backbone(tmp_path, dtype=torch.float16)[0].dtype == torch.float16
    with pytest.raises(UnsupportedBackboneError, match="dtype 'half-ish': expected auto"):
        load_backbone(tmp_path, dtype="half-ish")


def test_plans_are_searched_for_an_adapter_folder(world, tmp_path, capsys):
    """Its backbone's config is read, not its own."""
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(world / "backbone"), "peft_type": "LORA"})
    )
    words = ["search-plan", "--model_name_or_path", str(tmp_path), "--data_path", str(world / "data.json")]
    words += ["--budget", "0.5", "--output", str(tmp_path / "plans"), "--dry-run"]
    assert main(words) == 0
    assert "5 exits behind 4 freeze layers" in capsys.readouterr().out
    assert fingerprint(tmp_path) == fingerprint(world / "backbone")
    words[2] = str(world / "nowhere")
    assert main(words) == 2
    assert f"no model folder at {world / 'nowhere'}: check the path" in capsys.readouterr().err
