"""A network from a training state or from a checkpoint folder, and how this machine should compute."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from dyvte.backbones.built import PARTS, RECIPE
from smol_llava.network import Network, load_tower, prepare_decoder
from smol_llava.trainer import Recipe, Schedule, Trainer

TOWER = Path(__file__).resolve().parents[2] / "checkpoints/tiny-llava"


def compute_type(wanted: str) -> torch.dtype:
    """Type of the matrix products; "auto": bf16 pays only where the CPU multiplies it natively."""
    if wanted == "auto":
        info = Path("/proc/cpuinfo")
        flags = info.read_text(encoding="utf-8") if info.exists() else ""
        wanted = "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted]


def trainer_of_state(work: Path, caches: Path, compute: torch.dtype, tower: Path = TOWER) -> Trainer:
    """A trainer with the recipe, the schedule and the weights of the state in ``work``."""
    saved = torch.load(work / "state.pt", weights_only=True, mmap=True)
    recipe = Recipe(**saved["recipe"])
    trainer = new_trainer(recipe, Schedule(), caches, compute, tower)
    trainer.resume(work, with_schedule=True)
    return trainer


def new_trainer(
    recipe: Recipe,
    schedule: Schedule,
    caches: Path,
    compute: torch.dtype,
    tower: Path = TOWER,
    rank: int = 0,
) -> Trainer:
    """A trainer at step 0; texts and the projector of stage 0 are the caller's to put in."""
    options = {"rank": recipe.rank, "scale": recipe.scale, "seed": recipe.seed, "compute": compute}
    network = Network(prepare_decoder(caches), load_tower(tower), **options)
    return Trainer(network, recipe, schedule, rank)


def part_of(parts: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The weights of one part of the model, by their names inside it."""
    return {k.removeprefix(f"{name}."): v for k, v in parts.items() if k.startswith(f"{name}.")}


def load_checkpoint(network: Network, folder: Path) -> dict:
    """Projector and adapters of a checkpoint folder into ``network``; returns the recipe."""
    parts = load_file(folder / PARTS)
    network.projector.load_state_dict(part_of(parts, "multi_modal_projector"))
    network.decoder.load_adapters(part_of(parts, "language_model"))
    return json.loads((folder / RECIPE).read_text(encoding="utf-8"))


def network_of_checkpoint(folder: Path, caches: Path, compute: torch.dtype) -> tuple[Network, dict]:
    """The network of a checkpoint folder, its tower included, adapters as stored; and its recipe."""
    record = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    tower = (record["vision_config"], part_of(load_file(folder / PARTS), "vision_tower"))
    lora = record["lora"]
    options = {"rank": lora["rank"], "scale": lora["scale"], "seed": 0, "compute": compute}
    network = Network(prepare_decoder(caches), tower, **options)
    return network, load_checkpoint(network, folder)
