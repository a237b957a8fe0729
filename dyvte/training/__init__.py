"""Training gates against the un-pruned model, in a DeepSpeed engine."""

from __future__ import annotations

from dyvte.training.config import TrainConfig
from dyvte.training.train import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
