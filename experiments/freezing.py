"""Three-state gates (updated, read, gone) beside everything that does with two states, or without deciding.

On the embedded backbone and held-out scenes, three seeds. Compared, all at equal visual compute: gates with
two heads; gates of exits alone (the better of two kinds on calibration scenes); fixed K (VTW); the best
mixtures of static schedules; a question-only router of schedules; both oracles; ShortV's sets of frozen
layers at what they cost. Then the parts: gates for the exit behind a static freeze, and gates for the freeze
before a static exit, the static layer chosen on calibration scenes for every budget. Then what is certified,
prefill FLOPs at equal fidelity, and answers by their length. Run again it goes on where it stopped.

    python -m dyvte.data.scenes --output data/scenes --test 2400
    python experiments/freezing.py --sets --plot docs/freezing.png --json docs/freezing.json

The options below say the layers, which are those of the embedded 10-layer backbone unless given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from freezing_costs import at_target, prefill_ratios, sets_at_target, text_tokens
from freezing_tables import certified_table, hulls_table, lengths_table, target_table
from reference import reference_rules
from torch import Tensor
from workbench import Workbench, arguments

from dyvte.backbones.sizes import decoder_shape
from dyvte.calibration import calibrate_risk, gate_logits
from dyvte.calibration.operating_points import (
    OperatingPoints,
    compute_to_reach,
    fixed_points,
    static_points,
)
from dyvte.calibration.path import Labels
from dyvte.comparison.bootstrap import paired_bootstrap
from dyvte.comparison.budgets import Rule, compare_at_budgets
from dyvte.comparison.compare import make_pairs, router_rule
from dyvte.comparison.config import parse_budgets
from dyvte.comparison.oracle import oracle_points, schedule_oracle_points
from dyvte.comparison.records import Spread, plain
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.static_sets import (
    StaticSet,
    compare_hulls,
    compare_sets,
    read_static_sets,
)
from dyvte.comparison.tuned_gates import TunedGates, load_gates
from dyvte.data import DataConfig
from dyvte.evaluation.generation import GenerationSettings, Pipeline
from dyvte.evaluation.latency import machine
from dyvte.evaluation.runner import load_pipeline
from dyvte.files import write_atomically
from dyvte.gates import CLOSED, GateConfig, GateStack, uniform_freeze_offsets, uniform_offsets
from dyvte.reporting.budgets import budget_markdown, plot_budgets
from dyvte.reporting.comparison import sets_table
from dyvte.reporting.frozen_sets import write_frozen_sets
from dyvte.teacher import TraceStore
from dyvte.tracing.frozen_search import search_frozen

FREEZES = (0, 1, 2, 3, 4, 5)
STATIC_FREEZES, STATIC_EXITS = (1, 2, 3, 4), (9, 10)
DELTA = 0.1
ALWAYS = -CLOSED
"""An offset with which a gate always fires."""
ONE_HEAD = ("gates.freeze_head=false",)
KINDS_OF_EXITS = {
    "exits-risk": (
        *ONE_HEAD,
        *("gates.architecture=shared", "gates.hidden_size=64", "objective.loss=risk", "objective.lam=0.1"),
        *("objective.span=100", "optimizer.learning_rate=5e-3", "optimizer.weight_decay=0"),
        *("batch_size=64", "epochs=30"),
    ),
    "exits-answer": ONE_HEAD,
}
"""Gates of exits alone: as embedded.yaml trains them, and trained as the gates of two heads are."""


# --- training -----------------------------------------------------------------------------------------------


def pinned(bench: Workbench, name: str, offsets: Mapping[str, tuple[float, ...]]) -> Path:
    """A stack of two heads to start from in which one of the two is no choice: its offsets decide."""
    folder = bench.work / "pinned" / name
    if not folder.is_dir():
        store, gates = TraceStore.open(bench.work / "trace-train"), bench.settings().gates
        manifest = store.manifest
        config = GateConfig(
            num_layers=manifest.num_layers,
            hidden_size=manifest.feature_size // len(manifest.features),
            architecture=gates.architecture,
            gate_hidden_size=gates.hidden_size,
            features=manifest.features,
            freeze_head=True,
            **{
                "offsets": uniform_offsets(manifest.num_layers),
                "freeze_offsets": uniform_freeze_offsets(manifest.num_layers, manifest.freezes),
                **offsets,
            },
        )
        stack = GateStack.init(config, seed=0)
        stack.fit_inputs(**store.trace(config.features).gate_inputs())
        stack.save_pretrained(folder)
    return folder


def with_static_freeze(bench: Workbench, f: int, calibration: TracedScenes) -> list[TunedGates]:
    """Gates for the exit, of rows that all freeze after layer f."""
    num_layers = calibration.num_layers
    offsets = tuple(ALWAYS if j == f else CLOSED for j in range(num_layers))
    only = f"teacher.freeze_layers=[{f}]"  # no row is on another stream
    trace = bench.thinned("train", [f])
    return _from(bench, f"static-freeze-{f}", {"freeze_offsets": offsets}, calibration, only, trace=trace)


def with_static_exit(bench: Workbench, k: int, calibration: TracedScenes) -> list[TunedGates]:
    """Gates for the freeze, of rows that all leave after layer k."""
    num_layers = calibration.num_layers
    offsets = (*(ALWAYS if j == k else CLOSED for j in range(1, num_layers)), 0.0)
    return _from(bench, f"static-exit-{k}", {"offsets": offsets}, calibration)


def _from(
    bench: Workbench,
    name: str,
    offsets: Mapping[str, tuple[float, ...]],
    calibration: TracedScenes,
    *overrides: str,
    trace: str = "train",
) -> list[TunedGates]:
    start = pinned(bench, name, offsets)
    # one training: those that a target would try beside it start from gates of their own
    alone = (f"gates.init_from={start}", "target.alpha=null", "target.budget=null")
    folders = bench.gates(name, *alone, *overrides, trace=trace)
    return [load_gates(folder, f"{name} {seed}", calibration) for folder, seed in zip(folders, bench.seeds)]


def best_static(
    name: str,
    tried: Sequence[Sequence[TunedGates]],
    calibration: TracedScenes,
    test: TracedScenes,
) -> Rule:
    """Of gates with a static layer, for every seed and goal those that are best on the calibration scenes."""
    seeds = list(zip(*tried, strict=True))
    curves = [[one.points_on(calibration) for one in seed] for seed in seeds]
    risk, same = (Labels.of(calibration.trace, metric) for metric in ("risk", "same_answer"))

    def at_budget(seed: int) -> Callable[[float], OperatingPoints]:
        def points(budget: float) -> OperatingPoints:
            losses = [float(c.mixed_values(risk, c.at_compute(budget)).mean()) for c in curves[seed]]
            return seeds[seed][losses.index(min(losses))].points_on(test)

        return points

    def for_target(seed: int) -> Callable[[float], OperatingPoints]:
        def points(target: float) -> OperatingPoints:
            spent = [compute_to_reach(c.compute_S, c.means_S(same), target) for c in curves[seed]]
            known = [one if one == one else float("inf") for one in spent]
            return seeds[seed][known.index(min(known))].points_on(test)

        return points

    numbers = range(len(seeds))
    return Rule(name, tuple(map(at_budget, numbers)), tuple(map(for_target, numbers)))


# --- what is certified, what it costs, whom it hits ---------------------------------------------------------


def certified(
    folders: Sequence[Path],
    bench: Workbench,
    test: TracedScenes,
    num_text_B: Tensor,
    pipeline: Pipeline,
    alpha: float,
) -> dict[str, Any]:
    """Test scenes at the thresholds that calibration certifies at a same answer of 1 - alpha."""
    store = TraceStore.open(bench.work / "trace-calibration")
    compute, same, flops, freezes, exits = [], [], [], [], []
    for folder in folders:
        gates = GateStack.from_pretrained(folder).eval()
        found = calibrate_risk(gates, store, alpha, DELTA)
        config = dataclasses.replace(gates.config, threshold=found.threshold)
        if found.freeze_threshold is not None:
            config = dataclasses.replace(config, freeze_threshold=found.freeze_threshold)
        share = test.trace.grid.kv_share if config.freeze_head else float("nan")
        tuned = TunedGates(
            "certified", gates, found.threshold, config.min_layer, config.fallback, (), 0.0, share
        )
        gates.config = config
        points = tuned.operating_point(gate_logits(gates, test.trace, test.features), test.trace.num_visual)
        compute.append(float(points.compute_S[0]))
        same.append(float(points.means_S(Labels.of(test.trace, "same_answer"))[0]))
        chosen = points.schedules(0)
        freezes.append(float(chosen.freeze_layers_B.double().mean()))
        exits.append(float(chosen.exit_layers_B.double().mean()))
        flops.append(float(prefill_ratios(points, test, num_text_B, pipeline)[0]))
    values = {"compute": compute, "same_answer": same, "prefill": flops, "updated": freezes, "read": exits}
    return {name: Spread.of(column) for name, column in values.items()}


def answer_lengths(scenes: Path, test: TracedScenes) -> list[str]:
    """Words of each test sample's answer: 1, 2, 3 or more."""
    records = json.loads((scenes / "test.json").read_text(encoding="utf-8"))
    words = {one["id"]: len(one["conversations"][1]["value"].split()) for one in records}
    return [f"{min(words[i], 3)}{' or more' if words[i] > 2 else ''}" for i in test.trace.sample_ids]


