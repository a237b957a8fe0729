"""Settings of a training run; every field is a key of the YAML file and of ``--set``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dyvte.backbones import BackboneConfig
from dyvte.config import open_group
from dyvte.gates import ARCHITECTURES
from dyvte.objectives import OBJECTIVES, ExpectedRisk, Objective
from dyvte.teacher.teacher import TeacherConfig
from dyvte.training.lora.config import LoraConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """LLaVA instruction data, from a file or from the hub, and what is taken of it."""

    path: Path | None = None
    """A .json, .jsonl or .parquet file of conversations, or a dataset folder."""
    hub_id: str | None = None
    """A hub dataset instead."""
    subset: str | None = None
    """hub_id: the dataset's configuration, where it has several."""
    split: str = "train"
    """hub_id, or a dataset folder: which split."""
    revision: str | None = None
    """hub_id: commit, tag or branch."""
    streaming: bool = False
    """hub_id: read over the network and keep the chosen samples only; else download and cache all of it."""
    image_folder: Path | None = None
    """What image paths are relative to; null: "images" beside the file."""
    follow_links: bool = False
    """Let symbolic links in the image folder lead out of it (folders of images that you linked together)."""
    turns: Literal["single", "first", "all"] = "single"
    """Conversations of one exchange only; the first exchange of any; or every exchange as a sample of its
    own, with the earlier ones in its prompt."""
    repeated_ids: Literal["number", "refuse"] = "number"
    """Number ids that repeat (they do in LLaVA-665k), or count their samples as unusable."""
    fraction: float = 1.0
    """Random share of the eligible samples; the papers use 0.01 of LLaVA-665k."""
    limit: int | None = None
    """At most this many samples, drawn at random."""
    seed: int = 0
    """Seed of both draws."""
    max_bad_samples: int = 0
    """How many unusable samples (named in the log) are tolerated before the run stops."""
    validation_fraction: float = 0.05
    """Share of the images held out from training, for the figures in the log and the summary."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("give either path (a local file or folder) or hub_id (a hub dataset)")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], found {self.fraction}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie in [0, 1), found {self.validation_fraction}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, found {self.limit}")

    @property
    def images(self) -> Path:
        """The image folder in force."""
        if self.image_folder is not None:
            return self.image_folder
        return Path("images") if self.path is None else self.path.parent / "images"

    @property
    def name(self) -> str:
        """For messages: the file or the dataset."""
        return str(self.path if self.path is not None else self.hub_id)


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """Where the gates come from."""

    init_from: Path | None = None
    """A folder made by ``dyvte init`` or an earlier training; null: new gates."""
    architecture: str = field(default="shared", metadata={"choices": ARCHITECTURES})
    """Architecture of new gates."""
    hidden_size: int = 0
    """Width of new gates; 0: the architecture's own."""
    features: tuple[str, ...] = ()
    """What new gates read, out of ``teacher.features``; empty: all of it. A sweep needs one trace only."""


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
    """Where figures go besides ``train_log.jsonl``, which is always written."""

    report_to: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Further trackers; wandb is offline unless WANDB_MODE says otherwise."""
    project: str = "dyvte"
    """wandb project."""
    run_name: str | None = None
    """wandb run name; null: the output folder's name."""
    log_every: int = 10
    """Steps between log lines."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run."""

    model: BackboneConfig = field(metadata=open_group("path"))
    data: DataConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    gates: GatesConfig = field(default_factory=GatesConfig)
    objective: Objective = field(default_factory=ExpectedRisk, metadata={"registry": OBJECTIVES})
    """What the gates minimise: ``name``, and that objective's own settings."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
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
    deepspeed: Path | None = None
    """DeepSpeed JSON; null: stage 0. Stage 3 also shards the backbone, ``offload_param`` is for it alone."""

    def __post_init__(self) -> None:
        if self.epochs <= 0:
            raise ValueError(f"epochs must be positive, found {self.epochs}")
        if self.batch_size < 1 or self.accumulation < 1:
            raise ValueError("batch_size and accumulation must be at least 1")

    @property
    def traces(self) -> Path:
        """The trace folder in force."""
        return self.trace_dir if self.trace_dir is not None else self.output_dir / "trace"
