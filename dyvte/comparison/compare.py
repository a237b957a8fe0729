"""Gates beside VTW, a question-only router, the oracle and the full model: what ``dyvte compare`` computes.

Everything chosen is chosen on calibration samples; the test samples and the benchmarks are only looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import dyvte
from dyvte.backbones.sizes import decoder_shape
from dyvte.calibration.operating_points import fixed_points, static_points
from dyvte.calibration.path import Labels
from dyvte.comparison.budgets import BudgetComparison, PointsAt, Rule, compare_at_budgets
from dyvte.comparison.config import CompareConfig
from dyvte.comparison.oracle import oracle_points, schedule_oracle_points
from dyvte.comparison.plan_compare import PlanComparison, compare_searches, shared_reductions
from dyvte.comparison.question_features import router_features
from dyvte.comparison.records import plain
from dyvte.comparison.runs import (
    BenchmarkComparison,
    BenchmarkRuns,
    ScoreCurves,
    benchmark_comparison,
    gates_name,
    mixture_name,
    router_name,
    run_benchmark,
    static_name,
)
from dyvte.comparison.scenes import TracedScenes, load_scenes
from dyvte.comparison.score_curves import score_curves
from dyvte.comparison.static_sets import SetComparison, StaticSet, compare_sets, read_static_sets
from dyvte.comparison.table import PolicyRow, table_rows
from dyvte.comparison.traces import Pair, TraceComparison, compare_on_traces
from dyvte.comparison.tuned_gates import TunedGates, load_gates, read_gates
from dyvte.comparison.tuned_router import (
    TunedRouter,
    best_router,
    thriftiest_router,
    train_router_candidates,
    training_settings,
)
from dyvte.comparison.vtw import VtwChoice, choose_vtw
from dyvte.config import dump_config
from dyvte.distributed import Processes, join_processes
from dyvte.errors import ConfigError
from dyvte.evaluation.askable import without_unaskable
from dyvte.evaluation.earlier import check_earlier
from dyvte.evaluation.fitting import check_named
from dyvte.evaluation.generation import Pipeline, encoded_batches, plan_batches
from dyvte.evaluation.latency import PrefillTimes, even_batches, machine, measure_prefill
from dyvte.evaluation.runner import load_pipeline, load_questions, prompts_of
from dyvte.evaluation.scores import FULL_MODEL, Machine
from dyvte.evaluation.settings import NamedPolicy, parse_policies, with_reductions
from dyvte.policies import LearnedPolicy
from dyvte.tasks.base import get_benchmark
from dyvte.teacher import TraceStore

CONFIG_FILE = "config.yaml"
PLAN_BUDGETS = (0.5, 0.33, 0.22, 0.11)
"""Where plans are compared unless budgets are given."""


@dataclass(frozen=True)
class GateSetting:
    """A seed's gates: their stored threshold, and their visual compute on the calibration samples there."""

    threshold: float
    budget: float


