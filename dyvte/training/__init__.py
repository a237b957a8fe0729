"""Training gates against the un-pruned model, in a DeepSpeed engine."""

from __future__ import annotations

from dyvte.training.config import TrainConfig
from dyvte.training.gate_training import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
