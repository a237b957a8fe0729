"""Settings of a training run; every field is a key of the YAML file and of ``--set``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dyvte.errors import ConfigError
from dyvte.gates import ARCHITECTURES, FEATURES
from dyvte.objectives import OBJECTIVES, ExpectedRisk, Objective
from dyvte.tracing import TracingConfig
from dyvte.training.lora.config import LoraConfig
from dyvte.training.target import TargetConfig


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """Where the gates come from."""

    init_from: Path | None = None
    """A folder made by ``dyvte init`` or an earlier training; null: new gates."""
    architecture: str = field(default="shared", metadata={"choices": ARCHITECTURES})
    """Architecture of new gates."""
    hidden_size: int = 0
    """Width of new gates; 0: the architecture's own."""
    features: tuple[str, ...] = field(default=(), metadata={"choices": FEATURES})
    """What new gates read, out of ``teacher.features``; empty: all of it. A sweep needs one trace only."""
    freeze_head: bool = False
    """New gates also say when visual tokens freeze; needs traces with freeze layers (``teacher.freeze_every``
    or ``teacher.freeze_layers``)."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps spent warming up."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, found {self.learning_rate}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1), found {self.warmup_ratio}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints of the running training."""

    every_steps: int = 500
    """Optimiser steps between checkpoints; one more is written at the end."""
    keep: int = 2
    """How many are kept."""

    def __post_init__(self) -> None:
        if self.every_steps < 1 or self.keep < 1:
            raise ValueError("every_steps and keep must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go besides ``train_log.jsonl``, which is always written."""

    report_to: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Further trackers; wandb is offline unless WANDB_MODE says otherwise."""
    project: str = "dyvte"
    """wandb project."""
    run_name: str | None = None
    """wandb run name; null: the output folder's name."""
    log_every: int = 10
    """Steps between log lines."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TracingConfig):
    """A whole training run: the teacher pass, and what is trained on it."""

    gates: GatesConfig = field(default_factory=GatesConfig)
    objective: Objective = field(default_factory=ExpectedRisk, metadata={"registry": OBJECTIVES})
    """What the gates minimise: ``name``, and that objective's own settings."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    output_dir: Path
    """Everything the run writes."""
    trace_dir: Path | None = None
    """Traces to use or write; null: ``output_dir/trace``. Share one folder between runs of a sweep."""
    epochs: float = 20.0
    """Passes over the training samples."""
    batch_size: int = 64
    """Samples per process and micro-step."""
    accumulation: int = 1
    """Micro-steps per optimiser step."""
    seed: int = 0
    """Seed of new gates, data order and drawn layers."""

    def __post_init__(self) -> None:
        if self.target.is_set and self.lora.enabled:
            raise ConfigError("target chooses among trainings of gates: omit it where an adapter is trained")
        if self.epochs <= 0:
            raise ValueError(f"epochs must be positive, found {self.epochs}")
        if self.batch_size < 1 or self.accumulation < 1:
            raise ValueError("batch_size and accumulation must be at least 1")

    @property
    def validation_fraction(self) -> float:
        """Share of the images that is held out: more where a choice is made on them."""
        own = self.data.validation_fraction
        return max(own, self.target.held_out) if self.target.is_set else own

    @property
    def traces(self) -> Path:
        """The trace folder in force."""
        return self.trace_dir if self.trace_dir is not None else self.output_dir / "trace"