@dataclass(frozen=True)
class Comparison:
    """Outcome of `compare`.

    Attributes
    ----------
    version : of dyvte.
    eta, seed : of the settings.
    machine : where it ran, and times were taken.
    vtw : VTW's K.
    gates : by seed.
    traces : rules on traced test samples.
    benchmarks : by title.
    rows : the table over all benchmarks; empty without any.
    budgets, plans : None unless they were asked for.
    sets : static sets of frozen layers at what they cost; empty unless they were asked for.
    """

    version: str
    eta: float
    seed: int
    machine: Machine
    vtw: VtwChoice
    gates: Mapping[str, GateSetting]
    traces: TraceComparison
    benchmarks: Mapping[str, BenchmarkComparison]
    rows: tuple[PolicyRow, ...]
    budgets: BudgetComparison | None
    plans: PlanComparison | None
    sets: tuple[SetComparison, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as ``comparison.json`` holds it; what was not asked for is omitted."""
        settings = {"dyvte": self.version, "eta": self.eta, "seed": self.seed, "machine": plain(self.machine)}
        found = {name: plain(getattr(self, name)) for name in ("vtw", "gates", "traces", "benchmarks")}
        asked = {"table": self.rows, "budgets": self.budgets, "plans": self.plans, "sets": self.sets}
        return {"settings": settings, **found, **{name: plain(one) for name, one in asked.items() if one}}


def compare(config: CompareConfig) -> Comparison | None:
    """Run the whole comparison; runs on benchmarks are taken up where they stopped.

    Several processes (torchrun, accelerate) share the routers' trainings, the studies of traces and the
    benchmarks' batches; all but the first of them return None.

    Parameters
    ----------
    config : its settings; a copy goes to ``output``.

    Raises
    ------
    ConfigError
        ``output`` cannot be written, or gates and traces do not fit.
    DataError
        Traces are not of the given data, or not of every exit layer.
    """
    with join_processes() as processes:
        return _compare(config, processes)


def _compare(config: CompareConfig, processes: Processes) -> Comparison | None:
    processes.first_alone(lambda: _open_output(config))
    if config.plans is not None:  # before hours of work, not after
        shared_reductions(*_searches(config))
    check_earlier(config.earlier)
    policies = _policies(config)
    pipeline = load_pipeline(config, processes.device, policies=policies)
    check_named(pipeline.model, pipeline.processor, policies)
    sets = _static_sets(config, pipeline) if config.frozen_sets is not None else []
    train, calibration, test = (
        load_scenes(traces, data, config.image_folder)
        for traces, data in (
            (config.traces_train, config.data_train),
            (config.traces_calibration, config.data_calibration),
            (config.traces_test, config.data_test),
        )
    )
    pairs = make_pairs(config, pipeline, train, calibration, processes)
    if processes.first:
        _say(f"{len(pairs)} gates and their routers ready; comparing on {len(test.questions)} test samples")
    draws = {"num_draws": config.num_draws, "seed": config.seed}
    studies: list[Callable[[], Any]] = [
        lambda: compare_on_traces(calibration, test, pairs, **draws),
        lambda: choose_vtw(config, pipeline, calibration, [pair.gates for pair in pairs]),
        lambda: _at_budgets(config, calibration, test, pairs) if config.shares else None,
        lambda: _plans(config, pipeline, pairs) if config.plans is not None else None,
        lambda: _at_their_cost(config, test, pairs, sets),
    ]
    on_traces, vtw, budgets, plans, at_their_cost = processes.together(
        [study() for study in processes.share(studies)]
    )
    runs = _run_benchmarks(config, pipeline, calibration, pairs, vtw, processes)
    curves = {run.title: _curves(config, pipeline, run, pairs) for run in runs[:1]}

    def conclude() -> Comparison:
        timing = _timing(config, pipeline, runs[0], pairs, vtw) if runs else {}
        return Comparison(
            version=dyvte.__version__,
            eta=config.eta,
            seed=config.seed,
            machine=machine(),
            vtw=vtw,
            gates={pair.name: GateSetting(pair.gates.threshold, pair.gates.budget) for pair in pairs},
            traces=on_traces,
            benchmarks={
                run.title: benchmark_comparison(run, pairs, curves.get(run.title), **draws) for run in runs
            },
            rows=tuple(table_rows(runs, pairs, vtw, timing) if runs else ()),
            budgets=budgets,
            plans=plans,
            sets=at_their_cost,
        )

    return processes.first_alone(conclude)


def _open_output(config: CompareConfig) -> None:
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {config.output}: {error.strerror or error}") from error
    dump_config(config, config.output / CONFIG_FILE)


def _policies(config: CompareConfig) -> list[NamedPolicy]:
    """Every policy that is given, to be held against the backbone before its weights are read."""
    folders = {f"gates {folder}": folder for folder in config.gates}
    for name, given in config.baseline_gates.items():
        folders |= {f"baseline {name}={folder}": folder for folder in given}
    gates = [
        NamedPolicy(setting, LearnedPolicy(read_gates(folder)), {}, setting=setting)
        for setting, folder in folders.items()
    ]
    return [*gates, *with_reductions(parse_policies([FULL_MODEL]), config.controls)]


def _static_sets(config: CompareConfig, pipeline: Pipeline) -> list[StaticSet]:
    manifest = TraceStore.open(config.traces_test).manifest
    shape = decoder_shape(pipeline.model.config)
    return read_static_sets(config.frozen_sets, shape, manifest.num_samples, manifest.fingerprint)


def _at_their_cost(
    config: CompareConfig, test: TracedScenes, pairs: Sequence[Pair], sets: Sequence[StaticSet]
) -> tuple[SetComparison, ...]:
    gates = Rule.of("gates", *(pair.gates.points_on(test) for pair in pairs)) if sets else None

    def gates_at(metric: str, compute: float) -> Tensor:
        return gates.values_RB(Labels.of(test.trace, metric), compute)

    draws = {"num_draws": config.num_draws, "seed": config.seed}
    return compare_sets(sets, gates_at, test.image_ids, **draws)


def make_pairs(
    config: CompareConfig,
    pipeline: Pipeline,
    train: TracedScenes,
    calibration: TracedScenes,
    processes: Processes | None = None,
) -> list[Pair]:
    """Gates of every seed, each with a question-only router trained and tuned like them.

    The router's kind, objective and learning rate are chosen on calibration data, for every seed anew.

    Parameters
    ----------
    config : which gates, and the price where they do not record one.
    pipeline : the backbone, for the router's text states.
    train : what routers learn from.
    calibration : what they, and thresholds, are chosen on.
    processes : that share the routers' trainings; None: this one alone.
    """
    features = router_features(pipeline, train.questions)
    stacks = _load_seeds(config.gates, calibration)
    freezes = {one.freezes for one in stacks}
    if len(freezes) > 1:
        raise ConfigError(
            "some of the gates have a freeze head and some do not: compare one kind, and give the other as "
            "--baseline NAME=FOLDER with --budgets"
        )
    if freezes == {False}:
        train.trace.check_labelled(range(train.num_layers + 1), "a question-only router of exits alone")
    tuned = [training_settings(one.gates, len(train.questions), lam=config.lam) for one in stacks]
    candidates = train_router_candidates(
        features, train, calibration, tuned, freezes=freezes == {True}, processes=processes
    )
    return [
        Pair(gates, best_router(own, gates.budget), tuple(own))
        for gates, own in zip(stacks, candidates, strict=True)
    ]


def _load_seeds(folders: Sequence[str], calibration: TracedScenes) -> list[TunedGates]:
    names = _seed_names(folders)
    return [load_gates(folder, name, calibration) for folder, name in zip(folders, names, strict=True)]


def _seed_names(folders: Sequence[str]) -> list[str]:
    """The path component that tells the folders apart, or numbers."""
    parts = [Path(folder).absolute().parts for folder in folders]
    for depth in range(1, min(map(len, parts))):
        names = [part[-depth] for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(number) for number in range(len(folders))]


def router_rule(pairs: Sequence[Pair], test: TracedScenes) -> Rule:
    """The question-only router of every seed on test samples, as tuned for each goal."""

    def chosen(choose: Callable[[Sequence[TunedRouter], float], TunedRouter], pair: Pair) -> PointsAt:
        return lambda goal: choose(pair.candidates, goal).points(test.questions, test.trace.num_visual)

    return Rule(
        "question-only router",
        tuple(chosen(best_router, pair) for pair in pairs),
        tuple(chosen(thriftiest_router, pair) for pair in pairs),
    )


def _at_budgets(
    config: CompareConfig, calibration: TracedScenes, test: TracedScenes, pairs: Sequence[Pair]
) -> BudgetComparison:
    """The gates, fixed K, the router as tuned for each budget, and the further gates."""
    visual_B = test.trace.num_visual

    further = [
        Rule.of(name, *(gates.points_on(test) for gates in _load_seeds(folders, calibration)))
        for name, folders in config.baseline_gates.items()
    ]
    baselines = [Rule.of("fixed K", fixed_points(calibration.trace.risk, visual_B))]
    bound = None
    if pairs[0].gates.freezes:
        share = calibration.trace.grid.kv_share
        static = static_points(Labels.of(calibration.trace, "risk"), visual_B, share)
        baselines.append(Rule.of("static schedule", static))
        bound = schedule_oracle_points(Labels.of(test.trace, "risk"), visual_B, share)
    return compare_at_budgets(
        test,
        Rule.of("gates", *(pair.gates.points_on(test) for pair in pairs)),
        [*baselines, router_rule(pairs, test), *further],
        oracle_points(test.trace.risk, visual_B),
        config.shares,
        schedule_oracle=bound,
        num_draws=config.num_draws,
        seed=config.seed,
    )


def _searches(config: CompareConfig) -> tuple[Path, Path]:
    return config.plans / "calibration", config.plans / "test"


def _plans(config: CompareConfig, pipeline: Pipeline, pairs: Sequence[Pair]) -> PlanComparison:
    return compare_searches(
        pipeline.model,
        *_searches(config),
        [pair.gates.gates for pair in pairs],
        config.shares or PLAN_BUDGETS,
        num_draws=config.num_draws,
    )


def _run_benchmarks(
    config: CompareConfig,
    pipeline: Pipeline,
    calibration: TracedScenes,
    pairs: Sequence[Pair],
    vtw: VtwChoice,
    processes: Processes,
) -> list[BenchmarkRuns]:
    found = []
    for source in config.sources:
        benchmark = get_benchmark(source.name)
        questions = load_questions(benchmark, source.root, config.limit, config.max_bad_samples)
        prompts = prompts_of(benchmark, questions, config.question_suffix)
        kept, unaskable = without_unaskable(
            pipeline, questions, prompts, f"{source.title} ({source.root})", config.max_bad_samples
        )
        runs = BenchmarkRuns(benchmark, source.title, kept, config.dialect, unaskable, processes=processes)
        evaluation = config.evaluation_of(source)
        layers, controls = vtw.layers(), config.controls
        run_benchmark(pipeline, runs, calibration, pairs, evaluation, fixed_layers=layers, controls=controls)
        found.append(runs)
    return found


def _curves(
    config: CompareConfig, pipeline: Pipeline, runs: BenchmarkRuns, pairs: Sequence[Pair]
) -> ScoreCurves | None:
    if config.sweep_questions <= 0:
        return None
    source = next(one for one in config.sources if one.title == runs.title)
    return score_curves(pipeline, runs, pairs, config.evaluation_of(source), config.sweep_questions)


def _timing(
    config: CompareConfig,
    pipeline: Pipeline,
    runs: BenchmarkRuns,
    pairs: Sequence[Pair],
    vtw: VtwChoice,
) -> dict[str, PrefillTimes]:
    """Prefill time of the table's rows against the full model, in turns; baselines at the first seed."""
    names = [FULL_MODEL, *(f"fixed-{k}" for k in vtw.layers())]
    names += [make(pairs[0]) for make in (mixture_name, static_name, router_name, gates_name)]
    policies = [runs.policies[name] for name in names if name in runs.policies]
    prompts = prompts_of(runs.benchmark, runs.questions, config.question_suffix)
    plan = plan_batches(pipeline, prompts, config.batch_size)
    chosen = even_batches(len(plan), config.timing_batches)
    batches = list(encoded_batches(pipeline, runs.questions, prompts, plan, chosen))
    return measure_prefill(pipeline, batches, policies, config.timing_repeats) if batches else {}


def _say(text: str) -> None:
    print(f"[compare] {text}", flush=True)
