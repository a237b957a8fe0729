"""A small evaluation: its settings, on a tiny model of four layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dyvte.backbones import BackboneConfig
from dyvte.evaluation.runner import EvalConfig

LAYERS = 4


def small_run(data: Path, output: Path, benchmark: str = "gqa", **changes) -> EvalConfig:
    """Settings of a run on ``data / benchmark``; ``changes``: others than these."""
    settings = EvalConfig(
        model=BackboneConfig(path="tiny"),
        benchmark=benchmark,
        data=data / benchmark,
        output=output,
        question_suffix="",
        batch_size=5,
        max_new_tokens=4,
        timing_batches=0,
    )
    return dataclasses.replace(settings, **changes)
