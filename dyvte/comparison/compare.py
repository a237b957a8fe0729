"""Gates beside VTW, a question-only router, the oracle and the full model: ``dyvte compare``.

Everything chosen is chosen on calibration scenes; the test scenes and the benchmarks are only looked at.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dyvte
from dyvte.backbones import BackboneConfig
from dyvte.calibration import gate_logits, search_exit_layer
from dyvte.comparison.baselines import (
    VtwChoice,
    best_router,
    load_gates,
    train_router_candidates,
    training_settings,
)
from dyvte.comparison.compare_table import Row, comparison_markdown, table_rows
from dyvte.comparison.question_features import router_features
from dyvte.comparison.router import router_steps
from dyvte.comparison.runs import (
    BenchmarkRuns,
    accuracy_curves,
    gates_name,
    mixture_name,
    router_name,
    run_benchmark,
)
from dyvte.comparison.scenes import TracedScenes, load_scenes
from dyvte.comparison.significance import score_difference
from dyvte.comparison.traces import Pair, compare_on_traces
from dyvte.config import dump_config, open_group
from dyvte.data import open_conversations, select
from dyvte.errors import ConfigError
from dyvte.evaluation.generation import Asker, encoded_batches, plan_batches
from dyvte.evaluation.latency import PrefillTimes, machine, measure_prefill, spread_batches
from dyvte.evaluation.run_log import write_atomically
from dyvte.evaluation.runner import EvalConfig, load_asker, prompts_of
from dyvte.progress import progress
from dyvte.tasks.base import get_benchmark
from dyvte.teacher import Teacher, TeacherConfig, prepared_batches


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of ``dyvte compare``."""

    model: BackboneConfig = field(metadata=open_group("path"))
    """The backbone, as for ``dyvte eval``."""
    gates: tuple[str, ...]
    """Gates checkpoints, one per seed."""
    output: Path
    data_train: Path
    """LLaVA json that the gates were trained on; the question-only router learns from the same samples."""
    data_calibration: Path
    data_test: Path
    image_folder: Path
    traces_train: Path
    """Trace store of ``data_train``, as ``dyvte train`` leaves it in <output_dir>/trace."""
    traces_calibration: Path
    traces_test: Path
    gqa: Path | None = None
    """Root of (mini-)GQA; None: no run on it."""
    mme: Path | None = None
    """Root of (mini-)MME; None: no run on it."""
    question_suffix: str | None = None
    """Appended to benchmark questions; None: LLaVA's short-answer request."""
    template: str = "auto"
    dialect: str = "original"
    batch_size: int = 64
    max_new_tokens: int = 16
    limit: int | None = None
    """Ask about this many benchmark questions only."""
    sweep_questions: int = 500
    """GQA questions asked at every fixed K, for accuracy curves; 0 for none."""
    eta: float = 0.003
    """VTW's bound on the mean KL, in nats."""
    search_samples: int = 20
    """Calibration samples for VTW's K, as in its paper."""
    max_bad_samples: int = 0
    """Unusable ones among the calibration samples that are tolerated and left out of the search for K."""
    lam: float | None = None
    """Price of a layer for the router's training; None: what the gates were trained with."""
    timing_batches: int = 4
    timing_repeats: int = 5
    num_draws: int = 2000
    """Bootstrap draws."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.gates:
            raise ConfigError("no gates given: name one checkpoint folder per seed")


def compare(config: CompareConfig) -> dict[str, Any]:
    """Run the whole comparison; write comparison.json, comparison.md and the plot."""
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {config.output}: {error.strerror or error}") from error
    dump_config(config, config.output / "config.yaml")
    asker = load_asker(_eval_config(config))
    scenes = [
        load_scenes(traces, data, config.image_folder)
        for traces, data in (
            (config.traces_train, config.data_train),
            (config.traces_calibration, config.data_calibration),
            (config.traces_test, config.data_test),
        )
    ]
    pairs = make_pairs(config, asker, scenes[0], scenes[1])
    _say(f"{len(pairs)} gates and their routers ready; comparing on {len(scenes[2].questions)} test samples")
    on_traces = compare_on_traces(scenes[1], scenes[2], pairs, num_draws=config.num_draws, seed=config.seed)
    vtw = choose_vtw(config, asker, scenes[1], pairs)
    runs = _run_benchmarks(config, asker, scenes[1], pairs, vtw)
    result = {
        "settings": {
            "dyvte": dyvte.__version__,
            "eta": config.eta,
            "seed": config.seed,
            "machine": dataclasses.asdict(machine()),
        },
        "vtw": dataclasses.asdict(vtw),
        "gates": {p.gates.name: {"threshold": p.gates.threshold, "budget": p.gates.budget} for p in pairs},
        "traces": on_traces,
        "benchmarks": {run.benchmark.name: _benchmark_result(asker, run, pairs, config) for run in runs},
    }
    rows: list[Row] = []
    if runs:
        timing = _time_rows(config, asker, runs[0], pairs, vtw)
        rows = table_rows(runs, pairs, vtw, timing)
        result["table"] = [dataclasses.asdict(row) for row in rows]
    write_atomically(config.output / "comparison.json", json.dumps(result, indent=2) + "\n")
    write_atomically(config.output / "comparison.md", comparison_markdown(result, rows))
    _plot(result, config.output)
    return result


def make_pairs(
    config: CompareConfig, asker: Asker, train: TracedScenes, calibration: TracedScenes
) -> list[Pair]:
    """Gates of every seed, each with a question-only router trained and tuned like them.

    The router's kind, objective and learning rate are chosen on calibration data, for every seed anew.
    """
    names = _seed_names(config.gates)
    features = router_features(asker, train.questions)
    stacks = [load_gates(folder, name, calibration) for folder, name in zip(config.gates, names, strict=True)]
    tuned = [training_settings(one.gates, len(train.questions), lam=config.lam) for one in stacks]
    steps = len(features) * sum(router_steps(len(train.questions), settings) for settings in tuned)
    pairs = []
    with progress(steps, "question-only routers", "step") as advance:
        for gates, settings in zip(stacks, tuned, strict=True):
            candidates = train_router_candidates(features, train, calibration, settings, advance)
            pairs.append(Pair(gates, best_router(candidates, gates.budget)))
    return pairs


def _seed_names(folders: Sequence[str]) -> list[str]:
    """The path component that tells the folders apart, or numbers."""
    parts = [Path(folder).absolute().parts for folder in folders]
    for depth in range(1, min(map(len, parts))):
        names = [part[-depth] for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(number) for number in range(len(folders))]


def choose_vtw(
    config: CompareConfig, asker: Asker, calibration: TracedScenes, pairs: Sequence[Pair]
) -> VtwChoice:
    """VTW's K on calibration samples.

    Where no K qualifies for ``eta``, eta is set to the KL of the first K that keeps at least as many answers
    on the calibration scenes as the gates do.
    """
    selection = select(
        open_conversations(config.data_calibration, config.image_folder),
        limit=config.search_samples,
        seed=config.seed,
        max_bad_samples=config.max_bad_samples,
    )
    settings = TeacherConfig(
        template=config.template, batch_size=config.search_samples, max_new_tokens=config.max_new_tokens
    )
    batches = prepared_batches(
        Teacher(asker.model, asker.processor, settings),
        selection,
        file=str(config.data_calibration),
        max_bad_samples=config.max_bad_samples,
    )
    found = search_exit_layer(asker.model, (ready.inputs for ready in batches), eta=config.eta)
    kl = tuple(float(x) for x in found.kl)
    if found.k is not None:
        return VtwChoice(found.k, config.eta, None, None, kl)
    same_K = calibration.trace.same_answer.double().mean(0).tolist()
    kept = sum(_kept(pair, calibration) for pair in pairs) / len(pairs)
    enough = [k for k in range(1, calibration.num_layers) if same_K[k] >= kept]
    if not enough:
        return VtwChoice(None, config.eta, None, None, kl)
    return VtwChoice(None, config.eta, enough[0], kl[enough[0]], kl)


def _kept(pair: Pair, calibration: TracedScenes) -> float:
    """Same-answer rate of gates on the calibration scenes at their stored threshold."""
    logits_BL = gate_logits(pair.gates.gates, calibration.trace, calibration.features)
    points = pair.gates.operating_point(logits_BL, calibration.trace.num_visual)
    return float(points.means_S(calibration.trace.same_answer)[0])


def _run_benchmarks(
    config: CompareConfig, asker: Asker, calibration: TracedScenes, pairs: Sequence[Pair], vtw: VtwChoice
) -> list[BenchmarkRuns]:
    roots = {"gqa": config.gqa, "mme": config.mme}
    return [
        run_benchmark(
            asker,
            get_benchmark(name),
            root,
            calibration,
            pairs,
            _eval_config(config),
            fixed_layers=vtw.layers(),
        )
        for name, root in roots.items()
        if root is not None
    ]


def _benchmark_result(
    asker: Asker, runs: BenchmarkRuns, pairs: Sequence[Pair], config: CompareConfig
) -> dict[str, Any]:
    gates = [runs.hits(gates_name(pair)) for pair in pairs]
    rivals = {
        "vtw_mixture": [runs.hits(mixture_name(pair)) for pair in pairs],
        "router": [runs.hits(router_name(pair)) for pair in pairs],
        "full": [runs.hits("never")],
    }
    result: dict[str, Any] = {
        "runs": {
            name: {k: v for k, v in run.scores.to_dict().items() if k not in ("run", "timing")}
            for name, run in runs.results.items()
        },
        "gates_minus": {
            name: score_difference(
                runs.benchmark, runs.questions, gates, hits, num_draws=config.num_draws, seed=config.seed
            ).to_dict()
            for name, hits in rivals.items()
        },
    }
    if runs.benchmark.name == "gqa" and config.sweep_questions > 0:
        result["curves"] = accuracy_curves(asker, runs, pairs, _eval_config(config), config.sweep_questions)
    return result


def _time_rows(
    config: CompareConfig, asker: Asker, runs: BenchmarkRuns, pairs: Sequence[Pair], vtw: VtwChoice
) -> dict[str, PrefillTimes]:
    """Prefill time of the table's rows against the full model, taken in turns; rivals at the first seed."""
    names = ["never", *(f"fixed-{k}" for k in vtw.layers())]
    names += [make(pairs[0]) for make in (mixture_name, router_name, gates_name)]
    policies = [runs.policies[name] for name in names if name in runs.policies]
    prompts = prompts_of(runs.benchmark, runs.questions, config.question_suffix)
    plan = plan_batches(asker, prompts, config.batch_size)
    chosen = spread_batches(len(plan), config.timing_batches)
    batches = list(encoded_batches(asker, runs.questions, prompts, plan, chosen))
    return measure_prefill(asker, batches, policies, config.timing_repeats) if batches else {}


def _eval_config(config: CompareConfig) -> EvalConfig:
    """The runner's settings; benchmark and data are set for each run."""
    return EvalConfig(
        model=config.model,
        benchmark="gqa",
        data=config.gqa or config.output,
        output=config.output / "runs",
        question_suffix=config.question_suffix,
        template=config.template,
        dialect=config.dialect,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        limit=config.limit,
        timing_batches=0,
        seed=config.seed,
    )


def _plot(result: dict[str, Any], output: Path) -> None:
    from dyvte.comparison.plots import comparison_plot

    comparison_plot(result, output)


def _say(text: str) -> None:
    print(f"[compare] {text}", flush=True)
