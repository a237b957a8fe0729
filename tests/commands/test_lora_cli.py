"""`dyvte train --lora`, and its adapter through trace, train, calibrate and eval, as people call them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dyvte.cli import main
from dyvte.config import load_config
from dyvte.gates import load_checkpoint
from dyvte.training.config import TrainConfig
from tests.helpers.killing import train_and_kill
from tests.helpers.trainings import LIMIT_SECONDS, ROOT, environment, options, script
from tests.helpers.world import World, conversation

WORLD = World(conversations={"train": range(12), "calibration": range(12, 20)}, stops=True)
# peft asks for it
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
SHORT = {
    "--num_train_epochs": "1",
    "--first_exit": "1",
    "--last_exit": "2",
    "--lora_r": "2",
    "--version": "chat",
}


def lora(world: Path, output: Path, **changed: str) -> list[str]:
    return ["--lora", *options(world, output, **{**SHORT, **changed})]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def adapted(world: Path, tmp_path_factory) -> Path:
    """One process, through the script, from another folder."""
    output = tmp_path_factory.mktemp("adapted") / "run"
    done = script(*lora(world, output), cwd=output.parent)
    assert done.returncode == 0, done.stderr
    assert "first exit with at least 99% same answer: " in done.stdout
    assert f"adapter: {output}/adapter" in done.stdout
    return output


def test_gates_on_the_adapted_backbone(world: Path, adapted: Path, tmp_path: Path, capsys) -> None:
    """From the adapter's folder alone to calibrated gates that the plain backbone refuses."""
    folder, gates = str(adapted / "adapter"), tmp_path / "run" / "gates"
    given = options(
        world, tmp_path / "run", **{"--adapter": folder, "--version": "chat", "--num_train_epochs": "1"}
    )
    assert main(["train", *given, "--set", "teacher.reference=base"]) == 0
    config, _ = load_checkpoint(gates)
    plain, _, adapter = config.backbone["weights"].partition("+")
    assert plain
    assert adapter
    assert config.backbone["adapter"] == folder
    assert config.training["trace"]["reference"] == f"base {plain}"

    data = [
        "--data_path", str(world / "calibration.json"), "--image_folder", str(world / "images"),
        "--max_new_tokens", "3", "--teacher_batch_size", "8",
    ]  # fmt: skip
    # Backbone, adapter and reference are taken from the gates' own record.
    traces = tmp_path / "t"
    assert main(["calibrate", "--gates", str(gates), "--trace", str(traces), "--budget", "0.6", *data]) == 0
    made = json.loads((traces / "manifest.json").read_text())["fingerprint"]
    assert made["backbone_weights"] == config.backbone["weights"]
    assert made["reference"] == f"base {plain}"

    without = ["--set", f"model.path={world / 'backbone'}", "--set", "model.adapter=null"]
    without += ["--set", "teacher.reference=self", "--trace", str(tmp_path / "other")]
    code = main(["calibrate", "--gates", str(gates), "--budget", "0.6", *data, *without])
    assert code == 2
    assert "another backbone" in capsys.readouterr().err


def test_two_processes_train_the_same_adapter(world: Path, adapted: Path, tmp_path: Path) -> None:
    flags = {"--per_device_train_batch_size": "4"}
    done = script(*lora(world, tmp_path / "two", **flags), cwd=tmp_path, NUM_PROCESSES="2")
    assert done.returncode == 0, done.stderr
    for name, tensor in weights(adapted).items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.full
def test_killed_at_any_moment_it_ends_with_the_same_adapter(world: Path, tmp_path: Path) -> None:
    flags = {"--num_train_epochs": "12", "--save_steps": "5", "--trace_dir": str(tmp_path / "answers")}
    assert main(["train", *lora(world, tmp_path / "whole", **flags)]) == 0
    killed = lora(world, tmp_path / "killed", **flags)
    train_and_kill(killed, tmp_path / "killed", environment(), LIMIT_SECONDS)
    assert not (tmp_path / "killed" / "adapter").exists(), "the run was over before it could be killed"
    assert main(["train", *killed]) == 0
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_dry_run_counts_without_training(world: Path, tmp_path: Path, capsys) -> None:
    assert main(["train", *lora(world, tmp_path / "none"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    sizes = {"q": 64, "k": 48, "v": 48, "o": 64, "gate": 96, "up": 96, "down": 96}  # in + out of each module
    assert f"layers 2..4, {3 * 2 * sum(sizes.values()):,} parameters" in out
    assert "drawn from 1..2" in out
    assert not (tmp_path / "none").exists()


def test_started_again_it_is_done_and_changes_are_refused(world: Path, adapted: Path, capsys) -> None:
    stamp = (adapted / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert main(["train", *lora(world, adapted)]) == 0
    assert (adapted / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert main(["train", *lora(world, adapted, **{"--lora_r": "3"})]) == 2
    assert "lora.rank: 2 there, 3 now" in capsys.readouterr().err


CASES = {
    "range": ({"--first_exit": "3"}, "0 <= first <= last <= 4"),
    "layer": ({"--lora_first_layer": "9"}, "lora.first_layer 9: expected 1..4"),
    "empty answer": ({"--data_path": "bad.json", "--label_source": "data"}, "is empty"),
    "too long": ({"--model_max_length": "10"}, "the answer would be cut"),
    "unwritable": ({"--output_dir": "train.json/out"}, "cannot be written"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_bad_input_is_named(world: Path, tmp_path: Path, capsys, case: str) -> None:
    changed, message = CASES[case]
    changed = {name: str(world / value) if ".json" in value else value for name, value in changed.items()}
    (world / "bad.json").write_text(json.dumps([conversation("x", "0.png", answer=" ")]))
    assert main(["train", *lora(world, tmp_path / "out", **changed)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "backbone"), [("embedded", "tiny-llava"), ("smol", "smol-llava")])
def test_shipped_configuration_loads(name: str, backbone: str) -> None:
    cfg = load_config(TrainConfig, ROOT / "configs" / f"{name}_lora.yaml")
    assert cfg.lora.enabled
    assert cfg.model.path == str(ROOT / "checkpoints" / backbone)
