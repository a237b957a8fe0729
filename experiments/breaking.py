"""Where reductions break: gates beside all controls at equal compute on boxes, long answers, hallucination.

Traces, trains what is compared, and answers benchmarks that nothing was chosen on: with the full model, gates
of three states, gates of exits alone, the best static schedule and fixed K, and the controls (blind, pooled,
random and most diverse tokens, FastV), each as near to the gates' visual compute as it can be. A run that was
stopped goes on where it was.

    python -m dyvte.data.scenes --output data/scenes
    python experiments/breaking.py --config configs/embedded_states.yaml --work runs/breaking \\
        --gates checkpoints/tiny-llava-gates --benchmark mini-POPE:pope=data/scenes/mini_pope
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from workbench import Workbench, arguments

from dyvte.calibration import ThresholdPath, gate_logits
from dyvte.calibration.compute import threshold_for_budget
from dyvte.calibration.operating_points import OperatingPoints, fixed_points, static_points
from dyvte.calibration.path import Labels
from dyvte.comparison.bootstrap import paired_bootstrap
from dyvte.comparison.config import BenchmarkSource
from dyvte.comparison.hard import hard_subset
from dyvte.comparison.probe import probe_gates
from dyvte.comparison.records import plain
from dyvte.comparison.runs import BenchmarkRuns
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.significance import score_difference
from dyvte.comparison.tuned_gates import TunedGates, load_gates
from dyvte.evaluation.generation import Pipeline
from dyvte.evaluation.latency import machine
from dyvte.evaluation.questions import load_questions, prompts_of
from dyvte.evaluation.runner import EvalConfig, load_pipeline
from dyvte.evaluation.scores import FULL_MODEL
from dyvte.evaluation.settings import NamedPolicy, given_exits, learned, parse_named, with_reductions
from dyvte.files import write_atomically
from dyvte.formatting import difference_text, markdown_table, percentage
from dyvte.policies import LearnedPolicy
from dyvte.tasks.base import TASKS, Predictions, get_benchmark

GATES, EXITS, STATIC, FIXED = "gates", "exits-alone", "static", "fixed-mixture"
POOLED = "pool:2"
TITLES = {
    FULL_MODEL: "full model",
    GATES: "three-state gates",
    EXITS: "gates of exits alone",
    STATIC: "static schedule (mixture of two)",
    FIXED: "fixed K (mixture of two)",
    "blind": "blind",
}
QUALITY = {"refcoco": "mean overlap", "chair": "F1 of objects"}
"""Beside the score, where an answer can be more or less wrong."""


def keep(compute: float, layer: int, num_layers: int, num_visual: int) -> int:
    """Visual tokens to keep behind a layer so that, with all of them before it, so much is spent.

    Parameters
    ----------
    compute
        Share of the full model's visual compute.
    layer
        Layers that all tokens go through.
    num_layers
        L.
    num_visual
        Of an image.
    """
    share = (compute * num_layers - layer) / (num_layers - layer)
    return min(max(round(share * num_visual), 1), num_visual)


def controls_at(compute: float, num_layers: int, num_visual: int) -> list[str]:
    """Reductions of the full model that spend as nearly that much as they can, and `POOLED`.

    FastV's K is 2 as published; 1, where two whole layers cost more already.

    Parameters
    ----------
    compute
        Share of the full model's visual compute.
    num_layers
        L.
    num_visual
        Of an image.
    """
    behind = 2 if compute * num_layers > 2 else 1

    def dropped(layer: int) -> str:
        return f"{1 - keep(compute, layer, num_layers, num_visual) / num_visual:g}"

    side = round(num_visual**0.5)
    sides = {s: (-(-side // s)) ** 2 / num_visual for s in range(1, side + 1)}
    nearest = min(sides, key=lambda s: abs(sides[s] - compute))
    pools = [POOLED] if nearest in (1, 2) else [POOLED, f"pool:{nearest}"]
    return [
        *pools,
        f"random_visual:0:{dropped(0)}",
        f"random_visual:{behind}:{dropped(behind)}",
        f"divprune:{dropped(0)}",
        f"fastv:{behind}:{dropped(behind)}",
    ]


@dataclass(frozen=True)
class Rules:
    """What is compared, ready to be asked."""

    states: TunedGates
    exits: TunedGates
    calibration: TracedScenes

    @staticmethod
    def of(bench: Workbench, args: argparse.Namespace) -> Rules:
        """Trained where they are not given; the thresholds are the gates' own, or those of the budget."""
        bench.traces("train")
        calibration = bench.load("calibration")
        folder = args.gates or next(iter(bench.gates("states")))
        exits = next(iter(bench.gates("exits", "gates.freeze_head=false")))
        states = load_gates(folder, "states", calibration)
        if args.budget is not None:
            logits = gate_logits(states.gates, calibration.trace, calibration.features)
            path = ThresholdPath.of(logits, calibration.trace, states.gates.config)
            at = threshold_for_budget(path, args.budget)
            spent = path.compute(states.decided(logits, at))
            states = dataclasses.replace(states, threshold=at, budget=spent)
        return Rules(states, load_gates(exits, "exits", calibration), calibration)

    def first(self) -> list[NamedPolicy]:
        """The full model and the gates: what they spend is what the others may."""
        gates = self.states
        own = LearnedPolicy(gates.gates, gates.threshold, gates.min_layer, gates.fallback)
        return [parse_named(FULL_MODEL), learned(GATES, own)]

    def others(
        self, pipeline: Pipeline, runs: BenchmarkRuns, config: EvalConfig, also: Sequence[float]
    ) -> list[NamedPolicy]:
        """The rest, at the gates' visual compute on these questions: answers are not looked at; and at
        further ones."""
        spent, visual_B = runs.results[GATES].scores.cost.visual_compute, runs.num_visual_B
        prompts = prompts_of(runs.benchmark, runs.questions, config.question_suffix)
        (logits,) = probe_gates(pipeline, runs.questions, prompts, [self.exits.gates], config.batch_size)
        trace = self.calibration.trace
        points: dict[str, OperatingPoints] = {
            EXITS: self.exits.points(logits, visual_B),
            STATIC: static_points(Labels.of(trace, "risk"), visual_B, trace.grid.kv_share),
            FIXED: fixed_points(trace.risk, visual_B),
        }
        ids = [q.id for q in runs.questions]
        named, reductions = [parse_named("blind")], []
        for number, compute in enumerate((spent, *also)):
            for name, one in points.items():
                chosen = one.draw(one.at_compute(compute), ids, config.seed)
                exits = dict(zip(ids, chosen.exit_layers_B.tolist()))
                freezes = dict(zip(ids, chosen.freeze_layers_B.tolist())) if name == STATIC else None
                named.append(given_exits(f"{name}-{compute:g}" if number else name, exits, freezes))
            reductions += controls_at(compute, runs.num_layers, int(visual_B.max()))
        full = parse_named(FULL_MODEL)
        return [*named, *with_reductions([full], list(dict.fromkeys(reductions)))]


