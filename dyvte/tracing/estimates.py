"""What a teacher pass costs, before any weight is read: lengths of samples, FLOPs, speed of this machine.

The model is built without storage to count its parameters, and a few samples go through the processor to
count tokens.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from dyvte.backbones import BackboneConfig, read_model_config, resolve_adapter, set_image_padding
from dyvte.backbones.describe import model_without_weights
from dyvte.backbones.given_features import put_stand_in, takes_features
from dyvte.backbones.load import load_processor
from dyvte.backbones.sizes import DecoderShape
from dyvte.costs.teacher import SampleShape, teacher_flops
from dyvte.data import Selection
from dyvte.errors import UnsupportedBackboneError
from dyvte.spans import find_spans
from dyvte.teacher import Teacher
from dyvte.tracing.config import TracingConfig

log = logging.getLogger(__name__)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PACKED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes of a quantised weight; nf4: one fp32 scale for 64 weights."""
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


def shapes_of(backbone: BackboneConfig) -> Any:
    """The configured backbone's modules, without weights."""
    trust = backbone.trust_remote_code
    model = model_without_weights(read_model_config(backbone), trust_remote_code=trust)
    path, _ = resolve_adapter(backbone.path, backbone.adapter)
    if takes_features(path):
        put_stand_in(model, path)
    return model


def sample_tokens(cfg: TracingConfig, model: Any, selection: Selection) -> Tokens:
    """Lengths of a few samples as the processor makes them; guessed from the config where there is none.

    Parameters
    ----------
    cfg
        Of the pass.
    model
        Its modules, with or without weights.
    selection
        Of the samples.
    """
    path, _ = resolve_adapter(cfg.model.path, cfg.model.adapter)
    try:
        processor = load_processor(
            path,
            trust_remote_code=cfg.model.trust_remote_code,
            image_features=cfg.model.image_features,
        )
    except UnsupportedBackboneError as error:
        log.warning("tokens are guessed: %s", error)
        return _guess(model.config)
    set_image_padding(processor, cfg.model.image_padding, model.config.model_type)
    teacher = Teacher(model, processor, replace(cfg.teacher, label_source="data"))
    teacher.encoder.device, teacher.encoder.dtype = torch.device("cpu"), torch.float32
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


def pass_flops(cfg: TracingConfig, shape: DecoderShape, tokens: Tokens, questions: float = 1) -> float:
    """FLOPs of one sample's teacher pass; a generated answer takes one more full pass over its prompt.

    ``questions``: mean number of samples about one image, which share it where the configuration lets them.

    Parameters
    ----------
    cfg
        Of the pass.
    shape
        Of the decoder.
    tokens
        Of a mean sample.
    questions
        About one image, as a mean.
    """
    text = max(2, round(tokens.suffix))
    sample = SampleShape(
        prefix=max(0, round(tokens.total - tokens.visual - tokens.suffix)),
        visual=round(tokens.visual),
        text=text,
        answer=min(text - 1, max(1, round(tokens.answer))),
    )
    schedules = cfg.teacher.schedules(shape.num_layers)
    together = max(1, round(min(questions, cfg.teacher.batch_size))) if cfg.teacher.share_images else 1
    group = teacher_flops(
        shape,
        sample,
        schedules.exits,
        freezes=schedules.freezes,
        questions=together,
        num_features=len(cfg.teacher.features),
    )
    return group / together + (
        teacher_flops(shape, sample, ()) if cfg.teacher.label_source == "greedy" else 0
    )


def loaded_dtype(backbone: BackboneConfig, config: Any, device: torch.device) -> str:
    """The precision that the backbone will be loaded in, by name.

    Parameters
    ----------
    backbone
        As it is configured.
    config
        Of its model, by transformers.
    device
        Where it goes.
    """
    if backbone.dtype != "auto":
        return backbone.dtype
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return "float32" if device.type == "cpu" or stored not in DTYPE_BYTES else stored


def pass_seconds(flops: float, device: torch.device, dtype: str, world_size: int) -> float:
    """How long so many FLOPs take at the speed measured here, shared by the processes.

    Parameters
    ----------
    flops
        In all.
    device
        That the speed is measured on.
    dtype
        Of the weights, by name.
    world_size
        Number of processes.
    """
    return flops / (_matmul_speed(device, getattr(torch, dtype)) * _EFFICIENCY * world_size)


def _guess(config: Any) -> Tokens:
    """Lengths from the config alone: right for one square image of a family with a fixed number."""
    visual = getattr(config, "image_seq_length", None)
    vision = getattr(config, "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if visual is None:
        fixed = isinstance(size, int) and isinstance(patch, int)
        visual = (size // patch) ** 2 if fixed else 576
    return Tokens(visual, 40, visual + 60, 10, source="a guess from the config")


def _matmul_speed(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a square matrix product."""
    left = torch.randn(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        began = time.perf_counter()
        (left @ left).sum().item()  # waits for the device
        return time.perf_counter() - began

    # The best of several: other work on the machine slows some of them down.
    return 2 * size**3 / min(seconds() for _ in range(10))
