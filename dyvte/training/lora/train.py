"""``train --lora``: data and backbone in, a PEFT adapter out; safe to start again at any point.

Output folder::

    config.yaml         the resolved configuration
    answers/            what the un-adapted full model answers (made once, reused by every later start; in
                        trace_dir if that is set, to share them between runs)
    checkpoints/        of the running training
    train_log.jsonl     figures by step
    adapter/            adapter_config.json + adapter_model.safetensors: the result, as PEFT writes it
    summary.json        every fixed exit before and after; written last
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dyvte import __version__
from dyvte.backbones import describe, fingerprint, open_backbone, resolve_adapter, weights_digest
from dyvte.backbones.adapter import ADAPTER_WEIGHTS
from dyvte.config import to_dict
from dyvte.distributed import Processes, join_processes
from dyvte.errors import ConfigError
from dyvte.evaluation.run_log import write_atomically
from dyvte.progress import progress
from dyvte.teacher import Teacher
from dyvte.training.config import TrainConfig
from dyvte.training.lora.labels import Labelled, label
from dyvte.training.lora.loop import LoraTraining
from dyvte.training.lora.metrics import exit_columns, exit_rows, exit_table
from dyvte.training.lora.model import add_adapter, save_adapter, trainable
from dyvte.training.running import SUMMARY_FILE, disk_errors_named, prepare_output, run_tracked
from dyvte.training.schedule import held_out
from dyvte.training.tracing import select_samples
from dyvte.training.zero import engine_config, stage_of


@dataclass(frozen=True)
class LoraResult:
    """Where the adapter is and how every fixed exit fares with it on the held-out samples."""

    adapter: Path
    summary: dict[str, Any]

    def table(self) -> str:
        """The summary table."""
        return exit_table(self.summary["exits"])


def train_lora(cfg: TrainConfig) -> LoraResult:
    """Train an adapter from a configuration, or go on with it; see the module's text.

    Under a launcher every process calls this. A run that is already complete returns its result at once.

    Raises
    ------
    ConfigError, DataError, CheckpointError, UnsupportedBackboneError, TrainingError
        Each naming what is wrong and what to do.
    """
    check_settings(cfg)
    with join_processes(engine=True) as processes, disk_errors_named(cfg.output_dir):
        return _train(cfg, processes)


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
            "first (PeftModel.merge_and_unload, then save_pretrained), or leave it out"
        )


def _train(cfg: TrainConfig, processes: Processes) -> LoraResult:
    prepare_output(cfg, processes)
    finished = _finished(cfg)
    if finished is not None:
        return finished
    began = time.perf_counter()
    selection = select_samples(cfg)
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
    images = tuple(sample.image_id for sample in labelled.samples)
    out_B = held_out(images, cfg.data.validation_fraction, cfg.seed)
    train = labelled.rows((~out_B).nonzero().flatten().tolist())
    validation = labelled.rows(out_B.nonzero().flatten().tolist()) if bool(out_B.any()) else None
    answered = time.perf_counter()

    training = LoraTraining(cfg, model, train, validation, processes)
    try:
        run_tracked(cfg, training, processes)
    finally:
        training.close()
    times = {"answer_seconds": answered - began, "train_seconds": time.perf_counter() - answered}
    data = {"file": cfg.data.path.name if cfg.data.path else None, "sha256": selection.sha256}
    record = {"base": base, "data": {**data, **selection.counts}, **_record(cfg, training)}
    result = processes.first_alone(lambda: _finish(cfg, training, labelled, record, times))
    return result if result is not None else _finished(cfg)  # type: ignore[return-value]


def _finish(
    cfg: TrainConfig,
    training: LoraTraining,
    labelled: Labelled,
    record: dict[str, Any],
    times: dict[str, float],
) -> LoraResult:
    """Write the adapter with its record, then the summary."""
    folder = cfg.output_dir / "adapter"
    save_adapter(training.model, folder, record)
    judged = training.validation if training.validation is not None else training.train
    before = exit_columns(training.model, judged, cfg.teacher, adapted=False)
    after = exit_columns(training.model, judged, cfg.teacher)
    summary = {
        "adapter": str(folder),
        "judged_on": "held-out samples" if training.validation is not None else "training samples",
        "num_judged": len(judged),
        "exits": exit_rows(before, after),
        "parameters": sum(parameter.numel() for parameter in trainable(training.model)),
        "dropped": list(labelled.dropped),
        "notes": dict(labelled.notes),
        **times,
        **record,
    }
    write_atomically(cfg.output_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return LoraResult(folder, summary)


def _record(cfg: TrainConfig, training: LoraTraining) -> dict[str, Any]:
    """How the adapter came about: kept beside it."""
    layers = cfg.lora.layers(describe(training.model).num_layers)
    return {
        "lora": to_dict(cfg.lora),
        "exits_trained": list(training.exits),
        "layers_adapted": [layers[0], layers[-1]],
        "optimizer": to_dict(cfg.optimizer),
        "epochs": cfg.epochs,
        "steps": training.plan.steps,
        "global_batch": training.plan.global_batch,
        "num_samples": training.plan.num_samples,
        "seed": cfg.seed,
        "dyvte_version": __version__,
    }


def _finished(cfg: TrainConfig) -> LoraResult | None:
    path, adapter = cfg.output_dir / SUMMARY_FILE, cfg.output_dir / "adapter"
    if not path.is_file() or not (adapter / ADAPTER_WEIGHTS).is_file():
        return None
    return LoraResult(adapter, json.loads(path.read_text(encoding="utf-8")))