def quality(runs: BenchmarkRuns, name: str) -> list[float]:
    """What each answer is worth, 0 to 1, by degree where that is known; else whether it is right.

    Parameters
    ----------
    runs
        Of a benchmark.
    name
        Of a run.
    """
    questions = runs.questions
    texts = {one.question_id: one.prediction for one in runs.results[name].answers}
    if runs.benchmark.name == "refcoco":
        return runs.benchmark.overlaps(questions, Predictions(texts), runs.dialect)
    if runs.benchmark.name == "chair":
        return [f1(set(q.details["synonyms"].named(texts[q.id])), q.details["objects"]) for q in questions]
    return runs.hits(name)


def title_of(name: str, reduction: str) -> str:
    """What the tables call a run: a rule at a further compute by the name of the rule."""
    return TITLES.get(name) or TITLES.get(name.rpartition("-")[0]) or reduction


def f1(named: set[str], there: set[str]) -> float:
    """Harmonic mean of precision and recall of objects."""
    return 2 * len(named & there) / max(len(named) + len(there), 1)


def compared(runs: BenchmarkRuns, num_draws: int) -> dict[str, Any]:
    """Every run's scores, its difference to the full model and the gates' to it, and the hard subset.

    Parameters
    ----------
    runs
        Of a benchmark.
    num_draws
        Of the bootstrap over images.
    """
    hits = {name: runs.hits(name) for name in runs.results}
    worth = {name: quality(runs, name) for name in runs.results}
    pooled = next(name for name, one in runs.policies.items() if one.reduction == POOLED)
    images = [q.image_id for q in runs.questions]
    how = {"num_draws": num_draws}
    rows = {}
    for name, result in runs.results.items():
        minus = {
            "score": score_difference(runs.benchmark, runs.questions, [hits[GATES]], [hits[name]], **how),
            "quality": paired_bootstrap(worth[GATES], worth[name], images, **how),
            "same_answer": paired_bootstrap(runs.same_B(GATES), runs.same_B(name), images, **how),
        }
        rows[name] = {
            "title": title_of(name, runs.policies[name].reduction),
            "visual_compute": result.scores.cost.visual_compute,
            "score": runs.value(hits[name]),
            "scores": {
                key: value for key, value in result.scores.scores.items() if isinstance(value, (int, float))
            },
            "quality": float(np.mean(worth[name])),
            "same_answer": float(runs.same_B(name).mean()),
            "minus_full": score_difference(
                runs.benchmark, runs.questions, [hits[name]], [hits[FULL_MODEL]], **how
            ),
            "gates_minus": minus,
        }
    return {
        "benchmark": runs.benchmark.name,
        "score_name": runs.benchmark.score_name,
        "num_questions": len(images),
        "num_images": len(set(images)),
        "rows": rows,
        "hard": hard_subset(runs.questions, hits, FULL_MODEL, pooled, POOLED, **how),
    }


