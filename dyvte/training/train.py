"""``train``: data and backbone in, traces, gates and a summary out; safe to start again at any point.

Output folder::

    config.yaml         the resolved configuration
    trace/              what the teacher said (reused by every later start)
    checkpoints/        of the running training
    train_log.jsonl     metrics by step
    exit_histogram.png  where held-out samples leave
    gates/              gate_config.json + gates.safetensors: the result
    summary.json        the final metrics; written last

With a target, several trainings are tried (:mod:`dyvte.training.candidates`): ``candidates/NAME/`` has
checkpoints, log and gates of each, ``choice.json`` says which were kept and why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dyvte import __version__
from dyvte.calibration import gate_logits
from dyvte.config import to_dict
from dyvte.data import Selection, select_samples
from dyvte.distributed import Processes
from dyvte.errors import ConfigError, GateMismatchError
from dyvte.gates import (
    GateConfig,
    GateStack,
    close_freezes,
    close_gates,
    schedules,
    uniform_freeze_offsets,
    uniform_offsets,
)
from dyvte.gates.config import CONFIG_FILE as GATES_CONFIG
from dyvte.teacher import TraceStore
from dyvte.tracing import run_traces
from dyvte.training.candidates import Choice, candidate_configs, choose
from dyvte.training.config import TrainConfig
from dyvte.training.gate_training import GateTraining
from dyvte.training.loop import TrainingSize
from dyvte.training.metrics import BudgetRow, budget_rows, budget_table, exit_rate
from dyvte.training.running import carry_out, prepare_output, train_tracked, without_held_out
from dyvte.training.summary import RunSummary, TrainingRecord, judged_on, read_summary, write_summary
from dyvte.training.target import OWN

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GateRecord(TrainingRecord):
    """How gates came about; ``gate_config.json`` keeps it.

    Attributes
    ----------
    objective : its settings, as YAML would hold them.
    init_from : gates that the run started from; None for new ones.
    data : file, digests, rule and counts of the selection.
    trace : what the traces depend on.
    reductions : with which the teacher was traced.
    trace_notes : what was counted in the pass.
    """

    objective: Mapping[str, Any]
    init_from: str | None
    data: Mapping[str, Any]
    trace: Mapping[str, Any]
    reductions: str
    trace_notes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class GateSummary(RunSummary):
    """How gates fared.

    Attributes
    ----------
    gates : their folder.
    budgets : beside fixed K at several budgets.
    exit_rate : (L+1,) share of samples leaving at each exit layer at threshold 0.5.
    trace_seconds : of the teacher pass.
    record : how they came about.
    """

    gates: str
    budgets: tuple[BudgetRow, ...]
    exit_rate: tuple[float, ...]
    trace_seconds: float
    record: GateRecord


@dataclass(frozen=True)
class TrainResult:
    """Where the gates are and how they fared on the held-out samples.

    Attributes
    ----------
    gates
        Folder of the checkpoint.
    summary
        Their metrics on the held-out samples.
    """

    gates: Path
    summary: GateSummary
    choice: Choice | None = None
    """Which of several trainings they are; None where there was one."""

    def table(self) -> str:
        """Gates beside fixed K at several budgets, as text."""
        return budget_table(self.summary.budgets)


def train(cfg: TrainConfig) -> TrainResult:
    """Run a training from its configuration, or go on with it; see the module's text.

    Under a launcher every process calls this. A run that is already complete returns its result at once.

    Parameters
    ----------
    cfg
        All settings of the run; ``output_dir`` is where it is kept.

    Raises
    ------
    ConfigError, DataError, CheckpointError, GateMismatchError, UnsupportedBackboneError, TrainingError
        Each naming what is wrong and what to do.
    """
    return carry_out(cfg, _train, _finished)


def _train(cfg: TrainConfig, processes: Processes) -> Callable[[], TrainResult]:
    started = time.perf_counter()
    selection = select_samples(cfg.data)
    store, backbone = run_traces(cfg, selection, cfg.traces, processes)
    traced = time.perf_counter()

    tried = candidate_configs(cfg) if cfg.target.is_set else {OWN: cfg}
    made = store.manifest
    shape = made.num_layers, made.feature_size // len(made.features)
    gates = make_gates(tried[OWN], *shape, backbone, made.exits, made.freezes)
    features = gates.config.features
    parts = without_held_out(store.trace(features).rows, store.image_ids(), tried[OWN])
    trained: dict[str, tuple[GateTraining, dict[str, torch.Tensor]]] = {}
    for name, one in tried.items():
        if cfg.target.is_set:
            log.info("candidate %s", name)
            prepare_output(one, processes)
        if name != OWN:
            one = replace(one, gates=replace(one.gates, features=features))
            gates = make_gates(one, *shape, backbone, made.exits, made.freezes)
        if one.gates.init_from is None or gates.config.is_new:
            gates.fit_inputs(**parts[0].gate_inputs())
        training = GateTraining(one, gates, *parts, processes)
        trained[name] = training, train_tracked(one, training, processes)
    times = {"trace_seconds": traced - started, "train_seconds": time.perf_counter() - traced}
    return lambda: _finish(cfg, tried, trained, selection, store, times)


def make_gates(
    cfg: TrainConfig,
    num_layers: int,
    hidden_size: int,
    backbone: Mapping[str, str | None],
    exits: Sequence[int] | None = None,
    freezes: Sequence[int] | None = None,
) -> GateStack:
    """New gates for the run, or those it starts from.

    New gates get offsets that make all exits, and all freezes, equally likely where the objective starts so.
    Gates at layers that are not among ``exits`` or ``freezes`` (None: all are) are closed.

    Parameters
    ----------
    cfg
        Of the run.
    num_layers
        L.
    hidden_size
        D.
    backbone
        Its identity.
    exits
        Exit layers that the traces label.
    freezes
        Freeze layers that they hold.

    Raises
    ------
    ConfigError
        If a freeze head is to be trained without traced freeze layers, or by an objective that cannot.
    GateMismatchError
        If the gates to start from have another shape, or belong to another backbone.
    """
    if cfg.gates.init_from is None:
        zeros, uniform = (0.0,) * num_layers, cfg.objective.starts_uniform
        closed = close_gates(zeros, exits) if exits is not None else ()
        freeze_offsets: tuple[float, ...] = ()
        if cfg.gates.freeze_head:
            _check_freezes(cfg, freezes)
            closed_too = zeros if freezes is None else close_freezes(zeros, freezes)
            freeze_offsets = uniform_freeze_offsets(num_layers, freezes) if uniform else closed_too
        config = GateConfig(
            num_layers=num_layers,
            hidden_size=hidden_size,
            architecture=cfg.gates.architecture,
            gate_hidden_size=cfg.gates.hidden_size,
            features=cfg.gates.features or cfg.teacher.features,
            offsets=uniform_offsets(num_layers, exits) if uniform else closed,
            freeze_head=cfg.gates.freeze_head,
            freeze_offsets=freeze_offsets,
            backbone=dict(backbone),
        )
        return GateStack.init(config, seed=cfg.seed)
    gates = GateStack.from_pretrained(cfg.gates.init_from)
    given = (gates.config.num_layers, gates.config.hidden_size)
    if given != (num_layers, hidden_size):
        raise GateMismatchError(
            f"{cfg.gates.init_from}: gates for {given[0]} layers of size {given[1]}, the backbone has "
            f"{num_layers} of size {hidden_size}; make new ones with `dyvte init --model {cfg.model.path}`"
        )
    theirs = gates.config.backbone.get("fingerprint")
    if theirs is not None and theirs != backbone.get("fingerprint"):
        raise GateMismatchError(
            f"{cfg.gates.init_from}: gates of another backbone ({gates.config.backbone.get('id')}, "
            f"fingerprint {theirs}); this one is {backbone.get('id')}, {backbone.get('fingerprint')}"
        )
    offsets = gates.config.offsets if exits is None else close_gates(gates.config.offsets, exits)
    gates.config = replace(
        gates.config, backbone=dict(backbone), calibration={}, groups=None, offsets=offsets
    )
    gates.finder = None
    if gates.config.freeze_head:
        _check_freezes(cfg, freezes)
        if freezes is not None:
            own = close_freezes(gates.config.freeze_offsets, freezes)
            if gates.config.is_new and cfg.objective.starts_uniform:
                own = uniform_freeze_offsets(num_layers, freezes)
            gates.config = replace(gates.config, freeze_offsets=own)
    return gates


def _check_freezes(cfg: TrainConfig, freezes: Sequence[int] | None) -> None:
    if not cfg.objective.trains_freezes:
        raise ConfigError(
            f"objective {cfg.objective.name} trains no freeze head: choose expected_risk, or gates without "
            "one"
        )
    if freezes is not None and not freezes:
        raise ConfigError(
            "a freeze head learns from traces with freeze layers: set teacher.freeze_every or "
            "teacher.freeze_layers"
        )


def _finished(cfg: TrainConfig) -> TrainResult | None:
    folder, summary = cfg.output_dir / "gates", read_summary(cfg, GateSummary)
    if not summary or not (folder / GATES_CONFIG).is_file():
        return None
    return TrainResult(folder, summary, Choice.read(cfg.output_dir))


def _finish(
    cfg: TrainConfig,
    tried: Mapping[str, TrainConfig],
    trained: Mapping[str, tuple[GateTraining, dict[str, torch.Tensor]]],
    selection: Selection,
    store: TraceStore,
    times: dict[str, float],
) -> TrainResult:
    """Write the gates with their record, then the summary."""
    stacks, records = {}, {}
    for name, (training, weights) in trained.items():
        records[name] = _record(tried[name], training.size, selection, store)
        config = replace(training.gates.config, training=asdict(records[name]), dyvte_version=__version__)
        stacks[name] = GateStack(config)
        stacks[name].load_state_dict(weights)
        stacks[name].eval().save_pretrained(tried[name].output_dir / "gates")

    training, _ = trained[OWN]
    judged = training.validation if training.validation is not None else training.train
    gates, record, choice = stacks[OWN], records[OWN], None
    if cfg.target.is_set:
        gates, choice = choose(stacks, judged, cfg.target)
        record = records[choice.chosen[0]]
        gates.config = replace(gates.config, training={**asdict(record), "choice": asdict(choice)})
        choice.write(cfg.output_dir)
        gates.eval().save_pretrained(cfg.output_dir / "gates")
    train_logits, logits = gate_logits(gates, training.train), gate_logits(gates, judged)
    summary = GateSummary(
        gates=str(cfg.output_dir / "gates"),
        judged_on=judged_on(training.validation),
        num_judged=len(judged),
        budgets=tuple(budget_rows(train_logits, training.train, logits, judged)),
        exit_rate=tuple(exit_rate(schedules(logits, 0.5).exit_layers_B, judged.num_layers)),
        parameters=sum(parameter.numel() for parameter in gates.parameters()),
        dropped=store.dropped(),
        record=record,
        **times,
    )
    write_summary(cfg, summary)
    return TrainResult(cfg.output_dir / "gates", summary, choice)


def _record(cfg: TrainConfig, size: TrainingSize, selection: Selection, store: TraceStore) -> GateRecord:
    """How the weights came about."""
    return GateRecord(
        objective=to_dict(cfg.objective),
        init_from=str(cfg.gates.init_from) if cfg.gates.init_from else None,
        data=selection.record(),
        trace=store.manifest.fingerprint,
        reductions=cfg.teacher.reductions,
        trace_notes=store.notes(),
        **TrainingRecord.common(cfg, size),
    )
