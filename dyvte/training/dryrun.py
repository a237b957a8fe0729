"""What a training run would do: shapes, counts, memory and time, from the config and the data file alone.

No weight is read. Memory and time are estimates from formulas; the arithmetic speed is measured on the spot.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from dyvte.backbones import describe_config, resolve_adapter
from dyvte.evaluation.cost import DecoderShape, decoder_shape
from dyvte.gates import GateStack
from dyvte.training.config import TrainConfig
from dyvte.training.engine import Plan
from dyvte.training.tracing import select_samples
from dyvte.training.train import make_gates
from dyvte.training.zero import engine_config, stage_of

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Share of the speed of one large matrix product that whole layers were seen to reach.
_EFFICIENCY = 0.5
_TEXT_TOKENS = 40


def dry_run(cfg: TrainConfig, world_size: int = 1) -> dict[str, Any]:
    """Numbers of the run; raises what the run itself would raise about its data and settings."""
    from transformers import AutoConfig

    base, _ = resolve_adapter(cfg.model.path, cfg.model.adapter)
    config = AutoConfig.from_pretrained(base, trust_remote_code=cfg.model.trust_remote_code)
    shape = describe_config(config)
    sizes = decoder_shape(config)
    selection = select_samples(cfg)
    identity = {"id": cfg.model.path, "fingerprint": shape.fingerprint}
    with torch.device("meta" if cfg.gates.init_from is None else "cpu"):
        gates = make_gates(cfg, shape.num_layers, shape.hidden_size, identity)
    stage = stage_of(engine_config(cfg, world_size))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(cfg, config, device)
    samples = len(selection.samples)
    visual = _visual_tokens(config)
    flops = samples * teacher_flops(sizes, visual, _TEXT_TOKENS)
    speed = _matmul_speed(device, getattr(torch, dtype))
    num_features = len(cfg.teacher.features)
    feature_bytes = samples * shape.num_layers * num_features * shape.hidden_size * _BYTES[dtype]
    parameters = _parameters(gates)
    held_out = round(samples * cfg.data.validation_fraction)
    plan = Plan.of(cfg, max(1, samples - held_out), world_size)
    return {
        "model_type": shape.model_type,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "visual_tokens_per_image": visual,
        "dtype": dtype,
        "gate_architecture": gates.config.architecture,
        "gate_parameters": parameters,
        "features_per_sample": (shape.num_layers, num_features * shape.hidden_size),
        "samples": selection.counts,
        "data_sha256": selection.sha256,
        "steps": plan.steps,
        "samples_per_step": plan.global_batch,
        "zero_stage": stage,
        "backbone_bytes": _decoder_parameters(sizes) * _BYTES[dtype],
        "trace_bytes": feature_bytes + samples * 5 * (shape.num_layers + 1) * 4,
        "gate_training_bytes": parameters * 16,  # weight, gradient, two moments, fp32
        "teacher_flops": flops,
        "teacher_seconds": flops / (speed * _EFFICIENCY * world_size),
    }


def describe_dry_run(numbers: dict[str, Any]) -> str:
    """The numbers as text."""
    counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in numbers["samples"].items())
    layers, features = numbers["features_per_sample"]
    visual = numbers["visual_tokens_per_image"]
    lines = [
        ("backbone", f"{numbers['model_type']}, {numbers['num_layers']} layers of {numbers['hidden_size']}"),
        ("visual tokens", f"{visual if visual is not None else 'depends on the image'} an image"),
        ("gates", f"{numbers['gate_architecture']}, {numbers['gate_parameters']:,} parameters"),
        ("features", f"{layers} x {features} a sample"),
        ("data", f"{counts}; sha256 {numbers['data_sha256'][:16]}"),
        (
            "steps",
            f"{numbers['steps']} of {numbers['samples_per_step']} samples, ZeRO {numbers['zero_stage']}",
        ),
        ("decoder weights", f"about {_size(numbers['backbone_bytes'])} ({numbers['dtype']})"),
        ("traces on disk", f"about {_size(numbers['trace_bytes'])}"),
        ("gate training", f"about {_size(numbers['gate_training_bytes'])}"),
        (
            "teacher pass",
            f"about {numbers['teacher_flops'] / 1e12:,.1f} TFLOP, {_duration(numbers['teacher_seconds'])} "
            "at the speed measured here (labels' generation not included)",
        ),
    ]
    return "\n".join(f"{name:>16}: {text}" for name, text in lines)


def teacher_flops(shape: DecoderShape, num_visual: int | None, num_text: int) -> float:
    """FLOPs of one sample's teacher pass: the full stream once, and stream k's text in layers k+1..L."""
    num_visual = 576 if num_visual is None else num_visual
    per_token = _decoder_parameters(shape, embeddings=False) / shape.num_layers
    layers = shape.num_layers
    tokens = (num_visual + num_text) * layers + num_text * layers * (layers + 1) / 2
    return 2.0 * per_token * tokens


def _decoder_parameters(shape: DecoderShape, embeddings: bool = True) -> float:
    width = shape.num_heads * shape.head_dim
    attention = 2 * shape.hidden_size * (width + shape.num_kv_heads * shape.head_dim)
    layers = sum(attention + 3 * shape.hidden_size * ffn for ffn in shape.ffn_sizes_L)
    return layers + (2 * shape.vocab_size * shape.hidden_size if embeddings else 0)


def _parameters(gates: GateStack) -> int:
    return sum(parameter.numel() for parameter in gates.parameters())


def _visual_tokens(config: Any) -> int | None:
    """Visual tokens of one image where the config fixes them."""
    given = getattr(config, "image_seq_length", None)
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if given is None and isinstance(size, int) and isinstance(patch, int):
        return (size // patch) ** 2
    return given


def _dtype(cfg: TrainConfig, config: Any, device: torch.device) -> str:
    if cfg.model.dtype != "auto":
        return cfg.model.dtype
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return "float32" if device.type == "cpu" or stored not in _BYTES else stored


def _matmul_speed(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a square matrix product."""
    left = torch.randn(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        began = time.perf_counter()
        (left @ left).sum().item()  # waits for the device
        return time.perf_counter() - began

    # The best of several: other work on the machine slows some of them down.
    return 2 * size**3 / min(seconds() for _ in range(10))


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