def by_length(
    ours: Rule, others: Sequence[Rule], test: TracedScenes, lengths: Sequence[str], budget: float
) -> list[dict[str, Any]]:
    """Same answer at a budget, by length of the answer; ours minus each with intervals."""
    values = {
        rule.name: rule.values_RB(Labels.of(test.trace, "same_answer"), budget) for rule in (ours, *others)
    }
    rows = []
    for length in sorted(set(lengths)):
        own = [row for row, one in enumerate(lengths) if one == length]
        images = [test.image_ids[row] for row in own]
        means = {name: values_RB[:, own].mean(1).tolist() for name, values_RB in values.items()}
        mine = values[ours.name][:, own].mean(0)
        minus = {
            rule.name: paired_bootstrap(mine, values[rule.name][:, own].mean(0), images) for rule in others
        }
        rows.append(
            {
                "words": length,
                "samples": len(own),
                "same_answer": {name: Spread.of(column) for name, column in means.items()},
                "minus": minus,
            }
        )
    return rows


# --- the whole ----------------------------------------------------------------------------------------------


def main() -> None:
    """Trace, train, compare; write tables, plot and numbers."""
    parser = arguments(__doc__)
    parser.set_defaults(config=Path("configs/embedded_states.yaml"), work=Path("runs/freezing"))
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument(
        "--length-budget", type=float, default=0.2, help="visual compute of the lengths' table"
    )
    parser.add_argument("--sets", action="store_true", help="search ShortV's sets of frozen layers too")
    parser.add_argument("--freezes", type=int, nargs="+", default=FREEZES, help="freeze layers to trace")
    parser.add_argument(
        "--static-freezes", type=int, nargs="*", default=STATIC_FREEZES, help="of gates for the exit"
    )
    parser.add_argument(
        "--static-exits", type=int, nargs="*", default=STATIC_EXITS, help="of gates for the freeze"
    )
    parser.add_argument("--reference", action="store_true", help="gates of DyVTE's published rule too")
    kinds = {"nargs": "+", "choices": KINDS_OF_EXITS, "default": list(KINDS_OF_EXITS)}
    parser.add_argument("--exits-alone", **kinds, help="trainings of gates without a freeze head")
    parser.add_argument("--budgets", type=parse_budgets, default="0.1:0.7", help="visual compute")
    parser.add_argument("--alpha", type=float, default=0.02, help="answers that may change, to be certified")
    args = parser.parse_args()
    args.set.append(f"teacher.freeze_layers={list(args.freezes)}")
    bench = Workbench.of(args)
    train, calibration, test = (bench.load(split) for split in ("train", "calibration", "test"))
    visual_B, share = test.trace.num_visual, test.trace.grid.kv_share
    pipeline = load_pipeline(GenerationSettings(model=bench.settings().model, max_new_tokens=8))

    folders = list(bench.gates("states"))
    settings = dataclasses.make_dataclass("Settings", ["gates", "lam"])(tuple(map(str, folders)), None)
    pairs = make_pairs(settings, pipeline, train, calibration)
    exits = bench.best({kind: KINDS_OF_EXITS[kind] for kind in args.exits_alone}, calibration)
    print(f"[freezing] exits alone: {exits.label}", flush=True)
    ours = Rule.of("three-state gates", *(pair.gates.points_on(test) for pair in pairs))
    exits_only = Rule.of("exits only", *(one.points_on(test) for one in exits.gates))
    freeze_parts = [with_static_freeze(bench, f, calibration) for f in args.static_freezes]
    exit_parts = [with_static_exit(bench, k, calibration) for k in args.static_exits]
    risk = Labels.of(calibration.trace, "risk")
    others = [
        exits_only,
        Rule.of("fixed K", fixed_points(calibration.trace.risk, visual_B)),
        Rule.of("static schedule", static_points(risk, visual_B, share)),
        router_rule(pairs, test),
    ]
    if freeze_parts:
        others.append(best_static("static freeze, gates for the exit", freeze_parts, calibration, test))
    if exit_parts:
        others.append(best_static("gates for the freeze, static exit", exit_parts, calibration, test))
    if args.reference:
        others += [
            Rule.of(name, *(load_gates(one, name, calibration).points_on(test) for one in folders_of))
            for name, folders_of in reference_rules(bench, calibration).items()
        ]
    found = compare_at_budgets(
        test,
        ours,
        others,
        oracle_points(test.trace.risk, visual_B),
        args.budgets,
        schedule_oracle=schedule_oracle_points(Labels.of(test.trace, "risk"), visual_B, share),
        num_draws=args.draws,
    )
    num_text_B = text_tokens(pipeline, test.questions)
    certificates = {
        name: certified(of, bench, test, num_text_B, pipeline, args.alpha)
        for name, of in (("three-state gates", folders), ("exits only", exits.folders))
    }
    at_99 = {rule.name: at_target(rule, test, num_text_B, pipeline) for rule in (ours, *others)}
    lengths = by_length(ours, others[:4], test, answer_lengths(bench.scenes, test), args.length_budget)
    print(f"\n{machine()}\n\n{budget_markdown(found)}\n")
    print(
        certified_table(certificates, args.alpha),
        target_table(found, at_99),
        lengths_table(lengths),
        flush=True,
        sep="\n\n",
    )
    plot_budgets(found, args.plot or args.work / "freezing.png")
    content = {
        "machine": machine(), "exits": exits.label, "budgets": found, "certified": certificates,
        "at_target": at_99, "by_length": lengths,
    }  # fmt: skip
    path = args.json or args.work / "freezing.json"
    write_atomically(path, json.dumps(plain(content), indent=2) + "\n")
    if args.sets:
        content |= beside_sets(frozen_sets(bench, pipeline, test), ours, test, args, num_text_B, pipeline)
        write_atomically(path, json.dumps(plain(content), indent=2) + "\n")


