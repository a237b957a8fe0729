"""``train --lora``: data and backbone in, a PEFT adapter out; safe to start again at any point.

Output folder::

    config.yaml         the resolved configuration
    answers/            what the un-adapted full model answers (made once, reused by every later start; in
                        trace_dir if that is set, to share them between runs)
    checkpoints/        of the running training
    train_log.jsonl     metrics by step
    adapter/            adapter_config.json + adapter_model.safetensors: the result, as PEFT writes it
    summary.json        every fixed exit before and after; written last
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dyvte import __version__
from dyvte.backbones import describe, fingerprint, open_backbone, resolve_adapter, weights_digest
from dyvte.backbones.adapter import ADAPTER_WEIGHTS
from dyvte.config import to_dict
from dyvte.data import select_samples
from dyvte.distributed import Processes
from dyvte.errors import ConfigError
from dyvte.progress import progress
from dyvte.teacher import Teacher
from dyvte.tracing.zero import stage_of
from dyvte.training.config import TrainConfig
from dyvte.training.lora.distillation import LoraTraining
from dyvte.training.lora.labels import Labelled, label
from dyvte.training.lora.metrics import ExitRow, exit_columns, exit_rows, exit_table
from dyvte.training.lora.model import add_adapter, save_adapter, trainable
from dyvte.training.running import carry_out, train_tracked, without_held_out
from dyvte.training.summary import RunSummary, TrainingRecord, judged_on, read_summary, write_summary
from dyvte.training.zero import engine_config


@dataclass(frozen=True, kw_only=True)
class LoraRecord(TrainingRecord):
    """How an adapter came about; ``dyvte_lora.json`` keeps it beside the adapter.

    Attributes
    ----------
    base : id, fingerprint and digest of weights of the backbone.
    data : file, digest and counts of the selection.
    lora : its settings, as YAML would hold them.
    exits_trained : first and last exit layer that was drawn.
    layers_adapted : first and last decoder layer, from 1.
    dyvte_version : that trained it.
    """

    base: Mapping[str, str]
    data: Mapping[str, Any]
    lora: Mapping[str, Any]
    exits_trained: tuple[int, ...]
    layers_adapted: tuple[int, ...]
    dyvte_version: str


@dataclass(frozen=True, kw_only=True)
class LoraSummary(RunSummary):
    """How an adapter fared.

    Attributes
    ----------
    adapter : its folder.
    exits : every fixed exit before and after.
    notes : what was counted while the samples were labelled.
    answer_seconds : of the labelling.
    record : how it came about.
    """

    adapter: str
    exits: tuple[ExitRow, ...]
    notes: Mapping[str, int]
    answer_seconds: float
    record: LoraRecord


@dataclass(frozen=True)
class LoraResult:
    """Where the adapter is and how every fixed exit fares with it on the held-out samples."""

    adapter: Path
    summary: LoraSummary

    def table(self) -> str:
        """Every fixed exit before and after, as text."""
        return exit_table(self.summary.exits)


def train_lora(cfg: TrainConfig) -> LoraResult:
    """Train an adapter from a configuration, or go on with it; see the module's text.

    Under a launcher every process calls this. A run that is already complete returns its result at once.

    Raises
    ------
    ConfigError, DataError, CheckpointError, UnsupportedBackboneError, TrainingError
        Each naming what is wrong and what to do.
    """
    check_settings(cfg)
    return carry_out(cfg, _train, _finished)


def check_settings(cfg: TrainConfig) -> None:
    """Raise ConfigError for settings of a run that cannot train an adapter."""
    if stage_of(engine_config(cfg, 1)) == 3:
        raise ConfigError(
            "--lora trains with ZeRO stages 0 to 2: stage 3 would shard the adapter's matrices away from the "
            "frozen layers that use them"
        )
    _, adapter = resolve_adapter(cfg.model.path, cfg.model.adapter)
    if adapter is not None:
        raise ConfigError(
            f"--lora starts from a backbone without an adapter, found {adapter}: merge it into the backbone "
            "first (PeftModel.merge_and_unload, then save_pretrained), or omit it"
        )


def _train(cfg: TrainConfig, processes: Processes) -> Callable[[], LoraResult]:
    began = time.perf_counter()
    selection = select_samples(cfg.data)
    model, processor = open_backbone(cfg.model, processes.device)
    base = {"id": cfg.model.path, "fingerprint": fingerprint(model), "weights": weights_digest(model)}
    model = add_adapter(model, cfg.lora, cfg.seed)
    teacher = Teacher(model, processor, replace(cfg.teacher, reference="base"))
    share = -(-len(selection.samples) // processes.world_size)
    with progress(share, "answers", "sample", shown=processes.first) as advance:
        labelled = label(
            cfg.trace_dir if cfg.trace_dir is not None else cfg.output_dir / "answers",
            teacher,
            selection,
            processes,
            file=selection.source or str(cfg.data.path),
            max_bad_samples=cfg.data.max_bad_samples,
            progress=advance,
        )
    images = [sample.image_id for sample in labelled.samples]
    train, validation = without_held_out(lambda index: labelled.rows(index.tolist()), images, cfg)
    answered = time.perf_counter()

    training = LoraTraining(cfg, model, train, validation, processes)
    train_tracked(cfg, training, processes)
    times = {"answer_seconds": answered - began, "train_seconds": time.perf_counter() - answered}
    data = {"file": cfg.data.path.name if cfg.data.path else None, "sha256": selection.sha256}
    record = _record(cfg, training, base, {**data, **selection.counts})
    return lambda: _finish(cfg, training, labelled, record, times)


def _finish(
    cfg: TrainConfig,
    training: LoraTraining,
    labelled: Labelled,
    record: LoraRecord,
    times: dict[str, float],
) -> LoraResult:
    """Write the adapter with its record, then the summary."""
    folder = cfg.output_dir / "adapter"
    save_adapter(training.model, folder, asdict(record))
    judged = training.validation if training.validation is not None else training.train
    before = exit_columns(training.model, judged, cfg.teacher, adapted=False)
    after = exit_columns(training.model, judged, cfg.teacher)
    summary = LoraSummary(
        adapter=str(folder),
        judged_on=judged_on(training.validation),
        num_judged=len(judged),
        exits=tuple(exit_rows(before, after)),
        parameters=sum(parameter.numel() for parameter in trainable(training.model)),
        dropped=labelled.dropped,
        notes=dict(labelled.notes),
        record=record,
        **times,
    )
    write_summary(cfg, summary)
    return LoraResult(folder, summary)


def _record(
    cfg: TrainConfig, training: LoraTraining, base: Mapping[str, str], data: Mapping[str, Any]
) -> LoraRecord:
    """How the adapter came about."""
    layers = cfg.lora.layers(describe(training.model).num_layers)
    return LoraRecord(
        base=base,
        data=data,
        lora=to_dict(cfg.lora),
        exits_trained=tuple(training.exits),
        layers_adapted=(layers[0], layers[-1]),
        dyvte_version=__version__,
        **TrainingRecord.common(cfg, training.size),
    )


def _finished(cfg: TrainConfig) -> LoraResult | None:
    adapter, summary = cfg.output_dir / "adapter", read_summary(cfg, LoraSummary)
    return LoraResult(adapter, summary) if summary and (adapter / ADAPTER_WEIGHTS).is_file() else None
