"""Settings of a teacher pass: which backbone, which data, how it is traced."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dyvte.backbones import BackboneConfig
from dyvte.data import DataConfig
from dyvte.groups import open_group
from dyvte.teacher.config import TeacherConfig


@dataclass(frozen=True, kw_only=True)
class TracingConfig:
    """What ``trace``, ``calibrate`` and the searches need, and a part of every training."""

    model: BackboneConfig = field(metadata=open_group("path"))
    """The frozen backbone."""
    data: DataConfig
    """Instruction data."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """How samples are traced."""
    deepspeed: Path | None = None
    """DeepSpeed JSON; null: stage 0. Stage 3 also shards the backbone, ``offload_param`` is for it alone."""
