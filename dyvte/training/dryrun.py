"""What a training run would do: shapes, counts, memory and time, from configs, processor and data alone.

No weight is read and nothing is written (see :mod:`dyvte.tracing.estimates`). Memory and time are estimates
from formulas; the arithmetic speed is measured on the spot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dyvte.backbones import describe_config
from dyvte.backbones.describe import BackboneShape
from dyvte.backbones.sizes import decoder_shape
from dyvte.data import Selection, select_samples
from dyvte.distributed import own_device
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
from dyvte.training.candidates import candidate_configs
from dyvte.training.config import TrainConfig
from dyvte.training.loop import TrainingSize
from dyvte.training.train import make_gates
from dyvte.training.zero import engine_config


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """What a run would do: what gates and adapters have in common.

    Attributes
    ----------
    model_type, num_layers, hidden_size : of the backbone's decoder.
    samples : counts of the selection.
    data_sha256 : digest of the selection.
    steps, samples_per_step : of the training.
    zero_stage : DeepSpeed's.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    samples: Mapping[str, int]
    data_sha256: str
    steps: int
    samples_per_step: int
    zero_stage: int

    @staticmethod
    def common(
        cfg: TrainConfig, shape: BackboneShape, selection: Selection, world_size: int
    ) -> dict[str, Any]:
        """The fields above, by name.

        Parameters
        ----------
        cfg
            Of the run.
        shape
            Of the backbone.
        selection
            Of the samples.
        world_size
            Number of processes.
        """
        held_out = round(len(selection.samples) * cfg.validation_fraction)
        size = TrainingSize.of(cfg, max(1, len(selection.samples) - held_out), world_size)
        return {
            "model_type": shape.model_type,
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "samples": selection.counts,
            "data_sha256": selection.sha256,
            "steps": size.steps,
            "samples_per_step": size.global_batch,
            "zero_stage": stage_of(engine_config(cfg, world_size)),
        }

    def lines(self) -> list[tuple[str, str]]:
        """What each line is about, and its text."""
        raise NotImplementedError(f"{type(self).__name__} defines no `lines`")

    def data_text(self) -> str:
        """Counts and digest of the selection."""
        counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in self.samples.items())
        return f"{counts}; sha256 {self.data_sha256[:16]}"

    def __str__(self) -> str:
        """The lines, aligned."""
        return "\n".join(f"{name:>16}: {text}" for name, text in self.lines())


@dataclass(frozen=True, kw_only=True)
class GateDryRun(PlannedRun):
    """What a training of gates would do.

    Attributes
    ----------
    backbone_parameters : of the whole model.
    tokens : of a sample, as means.
    dtype : of the weights, or the quantization.
    gate_architecture, gate_parameters : of the gates.
    features_per_sample : (layers, numbers a layer) of what the gates read.
    trainings : that are tried; several with a target.
    processes : of the launcher.
    backbone_bytes : of the weights, in one process.
    logits_bytes : of the teacher's logits, a batch of all schedules.
    trace_bytes : on disk.
    gate_training_bytes : weights, gradients and moments in fp32.
    teacher_flops, teacher_seconds : of the pass in the decoder, at the speed measured here.
    """

    backbone_parameters: int
    tokens: Tokens
    dtype: str
    gate_architecture: str
    gate_parameters: int
    features_per_sample: tuple[int, int]
    trainings: int
    processes: int
    backbone_bytes: float
    logits_bytes: float
    trace_bytes: float
    gate_training_bytes: float
    teacher_flops: float
    teacher_seconds: float

    def lines(self) -> list[tuple[str, str]]:
        """What each line is about, and its text."""
        tokens, (layers, features) = self.tokens, self.features_per_sample
        sharded = " a process, of ZeRO-3" if self.zero_stage == 3 else ""
        return [
            ("backbone", f"{self.model_type}, {self.num_layers} layers of {self.hidden_size}, "
                         f"{self.backbone_parameters:,} parameters"),
            ("tokens", f"a sample {tokens.visual:.0f} visual, {tokens.total - tokens.visual:.0f} text "
                       f"({tokens.suffix:.0f} after the image), by {tokens.source}"),
            ("gates", f"{self.gate_architecture}, {self.gate_parameters:,} parameters"),
            ("features", f"{layers} x {features} a sample"),
            ("data", self.data_text()),
            ("steps", f"{self.steps} of {self.samples_per_step} samples, {self.processes} processes, "
                      f"ZeRO {self.zero_stage}"
                      + (f"; {self.trainings} trainings to choose from" if self.trainings > 1 else "")),
            ("backbone weights", f"about {_size(self.backbone_bytes)}{sharded} ({self.dtype})"),
            ("teacher's logits", f"about {_size(self.logits_bytes)} a batch, all schedules"),
            ("traces on disk", f"about {_size(self.trace_bytes)}"),
            ("gate training", f"about {_size(self.gate_training_bytes)}"),
            ("teacher pass", f"about {self.teacher_flops / 1e12:,.1f} TFLOP in the decoder, "
                             f"{_duration(self.teacher_seconds)} at the speed measured here"),
        ]  # fmt: skip


