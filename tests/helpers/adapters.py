"""A small training of an adapter, and what it left behind."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from dyvte.config import from_dict
from dyvte.training.config import TrainConfig

LAYERS = 4


def config(world: Path, output: Path, **changed) -> TrainConfig:
    """Two epochs over the world's conversations; ``changed``: other settings, those of ``lora`` apart."""
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


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the adapter, as they were saved."""
    return load_file(folder / "adapter_model.safetensors")
