"""Trainings as people start them: through the script, on the folder of the fixture `world`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 240


def environment() -> dict[str, str]:
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "DYVTE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def options(world: Path, output: Path, **changed: str) -> list[str]:
    given = {
        "--model_name_or_path": str(world / "backbone"), "--data_path": str(world / "train.json"),
        "--image_folder": str(world / "images"), "--output_dir": str(output), "--num_train_epochs": "4",
        "--per_device_train_batch_size": "8", "--max_new_tokens": "3", "--teacher_batch_size": "8",
        "--learning_rate": "1e-2", "--report_to": "none", **changed,
    }  # fmt: skip
    return [word for pair in given.items() for word in pair]


def script(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "finetune_visual_gate.sh"), *words]
    return subprocess.run(
        command, cwd=cwd, env={**environment(), **variables}, timeout=LIMIT_SECONDS,
        capture_output=True, text=True,
    )  # fmt: skip


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "gates" / "gates.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