def beside_sets(
    sets: Sequence[StaticSet],
    ours: Rule,
    test: TracedScenes,
    args: argparse.Namespace,
    num_text_B: Tensor,
    pipeline: Pipeline,
) -> dict[str, Any]:
    """Sets of frozen layers beside the gates: each at its cost, and mixed to spend each budget."""

    def ours_at(metric: str, compute: float) -> Tensor:
        return ours.values_RB(Labels.of(test.trace, metric), compute)

    alone = compare_sets(sets, ours_at, test.image_ids, num_draws=args.draws)
    mixed = compare_hulls(sets, ours_at, test.image_ids, args.budgets, num_draws=args.draws)
    prefill = sets_at_target(sets, test, num_text_B, pipeline)
    print(sets_table(alone), hulls_table(mixed, prefill), sep="\n\n", flush=True)
    return {"sets": alone, "set_mixtures": mixed, "sets_at_target": prefill}


def frozen_sets(bench: Workbench, pipeline: Pipeline, test: TracedScenes) -> list[Any]:
    """Sets found on calibration scenes by ShortV's rule, on test scenes."""
    calibration = bench.settings(
        f"data.path={bench.scenes / 'calibration.json'}", "data.limit=100", "teacher.freeze_layers=[]"
    )
    held_out = DataConfig(path=bench.scenes / "test.json", image_folder=bench.scenes / "images")
    folder = bench.work / "frozen-sets"
    found = search_frozen(calibration, folder, largest=9, held_out=held_out, rules=["shortv"])
    write_frozen_sets(found, folder, [0.99])
    manifest = TraceStore.open(bench.work / "trace-test").manifest
    shape = decoder_shape(pipeline.model.config)
    return read_static_sets(folder, shape, len(test.trace), manifest.fingerprint)


if __name__ == "__main__":
    main()