def dry_run(cfg: TrainConfig, world_size: int = 1) -> GateDryRun:
    """What the run would do; raises what the run itself would raise about its model, data and settings.

    Parameters
    ----------
    cfg
        Of the run.
    world_size
        Processes that it is planned for.

    Raises
    ------
    UnsupportedBackboneError
        If there is no model config: for a hub id that is not cached, with what to do.
    """
    model = shapes_of(cfg.model)
    shape, sizes = describe_config(model.config), decoder_shape(model.config)
    selection = select_samples(cfg.data)
    identity = {"id": cfg.model.path, "fingerprint": shape.fingerprint}
    schedules = cfg.teacher.schedules(shape.num_layers)
    with torch.device("meta" if cfg.gates.init_from is None else "cpu"):
        gates = make_gates(cfg, shape.num_layers, shape.hidden_size, identity, freezes=schedules.freezes)
    tokens = sample_tokens(cfg, model, selection)

    device = own_device()
    dtype = loaded_dtype(cfg.model, model.config, device)
    samples = len(selection.samples)
    flops = samples * pass_flops(cfg, sizes, tokens, samples / max(1, selection.counts["images"]))
    backbone = sum(parameter.numel() for parameter in model.parameters())
    parameters = sum(parameter.numel() for parameter in gates.parameters())
    feature_size = len(cfg.teacher.features) * shape.hidden_size
    packed = PACKED_BYTES.get(cfg.model.quantization, DTYPE_BYTES[dtype])
    stored_layers = shape.num_layers + len(schedules.stream_layers) + bool(schedules.freezes)
    labels = 5 * (len(schedules.freezes) + 1) * (shape.num_layers + 1) * 4
    return GateDryRun(
        backbone_parameters=backbone,
        tokens=tokens,
        dtype=dtype if cfg.model.quantization == "none" else cfg.model.quantization,
        gate_architecture=gates.config.architecture,
        gate_parameters=parameters,
        features_per_sample=(shape.num_layers, feature_size),
        trainings=len(candidate_configs(cfg)) if cfg.target.is_set else 1,
        processes=world_size,
        backbone_bytes=backbone * packed / (world_size if shards_backbone(cfg) else 1),
        logits_bytes=cfg.teacher.batch_size * tokens.answer * len(schedules.pairs) * sizes.vocab_size * 4,
        trace_bytes=samples * (stored_layers * feature_size * DTYPE_BYTES[dtype] + labels),
        gate_training_bytes=parameters * 16,
        teacher_flops=flops,
        teacher_seconds=pass_seconds(flops, device, dtype, world_size),
        **PlannedRun.common(cfg, shape, selection, world_size),
    )


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
