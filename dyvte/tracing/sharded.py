"""Backbones that do not fit one device: weights sharded over processes by ZeRO-3, or kept in CPU memory.

With stage 3 in the run's DeepSpeed file the frozen backbone of the teacher pass is loaded straight into
shards, and each decoder layer's weights are gathered while it runs. Gathering is collective, so all processes
must run the same modules in the same order: :class:`Lockstep` sees to that.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dyvte.backbones import BackboneConfig, describe, open_backbone, read_model_config, resolve_adapter
from dyvte.backbones.load import load_processor
from dyvte.data import Defect, Sample, Selection
from dyvte.distributed import Processes, import_deepspeed
from dyvte.errors import ConfigError, DataError
from dyvte.teacher import Teacher
from dyvte.teacher.manifest import Manifest, Shard
from dyvte.tracing.config import TracingConfig
from dyvte.tracing.zero import backbone_engine, shards_backbone, start_engine

log = logging.getLogger(__name__)


@contextmanager
def opened_backbone(cfg: TracingConfig, processes: Processes) -> Iterator[tuple[Any, Any]]:
    """Model and processor for the teacher pass; sharded where the DeepSpeed file says stage 3.

    All processes must enter and leave together. The model must not be used afterwards.

    Parameters
    ----------
    cfg
        Of the pass.
    processes
        All.

    Raises
    ------
    ConfigError
        If stage 3 meets a quantised backbone, whose packed weights cannot be sharded.
    """
    if not shards_backbone(cfg):
        yield open_backbone(cfg.model, processes.device)
        return
    if cfg.model.quantization != "none":
        raise ConfigError(
            f"ZeRO-3 cannot shard a backbone in {cfg.model.quantization}: use stage 0 to 2, or "
            "quantization: none"
        )
    deepspeed = import_deepspeed()
    _check_processor(cfg.model)
    from transformers.integrations import HfDeepSpeedConfig

    settings = backbone_engine(cfg, _stored_dtype(cfg.model, processes.device), processes.world_size)
    told_transformers = HfDeepSpeedConfig(
        settings
    )  # holds from_pretrained and generate to ZeRO-3 while alive
    engine = None
    try:
        # On a CPU no weight is moved: the shards are where they belong.
        device = None if processes.device.type == "cpu" else processes.device
        model, processor = open_backbone(replace(cfg.model, device=None), device)
        # A layer runs on the full stream and then on the exit streams: its weights stay gathered in between.
        deepspeed.utils.set_z3_leaf_modules(model, [type(describe(model).layers[0])])
        engine = start_engine(cfg.deepspeed, settings, model=model)
        engine.eval()
        yield model, processor
    finally:
        if engine is not None:
            engine.destroy()
        del told_transformers, engine
        gc.collect()


def _check_processor(backbone: BackboneConfig) -> None:
    """Read the processor once before ZeRO-3 divides every model that is built: it is compared with the vision
    side then, as without ZeRO-3."""
    path, _ = resolve_adapter(backbone.path, backbone.adapter)
    load_processor(path, trust_remote_code=backbone.trust_remote_code, image_features=backbone.image_features)


class Lockstep:
    """A teacher whose processes all make the same number of passes; takes a teacher's place in a writer.

    A process that has nothing left to trace, or whose batch holds no usable sample, passes over a spare
    sample and throws the result away, until no process has a batch left.
    """

    def __init__(self, teacher: Teacher, selection: Selection, processes: Processes) -> None:
        self.teacher, self.selection, self.processes = teacher, selection, processes
        self.config = teacher.config

    @staticmethod
    def of(
        cfg: TracingConfig, model: Any, processor: Any, selection: Selection, processes: Processes
    ) -> Lockstep:
        """For a sharded backbone. Whether an answer must be generated may depend on no process's own data,
        so ``try_answers`` (the same labels, sooner) is off.

        Parameters
        ----------
        cfg
            Of the pass.
        model, processor
            As `opened_backbone` gives them.
        selection
            With the spare sample.
        processes
            All.
        """
        teacher = Teacher(model, processor, replace(cfg.teacher, try_answers=False))
        teacher.encoder.device = processes.device  # a sharded weight may lie elsewhere
        return Lockstep(teacher, selection, processes)

    def manifest(self, selection: Selection) -> Manifest:
        """That of the teacher."""
        return self.teacher.manifest(selection)

    def trace(self, samples: Sequence[Sample], file: str = "") -> tuple[Shard, list[Defect]]:
        """Trace one batch while every other process passes over one of its own.

        Parameters
        ----------
        samples
            Of the batch.
        file
            That they are of, for messages.
        """
        self._any_busy(True)
        shard, defects = self.teacher.trace(samples, file)
        if not len(shard.trace):
            self._pass_over_a_spare()
        return shard, defects

    def finish(self) -> None:
        """Keep up with the others until all are done."""
        while self._any_busy(False):
            self._pass_over_a_spare()

    def _any_busy(self, busy: bool) -> bool:
        return not self.processes.all_true(not busy)

    def _pass_over_a_spare(self) -> None:
        for sample in self.selection.samples:
            if len(self.teacher.trace([sample])[0].trace):
                return
        raise DataError("no sample of the selection can be traced")


def _stored_dtype(cfg: BackboneConfig, device: torch.device) -> str:
    """The precision of the weights, by name; ZeRO-3 must know it before they are read."""
    if cfg.dtype != "auto":
        return cfg.dtype
    if device.type == "cpu":
        return "float32"
    stored = getattr(read_model_config(cfg), "dtype", None)
    return str(stored or "float32").removeprefix("torch.")
