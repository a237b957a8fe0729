"""What a training run would do: shapes, counts, memory and time, from configs, processor and data alone.

No weight is read and nothing is written (see :mod:`dyvte.tracing.estimates`). Memory and time are estimates
from formulas; the arithmetic speed is measured on the spot.
"""

from __future__ import annotations

from typing import Any

import torch

from dyvte.backbones import describe_config
from dyvte.backbones.sizes import decoder_shape
from dyvte.data import select_samples
from dyvte.distributed import own_device
from dyvte.gates import GateStack
from dyvte.tracing.estimates import (
    DTYPE_BYTES,
    PACKED_BYTES,
    Tokens,
    loaded_dtype,
    pass_flops,
    pass_seconds,
    sample_tokens,
    shapes_of,
)
from dyvte.tracing.zero import shards_backbone, stage_of
from dyvte.training.config import TrainConfig
from dyvte.training.loop import Plan
from dyvte.training.train import make_gates
from dyvte.training.zero import engine_config


def dry_run(cfg: TrainConfig, world_size: int = 1) -> dict[str, Any]:
    """Numbers of the run; raises what the run itself would raise about its model, data and settings.

    Raises
    ------
    UnsupportedBackboneError
        If there is no model config: for a hub id that is not cached, with what to do.
    """
    model = shapes_of(cfg.model)
    shape, sizes = describe_config(model.config), decoder_shape(model.config)
    selection = select_samples(cfg.data)
    identity = {"id": cfg.model.path, "fingerprint": shape.fingerprint}
    with torch.device("meta" if cfg.gates.init_from is None else "cpu"):
        freezes = cfg.teacher.schedules(shape.num_layers).freezes
        gates = make_gates(cfg, shape.num_layers, shape.hidden_size, identity, freezes=freezes)
    tokens = sample_tokens(cfg, model, selection)

    device = own_device()
    dtype = loaded_dtype(cfg.model, model.config, device)
    samples = len(selection.samples)
    schedules = cfg.teacher.schedules(shape.num_layers)
    flops = samples * pass_flops(cfg, sizes, tokens, samples / max(1, selection.counts["images"]))
    backbone = sum(parameter.numel() for parameter in model.parameters())
    feature_size = len(cfg.teacher.features) * shape.hidden_size
    parameters = _parameters(gates)
    held_out = round(samples * cfg.data.validation_fraction)
    plan = Plan.of(cfg, max(1, samples - held_out), world_size)
    return {
        "model_type": shape.model_type,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "backbone_parameters": backbone,
        "tokens": tokens,
        "dtype": dtype if cfg.model.quantization == "none" else cfg.model.quantization,
        "gate_architecture": gates.config.architecture,
        "gate_parameters": parameters,
        "features_per_sample": (shape.num_layers, feature_size),
        "samples": selection.counts,
        "data_sha256": selection.sha256,
        "steps": plan.steps,
        "samples_per_step": plan.global_batch,
        "processes": world_size,
        "zero_stage": stage_of(engine_config(cfg, world_size)),
        "backbone_bytes": backbone
        * PACKED_BYTES.get(cfg.model.quantization, DTYPE_BYTES[dtype])
        / (world_size if shards_backbone(cfg) else 1),
        "logits_bytes": cfg.teacher.batch_size * tokens.answer * len(schedules.pairs) * sizes.vocab_size * 4,
        "trace_bytes": samples
        * (
            (shape.num_layers + len(schedules.stream_layers) + bool(schedules.freezes))
            * feature_size
            * DTYPE_BYTES[dtype]
            + 5 * (len(schedules.freezes) + 1) * (shape.num_layers + 1) * 4
        ),
        "gate_training_bytes": parameters * 16,  # weight, gradient, two moments, fp32
        "teacher_flops": flops,
        "teacher_seconds": pass_seconds(flops, device, dtype, world_size),
    }


def describe_dry_run(numbers: dict[str, Any]) -> str:
    """The numbers as text."""
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in numbers["samples"].items())
    layers, features = numbers["features_per_sample"]
    tokens: Tokens = numbers["tokens"]
    sharded = " a process, of ZeRO-3" if numbers["zero_stage"] == 3 else ""
    lines = [
        ("backbone", f"{numbers['model_type']}, {numbers['num_layers']} layers of {numbers['hidden_size']}, "
                     f"{numbers['backbone_parameters']:,} parameters"),
        ("tokens", f"a sample {tokens.visual:.0f} visual, {tokens.total - tokens.visual:.0f} text "
                   f"({tokens.suffix:.0f} after the image), by {tokens.source}"),
        ("gates", f"{numbers['gate_architecture']}, {numbers['gate_parameters']:,} parameters"),
        ("features", f"{layers} x {features} a sample"),
        ("data", f"{counts}; sha256 {numbers['data_sha256'][:16]}"),
        ("steps", f"{numbers['steps']} of {numbers['samples_per_step']} samples, {numbers['processes']} "
                  f"processes, ZeRO {numbers['zero_stage']}"),
        ("backbone weights", f"about {_size(numbers['backbone_bytes'])}{sharded} ({numbers['dtype']})"),
        ("teacher's logits", f"about {_size(numbers['logits_bytes'])} a batch, all schedules"),
        ("traces on disk", f"about {_size(numbers['trace_bytes'])}"),
        ("gate training", f"about {_size(numbers['gate_training_bytes'])}"),
        ("teacher pass", f"about {numbers['teacher_flops'] / 1e12:,.1f} TFLOP in the decoder, "
                         f"{_duration(numbers['teacher_seconds'])} at the speed measured here"),
    ]  # fmt: skip
    return "\n".join(f"{name:>16}: {text}" for name, text in lines)


def _parameters(gates: GateStack) -> int:
    return sum(parameter.numel() for parameter in gates.parameters())


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