def table(found: Mapping[str, Any]) -> str:
    """One row per rule: what it spends, its score, what the gates are ahead or behind."""
    by_degree = QUALITY.get(found["benchmark"])
    head = ["rule", "visual compute", found["score_name"], "minus full model"]
    head += [by_degree] if by_degree else []
    head += ["same answer", "gates minus it: score"]
    head += [f"gates minus it: {by_degree}"] if by_degree else []
    head += ["gates minus it: same answer"] + (["hard subset"] if found["hard"] else [])
    return markdown_table(head, [_cells(name, found, bool(by_degree)) for name in found["rows"]])


def _cells(name: str, found: Mapping[str, Any], by_degree: bool) -> list[str]:
    row, hard = found["rows"][name], found["hard"]
    own = name == GATES
    minus = row["gates_minus"]
    cells = [row["title"], percentage(row["visual_compute"]), f"{row['score']:.1f}"]
    cells.append("" if name == FULL_MODEL else difference_text(row["minus_full"], 1))
    cells += [f"{100 * row['quality']:.1f}"] if by_degree else []
    cells += [percentage(row["same_answer"]), "" if own else difference_text(minus["score"], 1)]
    if by_degree:
        cells.append("" if own else difference_text(minus["quality"], 1, scale=100.0))
    cells.append("" if own else difference_text(minus["same_answer"], 1, scale=100.0))
    if hard:
        one = hard.scores[name]
        cells.append(f"{one.solved:.0f} [{one.low:.0f}, {one.high:.0f}]")
    return cells


def answer(
    rules: Rules,
    pipeline: Pipeline,
    source: BenchmarkSource,
    config: EvalConfig,
    also: Sequence[float],
) -> BenchmarkRuns:
    """All rules on a benchmark, by real generation; what is answered already is not asked again."""
    benchmark = get_benchmark(source.name)
    questions = load_questions(benchmark, source.root, config.limit, 0)
    runs = BenchmarkRuns(benchmark, source.title, questions, config.dialect)
    pipeline = dataclasses.replace(pipeline, max_new_tokens=config.max_new_tokens)
    runs.run(pipeline, rules.first(), config, "full model, gates")
    runs.run(pipeline, rules.others(pipeline, runs, config, also), config, "controls")
    return runs


def main(words: Sequence[str] | None = None) -> None:
    """Trace, train, answer; print a table for each benchmark."""
    parser = arguments(__doc__)
    parser.set_defaults(seeds=[0])
    parser.add_argument("--benchmark", action="append", required=True, help="[TITLE:]NAME=ROOT; several")
    parser.add_argument("--gates", type=Path, help="of three states; default: trained from the same traces")
    parser.add_argument("--budget", type=float, help="threshold of this visual compute on calibration data")
    parser.add_argument(
        "--also",
        type=float,
        nargs="+",
        default=[],
        help="visual compute at which all but the gates are asked too",
    )
    parser.add_argument("--limit", type=int, help="questions of a benchmark at most")
    parser.add_argument("--batch-size", type=int, default=32, help="questions of a batch")
    args = parser.parse_args(words)
    if len(args.seeds) != 1:
        parser.error(f"--seeds: expected one, found {len(args.seeds)}")
    bench, settings = Workbench.of(args), Workbench.of(args).settings()
    rules = Rules.of(bench, args)
    content: dict[str, Any] = {"machine": machine(), "budget": rules.states.budget, "benchmarks": {}}
    pipeline = None
    for source in map(BenchmarkSource.parse, args.benchmark):
        longest = min(TASKS.get(source.name).max_new_tokens, settings.teacher.max_new_tokens)
        config = EvalConfig(
            model=settings.model,
            benchmark=source.name,
            data=source.root,
            output=bench.work / source.title,
            question_suffix="",
            batch_size=args.batch_size,
            max_new_tokens=longest,
            limit=args.limit,
            timing_batches=0,
            seed=args.seeds[0],
        )
        pipeline = pipeline or load_pipeline(config)
        found = compared(answer(rules, pipeline, source, config, args.also), args.draws)
        content["benchmarks"][source.title] = found
        sizes = f"{found['num_questions']} questions about {found['num_images']} images"
        hard = found["hard"]
        hard_size = f"; hard subset: {hard.num_questions} that {POOLED} fails" if hard else ""
        print(f"\n## {source.title}\n\n{sizes}{hard_size}\n\n{table(found)}", flush=True)
        write_atomically(bench.work / "breaking.json", json.dumps(plain(content), indent=2) + "\n")


if __name__ == "__main__":
    main()
