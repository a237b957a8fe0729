"""What a training run would do: shapes, counts, memory and time, from configs, processor and data alone.

No weight is read and nothing is written: the model is built without storage to count its parameters, and a
few samples go through the processor to count tokens. Memory and time are estimates from formulas; the
arithmetic speed is measured on the spot.

Shape letters: B rows, N tokens, L decoder layers.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from dyvte.backbones import describe_config, read_model_config, resolve_adapter, set_image_padding
from dyvte.backbones.given_features import put_stand_in, takes_features
from dyvte.backbones.load import load_processor
from dyvte.backbones.sizes import DecoderShape, decoder_shape
from dyvte.costs.teacher import SampleShape, teacher_flops
from dyvte.data import Selection
from dyvte.errors import UnsupportedBackboneError
from dyvte.gates import GateStack
from dyvte.spans import find_spans
from dyvte.teacher import Teacher
from dyvte.teacher.exits import thinned_exits
from dyvte.training.config import TrainConfig
from dyvte.training.engine import Plan
from dyvte.training.gate_training import make_gates
from dyvte.training.tracing import select_samples
from dyvte.training.zero import engine_config, shards_backbone, stage_of

log = logging.getLogger(__name__)
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PACKED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # nf4: one fp32 scale for 64 weights
# Share of the speed of one large matrix product that whole layers were seen to reach.
_EFFICIENCY = 0.5
_PROBED_SAMPLES = 8


@dataclass(frozen=True)
class Tokens:
    """Mean length of a sample, in tokens; ``source`` says where the numbers come from."""

    visual: float
    suffix: float
    """Text after the image, answer included."""
    total: float
    answer: float
    source: str


def dry_run(cfg: TrainConfig, world_size: int = 1) -> dict[str, Any]:
    """Numbers of the run; raises what the run itself would raise about its model, data and settings.

    Raises
    ------
    UnsupportedBackboneError
        If there is no model config: for a hub id that is not cached, with what to do.
    """
    base, _ = resolve_adapter(cfg.model.path, cfg.model.adapter)
    config = read_model_config(cfg.model)
    shape = describe_config(config)
    model = _without_weights(cfg, base, config)
    sizes = decoder_shape(model.config)
    selection = select_samples(cfg)
    identity = {"id": cfg.model.path, "fingerprint": shape.fingerprint}
    with torch.device("meta" if cfg.gates.init_from is None else "cpu"):
        gates = make_gates(cfg, shape.num_layers, shape.hidden_size, identity)
    tokens = _tokens(cfg, base, model, selection)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(cfg, model.config, device)
    samples = len(selection.samples)
    flops = samples * _pass_flops(cfg, sizes, tokens)
    speed = _matmul_speed(device, getattr(torch, dtype))
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
        * _PACKED_BYTES.get(cfg.model.quantization, _BYTES[dtype])
        / (world_size if shards_backbone(cfg) else 1),
        "logits_bytes": cfg.teacher.batch_size
        * tokens.answer
        * (shape.num_layers + 1)
        * sizes.vocab_size
        * 4,
        "trace_bytes": samples
        * (shape.num_layers * feature_size * _BYTES[dtype] + 5 * (shape.num_layers + 1) * 4),
        "gate_training_bytes": parameters * 16,  # weight, gradient, two moments, fp32
        "teacher_flops": flops,
        "teacher_seconds": flops / (speed * _EFFICIENCY * world_size),
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
        ("teacher's logits", f"about {_size(numbers['logits_bytes'])} a batch, all exits"),
        ("traces on disk", f"about {_size(numbers['trace_bytes'])}"),
        ("gate training", f"about {_size(numbers['gate_training_bytes'])}"),
        ("teacher pass", f"about {numbers['teacher_flops'] / 1e12:,.1f} TFLOP in the decoder, "
                         f"{_duration(numbers['teacher_seconds'])} at the speed measured here"),
    ]  # fmt: skip
    return "\n".join(f"{name:>16}: {text}" for name, text in lines)


def _pass_flops(cfg: TrainConfig, shape: DecoderShape, tokens: Tokens) -> int:
    """FLOPs of one sample's teacher pass; a generated answer takes one more full pass over its prompt."""
    text = max(2, round(tokens.suffix))
    sample = SampleShape(
        prefix=max(0, round(tokens.total - tokens.visual - tokens.suffix)),
        visual=round(tokens.visual),
        text=text,
        answer=min(text - 1, max(1, round(tokens.answer))),
    )
    exits = thinned_exits(shape.num_layers, cfg.teacher.exit_every)
    once = teacher_flops(shape, sample, exits, num_features=len(cfg.teacher.features))
    return once + (teacher_flops(shape, sample, ()) if cfg.teacher.label_source == "greedy" else 0)


def _parameters(gates: GateStack) -> int:
    return sum(parameter.numel() for parameter in gates.parameters())


def _without_weights(cfg: TrainConfig, base: str, config: Any) -> Any:
    """The model's modules on the meta device: shapes, no storage."""
    from transformers import AutoModelForImageTextToText

    trust = cfg.model.trust_remote_code
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust).eval()
    if takes_features(base):
        put_stand_in(model, base)
    return model


def _tokens(cfg: TrainConfig, base: str, model: Any, selection: Selection) -> Tokens:
    """Lengths of a few samples as the processor makes them; guessed from the config where there is none."""
    try:
        processor = load_processor(
            base,
            trust_remote_code=cfg.model.trust_remote_code,
            image_features=cfg.model.image_features,
        )
    except UnsupportedBackboneError as error:
        log.warning("tokens are guessed: %s", error)
        return _guess(model.config)
    set_image_padding(processor, cfg.model.image_padding, model.config.model_type)
    teacher = Teacher(model, processor, replace(cfg.teacher, label_source="data"))
    teacher.device, teacher.dtype = torch.device("cpu"), torch.float32
    every = max(1, len(selection.samples) // _PROBED_SAMPLES)
    lengths = []
    for sample in selection.samples[::every][:_PROBED_SAMPLES]:
        ready = teacher.prepare([sample], cfg.data.name)
        for defect in ready.defects:
            log.warning("%s", defect)
        if not ready.samples:
            continue
        inputs, answer_BN = ready.inputs, ready.answer_BN
        spans = find_spans(
            inputs["input_ids"], teacher.backbone.visual_token_ids, inputs["attention_mask"], answer_BN
        )
        visual = int(spans.visual_BN.sum())
        total = int(inputs["attention_mask"].sum())
        last = int(spans.visual_BN[0].nonzero().max()) if visual else -1
        lengths.append(
            (visual, int(inputs["attention_mask"][0, last + 1 :].sum()), total, int(answer_BN.sum()))
        )
    if not lengths:
        return _guess(model.config)
    means = [sum(column) / len(lengths) for column in zip(*lengths, strict=True)]
    return Tokens(*means, source=f"{len(lengths)} samples of the data")


def _guess(config: Any) -> Tokens:
    """Lengths from the config alone: right for one square image of a family with a fixed number."""
    visual = getattr(config, "image_seq_length", None)
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if visual is None:
        fixed = isinstance(size, int) and isinstance(patch, int)
        visual = (size // patch) ** 2 if fixed else 576
    return Tokens(visual, 40, visual + 60, 10, source="a guess from the config")


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
