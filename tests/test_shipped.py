"""Configurations that come with dyvte: by name, from anywhere, and in the wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dyvte
from dyvte.config import load_config
from dyvte.errors import ConfigError
from dyvte.evaluation.runner import EvalConfig
from dyvte.shipped import FOLDER, find_settings, shipped_configs
from dyvte.training import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


def test_the_names_are_those_of_the_folder_at_the_top():
    assert FOLDER == ROOT / "configs"
    assert shipped_configs() == tuple(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))


def test_a_name_is_read_as_the_file_is_in_a_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("embedded", "llava_v1_5_7b"):
        assert load_config(TrainConfig, name) == load_config(TrainConfig, f"configs/{name}.yaml")
    assert load_config(EvalConfig, "eval_embedded") == load_config(EvalConfig, "configs/eval_embedded.yaml")


def test_elsewhere_a_name_writes_below_the_current_folder_and_finds_what_comes_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(TrainConfig, "llava_v1_5_7b")
    assert cfg.output_dir == tmp_path / "runs/llava_v1_5_7b"
    assert cfg.data.image_folder == tmp_path / "data"
    assert cfg.deepspeed == ROOT / "configs/deepspeed/zero2.json"
    assert cfg.model.path == "llava-hf/llava-1.5-7b-hf"
    (tmp_path / "llava_v1_5_7b").write_text("objective: {lam: 0.7}")  # a file goes before a name
    assert find_settings("llava_v1_5_7b").path == tmp_path / "llava_v1_5_7b"


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"embeded: .* \(did you mean 'embedded'\?\).*llava_v1_5_7b"):
        load_config(TrainConfig, "embeded")
    with pytest.raises(ConfigError, match=r"none.yaml: there is no such configuration file"):
        load_config(TrainConfig, "none.yaml")


@pytest.mark.full
def test_a_wheel_holds_configurations_and_all_else_that_is_no_module(tmp_path):
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    names = [name for name in listed.split("\0") if name]
    source = tmp_path / "source"
    for name in names:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            path.symlink_to((ROOT / name).readlink())
        else:
            path.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            source,
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("dyvte-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"dyvte/{name}" for name in names if name.startswith("configs/")}
    wanted |= {name for name in names if name.startswith("dyvte/") and not (ROOT / name).is_symlink()}
    assert wanted <= inside, sorted(wanted - inside)
    assert f"dyvte-{dyvte.__version__}" in wheel.name
