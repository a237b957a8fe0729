"""What ``train --lora`` would do: layers, parameters, counts and cost, from the config and data alone."""

from __future__ import annotations

from typing import Any

import torch

from dyvte.backbones import describe_config
from dyvte.data import select_samples
from dyvte.tracing.estimates import shapes_of
from dyvte.tracing.zero import stage_of
from dyvte.training.config import TrainConfig
from dyvte.training.loop import Plan
from dyvte.training.lora.model import add_adapter, target_pattern, trainable
from dyvte.training.lora.train import check_settings
from dyvte.training.zero import engine_config


def lora_dry_run(cfg: TrainConfig, world_size: int = 1) -> dict[str, Any]:
    """Numbers of the run; raises what the run itself would raise about its data and settings."""
    check_settings(cfg)
    model = shapes_of(cfg.model)
    shape = describe_config(model.config)
    pattern = target_pattern(model, cfg.lora)
    with torch.device("meta"):
        model = add_adapter(model, cfg.lora, cfg.seed)
    selection = select_samples(cfg.data)
    held_out = round(len(selection.samples) * cfg.data.validation_fraction)
    plan = Plan.of(cfg, max(1, len(selection.samples) - held_out), world_size)
    first, last = cfg.lora.exits(shape.num_layers)
    layers = cfg.lora.layers(shape.num_layers)
    return {
        "model_type": shape.model_type,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "exits": (first, last),
        "layers": (layers[0], layers[-1]),
        "modules": pattern,
        "parameters": sum(parameter.numel() for parameter in trainable(model)),
        "samples": selection.counts,
        "data_sha256": selection.sha256,
        "steps": plan.steps,
        "samples_per_step": plan.global_batch,
        "zero_stage": stage_of(engine_config(cfg, world_size)),
        "passes": _passes(cfg, shape.num_layers),
    }


def _passes(cfg: TrainConfig, num_layers: int) -> float:
    """Cost of a step in forward passes of the full model, text taken as free (which makes it a lower bound).

    Teacher forward; student forward, its visual tokens in k of L layers; backward through the adapted layers,
    of which those without visual tokens are free too: twice a forward for the states and the adapters.
    """
    first, last = cfg.lora.exits(num_layers)
    start = cfg.lora.layers(num_layers)[0]
    share = cfg.lora.full_share
    mean_exit = share * num_layers + (1 - share) * (first + last) / 2
    exits = [(num_layers, share)] + [(k, (1 - share) / (last - first + 1)) for k in range(first, last + 1)]
    behind = sum(weight * max(0, k - start + 1) for k, weight in exits)
    return 1 + mean_exit / num_layers + 2 * behind / num_layers


def describe_lora_dry_run(numbers: dict[str, Any]) -> str:
    """The numbers as text."""
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in numbers["samples"].items())
    lines = [
        ("backbone", f"{numbers['model_type']}, {numbers['num_layers']} layers of {numbers['hidden_size']}"),
        ("exits", f"drawn from {numbers['exits'][0]}..{numbers['exits'][1]}"),
        (
            "adapter",
            f"layers {numbers['layers'][0]}..{numbers['layers'][1]}, {numbers['parameters']:,} parameters",
        ),
        ("modules", numbers["modules"]),
        ("data", f"{counts}; sha256 {numbers['data_sha256'][:16]}"),
        (
            "steps",
            f"{numbers['steps']} of {numbers['samples_per_step']} samples, ZeRO {numbers['zero_stage']}",
        ),
        ("training", f"{parameters_size(numbers['parameters'])} for weights, gradients and moments (fp32)"),
        ("a step", f"at least {numbers['passes']:.1f} forward passes of the full model"),
    ]
    return "\n".join(f"{name:>16}: {text}" for name, text in lines)


def parameters_size(parameters: int) -> str:
    """Bytes of what the optimiser holds."""
    return f"{parameters * 16 / 1e6:.1f} MB"
